"""The cache tensors: keys and values by block."""

import torch
from torch import Tensor

from xc_ray.engine.config import EngineConfig
from xc_ray.model.config import DecoderConfig

E4M3_MAX = 448.0
_SMALLEST_SCALE = 1e-12  # of a head of zeros


class KVCache:
    """Keys and values (L, N, B, Hk, D) of N blocks of B tokens, and one block more.

    Slot `block · B + place` is one token. The last block, `self.spare`, is nobody's: rows that only
    pad a batch write there. In fp8 each token and head has a float32 scale, (L, N, B, Hk).
    """

    def __init__(
        self,
        config: DecoderConfig,
        limits: EngineConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.block_size = limits.block_size
        self.spare = limits.num_blocks
        scales = (
            config.num_hidden_layers,
            limits.num_blocks + 1,
            limits.block_size,
            config.num_key_value_heads,
        )
        fp8 = limits.kv_cache_dtype == "fp8"
        stored = torch.float8_e4m3fn if fp8 else dtype
        self.keys, self.values = (
            torch.zeros(*scales, config.head_dim, device=device, dtype=stored) for _ in range(2)
        )
        self.key_scales, self.value_scales = (
            torch.zeros(*scales, device=device) if fp8 else None for _ in range(2)
        )

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v (T, Hk, D) at slots (T,) int64."""
        for new, stored, scales in (
            (k, self.keys, self.key_scales),
            (v, self.values, self.value_scales),
        ):
            if scales is not None:
                new, scale = quantise(new)
                scales[layer].flatten(0, 1)[slots] = scale
            stored[layer].flatten(0, 1)[slots] = new

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of one sequence: (length, Hk, D) each, in `dtype`."""
        k, v = (t.flatten(0, 1)[:length] for t in self.gather(layer, blocks))
        return k, v

    def pick(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of slots (N,) int64: (N, Hk, D) each, in `dtype`."""
        keys, values = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)
        if self.key_scales is None or self.value_scales is None:
            return keys.index_select(0, slots), values.index_select(0, slots)
        scales = (s[layer].flatten(0, 1) for s in (self.key_scales, self.value_scales))
        k, v = (
            self._wide(stored, slots, own)
            for stored, own in zip((keys, values), scales, strict=True)
        )
        return k, v

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of blocks (...): (..., B, Hk, D) each, in `dtype`."""
        return (
            self._gather(self.keys, self.key_scales, layer, blocks),
            self._gather(self.values, self.value_scales, layer, blocks),
        )

    def _gather(self, stored: Tensor, scales: Tensor | None, layer: int, blocks: Tensor) -> Tensor:
        if scales is None:
            return stored[layer][blocks]
        return self._wide(stored[layer], blocks, scales[layer])

    def _wide(self, stored: Tensor, index: Tensor, scales: Tensor) -> Tensor:
        # 8-bit floats cannot be indexed on every device; their bytes can.
        numbers = stored.view(torch.uint8)[index].view(stored.dtype)
        return (numbers.float() * scales[index][..., None]).to(self.dtype)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) -> e4m3 numbers and float32 scales (...) by which their largest is 448."""
    scales = (x.abs().amax(-1).float() / E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    return (x.float() / scales[..., None]).to(torch.float8_e4m3fn), scales
