"""How soon the work for a client that leaves ends, from its hanging up to the next one's turn.

    python benchmarks/disconnect.py --num 20 [--mode haproxy]

Starts `serve run` in one of Serve's modes with serve_config.yaml, the demo model and one lane. A
stream takes the lane; a second request waits behind it in the engine. The first client closes its
connection in the middle (of a stream, or while it waits for a whole answer), and the second one's
first token is waited for. What that takes beyond a first token on an idle server is the time until
the work ended: the hanging up on its way through proxy, ingress and decoder, and the engine's steps
until the request is out. In engine steps it is that over the mean interval of tokens. Prints a
table, then one JSON line.
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
from served import MODES, environment, serving_args

PATIENCE_S = 0.8  # of who waits for a whole answer: more than half of it is work by then
ENDLESS: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def main() -> None:
    """Starts the server and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, or a folder (demo)")
    parser.add_argument("--mode", choices=list(MODES), default="default")
    parser.add_argument("--num", type=int, default=20, help="clients that leave (20)")
    parser.add_argument("--port", type=int, default=8127)
    args = parser.parse_args()
    one_lane = {"max_num_seqs": 1}
    with (
        environment(MODES[args.mode]),
        serving_args(args.port, model=args.model, decoder=one_lane) as url,
    ):
        measure(url, args)


def measure(url: str, args: argparse.Namespace) -> None:
    """The table and the JSON line."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        request = ENDLESS | {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        interval = token_interval(client, request)
        idle = [first_token_s(client, request) for _ in range(args.num)]
        left = {
            "a stream": [after_stream_s(url, client, request) for _ in range(args.num)],
            "a whole answer": [after_whole_s(url, request) for _ in range(args.num)],
        }
    alone = statistics.median(idle)
    rows = {"first token, idle server (median)": alone, "interval of tokens": interval}
    for kind, seconds in left.items():
        rows |= {
            f"work after {kind} was left (median)": max(0.0, statistics.median(seconds) - alone),
            f"work after {kind} was left (worst)": max(seconds) - alone,
        }
    for name, seconds in rows.items():
        print(f"{name:<48}{seconds * 1000:>10.1f} ms{seconds / interval:>10.1f} steps")
    figures = {
        "benchmark": "disconnect",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": args.model,
        "mode": args.mode,
        "num": args.num,
        "seconds": {name: round(seconds, 5) for name, seconds in rows.items()},
        "steps": {name: round(seconds / interval, 2) for name, seconds in rows.items()},
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


class Waiter:
    """A second client, who waits for the lane; `at` is when its first token came."""

    def __init__(self, url: str, request: dict[str, Any]) -> None:
        self._url, self._request = url, request | {"max_tokens": 1}
        self._thread = threading.Thread(target=self._wait)
        self.at = 0.0

    def start(self) -> None:
        """Sends the request."""
        self._thread.start()

    def turn(self) -> float:
        """When it got its turn, once it has."""
        self._thread.join(120)
        return self.at

    def _wait(self) -> None:
        with (
            httpx.Client(base_url=self._url, timeout=120, trust_env=False) as client,
            stream(client, self._request) as lines,
        ):
            next(lines)
        self.at = time.monotonic()


def after_stream_s(url: str, client: httpx.Client, request: dict[str, Any]) -> float:
    """Seconds from hanging up in a stream to the first token of the one that waited."""
    time.sleep(0.3)
    waiter = Waiter(url, request)
    with stream(client, request) as lines:
        next(lines)
        waiter.start()
        for _ in range(40):  # the other one's request is there by then
            next(lines)
        left = time.monotonic()
    return waiter.turn() - left


def after_whole_s(url: str, request: dict[str, Any]) -> float:
    """The same for a client that waits for a whole answer."""
    time.sleep(0.3)
    waiter = Waiter(url, request)
    timer = threading.Timer(PATIENCE_S / 2, waiter.start)
    timer.start()
    try:
        httpx.post(f"{url}/v1/chat/completions", json=request, timeout=PATIENCE_S, trust_env=False)
    except httpx.ReadTimeout:
        left = time.monotonic()
    else:
        raise SystemExit("the answer came before the client left")
    timer.join()
    return waiter.turn() - left


if __name__ == "__main__":
    main()
