"""Products with the adapters of many requests in one batch (2311.03285): y += scaling · B (A x).

Each row's adapter is found on the device, through its tile (`lora_layout`), so CUDA graphs hold all
of it: a graph captured for some number of rows serves whatever adapters they use. Two launches a
linear map: `shrink` reads A, `expand_add` or `expand_gated` reads B. A few rows would leave most
of the device idle in the first, so K is divided among programs whose float32 sums stand side by
side, and the second adds them in fixed order.

How K is divided depends on its length and the tiles' height alone: every result is the same on
every run, and a row's result does not depend on the other rows. `benchmarks/lora_kernels.py`
measures `Cut`s.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, whose values have no Python types; triton has no stubs.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from xc_ray.engine.kernels.lora_layout import DECODE_ROWS, Place, Slots, Tiles, max_tiles
from xc_ray.engine.kernels.skinny import _prefetch

MIN_SHARE = 256  # columns of K below which a program is not worth its start
MAX_GROUPED = 512  # rows that `group` can hold


@dataclass(frozen=True)
class Cut:
    """How a kernel's work is cut.

    `block` is a step along K (shrink) or the columns of a step (expand); `block_r` ranks are
    computed at once, in as many passes as an adapter's rank needs; at most `splits` programs share
    K (shrink), and expansions add as many sums; beyond about so many `programs` each walks several
    steps of columns (expand), for which it adds the sums once. `early` starts the kernel before its
    predecessor has ended (programmatic dependent launch) and asks for its first weights meanwhile;
    what made the tiles must have ended by then, so another kernel, not an early one, has to follow
    it first.
    """

    block: int
    block_r: int
    num_warps: int
    num_stages: int = 1
    splits: int = 16
    programs: int = 528  # four for each of an H200's 132 multiprocessors
    early: bool = False


@dataclass(frozen=True)
class Cuts:
    """A cut for each kernel."""

    shrink: Cut
    add: Cut
    gated: Cut


DECODE = Cuts(
    shrink=Cut(64, 16, num_warps=1, num_stages=4),
    add=Cut(512, 16, num_warps=4, programs=2112),
    gated=Cut(256, 16, num_warps=8, programs=1056),
)


def cuts_of(tiles: Tiles, slots: Slots) -> Cuts:
    """The cuts for tiles of this many rows; tall ones take all ranks in one pass over x."""
    if tiles.block <= DECODE_ROWS:
        return DECODE
    width = slots.width
    return Cuts(
        shrink=Cut(64, 16, num_warps=4, num_stages=3, splits=8),
        add=Cut(128, width, num_warps=8, programs=264),
        gated=Cut(64, width, num_warps=4, programs=264),
    )


def group(row_slots: Tensor, num_slots: int) -> Tiles:
    """Tiles of a decode step: rows (T,) int32 that use the same of `num_slots` slots go together.

    On the device, in one launch; as many tiles as the rows could need at most.
    """
    rows = len(row_slots)
    assert 0 < rows <= MAX_GROUPED
    assert row_slots.dtype == torch.int32
    tiles = max_tiles(rows, num_slots)
    table = row_slots.new_empty(3, tiles)
    order = row_slots.new_empty(rows)
    _group[(1,)](
        row_slots, order, *table, rows, tiles,
        BLOCK_M=DECODE_ROWS, ROWS=max(16, triton.next_power_of_2(rows)), num_warps=8,
    )  # fmt: skip
    slots, first, counts = table
    return Tiles(slots, first, counts, order)


def shrink(
    x: Tensor, slots: Slots, tiles: Tiles, place: Place, parts: int = 1, cut: Cut | None = None
) -> Tensor:
    """A x of each row's adapter, as sums over parts of K, float32.

    x (T, in) -> (splits, T, parts · width); columns past an adapter's rank and rows without an
    adapter hold anything. With 2 parts, the next linear map's A x follows: it has the same sizes.
    """
    cut = cut or cuts_of(tiles, slots).shrink
    size, width = place.size, slots.width
    splits = max(1, min(cut.splits, size // MIN_SHARE))
    assert x.stride(1) == 1
    assert x.shape[1] == size
    low = x.new_empty(splits, len(x), parts * width, dtype=torch.float32)
    share = triton.cdiv(triton.cdiv(size, splits), cut.block) * cut.block
    _shrink[(len(tiles.slots) * parts, splits)](
        x, low, slots.pool, slots.ranks, tiles.slots, tiles.first, tiles.counts, tiles.order,
        x.stride(0), low.stride(0), low.stride(1), slots.pool.stride(0),
        size, share, parts, width, place.before, size + place.out,
        BLOCK_M=tiles.block, BLOCK_R=min(cut.block_r, width), BLOCK_K=cut.block,
        EVEN=size % share == 0, EARLY=cut.early, **_launch(cut),
    )  # fmt: skip
    return low


def expand_add(
    y: Tensor, low: Tensor, slots: Slots, tiles: Tiles, place: Place, cut: Cut | None = None
) -> Tensor:
    """Adds scaling · B low to the rows of y (T, out) that have an adapter, in place.

    `low` is what `shrink` gave; y may be some columns of a wider tensor. The sum is rounded once.
    """
    cut = cut or cuts_of(tiles, slots).add
    assert y.stride(1) == 1
    assert y.shape[1] == place.out
    grid, span = _columns(len(tiles.slots), place.out, cut)
    _expand_add[grid](
        y, low, slots.pool, slots.ranks, slots.scalings,
        tiles.slots, tiles.first, tiles.counts, tiles.order,
        y.stride(0), low.stride(0), low.stride(1), slots.pool.stride(0), slots.scalings.stride(0),
        place.out, span, place.index, place.before + place.size,
        **_sizes(cut, tiles, slots, low),
    )  # fmt: skip
    return y


def expand(
    low: Tensor,
    slots: Slots,
    tiles: Tiles,
    place: Place,
    parts: int = 1,
    cut: Cut | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """scaling · B low of every row, zeros where it has no adapter: (T, parts · out).

    `low` is what `shrink` gave for as many parts.
    """
    cut = cut or cuts_of(tiles, slots).add
    out = torch.empty(low.shape[1], parts * place.out, dtype=dtype, device=low.device)
    assert low.shape[2] == parts * slots.width
    (_, columns), span = _columns(len(tiles.slots), place.out, cut)
    _expand[(len(tiles.slots) * parts, columns)](
        out, low, slots.pool, slots.ranks, slots.scalings,
        tiles.slots, tiles.first, tiles.counts, tiles.order,
        low.stride(0), low.stride(1), slots.pool.stride(0), slots.scalings.stride(0),
        place.out, span, parts, place.index, place.before + place.size, place.size + place.out,
        **_sizes(cut, tiles, slots, low),
    )  # fmt: skip
    return out


def expand_gated(
    y: Tensor, low: Tensor, slots: Slots, tiles: Tiles, place: Place, cut: Cut | None = None
) -> Tensor:
    """silu(gate + its B low) · (up + its B low), of all rows; without an adapter silu(gate) · up.

    y (T, 2 out), gates first; `low` of two parts, `place` of the gate's linear map -> (T, out).
    """
    cut = cut or cuts_of(tiles, slots).gated
    out = torch.empty(len(y), place.out, dtype=y.dtype, device=y.device)
    assert y.stride(1) == 1
    assert y.shape[1] == 2 * place.out
    assert low.shape[2] == 2 * slots.width
    grid, span = _columns(len(tiles.slots), place.out, cut)
    _expand_gated[grid](
        y, out, low, slots.pool, slots.ranks, slots.scalings,
        tiles.slots, tiles.first, tiles.counts, tiles.order,
        y.stride(0), low.stride(0), low.stride(1), slots.pool.stride(0), slots.scalings.stride(0),
        place.out, span, place.index, place.before + place.size, place.size + place.out,
        **_sizes(cut, tiles, slots, low),
    )  # fmt: skip
    return out


def _columns(tiles: int, out: int, cut: Cut) -> tuple[tuple[int, int], int]:
    """The grid of an expansion, and how many steps of columns each program walks."""
    steps = triton.cdiv(out, cut.block)
    span = max(1, min(16, tiles * steps // cut.programs))
    return (tiles, triton.cdiv(steps, span)), span


def _sizes(cut: Cut, tiles: Tiles, slots: Slots, low: Tensor) -> dict[str, int | bool]:
    block_r = min(cut.block_r, slots.width)
    return {
        "WIDTH": slots.width,
        "SPLITS": len(low),
        "BLOCK_M": tiles.block,
        "BLOCK_R": block_r,
        "BLOCK_N": cut.block,
        "ONCE": block_r == slots.width,
        "EARLY": cut.early,
        "AHEAD": low.is_cuda,  # the interpreter has no assembly
        **_launch(cut),
    }


def _launch(cut: Cut) -> dict[str, int | bool]:
    options: dict[str, int | bool] = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return options | ({"launch_pdl": True} if cut.early else {})


# The kernels. `first`, `counts` and `order` may be None: see `Tiles`. What differs from one linear
# map or step to the next is not specialized: no step compiles a kernel that start-up did not.
# With EARLY every program waits for the predecessor before it ends, also if it has nothing to do:
# whoever comes next relies on all that came before.

_TILES = ("slots", "first", "counts", "order")


@triton.jit(do_not_specialize=["rows", "tiles", *_TILES])
def _group(
    row_slots, order, slots, first, counts, rows, tiles,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)
    used = i < rows
    mine = tl.load(row_slots + i, mask=used, other=0)
    place = tl.zeros([ROWS], tl.int32)  # rows that go before
    ahead = place  # of them, those of the same slot
    same_slot = place
    tile = place  # tiles that go before
    STEP: tl.constexpr = min(32, ROWS)
    for start in tl.range(0, rows, STEP):
        j = start + tl.arange(0, STEP)
        there = (j < rows)[None, :] & used[:, None]
        theirs = tl.load(row_slots + j, mask=j < rows, other=0)
        same = there & (mine[:, None] == theirs[None, :])
        smaller = there & (theirs[None, :] < mine[:, None])
        before = same & (j[None, :] < i[:, None])
        their_ahead = tl.sum((same & (i[:, None] < j[None, :])).to(tl.int32), 0)
        begins = (their_ahead % BLOCK_M == 0)[None, :]  # j is the first row of a tile
        ahead += tl.sum(before.to(tl.int32), 1)
        same_slot += tl.sum(same.to(tl.int32), 1)
        place += tl.sum((smaller | before).to(tl.int32), 1)
        tile += tl.sum((begins & (smaller | before)).to(tl.int32), 1)
    tl.store(order + place, i, mask=used)
    leads = used & (ahead % BLOCK_M == 0)
    tl.store(slots + tile, mine, mask=leads)
    tl.store(first + tile, place, mask=leads)
    tl.store(counts + tile, tl.minimum(same_slot - ahead, BLOCK_M), mask=leads)
    spare = (i >= tl.sum(leads.to(tl.int32), 0)) & (i < tiles)
    tl.store(slots + i, -1, mask=spare)
    tl.store(first + i, 0, mask=spare)
    tl.store(counts + i, 0, mask=spare)


@triton.jit(do_not_specialize=["parts", *_TILES])
def _shrink(
    x, low, pool, ranks, slots, first, counts, order,
    x_stride, split_stride, low_stride, slot_stride,
    size, share, parts, width, before, between,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    split = tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
    slot, rank = _adapter(tile, slots, ranks)
    if slot < 0:
        if EARLY:
            gdc_wait()
        return
    rows, used = _rows(tile, first, counts, order, BLOCK_M)
    a = pool + slot.to(tl.int64) * slot_stride + rank.to(tl.int64) * (before + part * between)
    begin = split * share
    end = tl.minimum(begin + share, size)
    r = tl.arange(0, BLOCK_R)
    steps = tl.arange(0, BLOCK_K)
    if EARLY:
        ahead = tl.minimum(begin + 64 * tl.arange(0, BLOCK_K // 16), size - 1)
        _prefetch(a + tl.minimum(r, rank - 1).to(tl.int64)[:, None] * size + ahead[None, :])
        gdc_wait()
    x_at = x + rows[:, None] * x_stride
    to = low + split * split_stride.to(tl.int64) + rows[:, None] * low_stride + part * width
    for done in tl.range(0, rank, BLOCK_R):
        inside = done + r < rank
        a_at = a + (done + r).to(tl.int64)[:, None] * size
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in tl.range(begin, end, BLOCK_K):
            k = start + steps
            x_mask = used[:, None]
            a_mask = inside[:, None]
            if not EVEN:
                x_mask = x_mask & (k < size)[None, :]
                a_mask = a_mask & (k < size)[None, :]
            xs = tl.load(x_at + k[None, :], mask=x_mask, other=0.0)
            ws = tl.load(a_at + k[None, :], mask=a_mask, other=0.0)
            acc = tl.dot(xs, ws.T, acc, input_precision="ieee")
        tl.store(to + (done + r)[None, :], acc, mask=used[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["span", "index", *_TILES])
def _expand_add(
    y, low, pool, ranks, scalings, slots, first, counts, order,
    y_stride, split_stride, low_stride, slot_stride, scaling_stride,
    size, span, index, before,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ONCE: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    begin = tl.program_id(1) * span * BLOCK_N
    if EARLY:
        gdc_launch_dependents()
    slot, rank = _adapter(tile, slots, ranks)
    if slot < 0:
        if EARLY:
            gdc_wait()
        return
    rows, used = _rows(tile, first, counts, order, BLOCK_M)
    b = pool + slot.to(tl.int64) * slot_stride + rank.to(tl.int64) * before
    scaling = tl.load(scalings + slot * scaling_stride + index)
    if AHEAD:
        _prefetch_columns(b, begin, size, rank, BLOCK_N, BLOCK_R)
    if EARLY:
        gdc_wait()
    dtype: tl.constexpr = y.dtype.element_ty
    low_at = low + rows[:, None] * low_stride
    sums = _sums(low_at, used, 0, rank, split_stride, SPLITS, BLOCK_R, dtype)
    for start in tl.range(begin, tl.minimum(begin + span * BLOCK_N, size), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        stored = used[:, None] & (columns < size)[None, :]
        at = y + rows[:, None] * y_stride + columns[None, :]
        there = tl.load(at, mask=stored, other=0.0)  # on its way meanwhile
        delta = _times(
            sums, low_at, used, b, columns, size, rank, split_stride, SPLITS, BLOCK_R, ONCE
        )
        tl.store(at, (there.to(tl.float32) + scaling * delta).to(dtype), mask=stored)


@triton.jit(do_not_specialize=["span", "parts", "index", *_TILES])
def _expand(
    out, low, pool, ranks, scalings, slots, first, counts, order,
    split_stride, low_stride, slot_stride, scaling_stride,
    size, span, parts, index, before, between,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ONCE: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    begin = tl.program_id(1) * span * BLOCK_N
    if EARLY:
        gdc_launch_dependents()
    slot, rank = _adapter(tile, slots, ranks)
    if first is not None:  # noqa: SIM102 (what is known when compiling stands alone)
        if tl.load(counts + tile) == 0:
            if EARLY:
                gdc_wait()
            return
    rows, used = _rows(tile, first, counts, order, BLOCK_M)
    there = slot >= 0
    b = pool + tl.maximum(slot, 0).to(tl.int64) * slot_stride
    b += rank.to(tl.int64) * (before + part * between)
    scaling = tl.load(scalings + slot * scaling_stride + index + part, mask=there, other=0.0)
    if AHEAD:  # noqa: SIM102 (what is known when compiling stands alone)
        if there:
            _prefetch_columns(b, begin, size, rank, BLOCK_N, BLOCK_R)
    if EARLY:
        gdc_wait()
    dtype: tl.constexpr = out.dtype.element_ty
    low_at = low + rows[:, None] * low_stride + part * WIDTH
    sums = _sums(low_at, used, 0, rank, split_stride, SPLITS, BLOCK_R, dtype)
    for start in tl.range(begin, tl.minimum(begin + span * BLOCK_N, size), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        delta = _times(
            sums, low_at, used, b, columns, size, rank, split_stride, SPLITS, BLOCK_R, ONCE
        )
        stored = used[:, None] & (columns < size)[None, :]
        at = out + (rows[:, None] * parts + part) * size + columns[None, :]
        tl.store(at, (scaling * delta).to(dtype), mask=stored)


@triton.jit(do_not_specialize=["span", "index", *_TILES])
def _expand_gated(
    y, out, low, pool, ranks, scalings, slots, first, counts, order,
    y_stride, split_stride, low_stride, slot_stride, scaling_stride,
    size, span, index, before, between,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ONCE: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    begin = tl.program_id(1) * span * BLOCK_N
    if EARLY:
        gdc_launch_dependents()
    slot, rank = _adapter(tile, slots, ranks)
    if first is not None:  # noqa: SIM102 (what is known when compiling stands alone)
        if tl.load(counts + tile) == 0:
            if EARLY:
                gdc_wait()
            return
    rows, used = _rows(tile, first, counts, order, BLOCK_M)
    there = slot >= 0
    block = pool + tl.maximum(slot, 0).to(tl.int64) * slot_stride
    b = block + rank.to(tl.int64) * before
    other_b = b + rank.to(tl.int64) * between
    scaling_at = scalings + slot * scaling_stride + index
    scaling = tl.load(scaling_at, mask=there, other=0.0)
    other_scaling = tl.load(scaling_at + 1, mask=there, other=0.0)
    if AHEAD:  # noqa: SIM102 (what is known when compiling stands alone)
        if there:
            _prefetch_columns(b, begin, size, rank, BLOCK_N, BLOCK_R)
            _prefetch_columns(other_b, begin, size, rank, BLOCK_N, BLOCK_R)
    if EARLY:
        gdc_wait()
    dtype: tl.constexpr = y.dtype.element_ty
    low_at = low + rows[:, None] * low_stride
    sums = _sums(low_at, used, 0, rank, split_stride, SPLITS, BLOCK_R, dtype)
    others = _sums(low_at + WIDTH, used, 0, rank, split_stride, SPLITS, BLOCK_R, dtype)
    for start in tl.range(begin, tl.minimum(begin + span * BLOCK_N, size), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        stored = used[:, None] & (columns < size)[None, :]
        at = y + rows[:, None] * y_stride + columns[None, :]
        gate = tl.load(at, mask=stored, other=0.0)  # on their way meanwhile
        up = tl.load(at + size, mask=stored, other=0.0)
        delta = _times(
            sums, low_at, used, b, columns, size, rank, split_stride, SPLITS, BLOCK_R, ONCE
        )
        other_delta = _times(
            others, low_at + WIDTH, used, other_b, columns, size, rank, split_stride,
            SPLITS, BLOCK_R, ONCE,
        )  # fmt: skip
        # Rounded where the model rounds: after each product and after silu.
        gate = (gate.to(tl.float32) + scaling * delta).to(dtype).to(tl.float32)
        up = (up.to(tl.float32) + other_scaling * other_delta).to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        to = out + rows[:, None] * size + columns[None, :]
        tl.store(to, (silu * up).to(dtype), mask=stored)


@triton.jit
def _adapter(tile, slots, ranks):
    # -> slot, and its rank in a form whose divisibility the compiler sees: rows of B are that long
    slot = tl.load(slots + tile)
    rank = tl.load(ranks + slot, mask=slot >= 0, other=0)
    return slot, rank // 16 * 16


@triton.jit
def _rows(tile, first, counts, order, BLOCK_M: tl.constexpr):
    # -> the tile's rows, and which of BLOCK_M there are
    i = tl.arange(0, BLOCK_M)
    if first is None:
        used = i < 1
        rows = tile + tl.zeros([BLOCK_M], tl.int32)
    else:
        used = i < tl.load(counts + tile)
        rows = tl.load(order + tl.load(first + tile) + i, mask=used, other=0)
    return rows.to(tl.int64), used


@triton.jit
def _sums(
    low_at, used, done, rank, split_stride,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # The parts of K together, ranks from `done` on: (BLOCK_M, BLOCK_R)
    r = done + tl.arange(0, BLOCK_R)
    mask = used[:, None] & (r < rank)[None, :]
    total = tl.load(low_at + r[None, :], mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        part = low_at + split * split_stride.to(tl.int64) + r[None, :]
        total += tl.load(part, mask=mask, other=0.0)
    return total.to(DTYPE)


@triton.jit
def _times(
    sums, low_at, used, b, columns, size, rank, split_stride,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    # B times the sums, those of the first ranks given: (BLOCK_M, BLOCK_N) float32
    delta = tl.dot(sums, _columns_of(b, columns, size, 0, rank, BLOCK_R).T, input_precision="ieee")
    if not ONCE:
        for done in tl.range(BLOCK_R, rank, BLOCK_R):
            more = _sums(low_at, used, done, rank, split_stride, SPLITS, BLOCK_R, sums.dtype)
            ws = _columns_of(b, columns, size, done, rank, BLOCK_R)
            delta = tl.dot(more, ws.T, delta, input_precision="ieee")
    return delta


@triton.jit
def _columns_of(b, columns, size, done, rank, BLOCK_R: tl.constexpr):
    r = done + tl.arange(0, BLOCK_R)
    at = b + columns.to(tl.int64)[:, None] * rank + r[None, :]
    return tl.load(at, mask=(columns < size)[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _prefetch_columns(b, begin, size, rank, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    # The first step of columns, or what of it the ranks of one pass make up
    ahead = begin.to(tl.int64) * rank + 64 * tl.arange(0, BLOCK_N * BLOCK_R // 64)
    _prefetch(b + tl.minimum(ahead, size.to(tl.int64) * rank - 1))
