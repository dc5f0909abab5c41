"""What a command or a worker logs: our own words, and others' only where something is wrong."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TextIO

OURS = __name__.split(".", maxsplit=1)[0]


def log_to(stream: TextIO) -> None:
    """Sends this process's log there, in place of whatever was set up before."""
    logging.basicConfig(level=logging.INFO, stream=stream, format="%(message)s", force=True)
    for handler in logging.getLogger().handlers:
        # By the record and not by loggers' levels: libraries set their own, some as late as they
        # are imported, and name loggers as they like.
        handler.addFilter(is_wanted)


def is_wanted(record: logging.LogRecord) -> bool:
    """Whether it is ours, or a warning at least."""
    ours = record.name == OURS or record.name.startswith(f"{OURS}.")
    return ours or record.levelno >= logging.WARNING


@contextlib.contextmanager
def telling(name: str, stream: TextIO) -> Iterator[None]:
    """While it lasts, what one logger says goes to the stream and nowhere else, a line once."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(stream)
    level, propagates = logger.level, logger.propagate
    handler.setFormatter(logging.Formatter("xc-ray: %(message)s"))
    handler.addFilter(_Once())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new
