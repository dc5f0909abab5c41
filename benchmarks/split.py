"""Encoder and decoder on GPUs of their own against both on every GPU: goodput at the same GPUs.

    python benchmarks/split.py --gpus 4 --layout together apart:1

`together`: each GPU has a decoder (0.85) and an encoder (0.15). `apart:E`: E GPUs have an encoder
each, the others a decoder. A case TEXT:PICTURES is the share of requests without a picture, and how
many of 1120 px the others have, each of 4 tiles and new to the server.
Arrivals are Poisson, at `--load` times what `together` would manage by the costs below, for
`--seconds`. An answer is good if its first token came within `--ttft` and its tokens every
`--interval` on average. `good/s` of a case is the best over the loads.

Without `--model` a checkpoint of `--variant` with random weights is made in `--work`, once. Serve
runs with HAProxy and throughput mode, four ingress replicas, and packs replicas: without that, the
encoders come first, share a GPU, and a decoder finds none.

Prints a row a load, a table of the best, then one JSON line.
"""

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from engine_http import model_folder
from load import ask_tokens_a_word
from load_client import Target, drive
from load_mix import Arrival, Drawer, Length, Mix, Weighted, poisson
from load_report import Level, figures
from served import MODES, environment, serving_args
from shapes import Bench, arguments, say

from xc_ray.prompt.tiles import image_grid

SIDE = 1120  # pixels of a picture
NAME = "bench"
INGRESSES = 4
CLIENTS = 4
# One H100 at 7B, to choose rates: seconds a prompt token, a square, and an answer's token.
PROMPT_S, SQUARE_S, TOKEN_S = 1 / 32_000, 1 / 290, 0.25e-3
CASES = [(text, images) for text in (0.0, 0.5, 0.9) for images in (1, 2, 4, 8)]
PACKED = {"RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1"}


def main() -> None:
    """Every case in every layout."""
    parser = arguments(__doc__)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--layout", nargs="+", default=["together", "apart:1"])
    parser.add_argument("--cases", type=a_case, nargs="+", default=CASES, metavar="TEXT:PICTURES")
    parser.add_argument("--load", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--input", type=int, default=200, help="tokens of text a request (200)")
    parser.add_argument("--output", type=int, default=128, help="tokens an answer (128)")
    parser.add_argument("--ttft", type=float, default=3.0)
    parser.add_argument("--interval", type=float, default=0.1)
    parser.add_argument("--max-prefill-tokens", type=int, default=2048)
    parser.add_argument("--mode", choices=list(MODES), help="of Serve (haproxy; tiny: default)")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/xc_ray_split"))
    parser.add_argument("--port", type=int, default=8129)
    args = parser.parse_args()
    if args.tiny:
        args.input, args.output = 20, 8
    with Bench("split", args) as bench:
        model = str(model_folder(bench))
        best: dict[tuple[str, float, int], float] = {}
        for layout in args.layout:
            bench.attempt(layout, lambda at=layout: served(bench, at, model, best))
        summary(args, best)


def a_case(text: str) -> tuple[float, int]:
    """`0.5:4`: half of the requests without a picture, the others with four."""
    share, _, images = text.partition(":")
    return float(share), int(images)


def served(
    bench: Bench, layout: str, model: str, best: dict[tuple[str, float, int], float]
) -> None:
    """One layout: starts it, and runs every case."""
    args = bench.args
    kind, _, number = layout.partition(":")
    encoders = int(number) if kind == "apart" else args.gpus
    decoders = args.gpus - encoders if kind == "apart" else args.gpus
    shares = (1.0, 1.0) if kind == "apart" else (0.15, 0.85)
    if bench.tiny:
        shares = (0, 0)
    app: dict[str, Any] = {
        "model": model,
        "served_model_name": NAME,
        "encoder": {
            "num_gpus": shares[0],
            "num_cpus": 0.25 if bench.tiny else 2,
            "compile_tower": True,
            "cuda_graphs": True,
        },
        "decoder": {
            "num_gpus": shares[1],
            "max_num_seqs": 128,
            "max_prefill_tokens": args.max_prefill_tokens,
        },
        "limits": {"max_wait_s": args.ttft / 2},
    }
    if not bench.tiny:
        app["max_model_len"] = 24_576
    replicas = {"Ingress": INGRESSES, "Decoder": decoders, "VisionEncoder": encoders}
    if bench.tiny:
        replicas |= {"Ingress": 1}
    mode = MODES[args.mode or ("default" if bench.tiny else "haproxy")]
    started = time.monotonic()
    with environment({**mode, **PACKED}), serving_args(args.port, replicas=replicas, **app) as url:
        say(f"# {layout}: ready in {time.monotonic() - started:.1f} s")
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            a_word = ask_tokens_a_word(client, NAME)
        target = Target.of(url, {})
        warm_up(target, a_word, args)
        for text, images in args.cases:
            bench.attempt(
                f"{layout}, {text:.0%} text, {images} pictures",
                lambda t=text, n=images: best.update(
                    {(layout, t, n): case(bench, layout, target, a_word, t, n)}
                ),
            )


def warm_up(target: Target, a_word: float, args: argparse.Namespace) -> None:
    """Pictures and text for every replica."""
    for images in (0, 1, 4):
        drawer = Drawer.of(a_mix(args, 0.0, images), a_word)
        requests = drawer.requests([Arrival(0.05 * i) for i in range(24)], -1)
        run = drive(target, requests, 120, 1 if args.tiny else CLIENTS)
        outcomes = dict(Counter(answer.outcome for answer in run.answers))
        took = max(answer.finished for answer in run.answers)
        say(f"# warm-up, {images} pictures: {outcomes} in {took:.1f} s")


def case(
    bench: Bench, layout: str, target: Target, a_word: float, text: float, images: int
) -> float:
    """The best goodput over the loads."""
    args = bench.args
    drawer = Drawer.of(a_mix(args, text, images), a_word)
    found = []
    for number, load in enumerate(args.load):
        rate = load * args.gpus / seconds_a_request(bench, text, images)
        arrivals = poisson(rate, args.seconds, args.seed, number)
        requests = drawer.requests(arrivals, number + 100 * images + round(1e4 * text))
        run = drive(target, requests, 120, 1 if bench.tiny else CLIENTS)
        row = figures(run, args.seconds, Level(args.ttft, args.interval))
        found.append(row["goodput_per_s"])
        bench.row(
            case=layout,
            text=text,
            pictures=images,
            load=load,
            offered=row["offered_per_s"],
            done=row["completed_per_s"],
            good=row["goodput_per_s"],
            ttft_p50=row["ttft_s"]["p50"],
            ttft_p99=row["ttft_s"]["p99"],
            interval_p50=row["interval_s"]["p50"],
            interval_p99=row["interval_s"]["p99"],
            refused=row["refused"]["count"],
            errors=sum(row["errors"].values()) + row["cut"]["count"],
            late=row["late_s"]["p99"],
        )
        if row["errors"]:
            say(f"# errors: {row['errors']}")
    return max(found)


def a_mix(args: argparse.Namespace, text: float, images: int) -> Mix:
    """Requests of one case."""
    pictures = Weighted((0, images), (text, 1 - text)) if text else Weighted((images,), (1.0,))
    return Mix(
        models=Weighted((NAME,), (1.0,)),
        images=pictures,
        sizes=Weighted(((SIDE, SIDE),), (1.0,)),
        input=Length(args.input),
        output=Length(args.output),
        ignore_eos=True,
        seed=args.seed,
    )


def seconds_a_request(bench: Bench, text: float, images: int) -> float:
    """Of one GPU that does both, by the constants above."""
    args, config = bench.args, bench.config
    if bench.tiny:
        return 2.0 * args.gpus
    most = config.family.max_tiles if images == 1 else 6
    grid = image_grid(config, (SIDE, SIDE), most)
    prompt = images * config.image_tokens(grid.rows, grid.cols)
    squares = images * (grid.num_tiles + 1)
    own = args.input * PROMPT_S + args.output * TOKEN_S
    return float(own + (1 - text) * (prompt * PROMPT_S + squares * SQUARE_S))


def summary(args: argparse.Namespace, best: Mapping[tuple[str, float, int], float]) -> None:
    """The best goodput of each case, a column a layout."""
    layouts: Sequence[str] = args.layout
    say("")
    say("text  pictures  " + "  ".join(f"{name:>10}" for name in layouts))
    for text, images in args.cases:
        cells = [best.get((name, text, images)) for name in layouts]
        shown = "  ".join(f"{c:>10.2f}" if c is not None else f"{'–':>10}" for c in cells)
        say(f"{text:>4.0%}  {images:>8}  {shown}")


if __name__ == "__main__":
    main()
