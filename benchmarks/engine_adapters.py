"""Output tokens per second with LoRA adapters mixed in one batch, against the base model alone.

    python benchmarks/engine_adapters.py [--adapters 0 1 4 8 16 32 64] [--rank 16] [--requests 64]

All requests at once, 512 random ids in and 256 tokens out each, greedy, no stop ids; request i uses
adapter i mod N, which is on the device before the clock starts. `0` is the same engine, slots and
all, with requests for the base model; `ratio` is to the base without room for adapters, which is
measured first. A row is the median of `--repeats` runs.

`--load` measures how long an adapter takes from host memory to the device, and what a request
waits for its first token when its adapter is there and when it has to come, beside nothing and
beside the other requests decoding; `stall_ms` is by how much the longest interval of those grows,
`pack_stall_ms` the same while a thread packs an adapter.

Prints a table, then one JSON line.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from shapes import (
    Bench,
    Outcome,
    Request,
    arguments,
    drain,
    make_engine,
    random_ids,
    run,
    sampling,
    sync,
)

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import LINEARS, PackedAdapter
from xc_ray.model.adapter import Adapter, LoraPair
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder

TARGETS = {32: 0.85}  # of the base's tokens/s, 64 requests, rank 16


def main() -> None:
    """Every number of adapters over one model."""
    parser = arguments(__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4, 8, 16, 32, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--max-prefill-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.adapters, args.requests = [0, 1, 3], 6
        args.prompt_tokens, args.output_tokens, args.repeats = 24, 8, 1
    with Bench("engine_adapters", args) as bench:
        decoder = bench.decoder()
        base: list[float] = []
        bench.attempt("base", lambda: base.append(without(bench, decoder)))
        engine = make_engine(decoder, limits(args, max(args.adapters)))
        packed = [
            engine.pack(random_adapter(bench.config, args.rank, seed))
            for seed in range(max(args.adapters))
        ]
        bring(engine, packed)
        for count in args.adapters:
            bench.attempt(
                f"{count} adapters",
                lambda n=count: mixed(bench, engine, packed[:n], base[0] if base else None),
            )
        if args.load:
            bench.attempt("load", lambda: loading(bench, decoder))


def limits(args: argparse.Namespace, slots: int) -> EngineConfig:
    """An engine that holds all requests at once."""
    length = args.prompt_tokens + args.output_tokens + 64
    return EngineConfig(
        max_model_len=length,
        kv_cache_tokens=args.requests * (length + 64),
        max_num_seqs=args.requests,
        max_prefill_tokens=args.max_prefill_tokens,
        prefix_cache=False,
        max_loras=slots,
        max_lora_rank=args.rank,
    )


def random_adapter(config: XComposerConfig, rank: int, seed: int) -> Adapter:
    """An adapter of a rank on all five linear maps of every layer."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.01, generator=generator)

    pairs = {
        (layer, name): LoraPair(
            numbers(rank, config.linear_shapes[name][1]),
            numbers(config.linear_shapes[name][0], rank),
            2.0,
        )
        for layer in range(config.decoder.num_hidden_layers)
        for name in LINEARS
    }
    return Adapter(f"random {rank} {seed}", rank, pairs)


def bring(engine: Engine, adapters: list[PackedAdapter]) -> None:
    """Has every adapter used once, and every batch size seen."""
    ids = random_ids(engine.decoder.config, 16, 0)
    num = engine.config.max_num_seqs
    for start in range(0, max(1, len(adapters)), num):
        some: list[PackedAdapter | None] = [*adapters[start : start + num]] or [None]
        requests = [
            Request(ids, sampling("greedy", 2 + i), adapter=some[i % len(some)]) for i in range(num)
        ]
        run(engine, requests)


def requests_of(
    args: argparse.Namespace, engine: Engine, adapters: list[PackedAdapter]
) -> list[Request]:
    """The measured requests, their adapters by turns."""
    some: list[PackedAdapter | None] = [*adapters] or [None]
    return [
        Request(
            random_ids(engine.decoder.config, args.prompt_tokens, args.seed * 1_000_003 + i),
            sampling("greedy", args.output_tokens),
            adapter=some[i % len(some)],
        )
        for i in range(args.requests)
    ]


def median_run(bench: Bench, engine: Engine, adapters: list[PackedAdapter]) -> Outcome:
    """The median run by its time."""
    requests = requests_of(bench.args, engine, adapters)
    outcomes = [run(engine, requests) for _ in range(bench.args.repeats)]
    return sorted(outcomes, key=lambda o: o.seconds)[(len(outcomes) - 1) // 2]


def without(bench: Bench, decoder: Decoder) -> float:
    """Tokens per second of the base model in an engine without room for adapters."""
    engine = make_engine(decoder, limits(bench.args, 0))
    bring(engine, [])
    outcome = median_run(bench, engine, [])
    report(bench, "base, no slots", 0, outcome, outcome.tokens_per_s)
    return outcome.tokens_per_s


def mixed(bench: Bench, engine: Engine, adapters: list[PackedAdapter], base: float | None) -> None:
    """One number of adapters."""
    outcome = median_run(bench, engine, adapters)
    report(bench, f"{len(adapters)} adapters, rank {bench.args.rank}", len(adapters), outcome, base)


def report(bench: Bench, case: str, adapters: int, outcome: Outcome, base: float | None) -> None:
    """One row."""
    bench.row(
        case=case,
        adapters=adapters,
        requests=bench.args.requests,
        seconds=outcome.seconds,
        tokens_per_s=outcome.tokens_per_s,
        ratio=outcome.tokens_per_s / base if base else None,
        target=TARGETS.get(adapters) if bench.args.rank == 16 else None,
        first_token_s=statistics.median(outcome.first_token_s),
        interval_ms=statistics.mean(outcome.interval_s) * 1e3,
    )


# --- loading ------------------------------------------------------------------------------------


def loading(bench: Bench, decoder: Decoder) -> None:
    """From the host to the device and to a first token, alone and beside running requests."""
    args = bench.args
    engine = make_engine(decoder, replace(limits(args, 2), max_num_seqs=args.requests + 1))
    bring(engine, [])
    first = random_adapter(bench.config, args.rank, 0)
    started = time.perf_counter()
    packed = [engine.pack(first)]
    pack_ms = (time.perf_counter() - started) * 1e3
    packed += [engine.pack(random_adapter(bench.config, args.rank, 1 + i)) for i in range(9)]
    running = requests_of(args, engine, [])[:-1] if args.requests > 1 else []
    for others in ([], running):
        cold = [first_token(engine, adapter, others) for adapter in packed]
        warm = [first_token(engine, packed[-1], others) for _ in range(5)]
        base = [first_token(engine, None, others) for _ in range(5)]
        bench.row(
            case=f"load, rank {args.rank}, beside {len(others)}",
            megabytes=packed[0].nbytes / 1e6,
            pack_ms=pack_ms,
            cold_ms=statistics.median(t for t, _ in cold) * 1e3,
            warm_ms=statistics.median(t for t, _ in warm) * 1e3,
            base_ms=statistics.median(t for t, _ in base) * 1e3,
            stall_ms=(statistics.median(s for _, s in cold) - statistics.median(s for _, s in warm))
            * 1e3,
            pack_stall_ms=pack_stall(engine, first, others) * 1e3,
        )


def pack_stall(engine: Engine, adapter: Adapter, others: list[Request]) -> float:
    """Seconds by which the longest step exceeds the median one while a thread packs an adapter."""
    begin(engine, others)
    steps: list[float] = []
    with ThreadPoolExecutor(1) as thread:
        packing = thread.submit(engine.pack, adapter)
        before = time.perf_counter()
        while others and not packing.done():
            engine.step()
            now = time.perf_counter()
            steps.append(now - before)
            before = now
    drain(engine, [f"other {i}" for i in range(len(others))])
    return max(steps) - statistics.median(steps) if steps else 0.0


def begin(engine: Engine, others: list[Request]) -> None:
    """Brings other requests to decoding."""
    for i, other in enumerate(others):
        engine.add(f"other {i}", other.ids, other.params)
    for _ in range(3 if others else 0):
        engine.step()
    while others and engine.num_waiting:
        engine.step()


def first_token(
    engine: Engine, adapter: PackedAdapter | None, others: list[Request]
) -> tuple[float, float]:
    """Seconds to the first token of a request of 16 ids, and the longest step meanwhile."""
    begin(engine, others)
    sync(engine.decoder.device)
    started = before = time.perf_counter()
    engine.add("one", random_ids(engine.decoder.config, 16, 1), sampling("greedy", 2), (), adapter)
    found, longest = 0.0, 0.0
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
        if any(o.request_id == "one" and o.ids for o in outputs):
            found = now - started
            break
    drain(engine, ["one", *(f"other {i}" for i in range(len(others)))])
    return found, longest


if __name__ == "__main__":
    main()
