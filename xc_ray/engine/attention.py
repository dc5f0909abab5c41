"""The engine's Attend: keys and values into the cache, attention over each sequence's own range."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xc_ray.engine.kv_cache import KVCache
from xc_ray.model.attention import causal_attention


@dataclass(frozen=True)
class Span:
    """Rows of one sequence in the flat batch.

    `num_new` rows follow `num_past` cached tokens; `start` is the first slot of its range.
    """

    start: int
    num_past: int
    num_new: int


class CachedAttend:
    """Attention of one step; see `xc_ray.model.attention.Attend`."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], slots: Tensor) -> None:
        self.cache = cache
        self.spans = spans
        self.slots = slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        self.cache.write(layer, self.slots, k, v)
        outs = []
        parts = q.split([span.num_new for span in self.spans])
        for span, queries in zip(self.spans, parts, strict=True):
            keys, values = self.cache.read(layer, span.start, span.num_past + span.num_new)
            outs.append(causal_attention(queries, keys, values))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
