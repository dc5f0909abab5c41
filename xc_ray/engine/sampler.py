"""Logits -> token ids on the device, each row by its lane's own parameters; nothing waits."""

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from xc_ray.engine.sequence import SamplingParams, TokenLogprob

# The lanes' table, one row a lane. Numbers: temperature, top_p, log of min_p, presence, frequency
# and repetition penalty. Wholes: top_k (0: off), seed, and whether it is greedy, and penalised.
NUM_NUMBERS, NUM_WHOLES = 6, 4
_NEUTRAL_NUMBERS = (1.0, 1.0, -math.inf, 0.0, 0.0, 1.0)
_NEUTRAL_WHOLES = (0, 0, 1, 0)

# Neither these nor their reciprocals leave float32, and no draw can tell them from what is beyond.
_LEAST, _MOST = 1e-30, 1e30


class Sampler:
    """Parameters and counts of generated ids of each lane, and the choice of ids by them.

    Everything is on the device for `num_lanes` lanes and one more, `padding_lane`, which is greedy:
    rows that only fill a batch use it.
    """

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        lanes = num_lanes + 1
        self.padding_lane = num_lanes
        self.vocab_size = vocab_size
        self.counts = torch.zeros(lanes, vocab_size, dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self.numbers = torch.tensor(
            [_NEUTRAL_NUMBERS] * lanes,
            dtype=torch.float32 if on_gpu else torch.float64,
            device=device,
        )
        self.wholes = torch.tensor([_NEUTRAL_WHOLES] * lanes, device=device)
        # The kernel's candidates of each row: their scores and ids.
        shape = (num_lanes if on_gpu else 0, _places(vocab_size))
        self._scores = torch.empty(shape, dtype=torch.float32, device=device)
        self._ids = torch.empty(shape, dtype=torch.int32, device=device)

    @staticmethod
    def num_bytes(num_lanes: int, vocab_size: int, on_gpu: bool) -> int:
        """Bytes that a sampler holds: int32 counts, the table, and on a GPU the candidates."""
        numbers = NUM_NUMBERS * (4 if on_gpu else 8)
        lane = 4 * vocab_size + numbers + 8 * NUM_WHOLES
        candidates = 8 * num_lanes * _places(vocab_size) if on_gpu else 0
        return (num_lanes + 1) * lane + candidates

    def set_lanes(self, entries: Seq[tuple[int, SamplingParams, Seq[int]]]) -> None:
        """Gives lanes to sequences: (lane, parameters, ids generated so far) each."""
        if not entries:
            return
        counted = [
            (lane, token)
            for lane, params, generated in entries
            if params.penalised
            for token in generated
        ]
        wholes = [(lane, *_wholes(params, self.vocab_size)) for lane, params, _ in entries]
        whole_rows = self._to_device(wholes, torch.int64)  # (n, 1 + NUM_WHOLES)
        number_rows = self._to_device([_numbers(p) for _, p, _ in entries], self.numbers.dtype)
        taken = whole_rows[:, 0]
        self.numbers.index_copy_(0, taken, number_rows)
        self.wholes.index_copy_(0, taken, whole_rows[:, 1:])
        self.counts.index_fill_(0, taken, 0)
        if counted:
            places = self._to_device(counted, torch.int64).T  # (2, n)
            ones = torch.ones_like(places[0], dtype=torch.int32)
            self.counts.index_put_((places[0], places[1]), ones, accumulate=True)

    def choose(
        self, logits: Tensor, lanes: Tensor, positions: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Logits (S, V) of any float dtype -> a chosen id a row, (S,) int32; `out` if it is given.

        `lanes` and `positions` (S,) int64: each row's lane, and its new token's place in its
        sequence. A row with NaN or +inf, or with nothing finite, gets −1. Ids of penalised lanes
        are counted. What a row draws depends on its logits, its lane and its position alone.
        """
        if out is None:
            out = torch.empty(len(lanes), dtype=torch.int32, device=logits.device)
        if logits.is_cuda:
            # Triton comes with CUDA builds of torch only.
            from xc_ray.engine.kernels.sample import choose

            state = (self.numbers, self.wholes, self.counts, self._scores, self._ids)
            choose(logits, lanes, positions, *state, out)
            return out
        ids = chosen_ids(logits, lanes, positions, self.numbers, self.wholes, self.counts)
        counted = self.wholes[lanes, 3] * (ids >= 0)
        self.counts.index_put_((lanes, ids.clamp(min=0)), counted.int(), accumulate=True)
        return out.copy_(ids)

    def edit(self, logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """A float32 copy of logits (float64 stays) with `values` added at (row, id) pairs.

        For `logit_bias`, and with −inf for stop ids before `min_tokens`. Duplicates add up.
        """
        dtype = _work_dtype(logits)
        edited = logits.to(dtype, copy=True)
        return edited.index_put_((rows, ids), values.to(dtype), accumulate=True)

    def logprobs(self, logits: Tensor, chosen: Tensor, k: int) -> Tensor:
        """Log-probabilities of raw logits (S, V) as rows of numbers, (S, 1 + 2k) float64.

        A row is the chosen id's own, the k highest, and their ids; see `to_logprobs`. k <= V.
        """
        every = logits.to(_work_dtype(logits)).log_softmax(-1)
        own = every.gather(-1, chosen.long().clamp(min=0)[:, None])
        top, top_ids = every.topk(k, dim=-1)
        return torch.cat([own.double(), top.double(), top_ids.double()], -1)

    def _to_device(self, rows: Seq[Seq[float]], dtype: torch.dtype) -> Tensor:
        on_gpu = self.counts.is_cuda
        return torch.tensor(rows, dtype=dtype, pin_memory=on_gpu).to(
            self.counts.device, non_blocking=True
        )


def to_logprobs(row: Seq[float], k: int) -> TokenLogprob:
    """A row of `Sampler.logprobs`, on the host, for a request that asked for `k` top ones."""
    most = len(row) // 2
    pairs = zip(map(int, row[1 + most :]), row[1 : 1 + most], strict=True)
    return TokenLogprob(row[0], tuple(pairs)[:k])


def chosen_ids(
    logits: Tensor,
    lanes: Tensor,
    positions: Tensor,
    numbers: Tensor,
    wholes: Tensor,
    counts: Tensor,
) -> Tensor:
    """What `Sampler.choose` means, in plain torch: (S,) int64. It counts nothing.

    Parameters are rows of the lanes' table. A draw keeps every score at or above a threshold, the
    highest of three: the top_k-th score; the highest score that, with all above it, has `top_p` of
    the probability of the top_k; and that of `min_p` times the best's probability. Scores equal to
    the threshold are kept all. Of the kept ids, in the vocabulary's order, it takes the first whose
    cumulative probability exceeds `uniforms`' share of their sum.
    """
    dtype = _work_dtype(logits)
    logits = logits.to(dtype)
    columns = numbers[lanes].to(dtype).T.unsqueeze(-1)  # (NUM_NUMBERS, S, 1)
    temperature, top_p, log_min_p, *penalties = columns
    top_k, seeds, greedy, _ = wholes[lanes].T
    scores = _penalised(logits, counts[lanes], penalties)
    bad = ~(logits < math.inf).all(-1) | (logits == -math.inf).all(-1)
    chosen = scores.argmax(-1).masked_fill(bad, -1)
    rows = ((greedy == 0) & ~bad).nonzero().squeeze(-1)
    if len(rows):
        chosen[rows] = _drawn(
            (scores[rows] - scores[rows].amax(-1, keepdim=True)) / temperature[rows],
            top_k[rows, None],
            top_p[rows],
            log_min_p[rows],
            uniforms(seeds[rows], positions[rows])[:, None],
        )
    return chosen


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """`sequence.uniform` of int64 seeds and positions, on their device, float64."""
    # int64 products wrap as those of 64 bits without a sign; shifts bring in copies of the sign.
    x = seeds * _signed(0x9E3779B97F4A7C15) + positions * _signed(0xD1B54A32D192ED03)
    x = x + _signed(0x8CB92BA72F3D8DD7)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() / (1 << 53)


def _drawn(x: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, draw: Tensor) -> Tensor:
    """One id a row; x (S, V): logarithms of probabilities over the best's."""
    size = x.shape[-1]
    ranked = x.sort(dim=-1, descending=True).values
    threshold_k = ranked.gather(-1, torch.where(top_k > 0, top_k, size) - 1)
    # Sums are float64: at 92,544 ids, float32 would move the edges between them.
    mass = ranked.exp().double().masked_fill(ranked < threshold_k, 0.0).cumsum(-1)
    short = (mass < top_p * mass[:, -1:]).sum(-1, keepdim=True)
    threshold_p = ranked.gather(-1, short.clamp(max=size - 1))
    threshold_p = threshold_p.masked_fill(top_p >= 1, -math.inf)
    threshold = threshold_k.maximum(threshold_p).maximum(log_min_p)
    probs = x.exp().double().masked_fill(x < threshold, 0.0)
    mass = probs.cumsum(-1)
    place = torch.searchsorted(mass, draw * mass[:, -1:], right=True)
    # Rounding may put the draw on the flat end behind the last kept id.
    last = (size - 1) - (probs.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return torch.minimum(place, last).squeeze(-1)


def _penalised(logits: Tensor, counts: Tensor, penalties: Seq[Tensor]) -> Tensor:
    presence, frequency, repetition = penalties
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    # A penalty of 1e30 leaves the order to the other ids; it does not make the row a failed one.
    edge = torch.finfo(logits.dtype).max
    moved = (scaled - presence - frequency * counts).clamp(-edge, edge)
    return torch.where((counts > 0) & (logits > -math.inf), moved, logits)


def _numbers(params: SamplingParams) -> tuple[float, ...]:
    return (
        min(max(params.temperature, _LEAST), _MOST),
        max(params.top_p, _LEAST),
        math.log(params.min_p) if params.min_p else -math.inf,
        params.presence_penalty,
        params.frequency_penalty,
        min(max(params.repetition_penalty, _LEAST), _MOST),
    )


def _wholes(params: SamplingParams, vocab_size: int) -> tuple[int, ...]:
    top_k = params.top_k if params.top_k < vocab_size else 0
    return (top_k, _signed(params.seed), int(params.greedy), int(params.penalised))


def _places(vocab_size: int) -> int:
    """Places for a row's candidates: `kernels.sample` reads them 16 at a time."""
    return -(-vocab_size // 16) * 16


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _signed(value: int) -> int:
    """The int64 with the last 64 bits of a whole number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)
