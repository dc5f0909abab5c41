"""What a run that failed says of its workers, and of Ray Train itself."""

from ray.train import ControllerError, WorkerGroupError

from xc_ray.errors import DataError, XcRayError
from xc_ray.train.cluster import worker_error


def test_a_workers_own_error_comes_through_with_its_rank() -> None:
    failures = {0: RuntimeError("a peer has gone"), 1: DataError("row 7 has no picture")}
    told = worker_error(WorkerGroupError("several", failures))
    assert type(told) is DataError
    assert told.message == "rank 1: row 7 has no picture"


def test_another_error_of_a_worker_is_told_by_its_last_line() -> None:
    failures: dict[int, Exception] = {
        2: RuntimeError("later"),
        1: RuntimeError("Traceback …\nout of memory\n"),
    }
    told = worker_error(WorkerGroupError("several", failures))
    assert type(told) is XcRayError
    assert told.message == (
        "training failed more often than workers.max_failures allows: "
        "rank 1: RuntimeError: out of memory"
    )


def test_an_error_of_the_controller_is_no_worker_that_failed_too_often() -> None:
    told = worker_error(ControllerError(RuntimeError("the storage has gone")))
    assert type(told) is XcRayError
    assert told.message == "training failed: ControllerError: the storage has gone"
