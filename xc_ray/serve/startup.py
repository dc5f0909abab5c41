"""What a replica's start consists of, with the seconds that each phase took, in its log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("ray.serve")


class Startup:
    """The start of one replica; `what` is its name in the log."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._began = clock()
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done within, and says so as it begins: that is where a start hangs."""
        logger.info("%s: %s", self._what, name)
        began = self._clock()
        try:
            yield
        finally:
            self.phases[name] = self._clock() - began

    def ready(self, details: object) -> None:
        """The last line: all of it, and what is ready."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items())
        total = self._clock() - self._began
        logger.info("%s ready after %.1f s (%s): %s", self._what, total, parts, details)
