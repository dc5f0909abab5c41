"""Cache hits and balance over 4 decoders: this router against Serve's default.

    python benchmarks/routing.py            in simulated time, by the real cache and the real choice
    python benchmarks/routing.py --http     four decoders with the demo model, on this machine's CPU

The conversations of the simulation (`routing_sim.py: talks`) have one to eight turns, half of them
pictures of 1,041 to 10,101 tokens, three system texts, half an adapter. A hit is a prompt token
that the decoder's cache held, of those that one endless cache for all would have held (`hits`).
Balance is the largest decoder's tokens over the mean. `moved` are later turns that went to another
decoder though theirs was there; `loads` are adapters brought into a slot. Routers are ingress
replicas, which do not speak to each other; a turn comes through any of them. Where a decoder is
lost, it is lost with its cache halfway, and an empty one takes its place.

With `--http` conversations have pictures and the system text in common, and no adapters; four are
under way at a time. Hits are of the tokens that the turn before had (`whole_hits`: turns that found
all of them); balance is of CPU seconds by decoder.

Prints a table, then one JSON line. Means over the seeds; the spread of hits is in the JSON.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

from routing_http import measure
from routing_sim import ByAffinity, Outcome, PowerOfTwo, WithoutHash, simulate, talks

FREE_TOKENS = 16_384  # one longest request of the 2.5 family
Router = PowerOfTwo | ByAffinity
ROUTERS: dict[str, Callable[[int], Router]] = {
    "Serve's default: two choices": PowerOfTwo,
    "by the hash alone, 1.5": lambda seed: affinity(seed, 1.5, record=False),
    "by a record alone, 1.5": lambda seed: WithoutHash(
        seed, load_factor=1.5, free_tokens=FREE_TOKENS
    ),
    "both, load factor 1.25": lambda seed: affinity(seed, 1.25),
    "both, load factor 1.5 (ours)": lambda seed: affinity(seed, 1.5),
    "both, load factor 2": lambda seed: affinity(seed, 2.0),
    "both, 1.5, nothing free": lambda seed: ByAffinity(seed, load_factor=1.5),
}
OURS = "both, load factor 1.5 (ours)"
DEFAULT = "Serve's default: two choices"


def affinity(seed: int, factor: float, record: bool = True) -> ByAffinity:
    return ByAffinity(seed, record, load_factor=factor, free_tokens=FREE_TOKENS)


def main() -> None:
    """All rows of one of the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http", action="store_true", help="over HTTP with the demo model")
    parser.add_argument("--talks", type=int, help="conversations (1500; with --http 40)")
    parser.add_argument("--rate", type=float, default=15.0, help="conversations a second (15)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (3)")
    parser.add_argument("--cache-tokens", type=int, default=262_144, help="of each decoder")
    parser.add_argument("--port", type=int, default=8131)
    args = parser.parse_args()
    began = time.monotonic()
    rows = over_http(args) if args.http else simulated(args)
    show(rows)
    figures = {
        "benchmark": "routing",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "http": args.http,
        "seeds": None if args.http else args.seeds,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }
    print(json.dumps(figures))


def simulated(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for num_routers in (1, 4):
        rows += [row(args, name, num_routers) for name in ROUTERS]
        rows += [row(args, name, num_routers, lose=True) for name in (DEFAULT, OURS)]
    return rows


def row(
    args: argparse.Namespace, name: str, num_routers: int, lose: bool = False
) -> dict[str, Any]:
    count = args.talks or 1500
    found = [
        simulate(
            talks(count, args.rate, seed),
            [ROUTERS[name](100 * seed + i) for i in range(num_routers)],
            num_blocks=args.cache_tokens // 64,
            seed=seed,
            lose_at_s=count / args.rate / 2 if lose else None,
        )
        for seed in range(args.seeds)
    ]

    def mean(figure: Callable[[Outcome], float], digits: int | None = 3) -> float:
        return round(statistics.mean(map(figure, found)), digits)

    def p95_s(outcome: Outcome) -> float:
        return statistics.quantiles(outcome.first_token_s, n=20)[-1]

    hits = [round(outcome.hit_rate, 3) for outcome in found]
    return {
        "router": name + (", one decoder lost" if lose else ""),
        "routers": num_routers,
        "hits": mean(lambda o: o.hit_rate),
        "hits_least_most": [min(hits), max(hits)],
        "balance": None if lose else mean(lambda o: o.balance),
        "moved": mean(lambda o: o.moved / o.later),
        "loads": mean(lambda o: o.slot_loads, None),
        "first_token_ms": mean(lambda o: 1e3 * statistics.mean(o.first_token_s), None),
        "first_token_p95_ms": mean(lambda o: 1e3 * p95_s(o), None),
    }


def over_http(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        measure(name, default=name == DEFAULT, num_talks=args.talks or 40, port=args.port)
        for name in (DEFAULT, OURS)
    ]


def show(rows: list[dict[str, Any]]) -> None:
    columns = [key for key in rows[0] if key not in ("router", "hits_least_most")]
    print(f"{'router':<50}" + "".join(f"{key:>20}" for key in columns))
    for values in rows:
        cells = (f"{'' if values[k] is None else values[k]!s:>20}" for k in columns)
        print(f"{values['router']:<50}" + "".join(cells))


if __name__ == "__main__":
    main()
