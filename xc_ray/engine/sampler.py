"""Logits -> token ids on the device, each row by its own parameters."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from xc_ray.engine.sequence import SamplingParams, TokenLogprob, uniform

_TOPK_PATH = 256  # up to this top_k a partial sort serves; past it, all logits are sorted


@dataclass(frozen=True)
class Sampled:
    """New ids of a step, and log-probabilities for the rows that asked."""

    ids: list[int]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """Keeps how often each lane has generated each id: counts (lanes, V) int32 on the device."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_lanes, vocab_size, dtype=torch.int32, device=device)

    def reset(self, lane: int) -> None:
        """Forgets a lane's generated ids."""
        self.counts[lane].zero_()

    def __call__(
        self, logits: Tensor, params: Seq[SamplingParams], lanes: Seq[int], positions: Seq[int]
    ) -> Sampled:
        """Logits (S, V) -> one id a row; `positions`: each new token's place in its sequence."""
        device = logits.device
        lane_index = torch.tensor(lanes, device=device)
        scores = self._penalised(logits, params, lane_index)
        if all(p.greedy for p in params):
            chosen = scores.argmax(-1)
        else:
            chosen = _draw(scores, params, positions)
        if any(p.penalised for p in params):
            self.counts[lane_index, chosen] += 1
        return _to_host(logits, chosen, params)

    def _penalised(self, logits: Tensor, params: Seq[SamplingParams], lanes: Tensor) -> Tensor:
        if not any(p.penalised for p in params):
            return logits
        counts = self.counts[lanes].to(logits.dtype)  # (S, V)
        seen = counts > 0
        table = [(p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for p in params]
        presence, frequency, repetition = torch.tensor(
            table, device=logits.device, dtype=logits.dtype
        ).T.unsqueeze(-1)  # (3, S, 1)
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        return torch.where(seen, scaled - presence - frequency * counts, logits)


def _draw(scores: Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> Tensor:
    """One id a row from the filtered distribution; greedy rows take their best."""
    size = scores.shape[-1]
    rows = [
        (
            1.0 if p.greedy else p.temperature,
            1.0 if p.greedy else p.top_p,
            1.0 if p.greedy else float(min(p.top_k or size, size)),
            uniform(p.seed, position),
        )
        for p, position in zip(params, positions, strict=True)
    ]
    wide = scores.to(torch.float64) if scores.dtype == torch.float64 else scores.to(torch.float32)
    temperature, top_p, top_k, draw = torch.tensor(
        rows, device=scores.device, dtype=wide.dtype
    ).T.unsqueeze(-1)
    kept = int(max(r[2] for r in rows))
    wide = wide / temperature
    best, ids = (
        wide.topk(kept, dim=-1) if kept <= _TOPK_PATH else wide.sort(dim=-1, descending=True)
    )
    outside = torch.arange(best.shape[-1], device=best.device) >= top_k
    probs = best.masked_fill(outside, float("-inf")).softmax(-1)
    before = probs.cumsum(-1) - probs
    # The first is always kept: nothing stands before it.
    probs = probs.masked_fill(before >= top_p, 0.0)
    mass = probs.cumsum(-1)
    place = torch.searchsorted(mass, draw * mass[:, -1:], right=True).clamp(max=best.shape[-1] - 1)
    # Rounding may put the draw on the flat end behind the last kept id.
    # A top_p too small for the dtype keeps nothing, and NaN logits have no order: the first then.
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    chosen: Tensor = ids.gather(-1, torch.minimum(place, last)).squeeze(-1)
    return chosen


def _to_host(logits: Tensor, chosen: Tensor, params: Seq[SamplingParams]) -> Sampled:
    """One device-to-host copy of ids, and of log-probabilities where asked for."""
    most = max((p.logprobs for p in params if p.logprobs is not None), default=None)
    if most is None:
        return Sampled(chosen.tolist(), [None] * len(params))
    all_logprobs = logits.log_softmax(-1)
    own = all_logprobs.gather(-1, chosen[:, None])
    most = min(most, logits.shape[-1])
    top, top_ids = all_logprobs.topk(most, dim=-1)
    packed = torch.cat(
        [chosen[:, None].double(), own.double(), top.double(), top_ids.double()], -1
    ).tolist()
    logprobs: list[TokenLogprob | None] = []
    for row, p in zip(packed, params, strict=True):
        if p.logprobs is None:
            logprobs.append(None)
            continue
        pairs = zip(map(int, row[2 + most :]), row[2 : 2 + most], strict=True)
        logprobs.append(TokenLogprob(row[1], tuple(pairs)[: p.logprobs]))
    return Sampled([int(row[0]) for row in packed], logprobs)
