"""Prefill of 8k tokens: text, half of it image rows in one piece or four, and many short prompts.

    python benchmarks/engine_prefill.py [--chunks 8192 4096 16384]

One request with `max_tokens` 1 goes through the engine, prefix cache off, from `add` to its token:
the median of `--repeats` after one unmeasured. `tflops` counts the products of the layers (114.4 T
for 8k rows of text at 7B; PLoRA's on top for image rows) over the whole time, attention, head and
host included. Embeddings lie on the device.

Prints a table, then one JSON line.
"""

import statistics

from baseline import CASE, prefill_and_step, transformers_model
from shapes import (
    Bench,
    Request,
    arguments,
    make_engine,
    prefill_flop,
    random_ids,
    random_image,
    run,
    sampling,
)

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.model.decoder import Decoder

SHORT_PROMPTS = 16
TARGET_MS = 210.0  # 8k tokens of text
TARGET_IMAGE = 1.08  # times the text's, half of the tokens image rows


def main() -> None:
    """Every case with every chunk size over one model."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="in all, a multiple of 64")
    parser.add_argument("--chunks", type=int, nargs="+", help="max_prefill_tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--baseline", action="store_true", help="generate() of transformers too")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.repeats = 256, 2
    args.chunks = args.chunks or ([256, 128] if args.tiny else [8192, 4096, 16384])
    with Bench("engine_prefill", args) as bench:
        decoder = bench.decoder()
        sets = cases(bench)
        for chunk in args.chunks:
            bench.attempt(f"chunks of {chunk}", lambda c=chunk: over_cases(bench, decoder, sets, c))
        if args.baseline:
            bench.attempt(CASE, lambda: of_generate(bench, decoder))


def of_generate(bench: Bench, decoder: Decoder) -> None:
    """The text by transformers' generate(), which computes a prompt as one piece."""
    tokens = bench.args.tokens
    prefill, _ = prefill_and_step(bench, transformers_model(bench, decoder), 1, tokens, 1)
    tflops = prefill_flop(bench.config, tokens) / prefill / 1e12
    bench.row(case=f"{CASE}, text", tokens=tokens, ms=prefill * 1e3, tflops=tflops)


def cases(bench: Bench) -> dict[str, list[Request]]:
    """Requests by the name of their case; all have the same number of prompt tokens."""
    n = bench.args.tokens
    short = [laid_out(bench, n // SHORT_PROMPTS, 0, seed=i) for i in range(SHORT_PROMPTS)]
    return {
        "text": [laid_out(bench, n, 0)],
        "half image rows, one piece": [laid_out(bench, n, 1)],
        "half image rows, four pieces": [laid_out(bench, n, 4)],
        f"text, {SHORT_PROMPTS} prompts": short,
    }


def laid_out(bench: Bench, tokens: int, pieces: int, seed: int = 0) -> Request:
    """Half of `tokens` as rows of `pieces` images, text before, between and behind them."""
    config, seed = bench.config, bench.args.seed + seed
    rows = tokens // 2 // pieces if pieces else 0
    text = random_ids(config, tokens - rows * pieces, seed)
    gap = len(text) // (pieces + 1)
    ids, row = text[:gap] if pieces else text, config.decoder.vocab_size
    for piece in range(1, pieces + 1):
        ids = ids + list(range(row, row + rows))
        row += rows
        ids += text[piece * gap : (piece + 1) * gap if piece < pieces else None]
    images = (random_image(config, rows, i, bench.device, bench.dtype) for i in range(pieces))
    return Request(ids, sampling("greedy", 1), tuple(images))


def over_cases(bench: Bench, decoder: Decoder, sets: dict[str, list[Request]], chunk: int) -> None:
    """Every case on one engine."""
    tokens = bench.args.tokens
    limits = EngineConfig(
        max_model_len=tokens + 64,
        kv_cache_tokens=2 * tokens + 64 * SHORT_PROMPTS,
        max_num_seqs=SHORT_PROMPTS,
        max_prefill_tokens=chunk,
        prefix_cache=False,
        cuda_graphs=False,  # of decode steps, which there are none of
    )
    engine = make_engine(decoder, limits)
    text_ms: list[float] = []
    for name, requests in sets.items():
        bench.attempt(
            f"{name}, chunks of {chunk}",
            lambda n=name, r=requests: case(bench, engine, n, r, text_ms),
        )


def case(
    bench: Bench, engine: Engine, name: str, requests: list[Request], text_ms: list[float]
) -> None:
    """Times one case; the first is text alone, which the others are compared with."""
    run(engine, requests)
    times = [run(engine, requests).seconds * 1e3 for _ in range(bench.args.repeats)]
    ms = statistics.median(times)
    text_ms.append(ms)
    image_rows = sum(image.num_rows for r in requests for image in r.images)
    tokens = sum(len(r.ids) for r in requests)
    chunk = engine.config.max_prefill_tokens
    bench.row(
        case=name,
        chunk=chunk,
        tokens=tokens,
        image_rows=image_rows,
        ms=ms,
        least_ms=min(times),
        most_ms=max(times),
        tflops=prefill_flop(bench.config, tokens, image_rows) / ms / 1e9,
        vs_text=ms / text_ms[0],
        target=TARGET_IMAGE if image_rows else None,
        target_ms=TARGET_MS if len(text_ms) == 1 and tokens == 8192 else None,
    )


if __name__ == "__main__":
    main()
