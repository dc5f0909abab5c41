"""One forward step, eager: a batch in, logits of the sampling rows out."""

import torch
from torch import Tensor

from xc_ray.engine.attention import CachedAttend
from xc_ray.engine.batch import Batch
from xc_ray.engine.kv_cache import KVCache
from xc_ray.model.decoder import Decoder
from xc_ray.model.rope import inverse_frequencies, rope_table


class Runner:
    """Holds the model, the cache and each lane's rope frequencies (lanes, D / 2)."""

    def __init__(self, decoder: Decoder, cache: KVCache, num_lanes: int) -> None:
        self.decoder = decoder
        self.cache = cache
        self._wide = torch.promote_types(decoder.dtype, torch.float32)
        half = decoder.config.decoder.head_dim // 2
        self.frequencies = torch.zeros(num_lanes, half, device=decoder.device, dtype=self._wide)

    def set_lane(self, lane: int, rope_length: int) -> None:
        """Fixes the rope base of the sequence that takes `lane`."""
        config = self.decoder.config.decoder
        self.frequencies[lane] = inverse_frequencies(
            config, rope_length, device=self.decoder.device, dtype=self._wide
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor | None:
        """Logits (S, V) of the rows that sample, None if none does."""
        x = self.decoder.model.tok_embeddings(batch.ids)
        if batch.image_rows is not None:
            assert batch.image_embeddings is not None
            x = x.index_copy(0, batch.image_rows, batch.image_embeddings.to(x.dtype))
        rope = rope_table(batch.positions, self.frequencies[batch.lanes])
        attend = CachedAttend(self.cache, batch.spans, batch.slots)
        hidden = self.decoder(x, rope, attend, batch.image_rows)
        if not len(batch.sample_rows):
            return None
        return self.decoder.logits(hidden.index_select(0, batch.sample_rows))
