"""The Attend protocol, and its forms without a cache: dense, and one call for many sequences.

A decoder layer hands its queries, keys and values of the flat batch to `attend`, which knows which
rows belong to which sequence and where earlier keys are kept. Layers never look attention up.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn


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


class VarlenAttend:
    """`DenseAttend` in one call of torch's variable-length flash attention: half types on a GPU."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.ends, self.longest = ends.to(device), max(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        return varlen_attention(q, k, v, self.ends, self.ends, self.longest, self.longest)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int
) -> Tensor:
    """`causal_attention` of S sequences end to end: q (Tq, H, D), k and v (Tk, Hk, D) -> q's shape.

    q_ends, k_ends (S + 1,) int32: where each sequence ends, and 0 before; max_q, max_k: the longest
    in tokens.
    """
    out = varlen_attn(q, k, v, q_ends, k_ends, max_q, max_k, **_CAUSAL)
    assert isinstance(out, Tensor)
    return out


def _causal() -> dict[str, Any]:
    """How this torch's `varlen_attn` is told to be causal, and that heads are grouped."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    )
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


_CAUSAL = _causal()
