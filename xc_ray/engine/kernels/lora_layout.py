"""Adapters in one batch (2311.03285): where they lie on the device, and which rows use which.

A pool has a slot for each adapter that is on the device. In its slot an adapter of rank R is one
contiguous block: linear map after linear map, A (R, in), then B (out, R); so one copy loads it.
Rows of the flat batch that use the same adapter are cut into tiles, the work of one program.

The plain functions are what the kernels of `multi_lora` mean, and what runs without a GPU.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RANK_STEP = 16  # ranks are padded with rows of zeros to a multiple of what tensor cores multiply
NO_SLOT = -1
DECODE_ROWS = 16  # rows of a tile in a decode step


@dataclass(frozen=True)
class Place:
    """Where one linear map's A and B lie within a slot, in elements per rank.

    `index` counts the linear maps of the model, and is their column of the scalings; `before` is
    in + out, summed over those before it.
    """

    size: int
    out: int
    index: int
    before: int

    def views(self, block: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) within an adapter's block, flat, of this (padded) rank."""
        begin, middle = rank * self.before, rank * (self.before + self.size)
        a = block[begin:middle].view(rank, self.size)
        return a, block[middle : middle + rank * self.out].view(self.out, rank)


def places(shapes: Sequence[tuple[int, int]]) -> list[Place]:
    """The places of linear maps of these (in, out), in this order.

    A pair whose products are joined (w1, w3) stands one behind the other.
    """
    found, before = [], 0
    for index, (size, out) in enumerate(shapes):
        found.append(Place(size, out, index, before))
        before += size + out
    return found


@dataclass(frozen=True)
class Slots:
    """The pool of S adapters, all on one device.

    pool (S, elements) in the model's dtype; ranks (S,) int32, padded, at most max_rank; scalings
    (S, linear maps) float32.
    """

    pool: Tensor
    ranks: Tensor
    scalings: Tensor
    max_rank: int

    @property
    def width(self) -> int:
        """Columns that `shrink` keeps for one linear map: the power of two that holds max_rank."""
        return max(RANK_STEP, 1 << (self.max_rank - 1).bit_length())


@dataclass(frozen=True)
class Tiles:
    """Rows of a flat batch of T, cut into M tiles of at most `block` rows that share a slot.

    All int32: slots (M,), NO_SLOT where the rows have no adapter; tile m holds the rows
    order[first[m]] to order[first[m] + counts[m] - 1]; counts of 0 are spare tiles. Every row is in
    one tile. With `first` None each row is a tile: slots (T,) alone says all.
    """

    slots: Tensor
    first: Tensor | None = None
    counts: Tensor | None = None
    order: Tensor | None = None
    block: int = DECODE_ROWS

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(slot, its rows) of each tile that has any; asks the device."""
        if self.first is None or self.counts is None or self.order is None:
            for row, slot in enumerate(self.slots.tolist()):
                yield slot, torch.tensor([row], device=self.slots.device)
            return
        numbers = (self.slots.tolist(), self.first.tolist(), self.counts.tolist())
        for slot, first, count in zip(*numbers, strict=True):
            if count:
                yield slot, self.order[first : first + count].long()


def cut(runs: Sequence[tuple[int, int]], block: int, device: torch.device | str) -> Tiles:
    """Tiles of a step that the host knows: (slot, rows) of each sequence, as they lie in the batch.

    Rows of a slot go together, wherever they are. One copy, which the host does not wait for.
    """
    rows_of, begin = defaultdict[int, list[np.ndarray]](list), 0
    for slot, num in runs:
        rows_of[slot].append(np.arange(begin, begin + num, dtype=np.int32))
        begin += num
    tiles, place = [], 0
    for slot, parts in rows_of.items():
        end = place + sum(map(len, parts))
        tiles += [(slot, first, min(block, end - first)) for first in range(place, end, block)]
        place = end
    table = np.array(tiles, dtype=np.int32).reshape(-1, 3).T
    order = [rows for parts in rows_of.values() for rows in parts]
    packed = torch.from_numpy(np.concatenate([table.ravel(), *order]))
    if torch.device(device).type == "cuda":
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    slots, first, counts = packed[: 3 * len(tiles)].view(3, -1)
    return Tiles(slots, first, counts, packed[3 * len(tiles) :], block)


def max_tiles(rows: int, num_slots: int, block: int = DECODE_ROWS) -> int:
    """The most tiles that so many rows can need, those without an adapter included."""
    groups = min(rows, num_slots + 1)
    return (rows - groups) // block + groups


def plain_group(row_slots: Tensor, num_slots: int, block: int = DECODE_ROWS) -> Tiles:
    """Tiles of rows that use the slots row_slots (T,); tiles and rows ordered by slot, then row."""
    numbers = row_slots.tolist()
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    tiles: list[tuple[int, int, int]] = []
    for slot in sorted(set(numbers)):
        first = sum(other < slot for other in numbers)
        end = first + numbers.count(slot)
        tiles += [(slot, begin, min(block, end - begin)) for begin in range(first, end, block)]
    tiles += [(NO_SLOT, 0, 0)] * (max_tiles(len(numbers), num_slots, block) - len(tiles))
    columns = (*zip(*tiles, strict=True), order)
    device = row_slots.device
    slots, firsts, counts, places = (
        torch.tensor(column, dtype=torch.int32, device=device) for column in columns
    )
    return Tiles(slots, firsts, counts, places, block)


def plain_shrink(x: Tensor, slots: Slots, tiles: Tiles, place: Place, parts: int = 1) -> Tensor:
    """What `multi_lora.shrink` means: A x of each row's adapter, (1, T, parts · width)."""
    wide = _wide(x)
    low = torch.zeros(1, len(x), parts * slots.width, dtype=wide.dtype, device=x.device)
    for slot, rows in tiles:
        for part in range(parts) if slot >= 0 else ():
            a, _ = _views(slots, slot, _part(place, part))
            begin = part * slots.width
            low[0, rows, begin : begin + len(a)] = wide[rows] @ _wide(a).T
    return low


def plain_expand(
    low: Tensor,
    slots: Slots,
    tiles: Tiles,
    place: Place,
    parts: int = 1,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """What `multi_lora.expand` means."""
    out = torch.zeros(low.shape[1], parts * place.out, dtype=dtype, device=low.device)
    for part, columns in enumerate(out.chunk(parts, 1)):
        for slot, rows in tiles:
            if slot >= 0:
                delta = _delta(low, rows, slots, slot, _part(place, part), part, out)
                columns[rows] = delta.to(dtype)
    return out


def plain_expand_add(y: Tensor, low: Tensor, slots: Slots, tiles: Tiles, place: Place) -> Tensor:
    """What `multi_lora.expand_add` means."""
    for slot, rows in tiles:
        if slot >= 0:
            y[rows] = (_wide(y[rows]) + _delta(low, rows, slots, slot, place, 0, y)).to(y.dtype)
    return y


def plain_expand_gated(y: Tensor, low: Tensor, slots: Slots, tiles: Tiles, place: Place) -> Tensor:
    """What `multi_lora.expand_gated` means."""
    both = y.clone()
    for part, half in enumerate(both.chunk(2, 1)):
        for slot, rows in tiles:
            if slot >= 0:
                delta = _delta(low, rows, slots, slot, _part(place, part), part, y)
                half[rows] = (_wide(half[rows]) + delta).to(y.dtype)
    gate, up = both.chunk(2, 1)
    return F.silu(gate) * up


def _delta(
    low: Tensor, rows: Tensor, slots: Slots, slot: int, place: Place, part: int, y: Tensor
) -> Tensor:
    _, b = _views(slots, slot, place)
    begin = part * slots.width
    lows = low[:, rows, begin : begin + b.shape[1]].sum(0).to(y.dtype)
    return _wide(lows) @ _wide(b).T * slots.scalings[slot, place.index]


def _views(slots: Slots, slot: int, place: Place) -> tuple[Tensor, Tensor]:
    return place.views(slots.pool[slot], int(slots.ranks[slot]))


def _part(place: Place, part: int) -> Place:
    step = place.size + place.out
    return Place(place.size, place.out, place.index + part, place.before + part * step)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
