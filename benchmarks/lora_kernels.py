"""The kernels of `xc_ray/engine/kernels/multi_lora.py`: a decode step's adapters, and a prefill's.

    PYTHONPATH=. python benchmarks/lora_kernels.py            # tables, with the cuts in use
    PYTHONPATH=. python benchmarks/lora_kernels.py --sweep    # which cuts are best

Shapes of the 7B decoder, bf16, a pool of 64 slots of rank 64 (19 GB), random numbers. A decode step
has eight launches in each of 32 layers, in a CUDA graph: "alone" is their time with nothing else,
"added" how much longer a graph of the step's matrix products and gates gets by them (cuBLAS; no
attention, no norms), the grouping of rows by adapter included and the silu_mul that they replace
taken off. "GB" are the adapters in use, "limit" is reading them once at 4.3 TB/s. Ranks are padded
to multiples of 16: rank 8 costs what rank 16 costs. A prefill is two layers, times 16.

`--sweep` compiles many ways to cut each kernel (in parallel, into Triton's cache), times them at a
few mixes of rows, adapters and ranks, and prints those that lose least against the best of each
mix (geometric mean); then whole steps with the best of them, for several divisions of K and with
early launches (programmatic dependent launch). Every cut is first compared with plain torch.
`--cpu` runs the same path in Triton's interpreter on tiny shapes: that tests the script and is no
figure.
"""

import argparse
import json
import math
import multiprocessing as mp
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from xc_ray.engine.kernels.lora_layout import Place, Tiles
    from xc_ray.engine.kernels.multi_lora import Cut, Cuts

HBM_BYTES_S = 4.3e12
KERNELS = ("shrink", "add", "gated")
DECODE_BLOCK = 16
PREFILL_BLOCKS = (64, 128)  # rows of a tile
REPLAYS = 9


@dataclass(frozen=True)
class Case:
    """A step: its rows, how many adapters they use, their rank; rows of a tile tell prefills."""

    rows: int
    adapters: int
    rank: int
    block: int = DECODE_BLOCK

    def __str__(self) -> str:
        return f"{self.rows}/{self.adapters}/r{self.rank}"


# What a sweep weighs alike: (rows, adapters, rank).
MIXES = tuple(
    Case(*mix)
    for mix in ((1, 1, 16), (8, 8, 16), (32, 32, 16), (64, 1, 16), (64, 32, 16), (256, 32, 16))
)
DEEP = Case(64, 64, 64)
CHUNKS = tuple(
    Case(*mix, block=64)
    for mix in ((512, 1, 16), (2048, 1, 16), (8192, 1, 16), (8192, 8, 16), (8192, 1, 64))
)
TINY_CASES = (Case(1, 1, 16), Case(5, 2, 32))


@dataclass(frozen=True)
class Model:
    """Sizes; of the 7B decoder unless told otherwise."""

    hidden: int = 4096
    packed: int = 6144
    inner: int = 14336
    layers: int = 32
    slots: int = 64
    max_rank: int = 64

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(in, out) of wqkv, wo, w1, w3, w2."""
        c, i = self.hidden, self.inner
        return [(c, self.packed), (c, c), (c, i), (c, i), (i, c)]


TINY = Model(hidden=64, packed=96, inner=80, layers=2, slots=4, max_rank=32)
ONE_LAYER = Model(layers=1, slots=4)  # for compiling and checking


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--sweep", action="store_true", help="try many cuts instead")
    parser.add_argument("--only", choices=["decode", "prefill"], help="one half of it")
    parser.add_argument("--early", action="store_true", help="tables with early launches")
    parser.add_argument("--own-tiles", action="store_true", help="each decode row a tile")
    parser.add_argument("--workers", type=int, default=12, help="compiling processes (default 12)")
    parser.add_argument("--time-limit", type=float, default=280, help="seconds (default 280)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="for the JSON line, where there is no git")
    parser.add_argument("--verbose", action="store_true", help="all cuts of a sweep")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes in Triton's interpreter")
    args = parser.parse_args()
    if args.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels' module is imported
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU; --cpu runs tiny shapes in Triton's interpreter")
    started = time.monotonic()
    bench = Bench(args, started + args.time_limit)
    try:
        for half in [args.only] if args.only else ["decode", "prefill"]:
            table = bench.decode if half == "decode" else bench.prefill
            (partial(bench.sweep, half) if args.sweep else table)()
    finally:
        facts = {
            "benchmark": "lora_kernels",
            "device": "CPU, interpreter" if args.cpu else torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "commit": args.commit,
            "seed": args.seed,
            "command": " ".join(["lora_kernels.py", *sys.argv[1:]]),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(facts | {"found": bench.found}))


class World:
    """A pool of adapters, and the rows that use them."""

    def __init__(self, model: Model, device: str, dtype: torch.dtype) -> None:
        from xc_ray.engine.kernels.lora_layout import Slots, places  # here: see --cpu

        self.model, self.device, self.dtype = model, device, dtype
        self.places: list[Place] = places(model.shapes * model.layers)
        self.per_rank = sum(map(sum, model.shapes)) * model.layers
        pool = self.empty(model.slots, model.max_rank * self.per_rank)
        for slot in pool:
            slot.normal_(std=0.02)
        scalings = torch.rand(model.slots, len(self.places), device=device) + 0.5
        ranks = torch.full((model.slots,), model.max_rank, dtype=torch.int32, device=device)
        self.slots = Slots(pool, ranks, scalings, model.max_rank)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def rows(self, num: int) -> dict[str, Tensor]:
        """What the linear maps of a layer take and give."""
        m = self.model
        sizes = {"x": m.hidden, "qkv": m.packed, "out": m.hidden, "both": 2 * m.inner}
        return {k: self.empty(num, n).normal_() for k, n in (sizes | {"inner": m.inner}).items()}

    def tiles(self, case: Case, seed: int, *, own: bool = False) -> "Callable[[], Tiles]":
        """What makes a step's tiles: on the device, in its graph; once on the host for a prefill.

        Rows are shared out evenly; those of a decode step are in no order.
        """
        from xc_ray.engine.kernels.lora_layout import Tiles, cut
        from xc_ray.engine.kernels.multi_lora import group

        slots = [row * case.adapters // case.rows for row in range(case.rows)]
        if case.block > DECODE_BLOCK:
            runs = [(slot, slots.count(slot)) for slot in range(case.adapters)]
            tiles = cut(runs, case.block, self.device)
            return lambda: tiles
        random.Random(seed).shuffle(slots)
        row_slots = torch.tensor(slots, dtype=torch.int32, device=self.device)
        return lambda: Tiles(row_slots) if own else group(row_slots, self.model.slots)

    def adapters(
        self,
        rows: dict[str, Tensor],
        tiles: "Tiles",
        cuts: "Cuts",
        layers: int,
        kernels: Sequence[str] = KERNELS,
        low: Tensor | None = None,
    ) -> None:
        """The adapters of a step; with `low`, only some of the kernels."""
        from xc_ray.engine.kernels.multi_lora import expand_add, expand_gated, shrink

        for layer in range(layers):
            wqkv, wo, w1, _, w2 = self.places[5 * layer : 5 * layer + 5]
            for place, x, y in (
                (wqkv, rows["x"], rows["qkv"]),
                (wo, rows["x"], rows["out"]),
                (w1, rows["x"], None),
                (w2, rows["inner"], rows["out"]),
            ):
                sums = low
                if "shrink" in kernels:
                    parts = 2 if y is None else 1
                    sums = shrink(x, self.slots, tiles, place, parts, cuts.shrink)
                if y is None and "gated" in kernels:
                    expand_gated(rows["both"], sums, self.slots, tiles, place, cuts.gated)
                if y is not None and "add" in kernels:
                    expand_add(y, sums, self.slots, tiles, place, cuts.add)

    def step(
        self,
        weights: list[list[Tensor]],
        rows: dict[str, Tensor],
        tiles: "Tiles | None",
        cuts: "Cuts | None",
    ) -> None:
        """The products and gates of these layers, with adapters or without."""
        from xc_ray.engine.kernels.multi_lora import expand_add, expand_gated, shrink
        from xc_ray.engine.kernels.pointwise import silu_mul

        x = rows["x"]
        for layer, (wqkv, wo, both, w2) in enumerate(weights):
            at = self.places[5 * layer : 5 * layer + 5]

            def linear(x: Tensor, weight: Tensor, place: "Place") -> Tensor:
                y = F.linear(x, weight)
                if tiles is None or cuts is None:
                    return y
                low = shrink(x, self.slots, tiles, place, 1, cuts.shrink)
                return expand_add(y, low, self.slots, tiles, place, cuts.add)

            linear(x, wqkv, at[0])
            h = linear(x, wo, at[1])
            y = F.linear(h, both)
            if tiles is None or cuts is None:
                inner = silu_mul(y)
            else:
                low = shrink(h, self.slots, tiles, at[2], 2, cuts.shrink)
                inner = expand_gated(y, low, self.slots, tiles, at[2], cuts.gated)
            linear(inner, w2, at[4])


class Bench:
    """What is timed, and what was found."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.args, self.deadline = args, deadline
        self.found: list[dict[str, Any]] = []
        self.device, self.dtype = ("cpu", torch.float32) if args.cpu else ("cuda", torch.bfloat16)
        torch.manual_seed(args.seed)
        self.world = World(TINY if args.cpu else Model(), self.device, self.dtype)
        self.weights: list[list[Tensor]] = []
        self.plain_s: dict[tuple[int, int], float] = {}

    def late(self) -> bool:
        if time.monotonic() < self.deadline:
            return False
        print("time limit: the rest is left out")
        return True

    def decode(self) -> None:
        """The table of decode steps."""
        from xc_ray.engine.kernels.multi_lora import DECODE

        cuts = early(DECODE, *KERNELS) if self.args.early else DECODE
        asked = product(self.args.ranks, self.args.rows, self.args.adapters)
        cases = [Case(rows, num, rank) for rank, rows, num in asked if num <= rows]
        self.check(DECODE_BLOCK, cuts)
        print(f"\ndecode: {brief(cuts)}\n{'rows':>5} {'adapters':>8} {'rank':>5} {'GB':>6}", end="")
        print(f" {'limit ms':>9} {'alone ms':>9} {'TB/s':>6} {'us/call':>8} {'added ms':>9}")
        for case in TINY_CASES if self.args.cpu else cases:
            if self.late():
                return
            alone = self.alone_s(case, cuts)
            added = self.added_s(case, cuts)
            num_bytes = self.adapter_bytes(case)
            calls = 8 * self.world.model.layers
            figures = {
                "gb": round(num_bytes / 1e9, 3),
                "limit_ms": ms(num_bytes / HBM_BYTES_S),
                "alone_ms": ms(alone),
                "tb_s": round(num_bytes / alone / 1e12, 2),
                "us_per_call": round(alone * 1e6 / calls, 2),
                "added_ms": ms(added),
            }
            head = f"{case.rows:>5} {case.adapters:>8} {case.rank:>5}"
            widths = (6, 9, 9, 6, 8, 9)
            line = [f"{v:>{w}}" for v, w in zip(figures.values(), widths, strict=True)]
            print(head, *line, flush=True)
            self.found.append({"decode": str(case), **figures})

    def prefill(self) -> None:
        """The table of prefills, one line for each height of tiles."""
        from xc_ray.engine.kernels.lora_layout import Tiles
        from xc_ray.engine.kernels.multi_lora import cuts_of

        some = torch.zeros(1, dtype=torch.int32)
        cases = [replace(c, block=b) for c in CHUNKS for b in PREFILL_BLOCKS]
        if self.args.cpu:
            cases = [replace(c, block=64) for c in TINY_CASES]
        for block in sorted({c.block for c in cases}):
            cuts = cuts_of(Tiles(some, block=block), self.world.slots)
            self.check(block, cuts)
            print(f"\nprefill, tiles of {block}: {brief(cuts)}")
        print(f"{'rows':>5} {'adapters':>8} {'rank':>5} {'tile':>5}", end="")
        print(f" {'products ms':>12} {'added ms':>9} {'share':>6}")
        for case in cases:
            if self.late():
                return
            cuts = cuts_of(Tiles(some, block=case.block), self.world.slots)
            added = self.added_s(case, cuts)
            plain = self.plain_s[case.rows, self.layers(case)]
            scale = self.world.model.layers / self.layers(case)
            share = added / plain
            print(f"{case.rows:>5} {case.adapters:>8} {case.rank:>5} {case.block:>5}", end="")
            print(f" {ms(plain * scale):>12} {ms(added * scale):>9} {share:>6.1%}", flush=True)
            self.found.append(
                {
                    "prefill": str(case),
                    "tile": case.block,
                    "products_ms": ms(plain * scale),
                    "added_ms": ms(added * scale),
                }
            )

    def sweep(self, half: str) -> None:
        """The best cuts of each kernel, then of whole steps."""
        from xc_ray.engine.kernels.multi_lora import Cuts

        blocks = (DECODE_BLOCK,) if half == "decode" else PREFILL_BLOCKS
        cases = (*MIXES, DEEP) if half == "decode" else CHUNKS
        if self.args.cpu:
            blocks, cases = blocks[:1], TINY_CASES
        jobs = [
            (kernel, block, cut)
            for block in blocks
            for kernel in KERNELS
            for cut in cuts_to_try(kernel, block, tiny=self.args.cpu)
        ]
        good = compiled(jobs, self.args, self.deadline)
        print(f"\n{half}: {len(good)} of {len(jobs)} cuts compile and agree with plain torch")
        for block in blocks:
            best: dict[str, Cut] = {}
            mixes = [replace(case, block=block) for case in cases]
            for kernel in KERNELS:
                cuts = [cut for name, height, cut in good if (name, height) == (kernel, block)]
                times = {
                    cut: [self.kernel_s(kernel, case, cut) for case in mixes]
                    for cut in cuts
                    if not self.late()
                }
                if times:
                    title = f"{half} {kernel}, tiles of {block}"
                    best[kernel] = self.ranking(title, mixes, times)
                    if kernel != "shrink":
                        best[kernel] = self.programs(title, kernel, mixes, best[kernel])
            if len(best) == len(KERNELS):
                self.whole_steps(f"{half}, tiles of {block}", mixes, Cuts(**best))

    def programs(self, title: str, kernel: str, cases: list[Case], cut: "Cut") -> "Cut":
        """How many programs walk the columns."""
        cuts = [replace(cut, programs=num) for num in (264, 528, 1056, 2112, 4224)]
        times = {c: [self.kernel_s(kernel, case, c) for case in cases] for c in cuts}
        found: Cut = self.ranking(f"{title}: programs", cases, times)
        return found

    def whole_steps(self, title: str, cases: list[Case], cuts: "Cuts") -> None:
        """Divisions of K and early launches, in steps with products."""
        divided = [
            replace(cuts, shrink=replace(cuts.shrink, splits=splits)) for splits in (16, 8, 32)
        ]
        # The interpreter knows no early launch.
        starts = [()] if self.args.cpu else [(), ("add", "gated"), KERNELS]
        times = {
            c: [self.added_s(case, c) for case in cases]
            for c in [early(d, *names) for d in divided for names in starts]
            if not self.late()
        }
        if times:
            print(self.ranking(f"{title}: whole steps, added", cases, times))

    def ranking(self, title: str, cases: list[Case], times: dict[Any, list[float]]) -> Any:
        """Prints the best few, each with its mean loss against the best of each case."""
        best = [min(column) for column in zip(*times.values(), strict=True)]
        # What is added to a step may measure as nothing, or less.
        floor = [max(b, 1e-6) for b in best]

        def loss(cut: Any) -> float:
            ratios = [max(t, f) / f for t, f in zip(times[cut], floor, strict=True)]
            return math.exp(sum(map(math.log, ratios)) / len(ratios))

        order = sorted(times, key=loss)
        print(f"\n{title}, us of {self.world.model.layers} layers, of {len(times)}")
        print("  loss", *(f"{case!s:>13}" for case in cases))
        for cut in order if self.args.verbose else order[:6]:
            columns = [f"{t * 1e6:>13.1f}" for t in times[cut]]
            print(f"{loss(cut):>6.3f}", *columns, "", brief(cut), flush=True)
            figures = [round(t * 1e6, 1) for t in times[cut]]
            self.found.append({"sweep": title, "cut": brief(cut), "us": figures})
        return order[0]

    # Timing.

    def layers(self, case: Case) -> int:
        """How many of the model's layers are run."""
        return 2 if case.block > DECODE_BLOCK else self.world.model.layers

    def adapter_bytes(self, case: Case) -> int:
        return case.adapters * padded(case.rank) * self.world.per_rank * self.dtype.itemsize

    def prepare(self, case: Case) -> "tuple[dict[str, Tensor], Callable[[], Tiles]]":
        self.world.slots.ranks.fill_(padded(case.rank))
        tiles = self.world.tiles(case, self.args.seed, own=self.args.own_tiles)
        return self.world.rows(case.rows), tiles

    def alone_s(self, case: Case, cuts: "Cuts") -> float:
        rows, make_tiles = self.prepare(case)
        tiles, layers = make_tiles(), self.layers(case)
        return self.timed(partial(self.world.adapters, rows, tiles, cuts, layers))

    def kernel_s(self, kernel: str, case: Case, cut: "Cut") -> float:
        """One kernel in all layers, as seconds of the whole model."""
        from xc_ray.engine.kernels.multi_lora import Cuts, shrink

        rows, make_tiles = self.prepare(case)
        tiles, layers = make_tiles(), self.layers(case)
        low = shrink(rows["x"], self.world.slots, tiles, self.world.places[2], 2)
        cuts = Cuts(cut, cut, cut)
        work = partial(self.world.adapters, rows, tiles, cuts, layers, (kernel,), low)
        return self.timed(work) * self.world.model.layers / layers

    def added_s(self, case: Case, cuts: "Cuts") -> float:
        """How much longer a step with products takes."""
        m, layers = self.world.model, self.layers(case)
        while len(self.weights) < layers:
            sizes = [(m.packed, m.hidden), (m.hidden, m.hidden), (2 * m.inner, m.hidden)]
            sizes.append((m.hidden, m.inner))
            self.weights.append([self.world.empty(*size).normal_(std=0.02) for size in sizes])
        weights = self.weights[:layers]
        rows, tiles = self.prepare(case)
        key = (case.rows, layers)
        if key not in self.plain_s:
            self.plain_s[key] = self.timed(lambda: self.world.step(weights, rows, None, None))
        with_adapters = self.timed(lambda: self.world.step(weights, rows, tiles(), cuts))
        return with_adapters - self.plain_s[key]

    def timed(self, work: Callable[[], None]) -> float:
        """Seconds of a graph of this work: the median of a few replays."""
        if self.args.cpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        work()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            work()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        spans = sorted(a.elapsed_time(b) for a, b in pairwise(events))
        return float(spans[len(spans) // 2]) / 1e3

    def check(self, block: int, cuts: "Cuts") -> None:
        """Ends the run if a kernel and plain torch differ."""
        world = World(TINY if self.args.cpu else ONE_LAYER, self.device, self.dtype)
        for kernel in KERNELS:
            error = error_of(world, kernel, block, getattr(cuts, kernel))
            if error > 1:
                sys.exit(f"{kernel}, tiles of {block}: {error:.1f} times the error allowed")


# Cuts: which are tried, and whether they work.


def cuts_to_try(kernel: str, block: int, *, tiny: bool) -> "list[Cut]":
    from xc_ray.engine.kernels.multi_lora import Cut

    if tiny:
        return [Cut(32, 16, 4), Cut(64, 32, 4)]
    if block == DECODE_BLOCK and kernel == "shrink":
        numbers = product((64, 128, 256), (16,), (1, 2, 4), (1, 2, 4))
        more = [(128, 32, 2, 3), (128, 64, 4, 3), (256, 32, 4, 2), (256, 64, 8, 2)]
        return [Cut(*n) for n in [*numbers, *more]]
    if block == DECODE_BLOCK:
        numbers = product((64, 128, 256, 512), (16,), (1, 2, 4, 8))
        more = [(64, 64, 4), (128, 64, 4), (128, 32, 4), (128, 64, 8)]
        return [Cut(*n) for n in [*numbers, *more] if n[0] // n[2] >= 16]
    if kernel == "shrink":
        numbers = product((64, 128), (16, 64), (4, 8), (2, 3, 4))
        return [Cut(*n) for n in numbers]
    return [Cut(*n) for n in product((64, 128, 256), (16, 64), (4, 8)) if n[0] < 256 or n[2] == 8]


Job = tuple[str, int, "Cut"]


def compiled(jobs: list[Job], args: argparse.Namespace, deadline: float) -> list[Job]:
    """Those that work; the others' errors are counted. Leaves the binaries in Triton's cache."""
    if args.cpu:
        outcomes = list(map(attempt, jobs))
    else:
        outcomes = []
        until = (time.monotonic() + deadline) / 2
        with mp.get_context("spawn").Pool(args.workers) as pool:
            pending = [pool.apply_async(attempt, (job,)) for job in jobs]
            for result in pending:
                try:
                    outcomes.append(result.get(timeout=max(0.1, until - time.monotonic())))
                except mp.TimeoutError:
                    outcomes.append("not compiled in time")
    failed = [text for text in outcomes if text]
    for text in sorted(set(failed)):
        print(f"{failed.count(text)} × {text}")
    return [job for job, text in zip(jobs, outcomes, strict=True) if not text]


_worlds: dict[str, World] = {}  # of a compiling process


def attempt(job: Job) -> str:
    """What is wrong with a cut, if anything."""
    kernel, block, cut = job
    cpu = not torch.cuda.is_available()
    if not _worlds:
        torch.manual_seed(0)
        kind = (TINY, "cpu", torch.float32) if cpu else (ONE_LAYER, "cuda", torch.bfloat16)
        _worlds["one"] = World(*kind)
    try:
        error = error_of(_worlds["one"], kernel, block, cut)
    except Exception as found:  # noqa: BLE001 (whatever the compiler says, the next is tried)
        return f"{kernel}: {type(found).__name__} {str(found)[:80]!r}"
    return f"{kernel}: wrong" if error > 1 else ""


def error_of(world: World, kernel: str, block: int, cut: "Cut") -> float:
    """The largest difference to plain torch, in units of what rounding explains."""
    from xc_ray.engine.kernels import lora_layout as plain
    from xc_ray.engine.kernels import multi_lora

    slots, place = world.slots, world.places[2]
    # Ranks and sequences of several lengths, two slots twice, and rows without an adapter.
    top = slots.max_rank
    slots.ranks.copy_(torch.tensor([top, 16, min(48, top), min(32, top)]))
    runs = [(0, 1), (plain.NO_SLOT, 3), (1, block + 5), (2, 17), (3, 1), (0, 2 * block)]
    tiles, num = plain.cut(runs, block, world.device), sum(rows for _, rows in runs)
    rows = world.rows(num)
    low = multi_lora.shrink(rows["x"], slots, tiles, place, 2)
    if kernel == "shrink":
        want = plain.plain_shrink(rows["x"], slots, tiles, place, 2)[0]
        filled = want != 0  # the rest is not written
        got = multi_lora.shrink(rows["x"], slots, tiles, place, 2, cut).sum(0)[filled]
        want, step = want[filled], 2e-4
    elif kernel == "gated":
        got = multi_lora.expand_gated(rows["both"], low, slots, tiles, place, cut)
        want = plain.plain_expand_gated(rows["both"], low, slots, tiles, place)
        step = 4 * torch.finfo(world.dtype).eps
    else:
        y = rows["both"][:, place.out :]
        want = plain.plain_expand_add(y.clone(), low, slots, tiles, place)
        got = multi_lora.expand_add(y, low, slots, tiles, place, cut)
        step = 4 * torch.finfo(world.dtype).eps
    step = max(step, 2e-5)
    excess = (got.float() - want.float()).abs() / (step * (1 + want.float().abs()))
    return float(excess.nan_to_num(nan=1e9).max())


def early(cuts: "Cuts", *kernels: str) -> "Cuts":
    """With an early launch of these kernels."""
    changed = {name: replace(getattr(cuts, name), early=True) for name in kernels}
    return replace(cuts, **changed)


def brief(cut: Any) -> str:
    """block × block_r, warps, stages, and what is not as usual; of three kernels or one."""
    if hasattr(cut, "shrink"):
        return " | ".join(f"{name} {brief(getattr(cut, name))}" for name in KERNELS)
    split = f" split{cut.splits}" if cut.splits != 16 else ""
    start = " early" if cut.early else ""
    walk = f" p{cut.programs}" if cut.programs != 528 else ""
    return f"{cut.block}x{cut.block_r} w{cut.num_warps} s{cut.num_stages}{walk}{split}{start}"


def padded(rank: int) -> int:
    return -(-rank // 16) * 16


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


if __name__ == "__main__":
    main()
