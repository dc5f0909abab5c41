"""Ctrl-C for a command whose work is safe to kill, and whose threads may be slow to end."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells count
# What is on its way may take so long to end by itself.
END_S = 5.0


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """KeyboardInterrupt at the first Ctrl-C, and the process's end within `END_S`, or at a second.

    Leaving a thread pool waits for its threads, which may be in a long call to a store: `stop` asks
    them to end, and whoever does not is not waited for.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as our parent wants it
        yield
        return
    last = threading.Timer(END_S, os._exit, (INTERRUPTED,))
    last.daemon = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if last.is_alive():
            os._exit(INTERRUPTED)
        last.start()
        stop()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        last.cancel()
