"""Many SSE streams from one cheap process: asyncio and the standard library, nothing else.

engine_http.py starts one or more of these. The job comes as JSON on stdin:

    {"url": ..., "start": seconds of time.monotonic(), "streams": [[body, ...], ...]}

Every stream asks its bodies one after another, all streams start together. The answer is JSON on
stdout: {"cpu_s": ..., "answers": [{"started", "first", "last", "completion_tokens",
"prompt_tokens", "events"}, ...]}: events that brought text, and times of time.monotonic(), which is
one clock for all processes of a machine.

Only what tells the first token and the usage is parsed; of other events the arrival counts.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/chat/completions"


class Refused(Exception):
    """The server answered with an error, or broke off."""


async def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """One streamed request: when it started, its first and last token, and its usage.

    Raises:
        Refused: another status than 200, an error event, or no usage before the end.
    """
    where = urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    answer: dict[str, Any] = {"started": time.monotonic(), "first": None, "events": 0}
    reader, writer = await asyncio.open_connection(where.hostname, where.port or 80, limit=1 << 22)
    try:
        writer.write(head.encode() + data)
        async for event in events(reader):
            take(answer, event)
    finally:
        writer.close()
    if "completion_tokens" not in answer:
        raise Refused(f"the stream ended without usage after {answer['events']} events")
    return answer


def take(answer: dict[str, Any], event: bytes) -> None:
    """Notes what one event tells."""
    now = time.monotonic()
    if event == b"data: [DONE]":
        return
    if b'"completion_tokens"' in event:
        usage = json.loads(event[6:])["usage"]
        answer |= {n: usage[n] for n in ("completion_tokens", "prompt_tokens")}
        return
    if b'"error"' in event and "error" in (found := json.loads(event[6:])):
        raise Refused(f"the stream failed: {found}")
    if answer["first"] is None:
        choices = json.loads(event[6:])["choices"]
        if not choices or not (choices[0]["delta"].get("content") or choices[0]["finish_reason"]):
            return
        answer["first"] = now
    answer["last"] = now
    answer["events"] += 1


async def events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The events of a response, without the empty lines behind them.

    Raises:
        Refused: another status than 200.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    chunked = b"transfer-encoding: chunked" in head
    if head.split(maxsplit=2)[1] != b"200":
        raise Refused(f"{head.splitlines()[0].decode()}: {(await reader.read(4096)).decode()}")
    buffer = b""
    while data := await (chunk(reader) if chunked else reader.read(1 << 16)):
        *whole, buffer = (buffer + data).split(b"\n\n")
        for event in whole:
            yield event


async def chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk of a chunked body; empty at its end."""
    size = int(await reader.readline(), 16)
    return (await reader.readexactly(size + 2))[:size]


async def work(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All streams of a job; the answers stream by stream."""

    async def stream(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        await asyncio.sleep(job["start"] - time.monotonic())
        return [await ask(job["url"], body) for body in bodies]

    found = await asyncio.gather(*map(stream, job["streams"]))
    return [answer for answers in found for answer in answers]


def main() -> None:
    """A job from stdin, the answers to stdout."""
    job = json.load(sys.stdin)
    before = time.process_time()
    try:
        answers = asyncio.run(work(job))
    except (Refused, OSError, EOFError) as e:
        sys.exit(f"{type(e).__name__}: {e}")
    json.dump({"cpu_s": time.process_time() - before, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
