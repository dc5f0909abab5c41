"""How soon the work for a client that leaves ends, from its hanging up to the next one's turn.

    python benchmarks/disconnect.py --num 20

Starts `serve run` with serve_config.yaml, the demo model and one lane. A stream takes the lane; a
second request waits behind it in the engine. The first client closes its connection in the
middle, and the second one's first token is waited for. What that takes beyond a first token on an
idle server is the time until the work ended: the hanging up on its way through proxy, ingress and
decoder, and the engine's steps until the request is out. In engine steps it is that over the mean
interval of tokens. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from served import serving_args

ENDLESS: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def main() -> None:
    """Starts the server and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, or a folder (demo)")
    parser.add_argument("--num", type=int, default=20, help="clients that leave (20)")
    parser.add_argument("--port", type=int, default=8127)
    args = parser.parse_args()
    with serving_args(args.port, model=args.model, decoder={"max_num_seqs": 1}) as url:
        measure(url, args)


def measure(url: str, args: argparse.Namespace) -> None:
    """The table and the JSON line."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        request = ENDLESS | {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        interval = token_interval(client, request)
        idle = [first_token_s(client, request) for _ in range(args.num)]
        left = [turn_after_leaving_s(url, client, request) for _ in range(args.num)]
    alone, turn = statistics.median(idle), statistics.median(left)
    rows = {
        "first token, idle server (median)": alone,
        "first token after another left (median)": turn,
        "work for who left, after that (median)": max(0.0, turn - alone),
        "worst": max(left) - alone,
        "interval of tokens": interval,
    }
    for name, seconds in rows.items():
        print(f"{name:<42}{seconds * 1000:>10.1f} ms")
    steps = max(0.0, turn - alone) / interval
    print(f"{'in engine steps':<42}{steps:>10.1f}")
    figures = {
        "benchmark": "disconnect",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": args.model,
        "num": args.num,
        "seconds": {name: round(seconds, 5) for name, seconds in rows.items()},
        "steps": round(steps, 2),
    }
    print(json.dumps(figures))


@contextmanager
def stream(client: httpx.Client, request: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The data lines of a stream that have text in them; leaving hangs up."""
    with client.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"HTTP {reply.status_code}: {reply.read().decode()[:500]}")
        yield (line for line in reply.iter_lines() if '"content":"' in line and '""' not in line)


def token_interval(client: httpx.Client, request: dict[str, Any], num: int = 100) -> float:
    """Mean seconds between two tokens of one stream."""
    with stream(client, request) as lines:
        next(lines)
        started = time.monotonic()
        for _ in range(num):
            next(lines)
        return (time.monotonic() - started) / num


def first_token_s(client: httpx.Client, request: dict[str, Any]) -> float:
    """Seconds to the first token; the server is idle."""
    time.sleep(0.3)
    started = time.monotonic()
    with stream(client, request | {"max_tokens": 1}) as lines:
        next(lines)
    return time.monotonic() - started


def turn_after_leaving_s(url: str, client: httpx.Client, request: dict[str, Any]) -> float:
    """Seconds from a client's hanging up to the first token of one that waited."""
    got = threading.Event()
    at = 0.0

    def wait() -> None:
        nonlocal at
        with (
            httpx.Client(base_url=url, timeout=120, trust_env=False) as other,
            stream(other, request | {"max_tokens": 1}) as lines,
        ):
            next(lines)
        at = time.monotonic()
        got.set()

    time.sleep(0.3)
    with stream(client, request) as lines:
        next(lines)
        waiter = threading.Thread(target=wait)
        waiter.start()
        for _ in range(40):  # the other one's request is there by then
            next(lines)
        left = time.monotonic()
    got.wait(60)
    waiter.join()
    return at - left


if __name__ == "__main__":
    main()
