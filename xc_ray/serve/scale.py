"""How many replicas the load of now needs: policies for the `autoscaling_config` of Ray Serve.

Serve's controller builds a policy once, with its `policy_kwargs`, and asks it several times a
second; around it Serve applies bounds, factors and delays. A policy therefore remembers nothing but
the last rate that it heard, and does nothing against flapping: a wish counts once it has held for
`upscale_delay_s` or `downscale_delay_s` without a break.

This module travels to the controller pickled by value: it imports the standard library alone.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

State = dict[str, Any]  # what Serve keeps from call to call
RATE = "rate"


class EncoderLoad(NamedTuple):
    """What a vision encoder reports; overviews count as tiles."""

    tiles: float  # of pictures that are here and not encoded
    use: float  # share of its tiles per second that was used, 0 to 1
    tiles_per_s: float  # while it works; 0 if it has not yet


class DecoderLoad(NamedTuple):
    """What a decoder reports."""

    kv_use: float  # share of the cache that requests hold, 0 to 1: what is merely kept is free
    lane_use: float  # requests that run or wait, per sequence that it can run
    prefill_use: float  # share of its prompt tokens per second that was used, 0 to 1
    waiting_tokens: float  # of prompts that are not computed and could be
    prefill_tokens_per_s: float  # while it computes prompts; 0 if it has not yet


class EncoderPolicy:
    """Tiles that are to be encoded within `target_wait_s`, at the rate that replicas measure.

    Queues alone would ask for less than arrives until one has grown: so many replicas are needed,
    too, that none is used above `target_use` in the mean. Pictures that still wait at a decoder
    count like those that have reached an encoder. A replica that has said nothing for `stale_s`
    counts as unknown.
    """

    def __init__(
        self, target_wait_s: float = 1.0, target_use: float = 0.7, stale_s: float = 60.0
    ) -> None:
        self.target_wait_s = _positive("target_wait_s", target_wait_s)
        self.target_use = _positive("target_use", target_use)
        self.stale_s = _positive("stale_s", stale_s)

    def __call__(self, ctx: "AutoscalingContext") -> tuple[float, State]:
        """Replicas wanted, before bounds and delays, and what to remember."""
        loads = [EncoderLoad(*row) for row in reported(ctx, EncoderLoad._fields, self.stale_s)]
        rate = mean_rate([load.tiles_per_s for load in loads], ctx)
        tiles = sum(load.tiles for load in loads)
        if queued := ctx.total_queued_requests:
            tiles += queued * max(1.0, tiles / max(1.0, ctx.total_running_requests))
        need = max(
            sum(load.use for load in loads) / self.target_use,
            tiles / (rate * self.target_wait_s) if rate else 0.0,
        )
        return settle(need, ctx, len(loads)), {RATE: rate}


class DecoderPolicy:
    """Whatever runs out first: room in the cache, lanes, or time to compute prompts.

    Cache and lanes are held to `target_use` in the mean, time for prompts to `target_prefill_use`:
    every answer halts while a prompt is computed, so that it is felt long before it runs out.
    Prompts that wait are to be computed within `target_wait_s` at the rate that replicas measure. A
    replica that has said nothing for `stale_s` counts as unknown.
    """

    def __init__(
        self,
        target_use: float = 0.8,
        target_prefill_use: float = 0.6,
        target_wait_s: float = 2.0,
        stale_s: float = 60.0,
    ) -> None:
        self.target_use = _positive("target_use", target_use)
        self.target_prefill_use = _positive("target_prefill_use", target_prefill_use)
        self.target_wait_s = _positive("target_wait_s", target_wait_s)
        self.stale_s = _positive("stale_s", stale_s)

    def __call__(self, ctx: "AutoscalingContext") -> tuple[float, State]:
        """Replicas wanted, before bounds and delays, and what to remember."""
        loads = [DecoderLoad(*row) for row in reported(ctx, DecoderLoad._fields, self.stale_s)]
        rate = mean_rate([load.prefill_tokens_per_s for load in loads], ctx)
        waiting = sum(load.waiting_tokens for load in loads)
        need = max(
            sum(load.kv_use for load in loads) / self.target_use,
            sum(load.lane_use for load in loads) / self.target_use,
            sum(load.prefill_use for load in loads) / self.target_prefill_use,
            waiting / (rate * self.target_wait_s) if rate else 0.0,
        )
        return settle(need, ctx, len(loads)), {RATE: rate}


def reported(
    ctx: "AutoscalingContext", names: tuple[str, ...], stale_s: float
) -> list[list[float]]:
    """The values of `names` of each running replica that has told all of them, and lately."""
    means, series = ctx.aggregated_metrics or {}, ctx.raw_metrics or {}
    now = ctx.current_time or 0.0
    rows = []
    for replica in ctx.running_replicas:
        told = (series.get(names[0]) or {}).get(replica)
        row = [(means.get(name) or {}).get(replica, math.nan) for name in names]
        if told and now - told[-1].timestamp <= stale_s and all(map(math.isfinite, row)):
            rows.append([max(0.0, value) for value in row])
    return rows


def mean_rate(rates: list[float], ctx: "AutoscalingContext") -> float:
    """The mean of the replicas that know theirs, else the last one heard of, else 0."""
    known = [rate for rate in rates if rate > 0]
    return sum(known) / len(known) if known else float((ctx.policy_state or {}).get(RATE, 0.0))


def settle(need: float, ctx: "AutoscalingContext", num_reported: int) -> float:
    """The need, held up where something is not known.

    A running replica that has not reported counts as full, and so do replicas on their way as long
    as there is one: they hold the target, and never raise it. While nothing runs, the target stays,
    and any request wakes one replica. While requests are there, one replica stays.
    """
    if ctx.total_num_requests > 0:
        need = max(need, 1.0)
    target = ctx.target_num_replicas
    if not ctx.current_num_replicas:
        return max(need, target)
    if num_reported < ctx.current_num_replicas:
        unknown = max(target, ctx.current_num_replicas) - num_reported
        need = max(need, min(target, need + unknown))
    return round(need, 6)  # Serve rounds up: 2.0000000000000004 is 2


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is a number above 0 (found {value!r})")
    return value
