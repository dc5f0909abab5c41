"""The sampler's kernel: time of one launch, and whether it chooses what plain torch chooses.

    python benchmarks/engine_sampling.py

Rows of random bf16 logits over the real vocabulary, normal with deviation `--logit-std`, are
sampled greedily, by top_p, by top_k with top_p and a repetition penalty over 200 generated ids, and
from the whole distribution. Time is of `Sampler.choose` inside a CUDA graph, one graph of
`--launches` of them, and beside it of torch's whole sort and of its topk(64), which a sampler made
of torch's parts would begin with. Chosen ids are compared with `chosen_ids` on the same device, in
float32: draws at the very edge between two ids may differ.

With `--cpu`, tiny shapes go through Triton's interpreter: that tests the script and is no figure.
Prints a table, then one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xc_ray.engine.sampler import Sampler, chosen_ids
from xc_ray.engine.sequence import SamplingParams

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top_p 0.8": {"top_p": 0.8},
    "top_k 50, top_p 0.8, repetition 1.005": {
        "top_k": 50,
        "top_p": 0.8,
        "repetition_penalty": 1.005,
    },
    "temperature 1": {},
}
LEAST_EQUAL = 0.99
COMPARED_POSITIONS = 4


def main() -> None:
    """Times and compares every case at every number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--vocab-size", type=int, default=92_544)
    parser.add_argument("--logit-std", type=float, default=3.0, help="spread of the logits")
    parser.add_argument("--launches", type=int, default=20, help="launches in one graph")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes through the interpreter")
    args = parser.parse_args()
    if args.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
        args.rows, args.vocab_size, args.launches = [1, 2], 300, 1
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu tests the script")
    device = torch.device("cpu" if args.cpu else "cuda")
    name = "CPU, interpreter (no figure)" if args.cpu else torch.cuda.get_device_name(0)
    print(f"{name}, torch {torch.__version__}, vocabulary {args.vocab_size:,}")
    print(f"{'rows':>5}  {'what':<40} {'ms':>9} {'least':>9} {'most':>9} {'equal':>8}")
    figures = []
    for rows in args.rows:
        logits = random_logits(rows, args.vocab_size, args.logit_std, device)
        for case, options in CASES.items():
            sampler, lanes, positions = prepared(rows, args.vocab_size, options, device)
            equal = share_equal(sampler, logits, lanes, positions)
            call = partial(sampler.choose, logits, lanes, positions)
            times = timed(call, args.launches, device)
            figures.append(figure(rows, case, times, equal))
        wide = logits.float()
        sort = timed(partial(wide.sort, dim=-1, descending=True), args.launches, device)
        figures.append(figure(rows, "torch sort", sort, None))
        topk = timed(partial(wide.topk, 64, dim=-1), args.launches, device)
        figures.append(figure(rows, "torch topk 64", topk, None))
    facts = {
        "figure": "engine_sampling",
        "machine": name,
        "torch": torch.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "rows": figures,
    }
    print(json.dumps(facts))
    unequal = [f for f in figures if f["equal"] is not None and f["equal"] < LEAST_EQUAL]
    if unequal:
        raise SystemExit(f"fewer than {LEAST_EQUAL:.0%} of the ids are those of plain torch")


def random_logits(rows: int, vocab_size: int, logit_std: float, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = logit_std * torch.randn(rows, vocab_size, generator=generator)
    # numpy, behind the interpreter, has no bf16
    return logits.to(device, torch.float16 if device.type == "cpu" else torch.bfloat16)


def prepared(
    rows: int, vocab_size: int, options: dict[str, Any], device: torch.device
) -> tuple[Sampler, Tensor, Tensor]:
    """A sampler with a lane a row, and the batch's lanes and positions."""
    sampler = Sampler(rows, vocab_size, device)
    generator = torch.Generator().manual_seed(1)
    generated = torch.randint(vocab_size, (rows, 200), generator=generator).tolist()
    sampler.set_lanes([(i, SamplingParams(seed=i, **options), generated[i]) for i in range(rows)])
    lanes = torch.arange(rows, device=device)
    return sampler, lanes, lanes + 1000


def share_equal(sampler: Sampler, logits: Tensor, lanes: Tensor, positions: Tensor) -> float:
    """Share of the kernel's ids that are those of plain torch, at a few positions."""
    equal = 0
    for further in range(COMPARED_POSITIONS):
        batch = (logits, lanes, positions + further)
        table = (sampler.numbers.float(), sampler.wholes, sampler.counts)
        plain = chosen_ids(*batch, *table)
        ids = sampler.choose(*batch) if logits.is_cuda else interpreted(*batch, *table)
        equal += int((ids == plain).sum())
    return equal / (COMPARED_POSITIONS * len(lanes))


def interpreted(
    logits: Tensor,
    lanes: Tensor,
    positions: Tensor,
    numbers: Tensor,
    wholes: Tensor,
    counts: Tensor,
) -> Tensor:
    """The kernel on CPU tensors."""
    from xc_ray.engine.kernels.sample import ALIGN, choose

    scores = torch.empty(len(lanes), -(-logits.shape[1] // ALIGN) * ALIGN)
    ids = torch.empty(scores.shape, dtype=torch.int32)
    out = torch.empty(len(lanes), dtype=torch.int32)
    choose(
        logits, lanes, positions, numbers, wholes, counts, scores, ids, out, block=256, chunk=128
    )
    return out


def timed(call: Callable[[], object], launches: int, device: torch.device) -> list[float]:
    """Milliseconds of one call in each of several runs of `launches` calls."""
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return [1000 * (time.perf_counter() - started)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, as capture asks for it
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    graph.replay()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return times


def figure(rows: int, case: str, times: list[float], equal: float | None) -> dict[str, Any]:
    """Prints one line of the table and returns it."""
    middle, least, most = statistics.median(times), min(times), max(times)
    shown = "" if equal is None else f"{equal:.2%}"
    print(f"{rows:>5}  {case:<40} {middle:>9.4f} {least:>9.4f} {most:>9.4f} {shown:>8}")
    return {
        "rows": rows,
        "case": case,
        "ms": round(middle, 5),
        "least_ms": round(least, 5),
        "most_ms": round(most, 5),
        "equal": equal,
    }


if __name__ == "__main__":
    main()
