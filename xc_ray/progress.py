"""How far something is: a bar where a person watches, a line now and then where a log is kept."""

import shutil
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from xc_ray.errors import XcRayError

BAR_EVERY_S = 0.1
LINE_EVERY_S = 10.0
BAR_CHARS = 24
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class Progress:
    """Called with (what, done, total) from any thread; totals below 1,000 count steps, not bytes.

    A stage is what has one total. As a context it leaves a clean line behind.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._bar = stream.isatty()
        self._lock = threading.Lock()
        self._shown_at = float("-inf")
        self._total = -1
        self._began = 0.0, 0  # time and amount of the stage's first report
        self._stopped = False

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows it, unless something was shown just now.

        Raises:
            XcRayError: it was stopped, so that threads at work end.
        """
        with self._lock:
            if self._stopped:
                raise XcRayError("interrupted")
            now = self._clock()
            if self._total < 0 and not self._bar:
                self._shown_at = now  # what is quick gets no line at all
            if total != self._total:
                self._total, self._began = total, (now, done)
            wait = BAR_EVERY_S if self._bar else LINE_EVERY_S
            if now - self._shown_at < wait and not (self._bar and done == total):
                return
            self._shown_at = now
            if self._bar:
                self._stream.write(f"\r{self._text(what, done, now)}\x1b[K")
            else:
                self._stream.write(f"{self._text(what, done, now)}\n")
            self._stream.flush()

    def stop(self) -> None:
        """From now on whoever reports is stopped by an error; may be called by a signal."""
        self._stopped = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar and self._total >= 0:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _text(self, what: str, done: int, now: float) -> str:
        share = done / self._total if self._total else 1.0
        text = f"{share:4.0%}  {amount(done, self._total)} of {amount(self._total)}"
        began, at_first = self._began
        if self._total >= 1000 and now > began and done > at_first:
            text += f"  {amount(round((done - at_first) / (now - began)))}/s"
        if not self._bar:
            return f"{text}  {what}"
        filled = round(share * BAR_CHARS)
        text = f"[{'#' * filled}{'-' * (BAR_CHARS - filled)}] {text}  {what}"
        return text[: shutil.get_terminal_size().columns - 1]


def amount(number: int, like: int | None = None) -> str:
    """A number of bytes as a person reads it, in the unit that suits `like` (1 GB is 10⁹ bytes).

    Below 1,000 it has no unit: it may count anything.
    """
    for unit, name in _UNITS:
        if (number if like is None else like) >= unit:
            return f"{number / unit:.1f}" + (f" {name}" if like is None else "")
    return f"{number}"
