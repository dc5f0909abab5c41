"""Rotary positions (2104.09864) of one head's vector at a time, in Python floats."""

import math

from xc_ray.model.config import DecoderConfig


def frequencies(config: DecoderConfig, length: int) -> list[float]:
    """The angle per position of each of the D / 2 pairs, for a sequence of `length` tokens."""
    d = config.hidden_size // config.num_attention_heads
    base, divisor = config.rope_theta, 1.0
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        divisor = config.rope_scaling.factor
    elif config.rope_scaling is not None and length > config.max_position_embeddings:
        factor, limit = config.rope_scaling.factor, config.max_position_embeddings
        base *= (factor * length / limit - (factor - 1)) ** (d / (d - 2))
    return [base ** (-2 * i / d) / divisor for i in range(d // 2)]


def rotated(vector: list[float], position: int, angles: list[float]) -> list[float]:
    """Number i of the first half and number i of the second half are turned by angle i."""
    half = len(vector) // 2
    result = [0.0] * len(vector)
    for i in range(half):
        x, y, angle = vector[i], vector[half + i], position * angles[i]
        result[i] = x * math.cos(angle) - y * math.sin(angle)
        result[half + i] = y * math.cos(angle) + x * math.sin(angle)
    return result
