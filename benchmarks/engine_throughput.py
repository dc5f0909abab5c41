"""Output tokens per second of 256 requests at once, through the engine, offline.

    python benchmarks/engine_throughput.py [--kv auto fp8] [--sets uniform mixed] [--baseline 32]

`uniform`: 512 random ids in, 256 tokens out, each. `mixed`: in 32 to 2,048 (log-uniform), out 16 to
512 (uniform), from the seed. No stop ids: every answer has its full length. The time is from the
first `add` to the last token, prefill included; one unmeasured run of short requests that end one
after another comes before it, so that every batch size has been seen.

`--baseline B ...` measures transformers' own `generate()` over the same weights (baseline.py) in
static batches of B prompts of 512 ids, `--baseline-tokens` new tokens each.
`tokens_per_s` of that row is what was measured, prefill included; `at_full_length` is the rate for
the uniform set's answers if further steps took what the measured ones took, which favours the
baseline, since its cache grows.

Prints a table, then one JSON line.
"""

import argparse
import random
import statistics
from typing import Any

from baseline import CASE, prefill_and_step, transformers_model
from shapes import (
    SAMPLING,
    Bench,
    Outcome,
    Request,
    arguments,
    make_engine,
    random_ids,
    run,
    sampling,
)

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder

TARGETS = {"greedy": 10_600, "sampled": 10_300}  # uniform, 256 requests, keys and values in bf16
Lengths = list[tuple[int, int]]  # tokens in and out of each request


def main() -> None:
    """Every set in every mode over one model."""
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--max-prefill-tokens", type=int, default=8192)
    parser.add_argument("--sets", nargs="+", choices=("uniform", "mixed"))
    parser.add_argument("--mode", nargs="+", choices=list(SAMPLING), default=list(SAMPLING))
    parser.add_argument("--kv", nargs="+", choices=("auto", "fp8"), default=["auto"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--baseline", type=int, nargs="*", metavar="B", help="default B is 32")
    parser.add_argument("--baseline-tokens", type=int, default=64)
    args = parser.parse_args()
    args.sets = args.sets or ["uniform", "mixed"]
    if args.tiny:
        args.requests, args.prompt_tokens, args.output_tokens = 6, 24, 8
        args.baseline_tokens = 4
    with Bench("engine_throughput", args) as bench:
        decoder = bench.decoder()
        for kv in args.kv:
            bench.attempt(f"kv {kv}", lambda kv=kv: over_sets(bench, decoder, kv))
        if args.baseline is not None:
            bench.attempt("transformers", lambda: over_batches(bench, decoder))


def over_sets(bench: Bench, decoder: Decoder, kv: str) -> None:
    """Every set in every mode on one engine."""
    args = bench.args
    sets = {name: lengths_of(args, name) for name in args.sets}
    engine = throughput_engine(
        decoder, list(sets.values()), kv=kv, max_prefill_tokens=args.max_prefill_tokens
    )
    for mode in args.mode:
        warm_up(engine, mode, args.requests)
        for name, lengths in sets.items():
            bench.attempt(
                f"{name}, {mode}, kv {kv}",
                lambda n=name, m=mode, x=lengths: case(bench, engine, n, m, kv, x),
            )


def case(bench: Bench, engine: Engine, name: str, mode: str, kv: str, lengths: Lengths) -> None:
    """One set in one mode: the median run by its time."""
    outcomes = [
        throughput(engine, mode, lengths, bench.args.seed + i) for i in range(bench.args.repeats)
    ]
    outcome = sorted(outcomes, key=lambda o: o.seconds)[(len(outcomes) - 1) // 2]
    wanted = name == "uniform" and kv == "auto" and bench.args.requests == 256
    bench.row(
        case=f"{name}, {mode}, kv {kv}",
        requests=len(lengths),
        tokens_in=sum(n for n, _ in lengths),
        tokens_out=outcome.output_tokens,
        steps=outcome.steps,
        seconds=outcome.seconds,
        tokens_per_s=outcome.tokens_per_s,
        target=TARGETS[mode] if wanted else None,
        first_token_s=statistics.median(outcome.first_token_s),
        interval_ms=statistics.mean(outcome.interval_s) * 1e3,
    )


def lengths_of(args: argparse.Namespace, name: str) -> Lengths:
    """Tokens in and out of each request of a set."""
    if name == "uniform":
        return [(args.prompt_tokens, args.output_tokens)] * args.requests
    rng = random.Random(args.seed)
    low, high, out_low, out_high = (8, 64, 2, 12) if args.tiny else (32, 2048, 16, 512)
    return [
        (int(low * (high / low) ** rng.random()), rng.randint(out_low, out_high))
        for _ in range(args.requests)
    ]


def throughput_engine(
    decoder: Decoder, sets: list[Lengths], *, kv: str = "auto", max_prefill_tokens: int = 8192
) -> Engine:
    """An engine that holds any one of the sets whole."""
    requests = max(len(lengths) for lengths in sets)
    longest = max(i + o for lengths in sets for i, o in lengths)
    warm_up_tokens = sum(WARM_UP_PROMPT + 2 + i for i in range(requests))
    whole = max(sum(i + o for i, o in lengths) for lengths in sets)
    limits = EngineConfig(
        max_model_len=max(longest, WARM_UP_PROMPT + requests + 2) + 64,
        kv_cache_tokens=max(whole, warm_up_tokens) + 128 * requests,
        max_num_seqs=requests,
        max_prefill_tokens=max_prefill_tokens,
        kv_cache_dtype=kv,
        prefix_cache=False,
    )
    return make_engine(decoder, limits)


WARM_UP_PROMPT = 16


def warm_up(engine: Engine, mode: str, requests: int) -> None:
    """Short requests that end one after another: every batch size from `requests` down to one."""
    config = engine.decoder.config
    run(
        engine,
        [
            Request(random_ids(config, WARM_UP_PROMPT, i), sampling(mode, 2 + i))
            for i in range(requests)
        ],
    )


def throughput(engine: Engine, mode: str, lengths: Lengths, seed: int = 0) -> Outcome:
    """All requests of a set at once."""
    config: XComposerConfig = engine.decoder.config
    requests = [
        Request(random_ids(config, n, seed * 1_000_003 + i), sampling(mode, out, seed=i))
        for i, (n, out) in enumerate(lengths)
    ]
    return run(engine, requests)


def over_batches(bench: Bench, decoder: Decoder) -> None:
    """transformers' generate() for each batch size, over the weights of `decoder`."""
    model = transformers_model(bench, decoder)
    for batch in bench.args.baseline or ([2] if bench.tiny else [32]):
        bench.attempt(f"{CASE}, batch {batch}", lambda b=batch: static_batch(bench, model, b))


def static_batch(bench: Bench, model: Any, batch: int) -> None:
    """One batch: its prefill alone, then with all new tokens."""
    args = bench.args
    new, full = args.baseline_tokens, args.output_tokens
    prefill, step = prefill_and_step(bench, model, batch, args.prompt_tokens, new)
    whole = prefill + (new - 1) * step
    bench.row(
        case=f"{CASE}, {args.prompt_tokens} in",
        batch=batch,
        tokens_out=new,
        seconds=whole,
        prefill_s=prefill,
        step_ms=step * 1e3,
        tokens_per_s=batch * new / whole,
        at_full_length=batch * full / (prefill + (full - 1) * step),
    )


if __name__ == "__main__":
    main()
