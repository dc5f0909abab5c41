"""How long a pass of the tower should wait for pictures that are being read: a simulation.

    python benchmarks/encoder_wait.py [--pass-ms 1.5 --square-ms 3.4] [--read-ms 12 4]

The server's own batcher (`xc_ray.serve.squares`) in simulated time. Requests of one to four
pictures of 1 to 24 tiles come at random; `--threads` read them, which takes so many ms a picture
and a tile; a pass takes `--pass-ms` and `--square-ms` a square (measure both with
encoder_tower.py). `load` is the share of its time that the tower needs for all of them in full
passes. Latencies are from a request's coming to its last picture's end. No device is used.

Prints a table, then one JSON line.
"""

import argparse
import heapq
import json
import random
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from xc_ray.serve.squares import Piece, SquareBatcher

TILES = (1, 1, 1, 2, 4, 6, 6, 12, 24)  # of a picture, by frequency


@dataclass
class Simulation:
    """One run; times in seconds. `ends` is when a request's last picture ended, by request."""

    args: argparse.Namespace
    wait_s: float
    now: float = 0.0
    passes: list[int] = field(default_factory=list)
    ends: dict[int, float] = field(default_factory=dict)

    def run(self, pictures: list[tuple[float, int, int]]) -> None:
        """Pictures are (time, request, tiles), in order of time."""
        self.batcher = SquareBatcher(self.args.max_squares, self.wait_s, lambda: self.now)
        self.order, self.events = count(), list[tuple[float, int, str, object]]()
        self.unread, self.free = deque[tuple[int, int]](), self.args.threads
        self.requests: dict[int, int] = {}
        self.busy = False
        for when, request, tiles in pictures:
            self.at(when, "come", (request, tiles))
        while self.events:
            self.now, _, kind, what = heapq.heappop(self.events)
            getattr(self, kind)(what)
            self.start()

    def at(self, when: float, kind: str, what: object) -> None:
        heapq.heappush(self.events, (when, next(self.order), kind, what))

    def come(self, what: tuple[int, int]) -> None:
        request, tiles = what
        key = self.batcher.expect(tiles + 1)
        self.requests[key] = request
        self.unread.append((key, tiles))

    def read(self, key: int) -> None:
        self.free += 1
        self.batcher.ready(key)

    def ended(self, pieces: list[Piece]) -> None:
        self.busy = False
        for key in self.batcher.ended(pieces):
            self.batcher.drop(key)
            self.ends[self.requests[key]] = self.now

    def look(self, _: object) -> None:
        """A wait is over; `start` looks."""

    def start(self) -> None:
        """Starts what can be: reading, and a pass."""
        while self.free and self.unread:
            key, tiles = self.unread.popleft()
            self.free -= 1
            picture_ms, tile_ms = self.args.read_ms
            self.at(self.now + (picture_ms + tile_ms * tiles) / 1e3, "read", key)
        wait_s = None if self.busy else self.batcher.wait_s()
        if wait_s is None:
            return
        if wait_s > 1e-9:
            self.at(self.now + wait_s, "look", None)
            return
        pieces = self.batcher.take()
        squares = sum(piece.count for piece in pieces)
        self.passes.append(squares)
        self.busy = True
        seconds = (self.args.pass_ms + self.args.square_ms * squares) / 1e3
        self.at(self.now + seconds, "ended", pieces)


def traffic(args: argparse.Namespace, load: float) -> list[tuple[float, int, int]]:
    """Random requests that need `load` of the tower."""
    draw = random.Random(args.seed)
    full = args.pass_ms / args.max_squares + args.square_ms
    squares = 2.5 * (sum(TILES) / len(TILES) + 1)  # of a request, on average
    every_s = squares * full / 1e3 / load
    pictures, now = [], 0.0
    for request in range(args.requests):
        now += draw.expovariate(1 / every_s)
        tiles = [draw.choice(TILES) for _ in range(draw.randint(1, 4))]
        pictures += [(now, request, n) for n in tiles]
    return pictures


def main() -> None:
    """Every wait at every load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pass-ms", type=float, default=1.5)
    parser.add_argument("--square-ms", type=float, default=3.4)
    parser.add_argument("--read-ms", type=float, nargs=2, default=[12.0, 4.0])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--max-squares", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.2, 0.5, 0.8, 0.95])
    parser.add_argument("--waits-ms", type=float, nargs="+", default=[0, 1, 2, 5, 10, 20, 50])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    print(f"{'load':>5} {'wait_ms':>8} {'mean_ms':>9} {'p95_ms':>9} {'squares':>8} {'passes':>8}")
    for load in args.loads:
        pictures = traffic(args, load)
        came = {request: when for when, request, _ in reversed(pictures)}
        for wait_ms in args.waits_ms:
            run = Simulation(args, wait_ms / 1e3)
            run.run(pictures)
            times = sorted((end - came[request]) * 1e3 for request, end in run.ends.items())
            row = {
                "load": load,
                "wait_ms": wait_ms,
                "mean_ms": round(statistics.mean(times), 1),
                "p95_ms": round(times[int(0.95 * len(times))], 1),
                "squares_a_pass": round(statistics.mean(run.passes), 2),
                "passes": len(run.passes),
            }
            rows.append(row)
            print("{:5} {:8} {:9} {:9} {:8} {:8}".format(*row.values()))
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    print(json.dumps({"figure": "encoder_wait", "command": command, "rows": rows}))


if __name__ == "__main__":
    main()
