"""VisionEncoder deployment: image bytes -> embeddings, batched over requests."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from xc_ray.config import ServeConfig
from xc_ray.hub import resolve_model
from xc_ray.model.weights import Checkpoint
from xc_ray.plan import encoder_plan
from xc_ray.prompt.tiles import Canvas, Grid, make_canvas, open_image
from xc_ray.serve.device import Device
from xc_ray.serve.signals import TileMeter

logger = logging.getLogger("ray.serve")


class VisionEncoder:
    """One tower and projector.

    Pictures are decoded and tiled on threads; one thread drives the device, with the pictures that
    came in meanwhile as the next batch.
    """

    def __init__(self, config: ServeConfig) -> None:
        device = Device.of_replica(config.dtype, config.encoder.num_gpus)
        checkpoint = Checkpoint.open(resolve_model(config.model, config.registry))
        squares = config.encoder.max_squares
        if device.on_gpu:
            encoder_plan(
                checkpoint.config,
                device.budget,
                number_bytes=device.dtype.itemsize,
                max_squares=squares,
                max_tiles=config.limits.max_tiles,
            ).check()
            device.enforce()
        self._config = checkpoint.config
        self._limits = config.limits
        self._max_squares = squares
        self._encoder = checkpoint.load_vision(device=device.name, dtype=device.dtype)
        self._device_thread = ThreadPoolExecutor(1, "encoder")
        self._meter = TileMeter(full=squares / 2)
        self._waiting: list[tuple[Canvas, asyncio.Future[npt.NDArray[np.generic]]]] = []
        self._running: asyncio.Task[None] | None = None
        logger.info("vision encoder ready: %s on %s", config.public_name, device)

    async def encode(self, data: bytes, grid: Grid) -> npt.NDArray[np.generic]:
        """File bytes -> embeddings (Ti, C): bf16 and fp16 as a uint16 view, fp32 as it is.

        Raises:
            MediaError: the picture is damaged past its header.
        """
        with self._meter.holding(grid.num_tiles + 1):
            return await self._encode(data, grid)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's question for `scale.EncoderPolicy`."""
        return self._meter.read()

    async def _encode(self, data: bytes, grid: Grid) -> npt.NDArray[np.generic]:
        canvas = await asyncio.to_thread(self._canvas, data, grid)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((canvas, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        result: npt.NDArray[np.generic] = await future
        return result

    def _canvas(self, data: bytes, grid: Grid) -> Canvas:
        image = open_image(data, max_pixels=self._limits.max_image_pixels)
        return make_canvas(image, grid, tiled=self._config.family.tiled)

    async def _run(self) -> None:
        """Batches until nothing waits; a failed batch fails its own pictures alone."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._take()
                canvases = [canvas for canvas, _ in batch]
                try:
                    arrays = await loop.run_in_executor(
                        self._device_thread, self._forward, canvases
                    )
                except Exception as e:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(e)
                    continue
                for (_, future), array in zip(batch, arrays, strict=True):
                    if not future.done():  # cancelled meanwhile
                        future.set_result(array)
        finally:
            self._running = None

    def _take(
        self,
    ) -> tuple[
        list[tuple[Canvas, asyncio.Future[npt.NDArray[np.generic]]]],
        list[tuple[Canvas, asyncio.Future[npt.NDArray[np.generic]]]],
    ]:
        """The next batch, at least one picture and about a pass of the tower, and the rest."""
        waiting = [(c, f) for c, f in self._waiting if not f.done()]
        squares, end = 0, 0
        for canvas, _ in waiting:
            squares += self._squares(canvas)
            end += 1
            if squares >= self._max_squares:
                break
        return waiting[:end], waiting[end:]

    @torch.inference_mode()
    def _forward(self, canvases: Sequence[Canvas]) -> list[npt.NDArray[np.generic]]:
        if not canvases:
            return []
        # Pillow's arrays are read-only views; torch wants to own what it might write to.
        tensors = [torch.from_numpy(c.copy()) for c in canvases]
        with self._meter.working(sum(map(self._squares, canvases))):
            embeddings = self._encoder(tensors, max_squares=self._max_squares)
            return [to_array(e) for e in embeddings]

    def _squares(self, canvas: Canvas) -> int:
        return int(canvas.shape[0] * canvas.shape[1]) // self._config.tile**2 + 1


def to_array(x: torch.Tensor) -> npt.NDArray[np.generic]:
    """A tensor as numpy for the object store: 16-bit floats as uint16 views, no copy on the CPU."""
    x = x.contiguous().cpu()
    array: npt.NDArray[np.generic] = (x.view(torch.uint16) if x.element_size() == 2 else x).numpy()
    return array
