"""Many streams at once, and what became of each: whole, ended by an error event, or cut."""

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.serve_run import body

DONE = "[DONE]"
CUT = "cut"
SUM = body("12 + 30 = ", max_tokens=20, stream=True)


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


@dataclass
class Streams:
    """Sends from a thread of its own: `num` streams, and short requests one by one.

    Streams start `apart_s` after one another. `short_request` makes the short ones by their number;
    with `every_s` they are sent that often, whatever becomes of those before. `with` it the streams
    run; `stop()` ends the short ones, and waits for all streams.
    """

    url: str
    num: int
    request: dict[str, Any]
    short_request: Callable[[int], dict[str, Any]] = lambda _: SUM
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
        """How many streams ended how."""
        return Counter(ended.how for ended in self.long)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self.num + 300)
        async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
            streams = [self._keep(client, i * self.apart_s) for i in range(self.num)]
            await asyncio.gather(self._trickle(client), *streams)

    async def _trickle(self, client: httpx.AsyncClient) -> None:
        async with asyncio.TaskGroup() as under_way:
            for number in itertools.count():
                if self._leaving.is_set():
                    break
                asking = under_way.create_task(self._ask(client, self.short_request(number)))
                if not self.every_s:
                    await asking
                await asyncio.sleep(self.every_s or 0.3)

    async def _ask(self, client: httpx.AsyncClient, request: dict[str, Any]) -> None:
        self.short.append(await self._one(client, request))

    async def _keep(self, client: httpx.AsyncClient, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.long.append(await self._one(client, self.request | {"stream": True}, count=True))

    async def _one(
        self, client: httpx.AsyncClient, request: dict[str, Any], *, count: bool = False
    ) -> Ended:
        ended = Ended(CUT, time.monotonic())
        url = f"{self.url}/v1/chat/completions"
        try:
            async with client.stream("POST", url, json=request) as response:
                if response.status_code != 200:
                    await response.aread()
                    ended.how = f"{response.status_code} {response.text[:200]}"
                elif not request.get("stream"):
                    (choice,) = json.loads(await response.aread())["choices"]
                    ended.how, ended.text = DONE, choice["message"]["content"]
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        if count and not ended.num_events:
                            self.begun += 1
                        ended.num_events += 1
                        self._read(line.removeprefix("data: "), ended)
        except httpx.HTTPError as e:
            ended.how = f"{CUT}: {e!r}"
        ended.seconds = time.monotonic() - ended.begun
        return ended

    @staticmethod
    def _read(data: str, ended: Ended) -> None:
        if data == DONE:
            ended.how = DONE
        elif "error" in (event := json.loads(data)):
            ended.how = str(event["error"]["code"])
        else:
            for choice in event["choices"]:
                ended.text += choice["delta"].get("content", "")
