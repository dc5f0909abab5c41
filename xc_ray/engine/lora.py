"""Many LoRA adapters on one device, and a step whose rows each use another (2311.03285).

A slot is one block of memory: for every linear map in the order of the layers A (R, in), then
B (out, R), with one rank R for the whole adapter. So an adapter is packed once on the host, and
one copy beside the running steps brings it to the device.
"""

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xc_ray.engine.batch import Segment, to_device
from xc_ray.engine.carrier import Carrier
from xc_ray.engine.config import LORA_RANK_STEP, EngineConfig
from xc_ray.engine.kernels.lora_layout import Place, Slots, places
from xc_ray.errors import InvalidRequest
from xc_ray.model.adapter import Adapter
from xc_ray.model.attention import Attend
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import Ops, Rope
from xc_ray.model.plora import ImageRows

# The order within a layer: w1 and w3, which take the same input, follow one another.
LINEARS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
)


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter as a slot holds it: `data` (R · numbers a rank,) on the host, `scalings` (J,).

    R is `rank`, padded with rows of zeros; J linear maps in the order of the layers.
    """

    digest: str
    rank: int
    data: Tensor
    scalings: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the host copy."""
        return self.data.nbytes


class LoraPool:
    """The slots of a decoder: `max_loras` adapters of ranks up to `max_lora_rank`."""

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        device, dtype = decoder.device, decoder.dtype
        self.config = config
        self.device, self.dtype = device, dtype
        shapes = decoder.config.linear_shapes
        modules = {
            (number, name): layer.get_submodule(name)
            for number, layer in enumerate(decoder.model.layers)
            for name in LINEARS
        }
        found = places([(shapes[name][1], shapes[name][0]) for _, name in modules])
        self.numel_per_rank = found[-1].before + found[-1].size + found[-1].out
        self.places = dict(zip(modules, found, strict=True))
        self.of_module: dict[nn.Module, Place] = {
            module: self.places[key] for key, module in modules.items()
        }
        num, rank = config.max_loras, config.padded_lora_rank
        wide = torch.promote_types(dtype, torch.float32)
        self.slots = Slots(
            torch.zeros(num, rank * self.numel_per_rank, device=device, dtype=dtype),
            torch.zeros(num, dtype=torch.int32, device=device),
            torch.zeros(num, len(found), dtype=wide, device=device),
            rank,
        )
        self._host_ranks = [0] * num
        self._copies: dict[int, Future[None]] = {}
        self._carrier = Carrier(device) if device.type == "cuda" else None

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """The host copy of an adapter; from any thread.

        Raises:
            InvalidRequest: its rank is larger than the slots'.
        """
        config = self.config
        if adapter.rank > config.max_lora_rank:
            raise InvalidRequest(
                f"the adapter has rank {adapter.rank} and this decoder holds ranks up to "
                f"{config.max_lora_rank}; raise adapters.max_rank",
                param="model",
            )
        rank = -(-adapter.rank // LORA_RANK_STEP) * LORA_RANK_STEP
        data = torch.zeros(rank * self.numel_per_rank, dtype=self.dtype)
        scalings = torch.zeros(len(self.places), dtype=self.slots.scalings.dtype)
        for key, pair in adapter.pairs.items():
            place = self.places[key]
            a, b = place.views(data, rank)
            a[: len(pair.a)].copy_(pair.a)
            b[:, : len(pair.a)].copy_(pair.b)
            scalings[place.index] = pair.scaling
        return PackedAdapter(adapter.digest, rank, data, scalings)

    def load(self, slot: int, adapter: PackedAdapter) -> None:
        """Starts to copy an adapter into a slot that no later step uses; see `loaded`."""
        self._host_ranks[slot] = adapter.rank
        target = self.slots.pool[slot, : len(adapter.data)]

        def finish() -> None:
            self.slots.scalings[slot].copy_(adapter.scalings)
            self.slots.ranks[slot].fill_(adapter.rank)

        if self._carrier is None:
            with torch.inference_mode():
                target.copy_(adapter.data)
                finish()
            return
        # Steps that are launched may still read what was in the slot.
        self._copies[slot] = self._carrier.start(adapter.data, target, finish)

    def loaded(self, slot: int) -> bool:
        """Whether the copy into a slot has ended."""
        copy = self._copies.get(slot)
        if copy is not None and not copy.done():
            return False
        if copy is not None:
            copy.result()  # raises what went wrong
        self._copies.pop(slot, None)
        return True

    def wait(self) -> None:
        """Waits for all copies."""
        for copy in self._copies.values():
            copy.result()

    def pair(self, slot: int, place: Place) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of a linear map, as they stand in a slot."""
        return place.views(self.slots.pool[slot], self._host_ranks[slot])


class LoraOps(Ops):
    """A step's `Ops` with the adapters of its rows, in plain torch; `base` does the rest.

    `segments` are (slot, first row, rows) of those rows that have one, `wanted` the same of the
    rows that the last layer goes on with.
    """

    def __init__(
        self, base: Ops, pool: LoraPool, segments: Seq[Segment], wanted: Seq[Segment] = ()
    ) -> None:
        self.base = base
        self.pool = pool
        self.wanted = wanted
        by_slot: dict[int, list[int]] = {}
        for slot, first, num in segments:
            by_slot.setdefault(slot, []).extend(range(first, first + num))
        rows = to_device(list(by_slot.values()), pool.device)
        self.rows = list(zip(by_slot, rows, strict=True))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `Ops`."""
        return self.base.norm(module, x)

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        y = self.base.linear(module, x, image_rows)
        place = self.pool.of_module[module]
        for slot, rows in self.rows:
            a, b = self.pool.pair(slot, place)
            scaling = self.pool.slots.scalings[slot, place.index]
            low = F.linear(F.linear(x.index_select(0, rows), a), b)  # (rows, out)
            y.index_add_(0, rows, (low * scaling).to(y.dtype))
        return y

    def head(self, module: nn.Module, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Ops`."""
        return self.base.head(module, x, out)

    def attention(self, attend: Attend, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """See `Ops`."""
        return self.base.attention(attend, layer, qkv, rope)

    def of_rows(self, rows: Tensor) -> Ops:
        """See `Ops`."""
        del rows  # they are told apart by `wanted` already
        return LoraOps(self.base, self.pool, self.wanted)
