"""Time of a decode step against the limit of the machine.

    python benchmarks/engine_decode.py [--batches 1 32] [--mode greedy] [--kv fp8] [--no-graphs]

B random prompts are prefilled through the engine; once all decode, `--steps` steps are timed as one
block, the device idle before and after it, and each by itself (a step may return the tokens of the
step before, so single times tell the spread and the block the mean). `context` is the mean number
of cached tokens in the middle of the block. The limit is computed for it: product by product
max(bytes / 4.3 TB/s, FLOP / 788 TFLOP/s), plus keys and values read once. 7B, bf16: 3.49, 3.92,
5.42, 11.4 and 12.8 ms for B = 1, 8, 32, 128 at 2k and 256 at 1k.

Prints a table, then one JSON line.
"""

import statistics
import time
from typing import Any

from baseline import CASE, prefill_and_step, transformers_model
from shapes import (
    SAMPLING,
    Bench,
    PointFailed,
    arguments,
    decode_limit_s,
    drain,
    make_engine,
    random_ids,
    sampling,
    say,
    sync,
)

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.model.decoder import Decoder

CONTEXTS = {1: 2048, 8: 2048, 32: 2048, 128: 2048, 256: 1024}
TARGETS = {1: 1.25, 32: 1.20, 128: 1.15, 256: 1.20}  # times the limit, greedy
SAMPLED_MORE_MS = 0.6
WARMUP_STEPS = 10
PREFILL_TOKENS = 8192
KV_BYTES = {"auto": 2, "fp8": 1}


def main() -> None:
    """All points of all modes over one model."""
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help=f"default {list(CONTEXTS)}")
    parser.add_argument("--mode", nargs="+", choices=list(SAMPLING), default=list(SAMPLING))
    parser.add_argument("--kv", nargs="+", choices=list(KV_BYTES), default=["auto"])
    parser.add_argument("--no-graphs", action="store_true", help="eager steps")
    parser.add_argument("--no-overlap", action="store_true", help="a step returns its own tokens")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--baseline", type=int, nargs="*", metavar="B", help="default B is 1 and 32"
    )
    parser.add_argument("--max-model-len", type=int, help="default: the longest context and 1,024")
    args = parser.parse_args()
    args.batches = args.batches or ([1, 4] if args.tiny else list(CONTEXTS))
    with Bench("engine_decode", args) as bench:
        decoder = bench.decoder()
        for kv in args.kv:
            bench.attempt(f"kv {kv}", lambda kv=kv: over_points(bench, decoder, kv))
        if args.baseline is not None:
            model = transformers_model(bench, decoder)
            for batch in args.baseline or ([1] if args.tiny else [1, 32]):
                bench.attempt(f"{CASE} B={batch}", lambda b=batch: of_generate(bench, model, b))


def over_points(bench: Bench, decoder: Decoder, kv: str) -> None:
    """Every batch size and mode on one engine."""
    args = bench.args
    room = max(b * (context_of(bench, b) + 3 * 64 + args.steps) for b in args.batches)
    limits = EngineConfig(
        max_model_len=args.max_model_len or max(context_of(bench, b) for b in args.batches) + 1024,
        kv_cache_tokens=room + 1024,
        max_num_seqs=max(args.batches),
        max_prefill_tokens=PREFILL_TOKENS,
        kv_cache_dtype=kv,
        prefix_cache=False,
        cuda_graphs=not args.no_graphs,
        overlap=not args.no_overlap,
    )
    started = time.perf_counter()
    engine = make_engine(decoder, limits)
    say(f"# {limits}: made in {time.perf_counter() - started:.1f} s")
    for mode in args.mode:
        for batch in args.batches:
            name = f"{mode} B={batch} kv {kv}"
            bench.attempt(name, lambda b=batch, m=mode: point(bench, engine, b, m, kv))


def of_generate(bench: Bench, model: Any, batch: int) -> None:
    """A step of transformers' generate() at the same context."""
    new, context = (4 if bench.tiny else 24), context_of(bench, batch)
    _, step = prefill_and_step(bench, model, batch, context - new // 2, new)
    limit = decode_limit_s(bench.config, batch, context)
    bench.row(
        case=CASE,
        batch=batch,
        context=context,
        step_ms=step * 1e3,
        ratio=None if bench.tiny else step / limit,
        tokens_per_s=batch / step,
    )


def context_of(bench: Bench, batch: int) -> int:
    """Tokens of context that a batch size is measured at."""
    if bench.tiny:
        return 96
    return CONTEXTS.get(batch, 2048 if batch <= 128 else 1024)


def point(bench: Bench, engine: Engine, batch: int, mode: str, kv: str) -> None:
    """Fills the cache, times the block, gives the cache back."""
    steps = bench.args.steps if not bench.tiny else min(bench.args.steps, 12)
    context = context_of(bench, batch)
    # The first sequences decode while the last are prefilled: on average for half of that time.
    filling = -(-batch * context // PREFILL_TOKENS)
    length = max(1, context - filling // 2 - WARMUP_STEPS - steps // 2)
    params = sampling(mode, 2 * filling + WARMUP_STEPS + steps + 32)
    started = time.perf_counter()
    counts = {str(i): 0 for i in range(batch)}
    for i, name in enumerate(counts):
        ids = random_ids(bench.config, length, bench.args.seed + i)
        engine.add(name, ids, params)
    try:
        while not all(counts.values()):
            take(engine, counts)
        filled = time.perf_counter() - started
        for _ in range(WARMUP_STEPS):
            take(engine, counts)
        before = sum(counts.values())
        middle = length + before / batch + steps / 2
        whole, each = timed(bench, engine, counts, steps)
        if sum(counts.values()) - before != steps * batch:
            raise PointFailed(f"{sum(counts.values()) - before} tokens in {steps} steps of {batch}")
    finally:
        drain(engine, counts)
    limit = decode_limit_s(bench.config, batch, middle, kv_bytes=KV_BYTES[kv]) * 1e3
    target = None if bench.tiny else TARGETS.get(batch)
    more = SAMPLED_MORE_MS if mode == "sampled" else 0.0
    bench.row(
        case=f"{mode}, kv {kv}{', eager' if bench.args.no_graphs else ''}",
        batch=batch,
        context=round(middle),
        step_ms=whole / steps * 1e3,
        median_ms=statistics.median(each) * 1e3,
        p95_ms=sorted(each)[int(0.95 * len(each))] * 1e3,
        limit_ms=None if bench.tiny else limit,
        ratio=None if bench.tiny else whole / steps * 1e3 / limit,
        target=target,
        target_ms=target * limit + more if target else None,
        tokens_per_s=batch * steps / whole,
        fill_s=filled,
    )


def timed(
    bench: Bench, engine: Engine, counts: dict[str, int], steps: int
) -> tuple[float, list[float]]:
    """Seconds of `steps` steps together, and of each."""
    each = []
    sync(bench.device)
    started = last = time.perf_counter()
    for _ in range(steps):
        take(engine, counts)
        now = time.perf_counter()
        each.append(now - last)
        last = now
    sync(bench.device)
    return time.perf_counter() - started, each


def take(engine: Engine, counts: dict[str, int]) -> None:
    """One step; counts what it brought."""
    for output in engine.step():
        if output.finish_reason is not None:
            raise PointFailed(f"a sequence ended: {output.finish_reason}, {output.error}")
        counts[output.request_id] = output.num_generated


if __name__ == "__main__":
    main()
