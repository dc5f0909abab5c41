"""The vision tower at its real size: squares per second and TFLOP/s by attention and by form.

    python benchmarks/encoder_tower.py [--squares 1 5 8 25 56]

Each case is the median of `--repeats` after two unmeasured. `tower` is squares to patches, on the
device already; `pass` adds the projector. Forms: the layers of transformers as they are; q, k and v
as one product with each attention of torch; with what lies between the products compiled; as one
CUDA graph; with pixels normalised on the device; and from pinned pixels to rows on the host as the
server runs it, one pass behind the other. `tflops` counts the products and the two of attention
(2.5: 1.22 TFLOP a square, 30.5 for 25), `ratio` is to the 788 TFLOP/s of a bf16 product on an H200.

Prints a table, then one JSON line.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from shapes import FLOP_PER_S, Bench, arguments, release, sync
from torch import Tensor

from xc_ray.config import EncoderOptions
from xc_ray.model.config import XComposerConfig
from xc_ray.model.fast_vision import FastVision, PassGraphs
from xc_ray.model.vision import normalise
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.tiles import Grid
from xc_ray.serve.square_runner import SquareRunner, TiledPicture

ATTENTIONS = ("default", "flash", "cudnn", "efficient", "math")
MATH_SQUARES = 25  # its score matrices of 56 squares would be 9 GB
TARGET = 0.45  # of FLOP_PER_S, at 25 squares

Timed = Callable[[], object]
Part = tuple[TiledPicture, int, int]
Form = Callable[[int], Timed]  # a number of squares -> what is timed


def main() -> None:
    """Every form over every number of squares."""
    parser = arguments(__doc__)
    parser.add_argument("--squares", type=int, nargs="+", help="in one pass")
    parser.add_argument("--attention", choices=ATTENTIONS, nargs="+", default=list(ATTENTIONS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.set_defaults(time_limit=160.0)
    args = parser.parse_args()
    args.squares = args.squares or ([1, 3] if args.tiny else [1, 5, 8, 25, 56])
    with Bench("encoder_tower", args) as bench, torch.inference_mode():
        tower(bench, bench.module(ImageEncoder))


def tower(bench: Bench, encoder: ImageEncoder) -> None:
    """The tower's own forms, then whole passes."""
    over_sizes(bench, "tower, transformers' layers", lambda n: with_squares(bench, n, encoder.vit))
    for attention in bench.args.attention:
        fast = FastVision(encoder, attention=attention)
        most = MATH_SQUARES if attention == "math" else None
        over_sizes(
            bench, f"tower, {attention}", lambda n, f=fast: with_squares(bench, n, f.patches), most
        )
    fast, compiled = (FastVision(encoder, compiled=c) for c in (False, True))
    over_sizes(bench, "tower, auto", lambda n: with_squares(bench, n, fast.patches))
    over_sizes(bench, "pass, auto", lambda n: with_squares(bench, n, fast))
    over_sizes(bench, "pass, normalised here", lambda n: with_pixels(bench, n, fast))
    if not bench.tiny:
        over_graphs(bench, "pass, graph", fast)
        over_sizes(bench, "tower, compiled", lambda n: with_squares(bench, n, compiled.patches))
        over_sizes(bench, "pass, compiled", lambda n: with_squares(bench, n, compiled))
        over_graphs(bench, "pass, compiled, graph", compiled)
    runner = SquareRunner(encoder, EncoderOptions(max_squares=max(bench.args.squares)))
    over_hosts(bench, "pass, host to host", runner)


def over_sizes(bench: Bench, name: str, form: Form, most: int | None = None) -> None:
    """One form with every number of squares."""
    release(bench.device)
    for squares in bench.args.squares:
        if most is None or squares <= most:
            bench.attempt(
                f"{name}, {squares} squares",
                lambda n=squares: measure(bench, name, n, form(n)),
            )


def over_graphs(bench: Bench, name: str, vision: FastVision) -> None:
    """Whole passes as CUDA graphs."""
    graphs = PassGraphs(vision, bench.args.squares)

    def captured() -> None:
        graphs.capture()
        over_sizes(bench, name, lambda n: with_squares(bench, n, graphs.replay))

    bench.attempt(name, captured)


def over_hosts(bench: Bench, name: str, runner: SquareRunner) -> None:
    """Pixels on the host to rows on the host, the last pass collected while the next one runs."""
    with collector() as collect:
        over_sizes(bench, name, lambda n: partial(collect, runner, part_of(bench, runner, n)))


def with_squares(bench: Bench, count: int, forward: Callable[[Tensor], Tensor]) -> Timed:
    """`forward` over random squares."""
    squares = normalise(random_pixels(bench, count)).to(bench.dtype)
    return lambda: forward(squares)


def with_pixels(bench: Bench, count: int, vision: FastVision) -> Timed:
    """A pass over random bytes, which it normalises."""
    pixels = random_pixels(bench, count)
    return lambda: vision(normalise(pixels).to(bench.dtype))


def random_pixels(bench: Bench, count: int) -> Tensor:
    """uint8 (N, S, S, 3)."""
    s = bench.config.tile
    generator = torch.Generator(bench.device).manual_seed(bench.args.seed)
    shape = (count, s, s, 3)
    return torch.randint(256, shape, dtype=torch.uint8, device=bench.device, generator=generator)


def part_of(bench: Bench, runner: SquareRunner, count: int) -> Part:
    """The first `count` squares of a random picture of at least two."""
    s, tiles = bench.config.tile, max(1, count - 1)
    grid = Grid(1, tiles, (tiles * s, s), (0, 0), (tiles * s, s))
    pixels = np.random.default_rng(bench.args.seed).integers(0, 256, (s, tiles * s, 3), np.uint8)
    return runner.tile(pixels, grid), 0, count


@contextmanager
def collector() -> Iterator[Callable[[SquareRunner, Part], None]]:
    """Launches a pass, and waits for the results of the one before it."""
    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def collect(runner: SquareRunner, part: Part) -> None:
            running.append(thread.submit(runner.collect, runner.launch([part])))
            if len(running) > 1:
                running.popleft().result()

        yield collect


def measure(bench: Bench, name: str, squares: int, step: Timed) -> None:
    """Times one case, and prints its row."""
    times = [timed(bench, step) for _ in range(2 + bench.args.repeats)][2:]
    ms = statistics.median(times) * 1e3
    flop = tower_flop(bench.config, squares)
    if name.startswith("pass"):
        flop += projector_flop(bench.config, squares)
    tflops = flop / ms / 1e9
    bench.row(
        case=name,
        squares=squares,
        ms=ms,
        least_ms=min(times) * 1e3,
        squares_per_s=squares / ms * 1e3,
        tflops=tflops,
        ratio=tflops * 1e12 / FLOP_PER_S,
        target=TARGET if squares == 25 else None,
    )


def timed(bench: Bench, step: Timed) -> float:
    """Seconds of one step."""
    sync(bench.device)
    started = time.perf_counter()
    step()
    sync(bench.device)
    return time.perf_counter() - started


def tower_flop(config: XComposerConfig, squares: int) -> float:
    """Arithmetic of the tower: the patches' products, four and two maps a layer, and attention."""
    v = config.vision
    c, p = v.hidden_size, v.num_positions
    maps = 4 * c * c + 2 * c * v.intermediate_size
    layer = 2 * p * maps + 4 * p * p * c
    patches = 2 * (p - 1) * 3 * v.patch_size**2 * c
    return float(squares * (patches + v.num_hidden_layers * layer))


def projector_flop(config: XComposerConfig, squares: int) -> float:
    """Arithmetic of the projector on the squares' own rows."""
    size = config.decoder.hidden_size
    return float(2 * squares * config.tokens_per_side**2 * (config.projector_in + size) * size)


if __name__ == "__main__":
    main()
