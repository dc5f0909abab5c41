"""Logs without what callers send in confidence: data URLs, keys, and the queries of URLs."""

import logging
import re
from typing import Final

_DATA_URL: Final = re.compile(r"data:[\w.+/-]*(?:;[\w.=+/-]*)*,[^\s\"'<>()\\]*", re.IGNORECASE)
_KEY: Final = re.compile(
    r"\b(bearer|basic)\s+[^\s\"',]+|\b(sk|pk|hf|xcr)[-_][\w-]{8,}", re.IGNORECASE
)
# Signatures of object stores stand there, and keys of many services.
_QUERY: Final = re.compile(r"(\bhttps?://[^\s\"'<>?#]*)\?[^\s\"'<>]*", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` without the contents of data URLs, keys, and queries of URLs."""
    text = _DATA_URL.sub(lambda found: f"data:…({len(found[0])} characters)", text)
    text = _KEY.sub(lambda found: f"{found[1] or found[2]}…", text)
    return _QUERY.sub(r"\1?…", text)


class Redacting(logging.Filter):
    """Lets every record pass, redacted: its message and its traceback."""

    _formatter = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record, for all handlers."""
        message = record.getMessage()
        if (shown := redacted(message)) != message:
            record.msg, record.args = shown, ()
        if record.exc_info and not record.exc_text:
            record.exc_text = self._formatter.formatException(record.exc_info)
        if record.exc_text:  # formatters take it as it is
            record.exc_text = redacted(record.exc_text)
        return True


_REDACTING: Final = Redacting()


def redact(logger: logging.Logger) -> None:
    """Redacts what is logged there from now on; a second time changes nothing.

    Its handlers, too: what loggers below it log meets no filter but theirs.
    """
    for place in (logger, *logger.handlers):
        place.addFilter(_REDACTING)
