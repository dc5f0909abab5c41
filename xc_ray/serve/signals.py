"""What a replica measures of its own load, for `scale`."""

import math
import time
from collections.abc import Callable

Clock = Callable[[], float]

# Seconds of work that a rate remembers: enough to be steady, and soon at home with other pictures.
MEMORY_S = 30.0


class WorkMeter:
    """How fast one kind of work goes here while it is done, and how much of that was used.

    A small piece of work tells little of the speed of large ones: once one of at least `full` has
    been seen, only such count for the rate. `add` is for one thread, the rest for another.
    """

    def __init__(self, full: float, clock: Clock = time.monotonic) -> None:
        self._full = full
        self._clock = clock
        self._seen_full = False
        self._amount = self._seconds = 0.0  # fading away as work goes on
        self._total = self._read = 0.0
        self._read_at = clock()

    def add(self, amount: float, seconds: float) -> None:
        """An amount was done, and took so long."""
        self._total += amount
        if amount <= 0 or seconds <= 0:
            return
        if amount >= self._full and not self._seen_full:
            self._seen_full = True
            self._amount = self._seconds = 0.0
        if amount >= self._full or not self._seen_full:
            kept = math.exp(-seconds / MEMORY_S)
            self._amount = self._amount * kept + amount
            self._seconds = self._seconds * kept + seconds

    @property
    def rate(self) -> float:
        """Amount per second of work; 0 if nothing was done yet."""
        seconds = self._seconds
        return self._amount / seconds if seconds else 0.0

    def read_use(self) -> float:
        """Share of the rate that was used since the last reading.

        1 in the mean while it never rests, though a single reading may be 0, and the next above 1,
        where pieces take longer than the time between two readings.
        """
        now, total, rate = self._clock(), self._total, self.rate
        passed, done = now - self._read_at, total - self._read
        self._read_at, self._read = now, total
        return done / (rate * passed) if rate and passed > 0 else 0.0
