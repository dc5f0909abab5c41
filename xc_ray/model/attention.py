"""The Attend protocol, and its dense form for training, reference and tests.

A decoder layer hands its queries, keys and values of the flat batch to `attend`, which knows which
rows belong to which sequence and where earlier keys are kept. Layers never look attention up.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


class Attend(Protocol):
    """Causal grouped-query attention (2305.13245) over the sequences of one flat batch."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, Hk, D), rotated -> (T, H, D), valid until the next call."""
        ...


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence: q (Tq, H, D), k and v (Tk, Hk, D) -> (Tq, H, D).

    The queries are those of the last Tq of the Tk positions.
    """
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, D)
    num_q, num_k = q.shape[0], k.shape[0]
    # A chunk that follows cached tokens needs the causal mask aligned at the end. As a bias object
    # it reaches the flash kernels; as a tensor it would make them fall back to full score matrices.
    mask = causal_lower_right(num_q, num_k) if 1 < num_q < num_k else None
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=1 < num_q == num_k,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


class DenseAttend:
    """Whole sequences of the given lengths laid end to end, no cache."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        if len(self.lengths) == 1:
            return causal_attention(q, k, v)
        parts = zip(*(t.split(self.lengths) for t in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*part) for part in parts])
