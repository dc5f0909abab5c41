"""What autoscaling policies make of a day's traffic: goodput and cost, at 8 to 1,000 GPUs.

    python benchmarks/scale_simulation.py
    python benchmarks/scale_simulation.py --gpus 8 --hours 24
    python benchmarks/scale_simulation.py --gpus 64 --node-s 240

A discrete-event simulation; nothing runs on a GPU. Requests arrive by a Poisson process whose rate
goes from a fifth of its peak to the peak and back within `--hours`, with bursts of `--burst` times
that rate for two minutes, four an hour. Replicas serve them as scale_model.py says, from measured
figures. Every GPU is one replica; four fifths of them are decoders, which at the peak, without a
burst, are busy with prompts 65 % of the time. The policies are those of xc_ray/serve/scale.py,
called as Serve calls them (scale_fleet.py), against Serve's default on ongoing requests, and fixed
sizes for the mean and for the peak.

A request is good if its first token came within `--ttft-s`, and its tokens at `--interval-ms` or
less in the mean. Nobody is refused and nobody leaves. GPU-hours are of replicas that start, run or
drain, until the last arrival. Prints a table, then one JSON line.
"""

import argparse
import gc
import json
import platform
import random
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate
from math import ceil, cos, inf, pi
from typing import Any

import numpy as np
from scale_fleet import REPORT_S, Fleet, OngoingPolicy, Scaling
from scale_model import (
    DECODER_START_S,
    ENCODER_START_S,
    MEAN_OUTPUT,
    MIX,
    SQUARE_S,
    Decoder,
    Encoder,
    Kind,
    Request,
)

from xc_ray.serve.scale import DecoderPolicy, EncoderPolicy

PEAK_USE = 0.65  # of a decoder's time for prompts, at the peak between bursts
LEAST_RATE = 0.2  # of the peak's
BURST_S = 120.0
BURSTS_PER_HOUR = 4
POLICIES = ("ours", "ongoing", "fixed mean", "fixed peak")


@dataclass(frozen=True)
class Setting:
    """One run."""

    gpus: int
    policy: str
    seconds: float = 3600.0
    peak_rate: float | None = None  # requests per second; None: what the GPUs are for
    least_rate: float = LEAST_RATE
    burst: float = 1.4
    node_s: float = 0.0  # until a GPU is there, before a replica starts on it
    ongoing: tuple[float, float] = (4.0, 1.0)  # targets of decoder and encoder
    prefill_use: float = 0.6  # target_prefill_use of DecoderPolicy
    mix: tuple[Kind, ...] = MIX
    mean_output: float = MEAN_OUTPUT
    ttft_s: float = 3.0
    interval_s: float = 0.05
    seed: int = 0

    @property
    def sizes(self) -> tuple[int, int]:
        """Decoders and encoders of the peak: four to one, as the mix needs them."""
        encoders = ceil(self.gpus / 5)
        return self.gpus - encoders, encoders

    @property
    def peak(self) -> float:
        """Requests per second between bursts."""
        mean_s = sum(k.share * k.prefill_s for k in self.mix) / sum(k.share for k in self.mix)
        return self.peak_rate or self.sizes[0] * PEAK_USE / mean_s


@dataclass
class Outcome:
    """What became of the requests."""

    arrived: int = 0
    ended: int = 0
    good: int = 0
    gpu_s: float = 0.0
    most_decoders: int = 0
    most_encoders: int = 0

    def __post_init__(self) -> None:
        self.ttft_s, self.interval_s = array("f"), array("f")


def arrivals(setting: Setting) -> Iterator[tuple[float, Kind, int]]:
    """Time, kind and length of the answer of each request, in order."""
    rng = np.random.default_rng(setting.seed)
    bursts = rng.uniform(0, setting.seconds, round(BURSTS_PER_HOUR * setting.seconds / 3600))
    shares = list(accumulate(kind.share for kind in setting.mix))
    for second in range(ceil(setting.seconds)):
        level = (1 - cos(2 * pi * second / setting.seconds)) / 2
        rate = setting.peak * (setting.least_rate + (1 - setting.least_rate) * level)
        if any(0 <= second - start < BURST_S for start in bursts):
            rate *= setting.burst
        count = rng.poisson(rate)
        times = np.sort(rng.uniform(second, second + 1, count)).tolist()
        kinds = np.searchsorted(shares, rng.uniform(0, shares[-1], count), "right").tolist()
        outputs = np.clip(rng.exponential(setting.mean_output, count), 1, 2000).astype(int).tolist()
        for at, kind, output in zip(times, kinds, outputs, strict=True):
            yield at, setting.mix[kind], output


class Simulation:
    """One run, event by event: arrivals, pictures that are encoded, and decoders' own."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.outcome = setting, Outcome()
        self._random = random.Random(setting.seed)
        self._events: list[tuple[float, int, Decoder, Request | None]] = []
        self._count = 0
        self._pictures: list[Request] = []  # while there is no encoder
        decoders, encoders = scalings(setting)
        first_decoders, first_encoders = first_sizes(setting)
        start_s = setting.node_s + DECODER_START_S
        self.decoders = Fleet(Decoder, first_decoders, start_s, decoders, 5)
        start_s = setting.node_s + ENCODER_START_S
        self.encoders = Fleet(Encoder, first_encoders, start_s, encoders, 3)

    def run(self) -> Outcome:
        """Until the last request has ended."""
        source, events, tick = arrivals(self.setting), self._events, 0.0
        coming = next(source, None)
        while coming or events:
            at = coming[0] if coming else inf
            now = min(at, events[0][0] if events else inf)
            while tick <= now:
                self._tick(tick)
                tick += REPORT_S
            if coming and at <= now:
                self._arrive(Request(*coming))
                coming = next(source, None)
                continue
            self._event(*heappop(events))
        self.outcome.most_decoders = self.decoders.most_running
        self.outcome.most_encoders = self.encoders.most_running
        return self.outcome

    def _tick(self, now: float) -> None:
        self.decoders.tick(now)
        if self.encoders.tick(now):
            waiting, self._pictures = self._pictures, []
            for request in waiting:
                self._encode(request, now)
        if now < self.setting.seconds:
            self.outcome.gpu_s = self.decoders.gpu_s + self.encoders.gpu_s

    def _arrive(self, request: Request) -> None:
        now = request.arrived
        self.outcome.arrived += 1
        self.decoders.ongoing += 1
        decoder = self.decoders.pick(self._random, _ongoing)
        decoder.take(request, now)
        if request.kind.squares:
            self.encoders.ongoing += 1
            self._encode(request, now)
        else:
            self._schedule(decoder)

    def _encode(self, request: Request, now: float) -> None:
        assert request.decoder is not None
        if not self.encoders.running:
            self._pictures.append(request)
            # Something must come, or time would stand still: the next report.
            self._push(now + REPORT_S, request.decoder, None)
            return
        done = self.encoders.pick(self._random, _free_at).take(request.kind.squares, now)
        self._push(done, request.decoder, request)

    def _event(self, now: float, _: int, decoder: Decoder, pictured: Request | None) -> None:
        if pictured is not None:
            self.encoders.ongoing -= 1
            decoder.give(pictured, now)
        else:
            if now >= decoder.due:
                decoder.due = inf
            for request in decoder.run(now):
                self._end(request)
        self._schedule(decoder)
        if self._pictures and not self._events:
            self._push(now + REPORT_S, decoder, None)

    def _schedule(self, decoder: Decoder) -> None:
        """An event that comes too early does no harm: it looks again."""
        due = decoder.next_event()
        if due < decoder.due:
            decoder.due = due
            self._push(due, decoder, None)

    def _push(self, at: float, decoder: Decoder, pictured: Request | None) -> None:
        self._count += 1
        heappush(self._events, (at, self._count, decoder, pictured))

    def _end(self, request: Request) -> None:
        outcome, setting = self.outcome, self.setting
        self.decoders.ongoing -= 1
        ttft_s = request.first - request.arrived
        outcome.ended += 1
        outcome.good += ttft_s <= setting.ttft_s and request.interval_s <= setting.interval_s
        outcome.ttft_s.append(ttft_s)
        outcome.interval_s.append(request.interval_s)


def _ongoing(decoder: Decoder) -> float:
    return decoder.ongoing


def _free_at(encoder: Encoder) -> float:
    return encoder.free_at


def scalings(setting: Setting) -> tuple[Scaling, Scaling]:
    """Of decoders and encoders, with the delays of serve_config.yaml."""
    decoders, encoders = setting.sizes
    if setting.policy.startswith("fixed"):
        return Scaling(most=decoders), Scaling(most=encoders)
    ours = setting.policy == "ours"
    decoder = DecoderPolicy(target_prefill_use=setting.prefill_use)
    return (
        Scaling(decoder if ours else OngoingPolicy(setting.ongoing[0]), 1, decoders),
        Scaling(
            EncoderPolicy() if ours else OngoingPolicy(setting.ongoing[1]),
            0 if ours else 1,
            encoders,
            upscale_delay_s=5,
            downscale_delay_s=120,
        ),
    )


def first_sizes(setting: Setting) -> tuple[int, int]:
    """At the start: the peak's or the mean's size, or what the first minutes need."""
    least = setting.least_rate
    share = {"fixed peak": 1.0, "fixed mean": (1 + least) / 2}.get(setting.policy, least)
    return tuple(max(1, round(size * share)) for size in setting.sizes)  # type: ignore[return-value]


def row_of(setting: Setting, outcome: Outcome, price: float, cpu_s: float) -> dict[str, Any]:
    """One row of the table; `price` is of a GPU for an hour."""
    gpu_hours = outcome.gpu_s / 3600
    p50, p99 = np.percentile(outcome.ttft_s, [50, 99]) if outcome.ended else (0.0, 0.0)
    return {
        "gpus": setting.gpus,
        "policy": setting.policy,
        "hours": setting.seconds / 3600,
        "requests": outcome.ended,
        "good_share": outcome.good / max(1, outcome.ended),
        "good_per_s": outcome.good / setting.seconds,
        "ttft_p50_s": float(p50),
        "ttft_p99_s": float(p99),
        "gpu_hours": gpu_hours,
        "cost_per_1000_good": 1000 * price * gpu_hours / max(1, outcome.good),
        "most": [outcome.most_decoders, outcome.most_encoders],
        "cpu_s": round(cpu_s, 1),
    }


HEAD = (
    f"{'GPUs':>5} {'policy':<11} {'requests':>9} {'good':>7} {'good/s':>7} {'TTFT p50':>8} "
    f"{'p99, s':>7} {'GPU-hours':>9} {'per 1,000 good':>14} {'at most':>9}"
)


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['gpus']:>5} {row['policy']:<11} {row['requests']:>9,} {row['good_share']:>7.1%} "
        f"{row['good_per_s']:>7.1f} {row['ttft_p50_s']:>8.2f} {row['ttft_p99_s']:>7.2f} "
        f"{row['gpu_hours']:>9.1f} {row['cost_per_1000_good']:>14.3f} "
        f"{'{}+{}'.format(*row['most']):>9}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 256, 1000])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--hours", type=float, default=1.0, help="in which a day's traffic passes")
    parser.add_argument("--burst", type=float, default=1.4, help="times the rate")
    parser.add_argument("--node-s", type=float, default=0.0, help="until a GPU is there")
    parser.add_argument("--ongoing", nargs=2, type=float, default=[4, 1], metavar=("DEC", "ENC"))
    parser.add_argument("--prefill-use", type=float, default=0.6, help="target_prefill_use")
    parser.add_argument("--ttft-s", type=float, default=3.0)
    parser.add_argument("--interval-ms", type=float, default=50.0)
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU for an hour")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common = Setting(
        gpus=0,
        policy="",
        seconds=args.hours * 3600,
        burst=args.burst,
        node_s=args.node_s,
        ongoing=tuple(args.ongoing),
        prefill_use=args.prefill_use,
        ttft_s=args.ttft_s,
        interval_s=args.interval_ms / 1000,
        seed=args.seed,
    )
    gc.disable()  # millions of small objects, and no cycles among them
    print(HEAD)
    rows = []
    for gpus in args.gpus:
        for policy in args.policies:
            setting = replace(common, gpus=gpus, policy=policy)
            started = time.process_time()
            outcome = Simulation(setting).run()
            rows.append(row_of(setting, outcome, args.price, time.process_time() - started))
            print(line_of(rows[-1]), flush=True)
    facts = {key: value for key, value in asdict(common).items() if key not in ("gpus", "policy")}
    facts |= {"price": args.price, "square_s": SQUARE_S, "command": " ".join(sys.argv)}
    print(json.dumps({"figure": "scale_simulation", "machine": platform.machine(), **facts,
                      "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
