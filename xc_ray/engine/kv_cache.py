"""The cache tensors."""

import torch
from torch import Tensor

from xc_ray.engine.slot_ranges import SlotRanges
from xc_ray.model.config import DecoderConfig


class KVCache:
    """Keys and values of `capacity` token slots: two tensors (L, capacity, Hk, D)."""

    def __init__(
        self, config: DecoderConfig, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.ranges = SlotRanges(capacity)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v (T, Hk, D) at slots (T,) int64."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)

    def read(self, layer: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and values of one sequence: (length, Hk, D) each."""
        return self.keys[layer, start : start + length], self.values[layer, start : start + length]
