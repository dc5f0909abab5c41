"""Drives the tower: pictures come one by one, their squares leave in passes. No torch, no Ray.

Reading pictures is the caller's; one thread drives the device, another brings results home, so that
a pass starts while the rows of the one before it are copied.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from xc_ray.serve.observe import EncoderMetrics
from xc_ray.serve.signals import WorkMeter
from xc_ray.serve.squares import Piece, SquareBatcher

Picture = TypeVar("Picture")
Launched = TypeVar("Launched")
Taken = TypeVar("Taken", contravariant=True)


class Runner(Protocol[Taken, Launched]):
    """What runs passes; each method on a thread of its own."""

    def launch(self, parts: Sequence[tuple[Taken, int, int]]) -> Launched:
        """Runs one pass and returns when the device is free for the next.

        A part is a picture, the first of its squares, and how many.
        """

    def collect(self, launched: Launched) -> None:
        """Brings the results of a pass into its pictures."""


class SquareDriver(Generic[Picture, Launched]):
    """All but the runner's work happens on the event loop."""

    def __init__(
        self,
        batcher: SquareBatcher,
        runner: Runner[Picture, Launched],
        metrics: EncoderMetrics,
        meter: WorkMeter,
    ) -> None:
        self.batcher = batcher
        self._runner = runner
        self._metrics = metrics
        self._meter = meter
        self._device_thread = ThreadPoolExecutor(1, "encoder-device")
        self._collect_thread = ThreadPoolExecutor(1, "encoder-collect")
        self._pictures: dict[int, tuple[Picture, asyncio.Future[None]]] = {}
        self._changed = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._collecting: asyncio.Task[None] | None = None

    async def encode(self, num_squares: int, read: Callable[[], Awaitable[Picture]]) -> Picture:
        """Reads a picture of so many squares and runs them all; returns it, results inside.

        Raises:
            Exception: what `read` raised, or a pass that had squares of this picture.
        """
        key = self.batcher.expect(num_squares)
        try:
            picture = await read()
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._pictures[key] = picture, future
            self.batcher.ready(key)
            self._changed.set()
            if self._loop_task is None:
                self._loop_task = asyncio.create_task(self._run())
            await future
            return picture
        finally:
            self.batcher.drop(key)
            self._pictures.pop(key, None)
            self._changed.set()

    async def _run(self) -> None:
        """Passes until no square is ready."""
        try:
            while (wait_s := self.batcher.wait_s()) is not None:
                if wait_s > 0:
                    self._changed.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), wait_s)
                    continue
                await self._pass(self.batcher.take())
        finally:
            self._loop_task = None

    async def _pass(self, pieces: list[Piece]) -> None:
        """Runs a pass; its results are collected while the next one runs, and no later."""
        parts = [(self._pictures[p.key][0], p.first, p.count) for p in pieces]
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            launched = await loop.run_in_executor(self._device_thread, self._runner.launch, parts)
        except Exception as e:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            self._ended(pieces, e)
            return
        num_squares, seconds = sum(p.count for p in pieces), time.monotonic() - started
        self._metrics.ran(num_squares, seconds)
        self._meter.add(num_squares, seconds)
        if self._collecting is not None:
            await self._collecting
        self._collecting = asyncio.create_task(self._collect(pieces, launched))

    async def _collect(self, pieces: list[Piece], launched: Launched) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._collect_thread, self._runner.collect, launched)
        except Exception as e:  # noqa: BLE001 - as above
            self._ended(pieces, e)
        else:
            self._ended(pieces, None)

    def _ended(self, pieces: list[Piece], error: Exception | None) -> None:
        """Wakes those whose pictures are whole, or all of a pass that failed."""
        whole = self.batcher.ended(pieces)
        for key in whole if error is None else [p.key for p in pieces]:
            _, future = self._pictures.get(key, (None, None))
            if future is None or future.done():  # left meanwhile
                continue
            if error is None:
                future.set_result(None)
            else:
                self.batcher.drop(key)  # none of its other squares is worth a pass
                future.set_exception(error)
