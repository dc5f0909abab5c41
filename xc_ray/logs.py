"""What a command or a worker logs: our own words, and others' only where something is wrong."""

import logging
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
