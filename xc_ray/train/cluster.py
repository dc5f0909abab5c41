"""Ray around a run: which cluster it uses, how it is asked to end, and what its workers died of."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

from xc_ray.errors import XcRayError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def cluster() -> Iterator[bool]:
    """The cluster of RAY_ADDRESS or of this machine, else one of our own that ends with us.

    RAY_ADDRESS=local is one of our own whatever runs here. Gives whether it is our own.
    """
    if ray.is_initialized():
        yield False
        return
    # Ray's own words are for when something is wrong; the workers' are ours.
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }
    own = os.environ.get("RAY_ADDRESS") == "local"
    with _same_root_logger():
        if not own:
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:
                own = True
        if own:
            # Without a dashboard Ray Train still asks its port whether the controller lives, and
            # takes the word of another cluster's there: it removes the workers. Nobody has port 0.
            ray.init(address="local", include_dashboard=False, dashboard_port=0, **quiet)
    logger.info("Ray: %s", "a cluster of this process" if own else "the running cluster")
    try:
        yield own
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _same_root_logger() -> Iterator[None]:
    """Ray's `logging_config` is for its logger and for the root: our words would go with Ray's."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextlib.contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """`ray job stop` sends SIGTERM: the workers save, then this process ends.

    Installed after `ray.init`, which has a handler of its own that would end us at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: object) -> None:
        logger.warning("asked to end: the workers save a last checkpoint")
        stop()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def worker_error(error: Exception) -> XcRayError:
    """The workers' own error where there is one, with the ranks that had it."""
    failures = getattr(error, "worker_failures", {}) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, XcRayError):
            return type(cause)(f"rank {rank}: {cause.message}")
    if not failures:  # Ray Train's own: max_failures counts the workers'
        return XcRayError(f"training failed: {_line(error)}")
    rank, failure = min(failures.items())
    what = f"rank {rank}: {_line(failure)}"
    return XcRayError(f"training failed more often than workers.max_failures allows: {what}")


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]
