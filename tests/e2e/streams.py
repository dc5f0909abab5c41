"""Many streams at once, and what became of each: whole, ended by an error event, or cut."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

import httpx

DONE = "[DONE]"
CUT = "cut"

Request: TypeAlias = dict[str, Any]


@dataclass
class Ended:
    """One request: `how` is DONE, CUT, a status that is not 200, or an error event's code.

    A whole answer that came is DONE, too. `begun` is of the monotonic clock.
    """

    how: str
    begun: float
    seconds: float = 0.0
    num_events: int = 0
    text: str = ""
    models: set[str] = field(default_factory=set)  # what the events say that answers


@dataclass
class Streams:
    """Sends from a thread of its own: long requests as streams, and short ones one by one.

    Streams start `apart_s` after one another. `short_request` makes the short ones by their number,
    whole answers where they do not ask for streams; with `every_s` they are sent that often,
    whatever becomes of those before. `with` it the streams run; `stop()` ends the short ones, and
    waits for all streams.
    """

    url: str
    requests: Sequence[Request]
    short_request: Callable[[int], Request] | None = None
    every_s: float = 0
    apart_s: float = 0
    long: list[Ended] = field(default_factory=list)
    short: list[Ended] = field(default_factory=list)
    begun: int = 0

    def __post_init__(self) -> None:
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Streams":
        self._thread.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._leaving.set()
        if failed is None:  # a test that has failed waits for nobody
            self.stop()

    @property
    def num_running(self) -> int:
        """Streams that have brought something and have not ended."""
        return self.begun - len(self.long)

    def stop(self) -> None:
        """Returns once every stream has ended."""
        self._leaving.set()
        self._thread.join(900)
        assert not self._thread.is_alive()

    def how(self) -> Counter[str]:
        """How many long streams ended how."""
        return how(self.long)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=len(self.requests) + 300)
        async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
            streams = [
                self._keep(client, request | {"stream": True}, i * self.apart_s)
                for i, request in enumerate(self.requests)
            ]
            await asyncio.gather(self._trickle(client), *streams)

    async def _trickle(self, client: httpx.AsyncClient) -> None:
        if self.short_request is None:
            return
        async with asyncio.TaskGroup() as under_way:
            for number in count():
                if self._leaving.is_set():
                    break
                asking = under_way.create_task(self._ask(client, self.short_request(number)))
                if not self.every_s:
                    await asking
                await asyncio.sleep(self.every_s or 0.3)

    async def _ask(self, client: httpx.AsyncClient, request: Request) -> None:
        self.short.append(await self._one(client, request))

    async def _keep(self, client: httpx.AsyncClient, request: Request, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.long.append(await self._one(client, request, long=True))

    async def _one(
        self, client: httpx.AsyncClient, request: Request, *, long: bool = False
    ) -> Ended:
        ended = Ended(CUT, time.monotonic())
        url = f"{self.url}/v1/chat/completions"
        try:
            async with client.stream("POST", url, json=request) as response:
                if response.status_code != 200:
                    await response.aread()
                    ended.how = f"{response.status_code} {response.text[:200]}"
                elif not request.get("stream"):
                    self._read_whole(await response.aread(), ended)
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        if long and not ended.num_events:
                            self.begun += 1
                        ended.num_events += 1
                        self._read(line.removeprefix("data: "), ended)
        except httpx.HTTPError as e:
            ended.how = f"{CUT}: {e!r}"
        ended.seconds = time.monotonic() - ended.begun
        return ended

    @staticmethod
    def _read_whole(data: bytes, ended: Ended) -> None:
        answer = json.loads(data)
        (choice,) = answer["choices"]
        ended.how, ended.text = DONE, choice["message"]["content"]
        ended.models.add(answer["model"])

    @staticmethod
    def _read(data: str, ended: Ended) -> None:
        if data == DONE:
            ended.how = DONE
        elif "error" in (event := json.loads(data)):
            ended.how = str(event["error"]["code"])
        else:
            ended.models.add(event["model"])
            for choice in event["choices"]:
                ended.text += choice["delta"].get("content", "")


def in_turn(*requests: Request) -> Callable[[int], Request]:
    """Short requests as streams, again and again."""
    return lambda number: requests[number % len(requests)] | {"stream": True}


def how(ended: Iterable[Ended]) -> Counter[str]:
    """How many requests ended how."""
    return Counter(e.how for e in ended)
