"""Sends requests when they are due, whatever has been answered, and notes what comes back.

    requests ── drive ──> one connection each ──> Answer: times, how it ended, tokens

One asyncio process; `processes` more where one is not enough. llhttp (httptools, which comes with
Ray Serve's uvicorn) takes the HTTP apart. Of an event only what tells its kind is looked at; JSON
is parsed for usage and errors alone. All times are seconds since the start of the run.
"""

import asyncio
import contextlib
import functools
import gc
import json
import multiprocessing
import re
import resource
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from typing import Any
from urllib.parse import urlsplit

import httptools

PATH = "/v1/chat/completions"
LEAD_S = 0.05  # from the start of a run to its first possible arrival
JOINED_S = 120  # for client processes to be there
TEXT = re.compile(rb'"content":\s*"(?!")')  # quotes within a text are escaped


@dataclass(frozen=True)
class Request:
    """A request: due `at` seconds; `body` in pieces, since those of pictures are shared."""

    at: float
    body: tuple[bytes, ...]
    model: str
    key: str | None = None  # the name of an API key
    stream: bool = True


@dataclass(frozen=True)
class Target:
    """Whom to ask: an address that is resolved already, and the API keys by name."""

    host: str
    address: str
    port: int
    tls: bool = False
    prefix: str = ""
    keys: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, url: str, keys: dict[str, str]) -> "Target":
        """The server at `url`, like http://127.0.0.1:8000."""
        where = urlsplit(url)
        tls = where.scheme == "https"
        if where.scheme not in ("http", "https") or not where.hostname:
            raise SystemExit(f"--url is {url!r}, expected http://HOST[:PORT]")
        port = where.port or (443 if tls else 80)
        found = socket.getaddrinfo(where.hostname, port, type=socket.SOCK_STREAM)
        address = str(found[0][4][0])
        return cls(where.hostname, address, port, tls, where.path.rstrip("/"), keys)

    def head(self, request: Request) -> bytes:
        """The request line and the headers."""
        lines = [
            f"POST {self.prefix}{PATH} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {sum(map(len, request.body))}",
            "Connection: close",
        ]
        if request.key is not None:
            lines.append(f"Authorization: Bearer {self.keys[request.key]}")
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass(slots=True)
class Answer:
    """What came back for one request.

    `ended`: `done` with all of it, by `[DONE]` if it is a stream; `error` as the server said, in a
    status or an event; `cut` by the end of the connection; `timeout` or `unreachable`.
    """

    due: float
    sent: float
    model: str
    key: str | None
    stream: bool
    headers: float | None = None
    first: float | None = None  # text
    last: float | None = None
    finished: float = 0.0
    largest_gap: float = 0.0  # between two events with text
    status: int | None = None
    retry_after: str | None = None
    ended: str = "cut"
    code: str | None = None  # of the error
    events: int = 0  # that brought text
    comments: int = 0  # heartbeats
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    completion_tokens: int | None = None

    @property
    def outcome(self) -> str:
        """`ok`, `refused` (429), `cut`, or `error`."""
        if self.ended == "done":
            return "ok"
        return "refused" if self.status == 429 else "cut" if self.ended == "cut" else "error"

    @property
    def tokens(self) -> int:
        """Of the answer: as the server counted, or else at least one for each event with text."""
        return self.events if self.completion_tokens is None else self.completion_tokens

    @property
    def latency(self) -> float:
        """Seconds from sending to the end."""
        return self.finished - self.sent

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first text of a stream; to its end if there was none."""
        if not self.stream:
            return None
        return (self.finished if self.first is None else self.first) - self.sent

    @property
    def interval_s(self) -> float | None:
        """Mean seconds from token to token of a stream with more than one."""
        if not self.stream or self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


class Exchange(asyncio.Protocol):
    """One request on one connection, and its answer as it is read."""

    def __init__(self, request: bytes, answer: Answer, start: float) -> None:
        self._request = request
        self._answer = answer
        self._start = start
        self._now = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._rest = bytearray()  # of a line, or of a body that is no stream
        self._framed = False
        self._whole = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)
        self._request = b""

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic() - self._start
        if not self.done.done():
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as e:
                self._answer.ended, self._answer.code = "error", f"not HTTP: {e}"[:80]
                self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._now = time.monotonic() - self._start
            # A body without a length ends with the connection.
            self._whole = exc is None and self._answer.headers is not None and not self._framed
            self._finish()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"retry-after":
            self._answer.retry_after = value.decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        self._answer.headers = self._now
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._rest += body
        if self._streams:
            *lines, rest = self._rest.split(b"\n")
            self._rest = rest
            for line in lines:
                self._take(line)

    def on_message_complete(self) -> None:
        self._whole = True
        self._finish()

    @property
    def _streams(self) -> bool:
        return self._answer.stream and self._answer.status == 200

    def _take(self, line: bytearray) -> None:
        """Notes what one line of a stream tells."""
        answer = self._answer
        if line.startswith(b"data:"):
            if b'"error"' in line and self._failed(line[5:]):
                return
            if b'"completion_tokens"' in line:
                self._count(line[5:])
            if TEXT.search(line):
                if answer.first is None:
                    answer.first = self._now
                else:
                    assert answer.last is not None
                    answer.largest_gap = max(answer.largest_gap, self._now - answer.last)
                answer.last = self._now
                answer.events += 1
            elif line[5:].strip() == b"[DONE]" and answer.ended != "error":
                answer.ended = "done"
        elif line.startswith(b":"):
            answer.comments += 1

    def _count(self, data: bytes | bytearray) -> None:
        usage = _object(_object(data).get("usage"))
        self._answer.prompt_tokens = usage.get("prompt_tokens", 0)
        self._answer.completion_tokens = usage.get("completion_tokens")
        details = _object(usage.get("prompt_tokens_details"))
        self._answer.cached_tokens = details.get("cached_tokens", 0)

    def _failed(self, data: bytes | bytearray) -> bool:
        """Whether it is an error, which is then noted."""
        found = _object(data)
        if "error" not in found:
            return False
        error = _object(found["error"])
        self._answer.ended = "error"
        self._answer.code = str(error.get("code") or error.get("type") or "unnamed")
        return True

    def _finish(self) -> None:
        answer = self._answer
        answer.finished = self._now
        if self._whole and not self._streams:
            if answer.status == 200:
                self._count(self._rest)
                answer.ended = "done" if _object(self._rest).get("choices") else "error"
                answer.code = None if answer.ended == "done" else "no choices"
            elif not self._failed(self._rest):
                answer.ended, answer.code = "error", "unnamed"
        if not self.done.done():
            self.done.set_result(None)


def _object(value: Any) -> dict[str, Any]:
    """`value`, or what it says as JSON, if that is an object; else an empty one."""
    if isinstance(value, bytes | bytearray):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


async def ask(
    target: Target,
    request: Request,
    start: float,
    timeout_s: float,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Sends one request now; `start`, of `time.monotonic()`, is what its times count from."""
    sent = time.monotonic() - start
    answer = Answer(request.at, sent, request.model, request.key, request.stream)
    exchange = Exchange(b"".join((target.head(request), *request.body)), answer, start)
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: exchange,
                target.address,
                target.port,
                ssl=tls,
                server_hostname=target.host if tls else None,
            )
            await exchange.done
    except TimeoutError:
        answer.finished = time.monotonic() - start
        if answer.ended == "cut":
            answer.ended = answer.code = "timeout"
    except OSError as e:
        answer.ended, answer.code = "unreachable", type(e).__name__
        answer.finished = time.monotonic() - start
    finally:
        exchange.done.cancel()  # what comes now comes too late
        if transport is not None:
            transport.abort()
    return answer


async def send_all(
    target: Target, requests: Sequence[Request], start: float, timeout_s: float
) -> list[Answer]:
    """Each request when it is due, `start` being a time of `time.monotonic()`."""
    tls = ssl.create_default_context() if target.tls else None
    tasks = []
    for request in requests:
        delay = start + request.at - time.monotonic()
        await asyncio.sleep(max(0.0, delay))
        tasks.append(asyncio.create_task(ask(target, request, start, timeout_s, tls)))
    return list(await asyncio.gather(*tasks))


@dataclass(frozen=True)
class Run:
    """The answers to all requests, and the busiest client process's share of a core."""

    answers: list[Answer]
    client_cpu: float


def drive(target: Target, requests: Sequence[Request], timeout_s: float, processes: int = 1) -> Run:
    """Sends all requests, from this process or from several, and waits for every answer."""
    if processes == 1:
        return _drive_here(target, requests, timeout_s)
    crowd = _crowd(processes)
    parts = [requests[i::processes] for i in range(processes)]
    jobs = [crowd.submit(_client, target, part, timeout_s) for part in parts]
    try:
        runs = [job.result() for job in jobs]
    except BrokenProcessPool:
        raise SystemExit("a client process ended without a result") from None
    answers = sorted((a for run in runs for a in run.answers), key=lambda a: a.due)
    return Run(answers, max(run.client_cpu for run in runs))


@functools.cache
def _crowd(processes: int) -> ProcessPoolExecutor:
    """Processes for all runs: each imports the script that is run, and torch with some of them."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    return ProcessPoolExecutor(
        processes, mp_context=context, initializer=_join, initargs=(barrier,)
    )


_together: Barrier | None = None  # of a client process, with the others


def _join(barrier: Barrier) -> None:
    global _together
    _together = barrier


def _client(target: Target, requests: Sequence[Request], timeout_s: float) -> Run:
    """A process of its own; all start together."""
    assert _together is not None
    _together.wait(JOINED_S)
    return _drive_here(target, requests, timeout_s)


def _drive_here(target: Target, requests: Sequence[Request], timeout_s: float) -> Run:
    raise_file_limit()
    gc.freeze()  # the requests: nothing to look through again while the run lasts
    cpu, start = time.process_time(), time.monotonic() + LEAD_S
    try:
        answers = asyncio.run(send_all(target, requests, start, timeout_s))
    finally:
        gc.unfreeze()
    return Run(answers, (time.process_time() - cpu) / (time.monotonic() - start))


def raise_file_limit() -> None:
    """As many connections as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
