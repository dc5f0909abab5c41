"""VisionEncoder deployment: picture bytes -> embeddings; passes are shared, results are kept."""

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from xc_ray.config import ServeConfig
from xc_ray.errors import EngineError
from xc_ray.hub import resolve_model
from xc_ray.model.weights import Checkpoint
from xc_ray.plan import GB, encoder_plan
from xc_ray.prompt.tiles import Grid, make_canvas, open_image
from xc_ray.serve.device import Device
from xc_ray.serve.embedding_cache import EmbeddingCache, Embeddings
from xc_ray.serve.messages import Picture
from xc_ray.serve.observe import EncoderMetrics, join_logs
from xc_ray.serve.redaction import redact
from xc_ray.serve.scale import EncoderLoad
from xc_ray.serve.signals import WorkMeter
from xc_ray.serve.square_driver import SquareDriver
from xc_ray.serve.square_runner import Launched, SquareRunner, TiledPicture
from xc_ray.serve.squares import SquareBatcher
from xc_ray.serve.startup import Startup

logger = logging.getLogger("ray.serve")

# A share of a core is what Ray counts, no limit; a second thread reads while one waits its turn.
MIN_THREADS = 2


class VisionEncoder:
    """One tower and projector.

    Pictures are read (decoded and tiled) on threads of their own; their squares go through the
    tower in passes that all waiting pictures share; their embeddings are kept by digest.
    """

    def __init__(self, config: ServeConfig) -> None:
        redact(logger)
        join_logs()
        startup, options = Startup("vision encoder"), config.encoder
        device = Device.of_replica(config.dtype, options.num_gpus)
        with startup.phase("model files"):
            checkpoint = Checkpoint.open(resolve_model(config.model, config.registry))
        if device.on_gpu:
            encoder_plan(
                checkpoint.config,
                device.budget,
                number_bytes=device.dtype.itemsize,
                max_squares=options.max_squares,
                max_tiles=config.limits.max_tiles,
                cuda_graphs=options.cuda_graphs,
            ).check()
            device.enforce()
        self._tiled = checkpoint.config.family.tiled
        self._max_pixels = config.limits.max_image_pixels
        self._decode_s = config.limits.max_decode_s
        with startup.phase("weights"):
            tower = checkpoint.load_vision(device=device.name, dtype=device.dtype)
        with startup.phase("passes"):
            self._runner = SquareRunner(tower, options)
        self._threads = ThreadPoolExecutor(
            max(MIN_THREADS, math.ceil(options.num_cpus)), "encoder-read"
        )
        metrics = EncoderMetrics()
        self.batcher = SquareBatcher(options.max_squares, options.batch_wait_ms / 1e3)
        # Half of a pass shows how fast it goes; with fewer squares the device waits for itself.
        self._meter = WorkMeter(full=options.max_squares / 2)
        self._driver = SquareDriver[TiledPicture, Launched](
            self.batcher, self._runner, metrics, self._meter
        )
        self._cache = EmbeddingCache(int(options.cache_gb * GB), metrics)
        startup.ready(f"{config.public_name} on {device}")

    async def encode(self, data: bytes, grid: Grid, salt: str = "") -> Embeddings:
        """File bytes -> embeddings (Ti, C): bf16 and fp16 as a uint16 view, fp32 as it is.

        The array is read-only: it is the one that is kept for whoever asks next with this salt.

        Raises:
            MediaError: the picture is damaged past its header.
            EngineError: its embeddings hold NaN or infinity.
        """
        # Of bytes, grid and salt, with their lengths: no two share a key. Not on the threads that
        # read: what is kept need not wait there.
        key = await asyncio.to_thread(Picture(data, grid, salt=salt).digest)
        return await self._cache.get(key, partial(self._encode, data, grid))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's question for `scale.EncoderPolicy`."""
        squares = self.batcher.waiting_squares + self.batcher.running_squares
        return EncoderLoad(squares, self._meter.read_use(), self._meter.rate)._asdict()

    async def _encode(self, data: bytes, grid: Grid) -> Embeddings:
        loop = asyncio.get_running_loop()

        async def read() -> TiledPicture:
            return await loop.run_in_executor(self._threads, self._read, data, grid)

        num_squares, began = self._runner.num_squares(grid), time.monotonic()
        picture = await self._driver.encode(num_squares, read)
        logger.info("%d squares encoded in %.3f s", num_squares, time.monotonic() - began)
        if not picture.finite:  # never kept, nor shared
            raise EngineError("the vision encoder failed on this picture; try again")
        return picture.placement.embeddings

    def _read(self, data: bytes, grid: Grid) -> TiledPicture:
        image = open_image(data, max_pixels=self._max_pixels, limit_s=self._decode_s)
        return self._runner.tile(make_canvas(image, grid, tiled=self._tiled), grid)
