"""Causal grouped-query attention (2305.13245), one query of one head at a time."""

import math

import torch
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (Tq, H, D): the last Tq of the Tk positions of k, v (Tk, Hk, D) -> (Tq, H, D)."""
    (num_q, num_heads, d), (num_k, num_kv_heads, _) = q.shape, k.shape
    out = torch.zeros_like(q)
    for row in range(num_q):
        seen = num_k - num_q + row + 1  # a query sees its own position and those before it
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = [q[row, head] @ k[j, kv_head] / math.sqrt(d) for j in range(seen)]
            weights = torch.stack(scores).softmax(0)
            out[row, head] = sum(w * v[j, kv_head] for j, w in enumerate(weights))
    return out
