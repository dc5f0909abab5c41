"""One id a row of logits, each by its lane's own parameters: one launch, one program a row.

The plain meaning is `engine.sampler.chosen_ids`; this is it in float32, but for ids of less than
e^-32 of the best's probability, which are never drawn. A program reads its row for the best score,
which is all that a greedy row needs, then to bracket the threshold of top_k or top_p, then to
gather the ids above the bracket's lower end, in order; what follows reads only those few.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, whose values have no Python types; triton has no stubs.

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # numbers of a row that a program holds at once, where it needs little beside them
CHUNK = 4096  # the same where it keeps sums by several thresholds
# One for all batches: with the chunk it orders the sums, and a draw must not depend on the batch.
_NUM_WARPS = 16

ALIGN = 16  # rows of candidates have a multiple of this many places
_ALIGN = tl.constexpr(ALIGN)
_NUM_NUMBERS = tl.constexpr(6)  # of a lane's row in the sampler's table
_NUM_WHOLES = tl.constexpr(4)
_FLOOR = tl.constexpr(-32.0)  # all 92,544 ids below it have 1e-9 of the best's probability
_EDGE = tl.constexpr(3e38)  # penalties leave finite scores finite
# Each round leaves a fifth of the bracket: 32 / 5^14 is less than float32 resolves.
_MAX_ROUNDS = tl.constexpr(14)


def choose(
    logits: Tensor,
    lanes: Tensor,
    positions: Tensor,
    numbers: Tensor,
    wholes: Tensor,
    counts: Tensor,
    scores: Tensor,
    ids: Tensor,
    out: Tensor,
    *,
    block: int = BLOCK,
    chunk: int = CHUNK,
) -> None:
    """Chosen ids of logits (S, V) into `out` (S,) int32; counts those of penalised lanes.

    `lanes`, `positions` (S,) int64; `numbers`, `wholes` and `counts` are the sampler's, a row a
    lane; `scores` float32 and `ids` int32, (at least S, V made a multiple of `ALIGN`), are
    overwritten.
    """
    assert len(lanes) <= len(scores)
    _choose[(len(lanes),)](
        logits,
        lanes,
        positions,
        numbers,
        wholes,
        counts,
        scores,
        ids,
        out,
        logits.stride(0),
        logits.shape[1],
        scores.stride(0),
        BLOCK=block,
        CHUNK=chunk,
        num_warps=_NUM_WARPS,
    )


# The batch's own tensors may be slices: no second compilation, least of all in a graph's capture.
@triton.jit(do_not_specialize_on_alignment=["lanes", "positions", "out"])
def _choose(
    logits,
    lanes,
    positions,
    numbers,
    wholes,
    counts,
    scores,
    ids,
    out,
    stride,
    size,
    width,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.load(lanes + row)
    logits += row * stride
    scores += row * width
    ids += row * width
    counts += lane * size
    numbers += lane * _NUM_NUMBERS
    wholes += lane * _NUM_WHOLES
    greedy = tl.load(wholes + 2) != 0
    penalised = tl.load(wholes + 3) != 0
    best, chosen, good = _best(logits, counts, numbers, penalised, size, BLOCK)
    if good & (greedy == 0):
        cut, high, goal = _bracket(logits, counts, numbers, wholes, penalised, best, size, CHUNK)
        n = _gather(logits, counts, numbers, penalised, best, cut, scores, ids, size, CHUNK)
        tl.debug_barrier()  # other threads read what each has written
        threshold = _threshold(scores, n, numbers, wholes, cut, high, goal, CHUNK)
        draw = _uniform(tl.load(wholes + 1), tl.load(positions + row))
        place = _cross(scores, n, threshold, draw, CHUNK)
        chosen = tl.load(ids + place)
    chosen = tl.where(good, chosen, -1)
    tl.store(out + row, chosen)
    if penalised & good:
        tl.atomic_add(counts + chosen, 1, sem="relaxed")


@triton.jit
def _raw(logits, at, size):
    """Logits as they are; past the end, −inf."""
    return tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _penalised(raw, counts, numbers, penalised, at, size):
    """Logits at `at` after the lane's penalties; what is not finite stays."""
    moved = raw
    if penalised:
        presence = tl.load(numbers + 3)
        frequency = tl.load(numbers + 4)
        repetition = tl.load(numbers + 5)
        n = tl.load(counts + at, mask=at < size, other=0).to(tl.float32)
        moved = raw * tl.where(raw > 0, 1.0 / repetition, repetition) - presence - frequency * n
        moved = tl.minimum(tl.maximum(moved, -_EDGE), _EDGE)
        finite = (raw > float("-inf")) & (raw < float("inf"))
        moved = tl.where((n > 0) & finite, moved, raw)
    return moved


@triton.jit
def _relative(logits, counts, numbers, penalised, best, at, size):
    """Logarithms of probabilities over the best's."""
    moved = _penalised(_raw(logits, at, size), counts, numbers, penalised, at, size)
    return (moved - best) * (1.0 / tl.load(numbers))


@triton.jit
def _best(logits, counts, numbers, penalised, size, BLOCK: tl.constexpr):
    """The best score, the lowest id that has it, and whether the row is one of numbers."""
    at = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    block = tl.zeros([BLOCK], tl.int32)
    raw = _raw(logits, at, size)
    for start in range(0, size, BLOCK):
        ahead = _raw(logits, start + BLOCK + at, size)  # on its way during the work below
        moved = _penalised(raw, counts, numbers, penalised, start + at, size)
        block = tl.where(moved > top, start, block)
        top = tl.maximum(top, moved, propagate_nan=tl.PropagateNan.ALL)
        raw = ahead
    best = tl.max(top, 0)
    first = tl.min(tl.where(top == best, block + at, size), 0)
    numeric = tl.max(tl.where(top == top, 0, 1), 0) == 0  # NaN is not itself
    return best, first, numeric & (best > float("-inf")) & (best < float("inf"))


@triton.jit
def _bracket(logits, counts, numbers, wholes, penalised, best, size, CHUNK: tl.constexpr):
    """What is at `low` or above reaches the goal, what is at `high` does not -> low, high, goal.

    The goal is `top_k` ids, or `top_p` of the mass, for whichever is asked first. The thresholds
    are where language models' nuclei end.
    """
    low = tl.maximum(_FLOOR, tl.load(numbers + 2))  # log of min_p
    high = tl.full([], 1.0, tl.float32)
    goal = tl.full([], 0.0, tl.float32)
    top_p = tl.load(numbers + 1)
    top_k = tl.load(wholes)
    if (top_k > 0) | (top_p < 1.0):
        at = tl.arange(0, CHUNK)
        all_ = tl.zeros([CHUNK], tl.float32)
        above_12 = tl.zeros([CHUNK], tl.float32)
        above_8 = tl.zeros([CHUNK], tl.float32)
        above_5 = tl.zeros([CHUNK], tl.float32)
        above_2 = tl.zeros([CHUNK], tl.float32)
        for start in range(0, size, CHUNK):
            x = _relative(logits, counts, numbers, penalised, best, start + at, size)
            weight = tl.where(top_k > 0, 1.0, tl.exp(x))
            all_ += tl.where(x >= _FLOOR, weight, 0.0)
            above_12 += tl.where(x >= -12.0, weight, 0.0)
            above_8 += tl.where(x >= -8.0, weight, 0.0)
            above_5 += tl.where(x >= -5.0, weight, 0.0)
            above_2 += tl.where(x >= -2.0, weight, 0.0)
        goal = tl.where(top_k > 0, top_k.to(tl.float32), top_p * tl.sum(all_, 0))
        to_12 = tl.sum(above_12, 0) >= goal
        to_8 = tl.sum(above_8, 0) >= goal
        to_5 = tl.sum(above_5, 0) >= goal
        to_2 = tl.sum(above_2, 0) >= goal
        low = tl.where(to_12, -12.0, _FLOOR)
        low = tl.where(to_8, -8.0, low)
        low = tl.where(to_5, -5.0, low)
        low = tl.where(to_2, -2.0, low)
        high = tl.where(to_2, high, -2.0)
        high = tl.where(to_5, high, -5.0)
        high = tl.where(to_8, high, -8.0)
        high = tl.where(to_12, high, -12.0)
    return low, high, goal


@triton.jit
def _gather(logits, counts, numbers, penalised, best, cut, scores, ids, size, CHUNK: tl.constexpr):
    """Writes scores of at least `cut` and their ids, in order, and returns how many they are."""
    at = tl.arange(0, CHUNK)
    n = 0
    for start in range(0, size, CHUNK):
        x = _relative(logits, counts, numbers, penalised, best, start + at, size)
        kept = (x >= cut).to(tl.int32)
        to = n + tl.cumsum(kept, 0) - kept
        tl.store(scores + to, x, mask=kept > 0)
        tl.store(ids + to, start + at, mask=kept > 0)
        n += tl.sum(kept, 0)
    return n


@triton.jit
def _threshold(scores, n, numbers, wholes, low, high, goal, CHUNK: tl.constexpr):
    """The highest of the thresholds by top_k, by top_p of what top_k keeps, and by min_p."""
    top_p = tl.load(numbers + 1)
    top_k = tl.load(wholes)
    if top_k > 0:
        low = _search(scores, n, low, high, goal, True, CHUNK)
        high = tl.full([], 1.0, tl.float32)
        if top_p < 1.0:
            goal = top_p * _mass(scores, n, low, CHUNK).to(tl.float32)
    if top_p < 1.0:
        low = _search(scores, n, low, high, goal, False, CHUNK)
    return tl.maximum(low, tl.load(numbers + 2))


@triton.jit
def _search(scores, n, low, high, goal, COUNTED: tl.constexpr, CHUNK: tl.constexpr):
    """Narrows the bracket until the scores in it are equal, and returns its lower end.

    Whatever is at `low` or above reaches the goal, by count or by mass; at `high`, it does not.
    """
    at = tl.arange(0, CHUNK)
    differ = low < high
    rounds = 0
    while differ & (rounds < _MAX_ROUNDS):
        step = (high - low) * 0.2
        t1 = low + step
        t2 = low + 2 * step
        t3 = low + 3 * step
        t4 = low + 4 * step
        above_1 = tl.zeros([CHUNK], tl.float32)
        above_2 = tl.zeros([CHUNK], tl.float32)
        above_3 = tl.zeros([CHUNK], tl.float32)
        above_4 = tl.zeros([CHUNK], tl.float32)
        least = tl.full([CHUNK], float("inf"), tl.float32)
        most = tl.full([CHUNK], float("-inf"), tl.float32)
        for start in range(0, n, CHUNK):
            x = _candidates(scores, start + at, n)
            weight = tl.full([CHUNK], 1.0, tl.float32) if COUNTED else tl.exp(x)
            above_1 += tl.where(x >= t1, weight, 0.0)
            above_2 += tl.where(x >= t2, weight, 0.0)
            above_3 += tl.where(x >= t3, weight, 0.0)
            above_4 += tl.where(x >= t4, weight, 0.0)
            inside = (x >= low) & (x < high)
            least = tl.minimum(least, tl.where(inside, x, float("inf")))
            most = tl.maximum(most, tl.where(inside, x, float("-inf")))
        differ = tl.min(least, 0) < tl.max(most, 0)
        to_1 = tl.sum(above_1, 0) >= goal
        to_2 = tl.sum(above_2, 0) >= goal
        to_3 = tl.sum(above_3, 0) >= goal
        to_4 = tl.sum(above_4, 0) >= goal
        low = tl.where(to_1, t1, low)
        low = tl.where(to_2, t2, low)
        low = tl.where(to_3, t3, low)
        low = tl.where(to_4, t4, low)
        high = tl.where(to_4, high, t4)
        high = tl.where(to_3, high, t3)
        high = tl.where(to_2, high, t2)
        high = tl.where(to_1, high, t1)
        rounds += 1
    return low


@triton.jit
def _candidates(scores, at, n):
    """Gathered scores; past the n-th, −inf."""
    # Threads load several numbers at once where the mask ends at a multiple of that.
    padded = (n + _ALIGN - 1) // _ALIGN * _ALIGN
    x = tl.load(scores + at, mask=at < padded, other=float("-inf"))
    return tl.where(at < n, x, float("-inf"))


@triton.jit
def _probabilities(scores, at, n, threshold):
    """Probabilities over the best's, 0 below the threshold."""
    x = _candidates(scores, at, n)
    return tl.where(x >= threshold, tl.exp(x), 0.0)


@triton.jit
def _mass(scores, n, threshold, CHUNK: tl.constexpr):
    """Sum of the kept probabilities, float64 over chunks."""
    at = tl.arange(0, CHUNK)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, n, CHUNK):
        total += tl.sum(_probabilities(scores, start + at, n, threshold), 0).to(tl.float64)
    return total


@triton.jit
def _cross(scores, n, threshold, draw, CHUNK: tl.constexpr):
    """The place where the cumulative probability first exceeds the draw's share of the sum."""
    at = tl.arange(0, CHUNK)
    goal = draw * _mass(scores, n, threshold, CHUNK)
    before = tl.full([], 0.0, tl.float64)
    place = 0
    found = before > goal
    start = 0
    # The chunks' sums are those that made the total, so one of them exceeds the goal.
    while (found == 0) & (start < n):
        p = _probabilities(scores, start + at, n, threshold)
        after = before + tl.sum(p, 0).to(tl.float64)
        found = after > goal
        if found:
            hit = (tl.cumsum(p, 0) > (goal - before).to(tl.float32)) & (p > 0)
            first = tl.min(tl.where(hit, at, CHUNK), 0)
            # Rounding may leave no hit: the chunk's last kept one then.
            place = start + tl.minimum(first, tl.max(tl.where(p > 0, at, 0), 0))
        before = after
        start += CHUNK
    return place


@triton.jit
def _uniform(seed, position):
    """`sequence.uniform` of int64 scalars, float64."""
    x = seed.to(tl.uint64) * 0x9E3779B97F4A7C15 + position.to(tl.uint64) * 0xD1B54A32D192ED03
    x += 0x8CB92BA72F3D8DD7
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x ^= x >> 31
    return (x >> 11).to(tl.float64) * (1.0 / 9007199254740992)
