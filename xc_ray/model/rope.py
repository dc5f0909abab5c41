"""Rotary positions (2104.09864) and their scaling, by a sequence's own length.

The original keeps one table a layer that grows with the longest sequence ever seen, so that one
long request changes every later one. Here the base follows from the length given for a sequence and
from nothing else.
"""

import torch
from torch import Tensor

from xc_ray.model.config import DecoderConfig


def rope_base(config: DecoderConfig, length: int) -> float:
    """Base of the angles for a sequence of `length` tokens.

    Dynamic NTK: theta·(factor·n / max − (factor − 1))^(d / (d − 2)) for n past
    max_position_embeddings.
    """
    scaling, limit = config.rope_scaling, config.max_position_embeddings
    if scaling is None or scaling.type != "dynamic" or length <= limit:
        return config.rope_theta
    d = config.head_dim
    growth = scaling.factor * length / limit - (scaling.factor - 1)
    return float(config.rope_theta * growth ** (d / (d - 2)))


def inverse_frequencies(
    config: DecoderConfig,
    length: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(D / 2,) base^(−2i / D) for a sequence of `length` tokens; linear scaling is folded in."""
    d = config.head_dim
    exponents = torch.arange(0, d, 2, dtype=dtype, device=device) / d
    frequencies = 1.0 / (rope_base(config, length) ** exponents)
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        return frequencies / config.rope_scaling.factor
    return frequencies


def rope_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, D), of positions (T,).

    frequencies: (D / 2,), or one row a token (T, D / 2).
    """
    half = positions.to(frequencies.dtype)[:, None] * frequencies  # (T, D / 2)
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D) with its two halves rotated into one another by the angles of each row."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
