"""The engine's Attend: keys and values into the cache's slots, attention over blocks.

A step's rows are, in this order, one row a decoding sequence, then the chunks of prompts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xc_ray.engine.kv_cache import KVCache
from xc_ray.model.attention import causal_attention


@dataclass(frozen=True)
class Span:
    """Rows of one prompt's chunk: `num_new` rows behind `num_past` tokens in the cache.

    `blocks` (M,) int64 hold both; None where there is no past, so that nothing is read back.
    """

    num_past: int
    num_new: int
    blocks: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Where the rows of a step stand: all tensors on the device.

    slots (T,) int64. Of the first `num_decode` rows, lanes (S,) int64 say whose block table holds
    their sequence, positions (S,) their place in it; `tables` (lanes, M) int32. `spans` are the
    rest; `num_blocks` bounds the blocks of a decoding sequence.
    """

    slots: Tensor
    num_decode: int
    lanes: Tensor
    positions: Tensor
    tables: Tensor
    num_blocks: int
    spans: tuple[Span, ...] = ()


class PagedAttend:
    """Attention of one step in plain torch; see `xc_ray.model.attention.Attend`."""

    def __init__(self, cache: KVCache, rows: Rows) -> None:
        self.cache = cache
        self.rows = rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        self.cache.write(layer, self.rows.slots, k, v)
        n = self.rows.num_decode
        outs = []
        if n:
            outs.append(self.decode(layer, q[:n]))
        if self.rows.spans:
            outs += self.prefill(layer, q[n:], k[n:], v[n:])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def decode(self, layer: int, q: Tensor) -> Tensor:
        """Queries (S, H, D) of the decoding sequences, whose keys are stored -> (S, H, D)."""
        rows = self.rows
        blocks = rows.tables[:, : rows.num_blocks][rows.lanes]  # (S, M)
        keys, values = self.cache.gather(layer, blocks)
        return plain_paged_decode(q, keys, values, rows.positions + 1)

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Queries, keys and values of all chunks -> their outputs, one after another."""
        sizes = [span.num_new for span in self.rows.spans]
        parts = zip(self.rows.spans, *(t.split(sizes) for t in (q, k, v)), strict=True)
        return [
            causal_attention(queries, *self.history(layer, span, keys, values))
            for span, queries, keys, values in parts
        ]

    def history(self, layer: int, span: Span, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a chunk and of what is before it."""
        if span.blocks is None:
            return k, v
        return self.cache.read(layer, span.blocks, span.num_past + span.num_new)


def key_slots(tables: Tensor, lanes: Tensor, ends: Tensor, total: int, block_size: int) -> Tensor:
    """Slots (total,) int64 of the first tokens of S sequences, one sequence after another.

    tables (lanes, M); lanes (S,); ends (S + 1,): 0, and where each sequence ends in the result.
    Nothing waits for the device.
    """
    index = torch.arange(total, device=tables.device)
    owner = torch.searchsorted(ends[1:].long(), index, right=True)
    places = index - ends[owner]
    blocks = tables[lanes[owner], places // block_size].long()
    return blocks * block_size + places % block_size


def plain_paged_decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query a sequence over the first `lengths` (S,) tokens of its blocks.

    q (S, H, D), keys and values (S, M, B, Hk, D) as gathered -> (S, H, D).
    """
    k, v = (t.flatten(1, 2).transpose(1, 2) for t in (keys, values))  # (S, Hk, M·B, D)
    seen = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
    # A mask does not hide NaN, which an earlier owner may have left in the rest of a block.
    k, v = (t.where(seen[:, None, :, None], 0) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=True
    )
    return out[:, :, 0]
