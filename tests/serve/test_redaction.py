"""Logs: what callers send in confidence is not in them, and all else is."""

import io
import logging
from collections.abc import Iterator

import pytest

from xc_ray.serve.redaction import redact, redacted


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    logger, written = logging.getLogger("tests.redaction"), io.StringIO()
    handler = logging.StreamHandler(written)
    logger.addHandler(handler)
    logger.propagate = False
    redact(logger)
    redact(logger)
    yield logger, written
    logger.removeHandler(handler)
    assert len(logger.filters) == 1


@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("bad: data:image/png;base64,U0VDUkVU+/=", "bad: data:…(33 characters)"),
        ("{'url': 'DATA:;base64,U0VD', 'n': 1}", "{'url': 'data:…(17 characters)', 'n': 1}"),
        ("data:text/plain;charset=utf-8,SECRET then", "data:…(36 characters) then"),
        ("Authorization: Bearer s3cret.word-1", "Authorization: Bearer…"),
        ("authorization: basic dXNlcjp3b3Jk", "authorization: basic…"),
        ("key sk-proj-abcdef12345 is unknown", "key sk… is unknown"),
        ("a key of ours: xcr_Zm9vYmFyYmF6", "a key of ours: xcr…"),
        ("GET https://b.test/a.png?X-Amz-Signature=1f&a=b now", "GET https://b.test/a.png?… now"),
    ],
)
def test_what_is_confidential_is_cut(
    log: tuple[logging.Logger, io.StringIO], said: str, logged: str
) -> None:
    logger, written = log
    assert redacted(said) == logged
    logger.warning("%s", said)
    assert written.getvalue() == f"{logged}\n"


@pytest.mark.parametrize(
    "said",
    ["decoder ready after 3.1 s", "GET /v1/models 200 3.2ms", "http://a.test/b.png", "data: none"],
)
def test_all_else_is_logged_as_it_is(said: str) -> None:
    assert redacted(said) == said


def test_a_traceback_is_cut_too(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = log
    try:
        raise ValueError("cannot read data:image/png;base64,U0VDUkVU")
    except ValueError:
        logger.exception("unexpected")
    assert "Traceback" in written.getvalue()
    assert "cannot read data:…(30 characters)" in written.getvalue()


def test_loggers_below_are_redacted_where_handlers_are(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, written = log
    logger.getChild("engine").warning("Bearer s3cret")
    assert written.getvalue() == "Bearer…\n"
