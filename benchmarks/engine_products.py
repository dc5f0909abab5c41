"""The matrix products of a decode step: our Triton kernels, cuBLAS and the device's limit.

    PYTHONPATH=. python benchmarks/engine_products.py

For each shape of the 7B decoder and each rows bucket, a few ways to cut the product are compiled
(in parallel, each tried once in a process of its own, so that a bad one ends nobody else), then
timed in a CUDA graph that goes over several copies of the weights, more than the L2 cache holds.
cuBLAS is timed the same way; the limit is reading the weights once at 4.3 TB/s, or 788 TFLOP/s.
A "winner" is within bf16 of cuBLAS, the same twice, and its rows do not depend on one another;
`early` ones (programmatic dependent launch) are counted apart, as next to nothing but themselves
they overlap more than in a model.

Prints a table, the `TILES` literal for xc_ray/engine/kernels/skinny.py, then one JSON line.
`--cpu` runs the same path in Triton's interpreter on tiny shapes: that tests the script and is no
figure.
"""

import argparse
import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xc_ray.engine.kernels.skinny import Tile

HBM_BYTES_S = 4.3e12
FLOP_S = 788e12
ROWS = (1, 32, 128, 8, 16, 64, 4, 2, 256)  # what matters most comes first
NUM_LAYERS = 32
COPIES_BYTES = 400e6
REPLAY_S = 2e-3
TRY_S = 90  # a worker that says nothing for this long is ended, and its tile skipped
NUM_EARLY = 3  # the best of a cell, tried with an early launch as well
COMPILE_SHARE = 0.45  # of the time limit


@dataclass(frozen=True)
class Shape:
    """One product: (rows, k) x (n, k)ᵀ, or the gated pair of two such weights."""

    name: str
    n: int
    k: int
    gated: bool = False
    per_model: int = NUM_LAYERS

    @property
    def key(self) -> tuple[int, int]:
        return (2 * self.n if self.gated else self.n, self.k)

    @property
    def weight_bytes(self) -> int:
        return 2 * self.key[0] * self.k

    def limit_s(self, rows: int) -> float:
        flop = 2 * rows * self.key[0] * self.k
        return max(self.weight_bytes / HBM_BYTES_S, flop / FLOP_S)


SHAPES = (
    Shape("wqkv", 6144, 4096),
    Shape("wo", 4096, 4096),
    Shape("gated", 14336, 4096, gated=True),
    Shape("w2", 4096, 14336),
    Shape("head", 92544, 4096, per_model=1),
)
TINY_SHAPES = (
    Shape("wqkv", 96, 64),
    Shape("gated", 80, 64, gated=True),
    Shape("head", 100, 64, per_model=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--time-limit", type=float, default=400, help="seconds (default 400)")
    parser.add_argument("--workers", type=int, default=14, help="compiling processes (default 14)")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help=f"default {ROWS}")
    parser.add_argument("--shapes", nargs="*", help="names, of wqkv wo gated w2 head (default all)")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--verbose", action="store_true", help="every tile's time")
    args = parser.parse_args()
    started = time.monotonic()
    if args.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels' module is imported
    shapes = [s for s in (TINY_SHAPES if args.cpu else SHAPES) if s.name in (args.shapes or s.name)]
    plan = {
        (shape, rows): tiles(shape, rows, tiny=args.cpu) for rows in args.rows for shape in shapes
    }
    skipped: dict[str, int] = {}
    if not args.cpu:
        plan, skipped = compiled(plan, args.workers, started + COMPILE_SHARE * args.time_limit)
    left = sum(map(len, plan.values()))
    print(f"{left} tiles to time, skipped {skipped} after {time.monotonic() - started:.0f} s")
    cells: dict[tuple[Shape, int], Cell] = {}
    for (shape, rows), found in plan.items():
        if time.monotonic() - started > args.time_limit - 10:
            print("time limit: the rest is left out")
            break
        try:
            cell = cells[shape, rows] = measure(shape, rows, found, args)
        except RuntimeError as error:  # a lost device: what was measured before it still counts
            print(f"rows {rows} {shape.name}: {error}; the rest is left out")
            break
        print(cell.line(shape, rows), flush=True)
    totals = [total for rows in args.rows if (total := model_total(cells, shapes, rows))]
    for total in totals:
        print(total)
    for name, early in (("TILES", False), ("TILES with early launch", True)):
        print(f"\n# {name}\nTILES: dict[tuple[int, int, int], Tile | None] = {{")
        for (shape, rows), cell in cells.items():
            print(f"    {(*shape.key, rows)}: {literal(cell.choice(early))},  # {shape.name}")
        print("}")
    device = "CPU, interpreter: no figure" if args.cpu else torch.cuda.get_device_name(0)
    figures = [cell.figures(*key) for key, cell in cells.items()]
    seconds = round(time.monotonic() - started)
    result = {"device": device, "torch": torch.__version__, "seconds": seconds, "skipped": skipped}
    print(json.dumps({"benchmark": "engine_products", **result, "model": totals, "cells": figures}))


# What is tried.


def tiles(shape: Shape, rows: int, *, tiny: bool) -> "list[Tile]":
    """The ways to cut one product, and each of them with an early launch."""
    from xc_ray.engine.kernels.skinny import Tile  # here: see --cpu

    if tiny:
        found = [Tile("matrix", 32, 16, 2, 4), Tile("matrix", 16, 32, 2, 4, boxes=True)]
        if not shape.gated:
            found.append(Tile("matrix", 16, 32, 2, 4, split_k=2))
        return found + ([Tile("vector", 8, 32, 1, 4)] if rows <= 4 else [])
    cuts = gated_cuts(rows) if shape.gated else linear_cuts(rows)
    found = [Tile("matrix", *cut, boxes=boxes) for cut in cuts for boxes in (False, True)]
    if shape.n <= 6144:  # too few tiles to fill 132 multiprocessors
        found += [
            Tile("matrix", *cut, split_k=split, boxes=boxes)
            for cut, split in split_cuts(rows)
            for boxes in (False, True)
        ]
    if rows <= 4:
        found += vector_tiles(shape, rows)
    return [t for tile in found for t in (tile, replace(tile, early=True))]


def linear_cuts(rows: int) -> list[tuple[int, int, int, int]]:
    """(block_n, block_k, num_stages, num_warps)."""
    if rows <= 32:
        return [
            (16, 256, 4, 4),
            (32, 128, 4, 4),
            (32, 256, 4, 4),
            (64, 128, 5, 4),
            (32, 128, 6, 4),
            (64, 64, 6, 4),
            (64, 256, 3, 4),
            (128, 64, 5, 4),
            (128, 128, 4, 8),
        ]
    if rows <= 64:
        return [
            (32, 128, 4, 4),
            (64, 64, 4, 4),
            (64, 64, 6, 4),
            (64, 128, 3, 4),
            (64, 128, 4, 4),
            (128, 64, 4, 4),
            (128, 64, 5, 8),
            (128, 128, 4, 8),
        ]
    if rows > 128:  # larger tiles spill registers
        return [(64, 64, 4, 4), (64, 64, 4, 8), (128, 64, 4, 8)]
    small = [(64, 64, 4, 4), (64, 128, 3, 4)]
    return [*small, (128, 64, 3, 8), (128, 64, 4, 8), (128, 64, 5, 8), (256, 64, 3, 8)]


def gated_cuts(rows: int) -> list[tuple[int, int, int, int]]:
    """The same for the pair, whose steps read twice as much."""
    if rows <= 32:
        return [
            (16, 256, 3, 4),
            (32, 128, 3, 4),
            (32, 128, 4, 4),
            (64, 64, 5, 4),
            (32, 64, 5, 4),
            (64, 128, 3, 4),
            (128, 64, 4, 8),
        ]
    if rows <= 64:
        return [
            (64, 64, 3, 4),
            (64, 64, 4, 4),
            (64, 128, 2, 4),
            (64, 128, 4, 4),
            (128, 64, 3, 8),
            (128, 64, 5, 8),
        ]
    if rows > 128:
        return [(32, 64, 4, 4), (64, 64, 3, 8), (64, 64, 4, 8)]
    return [(64, 64, 3, 4), (64, 64, 4, 4), (64, 64, 4, 8), (128, 64, 3, 8), (128, 64, 4, 8)]


def split_cuts(rows: int) -> list[tuple[tuple[int, int, int, int], int]]:
    """(cut, split_k)."""
    if rows <= 32:
        return [((64, 128, 4, 4), 2), ((64, 128, 4, 4), 4), ((128, 64, 5, 4), 4)]
    if rows <= 64:
        return [((64, 64, 5, 4), 2), ((64, 128, 4, 4), 2), ((128, 64, 5, 8), 4)]
    if rows > 128:
        return [((64, 64, 4, 8), 2)]
    return [((64, 64, 4, 4), 2), ((128, 64, 4, 8), 2), ((128, 64, 4, 8), 4)]


def vector_tiles(shape: Shape, rows: int) -> "list[Tile]":
    """On CUDA cores, for up to four rows; the gated pair takes half the columns."""
    from xc_ray.engine.kernels.skinny import Tile

    cuts = [
        (2, 1024, 1, 4),
        (4, 1024, 1, 4),
        (8, 512, 1, 2),
        (8, 1024, 1, 4),
        (16, 512, 1, 4),
        (4, 2048, 1, 4),
        (8, 1024, 3, 4),
        (8, 1024, 4, 4),
    ]
    cuts = cuts[:4] + cuts[6:7] if rows > 1 else cuts
    found = [Tile("vector", *cut) for cut in cuts]
    return found + [Tile("vector", *cut, evict_first=True) for cut in cuts[1:4]]


# Compiling: each worker tries its share; what it reports as tried is timed later.

Plan = dict[tuple[Shape, int], "list[Tile]"]


def compiled(plan: Plan, num_workers: int, deadline: float) -> tuple[Plan, dict[str, int]]:
    """The plan without what fails to compile or to run, and how many were skipped for what."""
    todo = list(unique(plan))
    # One binary serves all shapes (and all buckets below 16 rows), so it is tried on one of them.
    jobs = [todo[i::num_workers] for i in range(num_workers)]
    context = mp.get_context("spawn")
    workers = [Worker(context, jobs_of) for jobs_of in jobs if jobs_of]
    while (busy := [w for w in workers if not w.finished]) and time.monotonic() < deadline:
        ready = wait([w.pipe for w in busy], timeout=1)
        for worker in busy:
            worker.listen(worker.pipe in ready)
    for worker in workers:
        worker.stop()
    outcome = {binary: text for worker in workers for binary, text in worker.outcome.items()}
    skipped: dict[str, int] = {}
    for shape, rows, tile in todo:
        text = outcome.get(binary_of(shape, rows, tile), "not compiled in time")
        if text != "ok":
            skipped[text] = skipped.get(text, 0) + 1
    kept: Plan = {
        (shape, rows): [t for t in found if outcome.get(binary_of(shape, rows, t)) == "ok"]
        for (shape, rows), found in plan.items()
    }
    return kept, skipped


def binary_of(shape: Shape, rows: int, tile: "Tile") -> tuple[Any, ...]:
    """What a compiled kernel depends on."""
    return (shape.gated, rows if tile.kind == "vector" else max(16, rows), tile)


Job = tuple[Shape, int, "Tile"]


def unique(plan: Plan) -> Iterator[Job]:
    """One job for each binary, in the order of the plan."""
    seen = set()
    for (shape, rows), found in plan.items():
        for tile in found:
            if (binary := binary_of(shape, rows, tile)) not in seen:
                seen.add(binary)
                yield shape, rows, tile


class Worker:
    """A process that tries one job after another; replaced if one of them ends it."""

    def __init__(self, context: Any, jobs: list[Job]) -> None:
        self.context, self.jobs = context, jobs
        self.outcome: dict[tuple[Any, ...], str] = {}
        self.start()

    @property
    def finished(self) -> bool:
        return not self.jobs

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=try_all, args=(theirs, self.jobs), daemon=True)
        self.process.start()
        theirs.close()
        self.heard = time.monotonic()

    def listen(self, ready: bool) -> None:
        """Takes one report; a dead or silent process costs the job it was at."""
        if ready:
            try:
                self.note(self.pipe.recv())
                return
            except (EOFError, ConnectionResetError):
                text = "ended the process"
        elif time.monotonic() - self.heard > TRY_S:
            text = "silent for too long"
        else:
            return
        self.stop()
        self.note(text)
        if self.jobs:
            self.start()

    def note(self, text: str) -> None:
        self.heard = time.monotonic()
        self.outcome[binary_of(*self.jobs[0])] = text
        self.jobs = self.jobs[1:]

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


def try_all(pipe: Connection, jobs: list[Job]) -> None:
    """In the worker: compiles and runs each job once, and sends "ok" or the error's name."""
    from xc_ray.engine.kernels.skinny import launch, make_counters

    counters = make_counters("cuda")
    for shape, rows, tile in jobs:
        torch.cuda.empty_cache()
        text = "ok"
        try:
            x = torch.zeros(rows, shape.k, dtype=torch.bfloat16, device="cuda")
            weights = [x.new_empty(shape.n, shape.k) for _ in range(1 + shape.gated)]
            launch(tile, x, *weights, counters=counters)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 (whatever the compiler says, the next is tried)
            text = type(error).__name__
            if "CUDA" in str(error):  # the context may be lost with it: a fresh process
                os._exit(1)
        pipe.send(text)


# Timing.


@dataclass
class Cell:
    """One shape at one number of rows: seconds per product."""

    cublas_s: float
    limit_s: float
    times: "dict[Tile, float]"  # those that failed a check are not in it
    wrong: int

    def best(self, early: bool) -> "tuple[Tile, float] | None":
        allowed = [(t, s) for t, s in self.times.items() if early or not t.early]
        return min(allowed, key=lambda pair: pair[1], default=None)

    def choice(self, early: bool) -> "Tile | None":
        best = self.best(early)
        return best[0] if best and best[1] < self.cublas_s else None

    def mixed_s(self, early: bool) -> float:
        best = self.best(early)
        return min(self.cublas_s, best[1]) if best else self.cublas_s

    def line(self, shape: Shape, rows: int) -> str:
        parts = [f"rows {rows:>3} {shape.name:<6} limit {self.limit_s * 1e6:7.1f} us"]
        parts.append(f"cuBLAS {self.cublas_s * 1e6:7.1f}")
        for early in (False, True):
            tile, seconds = self.best(early) or (None, float("nan"))
            name = "early" if early else "ours"
            parts += [f"{name} {seconds * 1e6:7.1f} {brief(tile) if tile else ''}"]
        return " | ".join(parts) + (f" | {self.wrong} wrong" if self.wrong else "")

    def figures(self, shape: Shape, rows: int) -> dict[str, object]:
        found = {"shape": shape.name, "rows": rows, "cublas_us": round(self.cublas_s * 1e6, 2)}
        found |= {"limit_us": round(self.limit_s * 1e6, 2), "wrong": self.wrong}
        order = sorted(self.times.items(), key=lambda pair: pair[1])
        return {**found, "tiles": [[brief(t), round(s * 1e6, 2)] for t, s in order]}


def measure(shape: Shape, rows: int, found: "list[Tile]", args: argparse.Namespace) -> Cell:
    """Times every tile and cuBLAS; the winners, with and without early launch, are checked."""
    from xc_ray.engine.kernels.skinny import launch, make_counters, plain_gated, plain_linear

    device, dtype = ("cpu", torch.float16) if args.cpu else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    x = torch.randn(rows, shape.k, dtype=dtype, device=device)
    num_copies = 1 if args.cpu else 1 + int(COPIES_BYTES // shape.weight_bytes)
    copies = [
        [
            torch.randn(shape.n, shape.k, dtype=dtype, device=device) * shape.k**-0.5
            for _ in range(1 + shape.gated)
        ]
        for _ in range(num_copies)
    ]
    counters = make_counters(device)
    plain = plain_gated if shape.gated else plain_linear
    limit_s = shape.limit_s(rows)

    def seconds(product: Callable[..., Tensor]) -> float:
        return timed(lambda i: product(x, *copies[i % num_copies]), num_copies, limit_s, args.cpu)

    cell = Cell(seconds(plain), limit_s, {}, wrong=0)

    def try_out(tile: "Tile") -> None:
        try:
            cell.times[tile] = seconds(lambda x, *w: launch(tile, x, *w, counters=counters))
        except Exception as error:  # noqa: BLE001 (say a driver that refuses an early launch)
            print(f"    {brief(tile)}: {type(error).__name__} {str(error)[:200]}")
        else:
            if args.verbose:
                print(f"    {cell.times[tile] * 1e6:7.1f} us {brief(tile)}", flush=True)

    for tile in found:
        if not tile.early:
            try_out(tile)
    for tile in sorted(cell.times, key=cell.times.__getitem__)[:NUM_EARLY]:
        if replace(tile, early=True) in found:
            try_out(replace(tile, early=True))
    expected = plain(x, *copies[0])
    for early in (False, True):
        while best := cell.best(early):
            product = partial(launch, best[0], counters=counters)
            if good(lambda x: product(x, *copies[0]), x, expected):  # noqa: B023 (called at once)
                break
            print(f"    wrong: {brief(best[0])}")
            cell.wrong += 1
            del cell.times[best[0]]
    return cell


def timed(product: Callable[[int], Tensor], num_copies: int, limit_s: float, cpu: bool) -> float:
    """Seconds of one product: the median of seven replays of a graph of many."""
    if cpu:
        start = time.perf_counter()
        product(0)
        return time.perf_counter() - start
    launches = num_copies * max(1, round(REPLAY_S / limit_s / num_copies))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            product(i)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return float(spans[len(spans) // 2]) / 1e3 / launches


def good(product: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> bool:
    """Close to cuBLAS, the same twice, and its first row deaf to what the other rows hold."""
    y = product(x)
    close = torch.allclose(y.float(), expected.float(), rtol=2e-2, atol=2e-2)
    other = x.clone()
    other[1:] = float("nan")
    return close and torch.equal(y, product(x)) and torch.equal(y[0], product(other)[0])


def model_total(
    cells: dict[tuple[Shape, int], Cell], shapes: list[Shape], rows: int
) -> dict[str, float]:
    """Milliseconds of all products of a step; empty where a shape was not measured."""
    if not all((shape, rows) in cells for shape in shapes):
        return {}

    def total(seconds: Callable[[Cell], float]) -> float:
        return round(1e3 * sum(s.per_model * seconds(cells[s, rows]) for s in shapes), 3)

    return {
        "rows": rows,
        "ours_ms": total(lambda cell: cell.mixed_s(False)),
        "early_ms": total(lambda cell: cell.mixed_s(True)),
        "cublas_ms": total(lambda cell: cell.cublas_s),
        "limit_ms": total(lambda cell: cell.limit_s),
    }


def brief(tile: "Tile") -> str:
    """V or M, then the numbers, then what is switched on."""
    numbers = (tile.block_n, tile.block_k, tile.num_stages, tile.num_warps)
    switches = [name for name in ("boxes", "evict_first", "early") if getattr(tile, name)]
    split = [f"split{tile.split_k}"] if tile.split_k > 1 else []
    return " ".join([tile.kind[0].upper() + "x".join(map(str, numbers)), *split, *switches])


def literal(tile: "Tile | None") -> str:
    """As the table spells it."""
    if tile is None:
        return "None"
    numbers = (tile.block_n, tile.block_k, tile.num_stages, tile.num_warps)
    parts = [f'"{tile.kind}"', *map(str, numbers)]
    parts += [f"split_k={tile.split_k}"] if tile.split_k > 1 else []
    parts += [f"{name}=True" for name in ("boxes", "evict_first", "early") if getattr(tile, name)]
    return f"Tile({', '.join(parts)})"


if __name__ == "__main__":
    main()
