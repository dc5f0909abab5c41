"""Embeddings of pictures in host memory, by digest: encoded once for all who ask, kept by last use.

Everything happens on the event loop. What is kept are the arrays that are answered with, so that a
hit copies nothing here; they are read-only.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xc_ray.serve.observe import EncoderMetrics

Embeddings: TypeAlias = npt.NDArray[np.generic]


@dataclass
class _Flight:
    """An encoding under way, and how many wait for it."""

    task: asyncio.Task[Embeddings]
    num_waiting: int = 0


class EmbeddingCache:
    """Up to `max_bytes` of embeddings; a picture that alone is larger is not kept."""

    def __init__(self, max_bytes: int, metrics: EncoderMetrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._entries: OrderedDict[bytes, Embeddings] = OrderedDict()  # the last one was used last
        self._num_bytes = 0
        self._flights: dict[bytes, _Flight] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        return self._num_bytes

    async def get(self, key: bytes, encode: Callable[[], Awaitable[Embeddings]]) -> Embeddings:
        """The embeddings of `key`; `encode` makes them unless they are kept or under way.

        Who is cancelled leaves the others be; when all who waited have left, so does the encoding.
        An error reaches all who wait, and is not kept.
        """
        kept = self._entries.get(key)
        if kept is not None:
            self._entries.move_to_end(key)
            self._metrics.picture("hit")
            return kept
        flight = self._flights.get(key)
        self._metrics.picture("miss" if flight is None else "joined")
        if flight is None:
            flight = self._start(key, encode)
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()

    def _start(self, key: bytes, encode: Callable[[], Awaitable[Embeddings]]) -> _Flight:
        async def encoded() -> Embeddings:
            return await encode()

        flight = self._flights[key] = _Flight(asyncio.create_task(encoded()))
        flight.task.add_done_callback(lambda _: self._ended(key, flight))
        return flight

    def _ended(self, key: bytes, flight: _Flight) -> None:
        self._land(key, flight)
        # Asking for the exception also tells asyncio that it was seen, should nobody wait.
        if not flight.task.cancelled() and flight.task.exception() is None:
            self._keep(key, flight.task.result())

    def _land(self, key: bytes, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _keep(self, key: bytes, embeddings: Embeddings) -> None:
        embeddings.flags.writeable = False
        if embeddings.nbytes > self._max_bytes:
            return
        before = self._entries.pop(key, None)
        self._entries[key] = embeddings
        self._num_bytes += embeddings.nbytes - (before.nbytes if before is not None else 0)
        while self._num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._num_bytes -= oldest.nbytes
            self._metrics.evicted()
        self._metrics.cache_bytes(self._num_bytes)
