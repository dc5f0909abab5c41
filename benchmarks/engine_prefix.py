"""Time to the first token of a second turn over the same HD image, against the first turn's.

    python benchmarks/engine_prefix.py [--with-encoder]

The first turn holds one image of 24 tiles (10,101 rows in 2.5) and 200 tokens of text. The second
repeats it with the answer and 60 new tokens, and brings no embeddings: the engine holds the rows by
the image's digest. Each repeat has an image of its own; medians. Embeddings are a random tensor on
the device, or with `--with-encoder` what the vision tower makes of a random canvas, whose time
counts in the first turn.

Prints a table, then one JSON line.
"""

import statistics
import time

import torch
from baseline import CASE, prefill_and_step, transformers_model
from shapes import (
    Bench,
    Outcome,
    PointFailed,
    Request,
    arguments,
    make_engine,
    random_ids,
    random_image,
    run,
    sampling,
    sync,
)

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import Image
from xc_ray.model.decoder import Decoder
from xc_ray.model.xcomposer import ImageEncoder

ROWS, COLS = 4, 6  # of tiles
TEXT_BEFORE, TEXT_BEHIND, NEW_TEXT, ANSWER = 20, 180, 60, 32
TARGET = 0.15


def main() -> None:
    """Some conversations of two turns on one engine."""
    parser = arguments(__doc__)
    parser.add_argument("--with-encoder", action="store_true", help="the real tower's shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-prefill-tokens", type=int, default=8192)
    parser.add_argument("--baseline", action="store_true", help="generate() of transformers too")
    parser.add_argument("--kv", choices=("auto", "fp8"), default="auto")
    args = parser.parse_args()
    if args.tiny:
        args.repeats = 2
    with Bench("engine_prefix", args) as bench:
        decoder = bench.decoder()
        encoder = bench.module(ImageEncoder) if args.with_encoder else None
        bench.attempt("two turns", lambda: turns(bench, decoder, encoder))
        if args.baseline:
            bench.attempt(CASE, lambda: of_generate(bench, decoder))


def of_generate(bench: Bench, decoder: Decoder) -> None:
    """The second turn by transformers' generate(): as many tokens, as text, from the beginning."""
    rows = bench.config.image_tokens(ROWS, COLS) if bench.config.family.tiled else 256
    tokens = rows + TEXT_BEFORE + TEXT_BEHIND + ANSWER + NEW_TEXT
    prefill, _ = prefill_and_step(bench, transformers_model(bench, decoder), 1, tokens, 1)
    bench.row(case=f"{CASE}, {tokens:,} tokens", second_turn_ms=prefill * 1e3)


def turns(bench: Bench, decoder: Decoder, encoder: ImageEncoder | None) -> None:
    """Measures, and compares the medians."""
    args = bench.args
    rows = bench.config.image_tokens(ROWS, COLS) if bench.config.family.tiled else 256
    longest = rows + TEXT_BEFORE + TEXT_BEHIND + NEW_TEXT + 2 * ANSWER
    limits = EngineConfig(
        max_model_len=longest + 64,
        kv_cache_tokens=(args.repeats + 2) * (longest + 128),
        max_num_seqs=4,
        max_prefill_tokens=args.max_prefill_tokens,
        kv_cache_dtype=args.kv,
    )
    engine = make_engine(decoder, limits)
    found = [conversation(bench, engine, encoder, rows, seed) for seed in range(args.repeats + 1)]
    encoding, first, second = (list(x) for x in zip(*found[1:], strict=True))  # one to warm up
    encode_ms = statistics.median(encoding) * 1e3
    first_ms = statistics.median(o.first_token_s[0] for o in first) * 1e3
    second_ms = statistics.median(o.first_token_s[0] for o in second) * 1e3
    spread = [o.first_token_s[0] * 1e3 for o in second]
    bench.row(
        case=f"{rows:,} image rows, kv {args.kv}",
        encode_ms=encode_ms if encoder else None,
        first_turn_ms=encode_ms + first_ms,
        second_turn_ms=second_ms,
        least_ms=min(spread),
        most_ms=max(spread),
        cached=second[0].num_cached[0],
        ratio=second_ms / (encode_ms + first_ms),
        target=TARGET,
    )


def conversation(
    bench: Bench, engine: Engine, encoder: ImageEncoder | None, rows: int, seed: int
) -> tuple[float, Outcome, Outcome]:
    """Seconds in the encoder, then both turns."""
    config, seed = bench.config, bench.args.seed + seed
    image = random_image(config, rows, seed, bench.device, bench.dtype)
    encoding = 0.0
    if encoder is not None:
        encoding, image.embeddings = encoded(bench, encoder, seed)
    text = random_ids(config, TEXT_BEFORE + TEXT_BEHIND + NEW_TEXT, seed)
    vocab, behind = config.decoder.vocab_size, TEXT_BEFORE + TEXT_BEHIND
    ids = [*text[:TEXT_BEFORE], *range(vocab, vocab + rows), *text[TEXT_BEFORE:behind]]
    first = run(engine, [Request(ids, sampling("greedy", ANSWER), (image,))])
    later = Image(rows, image.digest)
    ids = [*ids, *first.ids[0], *text[behind:]]
    second = run(engine, [Request(ids, sampling("greedy", ANSWER), (later,))])
    if second.num_cached[0] < rows:
        raise PointFailed(f"the second turn found {second.num_cached[0]} tokens in the cache")
    return encoding, first, second


@torch.inference_mode()
def encoded(bench: Bench, encoder: ImageEncoder, seed: int) -> tuple[float, torch.Tensor]:
    """Seconds from a canvas on the host to embeddings on the device, and these."""
    generator = torch.Generator().manual_seed(seed)
    tiles = (ROWS, COLS) if bench.config.family.tiled else (1, 1)
    size = (tiles[0] * bench.config.tile, tiles[1] * bench.config.tile, 3)
    canvas = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    sync(bench.device)
    started = time.perf_counter()
    (embeddings,) = encoder([canvas])
    sync(bench.device)
    return time.perf_counter() - started, embeddings


if __name__ == "__main__":
    main()
