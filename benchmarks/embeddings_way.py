"""The way of a picture's embeddings from the encoder's device to the decoder's, through Ray Serve.

    python benchmarks/embeddings_way.py [--gpus 2] [--tiles 1 6 24]

Two deployments, as the server has them: the encoder holds embeddings on its device, the decoder
asks for them and has them on its own. With one GPU both share it (0.15 and 0.85), with two each has
one. `ms` is from the decoder's call until they are there, the median of `--repeats`; `others` calls
at the same time give `gb_per_s`. Ways:
  call    an empty answer: what Serve itself takes
  store   rows to pinned memory, laid out on the host, object store, device: as the server does it
  cached  the same for a picture that the encoder keeps on the host
  ipc     CUDA's handle to the encoder's memory as the message, copied on the device (one GPU)
`of_first` is the share of the first token's time that this way takes beyond an empty call, where
encoding takes `--encode-ms` a square and the prompt `--prefill-ms` a thousand tokens.

Prints a table, then one JSON line.
"""

import asyncio
import io
import pickle
import statistics
import time
import warnings
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from shapes import Bench, arguments
from torch import Tensor

from xc_ray.model.config import XComposerConfig
from xc_ray.serve.square_runner import to_array

WAYS = ("call", "store", "cached", "ipc")


@dataclass(frozen=True)
class Asked:
    """Milliseconds of each call, one after the other, and bytes a second of several at once."""

    ms: list[float]
    gb_per_s: float


def main() -> None:
    """Every way for every size."""
    parser = arguments(__doc__)
    parser.add_argument("--gpus", type=int, choices=[1, 2], default=1)
    parser.add_argument("--tiles", type=int, nargs="+", help="of a picture (1 6 24)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--encode-ms", type=float, default=3.4)
    parser.add_argument("--prefill-ms", type=float, default=30.0)
    args = parser.parse_args()
    args.tiles = args.tiles or ([1, 2] if args.tiny else [1, 6, 24])
    ray.init(
        num_cpus=8,
        num_gpus=0 if args.tiny else args.gpus,
        include_dashboard=False,
        object_store_memory=4_000_000_000 if not args.tiny else 100_000_000,
    )
    serve.start(proxy_location="Disabled")
    try:
        with Bench("embeddings_way", args) as bench:
            measure(bench)
    finally:
        serve.shutdown()
        ray.shutdown()


def measure(bench: Bench) -> None:
    """The rows."""
    args = bench.args
    shares = (0.0, 0.0) if bench.tiny else (0.15, 0.85) if args.gpus == 1 else (1.0, 1.0)
    source, sink = (
        serve.deployment(
            ray_actor_options={"num_cpus": 1, "num_gpus": share}, max_ongoing_requests=64
        )(part)
        for part, share in zip((Source, Sink), shares, strict=True)
    )
    handle = serve.run(sink.bind(source.bind(bench.config, bench.dtype)))
    for tiles in args.tiles:
        rows = bench.config.image_tokens(1, tiles)
        size = rows * bench.config.decoder.hidden_size * bench.dtype.itemsize
        floor = 0.0
        for way in WAYS:
            if way == "ipc" and (bench.tiny or args.gpus > 1):
                continue  # without a GPU, or where each replica sees only its own
            asked = handle.ask.remote(way, tiles, args.repeats, args.others).result(timeout_s=120)
            ms = statistics.median(asked.ms)
            floor = ms if way == "call" else floor
            first = floor + args.encode_ms * (tiles + 1) + args.prefill_ms * rows / 1000
            bench.row(
                case=way,
                gpus=args.gpus,
                tiles=tiles,
                mb=size / 1e6 if way != "call" else 0.0,
                ms=ms,
                worst_ms=max(asked.ms),
                gb_per_s=asked.gb_per_s if way != "call" else None,
                of_first=(ms - floor) / (first + ms - floor) if way != "call" else None,
            )


class Source:
    """The encoder: embeddings of pictures of so many tiles, on its device."""

    def __init__(self, config: XComposerConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._made: dict[int, Tensor] = {}
        self._kept: dict[int, npt.NDArray[np.generic]] = {}

    async def give(self, way: str, tiles: int) -> Any:
        """The answer of one call."""
        if way == "call":
            return None
        x = self._embeddings(tiles)
        if way == "cached":
            if tiles not in self._kept:
                self._kept[tiles] = to_array(x)
            return self._kept[tiles]
        if way == "store":
            return await asyncio.to_thread(self._to_host, x)
        message = io.BytesIO()
        ForkingPickler(message, pickle.HIGHEST_PROTOCOL).dump(x)  # the handle, not the numbers
        return message.getvalue()

    def _to_host(self, x: Tensor) -> npt.NDArray[np.generic]:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._device == "cuda")
        rows = to_array(pinned.copy_(x))
        return rows.copy()  # the layout among the picture's rows

    def _embeddings(self, tiles: int) -> Tensor:
        if tiles not in self._made:
            shape = (self._config.image_tokens(1, tiles), self._config.decoder.hidden_size)
            self._made[tiles] = torch.randn(shape, device=self._device).to(self._dtype)
        return self._made[tiles]


class Sink:
    """The decoder: asks, and has the embeddings on its device."""

    def __init__(self, source: DeploymentHandle[Any]) -> None:
        self._source = source.options(_by_reference=True)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    async def ask(self, way: str, tiles: int, repeats: int, others: int) -> Asked:
        """Calls one after the other, then several at once."""
        for _ in range(2):
            await self._one(way, tiles)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            await self._one(way, tiles)
            times.append((time.perf_counter() - started) * 1e3)
        started = time.perf_counter()

        async def several() -> int:
            return sum([await self._one(way, tiles) for _ in range(max(1, repeats // others))])

        sizes = await asyncio.gather(*(several() for _ in range(others)))
        return Asked(times, sum(sizes) / (time.perf_counter() - started) / 1e9)

    async def _one(self, way: str, tiles: int) -> int:
        answer = await self._source.give.remote(way, tiles)
        if answer is None:
            return 0
        return await asyncio.to_thread(self._take, answer)

    def _take(self, answer: Any) -> int:
        if isinstance(answer, bytes):
            theirs: Tensor = pickle.loads(answer)
            x = theirs.clone()
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                x = torch.from_numpy(answer).to(self._device)
        if x.is_cuda:
            torch.cuda.synchronize()
        return x.nbytes


if __name__ == "__main__":
    main()
