"""Training on a cluster that others run: submitted as a job, stopped, losing a node; and on S3.

All of it is real: `ray start` with its dashboard, `ray job`, raylets killed, a server that speaks
S3. Only the nodes share one machine. No loss may differ from those of a run that nothing happened
to; dropout is 0, so that not even the number of workers changes them.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ray_cluster import Cluster, Job, Node, ray_cluster
from tests.e2e.train_run import Training, base_config, records
from tests.s3_server import S3Server, credentials
from xc_ray.publish import import_checkpoint
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the unbroken run, too
]

STEPS, EVERY = 300, 50
ADAPTER_WEIGHTS = "adapter_model.safetensors"
Tiny = Callable[..., Path]


def recipe(folder: Path, model: Path | str, data: Path | str, **more: Any) -> dict[str, Any]:
    """What all runs here have in common; long enough for `ray job stop` to come in time."""
    config = base_config(folder, model, data, **more)
    config["lora"]["dropout"] = 0.0
    config["training"]["max_steps"] = STEPS
    config["checkpoints"]["every_steps"] = EVERY
    return config


@pytest.fixture
def submitted(tmp_path: Path, lessons: Path) -> Path:
    """A folder to submit: the data set beside its pictures."""
    return shutil.copytree(lessons.parent, tmp_path / "job")


@pytest.fixture
def s3(running_server: S3Server) -> Iterator[S3Server]:
    """The S3 server, with its keys in the environment."""
    with credentials(running_server):
        yield running_server


@dataclass(frozen=True)
class Unbroken:
    """A job that nothing happened to."""

    run: Path
    registry: Registry
    summary: dict[str, Any]
    status: str
    submit_to_first_step_s: float


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, lessons: Path) -> Unbroken:
    """Submitted to a cluster of one node, with a base and an adapter in a registry."""
    home = tmp_path_factory.mktemp("unbroken")
    registry = Registry.open(str(home / "registry"))
    import_checkpoint(tiny("2.5"), registry, "base")
    folder = shutil.copytree(lessons.parent, home / "job")
    config = recipe(home, "base", "train.jsonl", publish={"adapter": "colours"})
    with ray_cluster(2) as cluster, Job(cluster, folder, config) as job:
        seconds = job.wait_for_step(1)
        summary = job.wait()
        return Unbroken(job.run, registry, summary, cluster.status(job.name), seconds)


def test_a_submitted_job_trains_and_its_adapter_is_in_the_registry(
    unbroken: Unbroken, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """`ray job submit --working-dir .`: configuration and pictures travel with the job."""
    seconds = round(unbroken.submit_to_first_step_s, 1)
    record_testsuite_property("submit_to_first_step_s", seconds)  # for --junitxml
    assert unbroken.status == "SUCCEEDED"
    assert (unbroken.summary["steps"], unbroken.summary["stopped"]) == (STEPS, False)
    manifest = unbroken.registry.resolve("colours")
    assert unbroken.summary["adapter"] == f"colours@{manifest.version}"
    told = records(unbroken.run)
    assert [r["step"] for r in told] == list(range(1, STEPS + 1))
    assert manifest.lineage.metrics["train_loss"] == told[-1]["loss"]
    assert manifest.lineage.metrics["steps"] == STEPS


def test_a_stopped_job_loses_nothing_that_was_saved_and_goes_on_on_another_cluster(
    tmp_path: Path, submitted: Path, tiny: Tiny, unbroken: Unbroken
) -> None:
    """`ray job stop` kills the driver 3 s after its SIGTERM, in time for a last checkpoint or not.

    On the second cluster the submitted folder, pictures and all, lies at another path.
    """
    config = recipe(tmp_path, tiny("2.5"), "train.jsonl")
    with (
        ray_cluster(2) as cluster,
        Job(cluster, submitted, config) as job,
        job.stopper() as stop,
    ):
        job.wait_for_checkpoints(1)
        before = saved(job)[-1]
        stop()
        assert cluster.status(job.name) == "STOPPED"
    with ray_cluster(2) as cluster, Job(cluster, submitted, config, "--resume") as again:
        assert again.wait()["steps"] == STEPS
    assert before <= went_on_after(again) < STEPS
    assert records(again.run) == records(unbroken.run)


def test_a_job_that_has_time_to_stop_saves_a_last_checkpoint(
    tmp_path: Path, submitted: Path, tiny: Tiny, unbroken: Unbroken
) -> None:
    """RAY_JOB_STOP_WAIT_TIME_S=60 is in the environment of `ray start`."""
    config = recipe(tmp_path, tiny("2.5"), "train.jsonl")
    with ray_cluster(2, RAY_JOB_STOP_WAIT_TIME_S="60") as cluster:
        with Job(cluster, submitted, config) as job, job.stopper() as stop:
            job.wait_for_checkpoints(1)
            before = saved(job)[-1]
            stop()
            assert cluster.status(job.name) == "STOPPED"
        assert "asked to end: the workers save a last checkpoint" in job.text
        last = newest(job.run)
        assert before < last < STEPS
        with Job(cluster, submitted, config, "--resume") as again:
            assert again.wait()["steps"] == STEPS
    assert went_on_after(again) == last
    assert records(again.run) == records(unbroken.run)


def test_a_lost_node_is_made_up_for_by_another(
    tmp_path: Path, submitted: Path, tiny: Tiny, unbroken: Unbroken
) -> None:
    """A worker on each of two nodes; one raylet is killed, and another node comes.

    The actor that hears what the workers do is killed, too, and starts anew.
    """
    config = recipe(tmp_path, tiny("2.5"), "train.jsonl", workers={"num": 2, "num_cpus": 1})
    with ray_cluster(1) as cluster:
        second = cluster.add_node(1)
        with Job(cluster, submitted, config) as job:
            job.wait_for_checkpoints(1)
            (board,) = boards(cluster)
            os.kill(board, signal.SIGKILL)
            lose(second, job)
            third = cluster.add_node(1)
            job.wait_until(lambda: boards(cluster) not in ([], [board]))
            assert job.wait()["steps"] == STEPS
            assert third.process.poll() is None
    assert group_sizes(job) == [2, 2]
    assert went_on_after(job) >= EVERY
    assert records(job.run) == records(unbroken.run)


def test_a_run_goes_on_with_the_workers_that_are_left(
    tmp_path: Path, submitted: Path, tiny: Tiny, unbroken: Unbroken
) -> None:
    """`workers.num: [1, 2]`, and after a raylet was killed there is room for one.

    Its gradients are summed in another order, by which the last digits differ.
    """
    config = recipe(tmp_path, tiny("2.5"), "train.jsonl", workers={"num": [1, 2], "num_cpus": 1})
    with ray_cluster(1) as cluster:
        second = cluster.add_node(1)
        with Job(cluster, submitted, config) as job:
            job.wait_for_checkpoints(1)
            lose(second, job)
            assert job.wait()["steps"] == STEPS
    assert group_sizes(job) == [2, 1]
    assert went_on_after(job) >= EVERY
    curve, expected = losses(job.run), losses(unbroken.run)
    assert curve == pytest.approx(expected, abs=1e-5)
    assert curve[-1] < curve[0] / 2


def test_a_run_on_object_storage_goes_on_after_its_driver_was_killed(
    tmp_path: Path, s3: S3Server, tiny: Tiny, lessons: Path, unbroken: Unbroken
) -> None:
    """Checkpoints, rows, base and adapter in a bucket of a real S3 server."""
    bucket = s3.make_bucket()
    registry = Registry.open(s3.url(bucket, "registry"))
    import_checkpoint(tiny("2.5"), registry, "base")
    config = recipe(tmp_path, "base", lessons, publish={"adapter": "colours"})
    config |= {"storage": s3.url(bucket, "runs"), "registry": registry.store.url}
    with Training(tmp_path, config) as training:
        training.wait_for_checkpoints(2)
        os.killpg(training.process.pid, signal.SIGKILL)
        training.process.wait()
    with Training(tmp_path, config, "--resume") as again:
        summary = again.wait()
    # Ray Train notes a checkpoint up to 2 s after it was made; the last may be unknown to it.
    assert went_on_after(again) >= EVERY
    assert summary["adapter"] == "colours@1"
    assert registry.resolve("colours").lineage.metrics["steps"] == STEPS
    store = ObjectStore.open(s3.url(bucket, "runs/run"))
    kept = {entry.key for entry in store.list("")}
    assert kept >= {"run.json", "report.json", "summary.json", "metrics.jsonl", "curves.png"}
    assert kept >= {f"adapter/{name}" for name in ("adapter_config.json", ADAPTER_WEIGHTS)}
    assert [key for key in kept if key.startswith("data/train-") and key.endswith(".arrow")]
    # The newest two; one that was made just before the kill may lie beside them, unknown.
    checkpoints = sorted({key.split("/")[0] for key in kept if key.startswith("checkpoint_2")})
    assert 2 <= len(checkpoints) <= 3
    assert {f"{one}/optimizer.pt" for one in checkpoints[-2:]} < kept
    (tmp_path / "metrics.jsonl").write_bytes(store.get("metrics.jsonl"))
    assert records(tmp_path) == records(unbroken.run)


def boards(cluster: Cluster) -> list[int]:
    """The processes of the actor that hears what the workers do."""
    return [pid for node in cluster.nodes for pid in node.named("ray::Board")]


def lose(node: Node, job: Job) -> None:
    """Kills the raylet of a node that has one of the two workers."""
    assert [node.holds(pid) for pid in job.workers].count(True) == 1
    os.kill(node.raylet, signal.SIGKILL)


def saved(job: Job) -> list[int]:
    """The steps after which a checkpoint was told to be saved."""
    return [int(step) for step in re.findall(rf"step (\d+)/{STEPS}  saved a checkpoint", job.text)]


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint."""
    states = [json.loads(path.read_text()) for path in run.glob("checkpoint_*/state.json")]
    return max(int(state["step"]) for state in states)


def went_on_after(training: Training) -> int:
    """The step after which a run went on first."""
    return int(re.findall(r"going on after step (\d+)", training.text)[0])


def group_sizes(job: Job) -> list[int]:
    """How many workers each start of the group had."""
    return [
        int(size) for size in re.findall(r"Started training worker group of size (\d+)", job.text)
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]
