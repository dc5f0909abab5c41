"""Work beside the requests: tasks that somebody keeps, and whose failures somebody reads."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from xc_ray.errors import XcRayError

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


class Background:
    """The tasks of one owner. Errors of ours are for who awaits a task; others are bugs, logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps none alive

    def start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Starts some work; it goes on if who awaits it leaves, unless they cancel it."""
        task = asyncio.get_event_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, XcRayError):
            logger.error("work in the background failed", exc_info=error)
