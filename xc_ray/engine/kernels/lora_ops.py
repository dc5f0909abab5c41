"""A step's `Ops` with the adapters of its rows, on a GPU.

In steps with prompts two more launches a linear map add them to the product. In decode steps, where
launches one after another would take longer than what they do, B A x is computed beside the base's
product of the same x, and whichever kernel reads the product next adds the two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xc_ray.engine.kernels.fused import FusedAttend, FusedOps
from xc_ray.engine.kernels.lora_layout import DECODE_ROWS, NO_SLOT, Place, Slots, Tiles, cut
from xc_ray.engine.kernels.multi_lora import (
    MAX_GROUPED,
    expand,
    expand_add,
    expand_gated,
    group,
    shrink,
)
from xc_ray.engine.kernels.pointwise import add_rms_norm, silu_mul
from xc_ray.model.attention import Attend
from xc_ray.model.decoder import RMSNorm
from xc_ray.model.ops import Ops, Rope
from xc_ray.model.plora import ImageRows

PREFILL_ROWS = 64  # of a tile, where most rows are of prompts
FEW_ROWS = 256  # up to which tiles are as small as a decode step's

Places = Mapping[nn.Module, Place]


class FusedLoraOps(Ops):
    """What `base` computes, and each row's adapter added to its linear maps.

    `places` are the linear maps' in every slot; `tiles` the rows of the step by slot. `wanted`
    gives those of the rows that the last layer goes on with, None where none of them has an
    adapter.
    """

    def __init__(
        self,
        base: FusedOps,
        slots: Slots,
        places: Places,
        tiles: Tiles,
        wanted: Callable[[], Tiles | None] = lambda: None,
    ) -> None:
        self.base = base
        self.slots = slots
        self.places = places
        self.tiles = tiles
        self.wanted = wanted

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `Ops`."""
        return self.base.norm(module, x)

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        return self._add(module, self.base.linear(module, x, image_rows), x)

    def linear_add(
        self, module: nn.Module, x: Tensor, image_rows: ImageRows, residual: Tensor
    ) -> Tensor:
        """See `Ops`; the result takes the residual's place."""
        return self._add(module, self.base.linear_add(module, x, image_rows, residual), x)

    def gated(self, w1: nn.Module, w3: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        both = self.base.gates(w1, w3, x, image_rows)  # (T, 2 I)
        place = self.places[w1]
        low = shrink(x, self.slots, self.tiles, place, parts=2)
        return expand_gated(both, low, self.slots, self.tiles, place)

    def head(self, module: nn.Module, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Ops`."""
        return self.base.head(module, x, out)

    def attention(self, attend: Attend, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """See `Ops`."""
        return self.base.attention(attend, layer, qkv, rope)

    def of_rows(self, rows: Tensor) -> Ops:
        """See `Ops`."""
        del rows  # they are told apart by `wanted` already
        tiles = self.wanted()
        if tiles is None:
            return self.base
        return FusedLoraOps(self.base, self.slots, self.places, tiles)

    def _add(self, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        place = self.places[module]
        low = shrink(x, self.slots, self.tiles, place)
        return expand_add(y, low, self.slots, self.tiles, place)


class DecodeLoraOps(Ops):
    """The same for a step of one row a sequence, in a CUDA graph, with `side` for a second stream.

    A product that is not whole yet, and what is to be added to it, are kept until the next call:
    in a decoder layer that is the one that reads it.
    """

    def __init__(
        self,
        base: FusedOps,
        slots: Slots,
        places: Places,
        tiles: Tiles,
        side: torch.cuda.Stream,
    ) -> None:
        self.base = base
        self.slots = slots
        self.places = places
        self.tiles = tiles
        self.side = side
        self._part: tuple[Tensor, Tensor] | None = None  # a product, and what it lacks

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `Ops`; completes x in place."""
        if self._part is None:
            return self.base.norm(module, x)
        assert isinstance(module, RMSNorm)
        return add_rms_norm(x, self._lacking(x), module.weight, module.eps)

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`; `attention` completes it."""
        with self._beside(module, x) as delta:
            y = self.base.linear(module, x, image_rows)
        self._part = y, delta
        return y

    def linear_add(
        self, module: nn.Module, x: Tensor, image_rows: ImageRows, residual: Tensor
    ) -> Tensor:
        """See `Ops`; `norm` completes it."""
        with self._beside(module, x) as delta:
            y = self.base.linear_add(module, x, image_rows, residual)
        self._part = y, delta
        return y

    def gated(self, w1: nn.Module, w3: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        with self._beside(w1, x, parts=2) as delta:
            both = self.base.gates(w1, w3, x, image_rows)  # (T, 2 I)
        return silu_mul(both, delta)

    def head(self, module: nn.Module, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Ops`."""
        assert self._part is None
        return self.base.head(module, x, out)

    def attention(self, attend: Attend, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """See `Ops`."""
        assert isinstance(attend, FusedAttend)
        return attend.packed(layer, qkv, rope, self._lacking(qkv).view(qkv.shape))

    def _lacking(self, y: Tensor) -> Tensor:
        assert self._part is not None
        product, delta = self._part
        assert product.data_ptr() == y.data_ptr(), "another tensor than the one just computed"
        self._part = None
        return delta

    @contextmanager
    def _beside(self, module: nn.Module, x: Tensor, parts: int = 1) -> Iterator[Tensor]:
        """scaling · B A x of each row, (T, parts · out); there when the context ends."""
        assert self._part is None, "a product was left as it is"
        place, main = self.places[module], torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            low = shrink(x, self.slots, self.tiles, place, parts)
            delta = expand(low, self.slots, self.tiles, place, parts, dtype=x.dtype)
        yield delta
        # From here on it is main's too; the side stream takes its memory again only after it has
        # waited for main, as above.
        main.wait_stream(self.side)


def cut_rows(
    segments: Sequence[tuple[int, int, int]], num_rows: int, device: torch.device
) -> Tiles:
    """Tiles of a step of so many rows, from (slot, first row, rows) of those with an adapter."""
    runs: list[tuple[int, int]] = []
    place = 0
    for slot, first, num in segments:
        if first > place:
            runs.append((NO_SLOT, first - place))
        runs.append((slot, num))
        place = first + num
    if place < num_rows:
        runs.append((NO_SLOT, num_rows - place))
    return cut(runs, DECODE_ROWS if num_rows <= FEW_ROWS else PREFILL_ROWS, device)


def group_rows(row_slots: Tensor, num_slots: int) -> Tiles:
    """Tiles of a decode step, row_slots (T,) int32, found on the device."""
    if len(row_slots) <= MAX_GROUPED:
        return group(row_slots, num_slots)
    return Tiles(row_slots)
