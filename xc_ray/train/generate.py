"""Greedy answers while training: the decoder as it is, with a cache that grows by concatenation.

For a few validation rows; serving has the engine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xc_ray.model.attention import causal_attention
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import Ops
from xc_ray.model.rope import inverse_frequencies, rope_table


class GrowingAttend:
    """`Attend` of one sequence over all that it was given before."""

    def __init__(self, num_layers: int) -> None:
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        if before := self.past[layer]:
            k, v = torch.cat((before[0], k)), torch.cat((before[1], v))
        self.past[layer] = (k, v)
        return causal_attention(q, k, v)


@torch.no_grad()
def greedy_answer(
    decoder: Decoder,
    ops: Ops,
    prompt: Sequence[int],
    embeddings: Tensor | None,
    *,
    max_tokens: int,
    stop_ids: frozenset[int],
) -> list[int]:
    """Ids of the answer to a prompt with virtual image ids, without the id that ends it.

    `embeddings` (Ti, C) are the prompt's picture rows. Rope is scaled as in serving, by the prompt
    and `max_tokens` together.
    """
    config, device = decoder.config.decoder, decoder.device
    wide = torch.promote_types(decoder.dtype, torch.float32)
    total = len(prompt) + max_tokens
    frequencies = inverse_frequencies(config, total, device=device, dtype=wide)
    cos, sin = rope_table(torch.arange(total, device=device), frequencies)
    attend = GrowingAttend(config.num_hidden_layers)
    ids, start = torch.tensor(prompt, device=device), 0
    answer: list[int] = []
    for _ in range(max_tokens):
        x, image_rows = decoder.embed(ids, embeddings if start == 0 else None)
        rows = slice(start, start + len(ids))
        hidden = decoder(x, (cos[rows], sin[rows]), attend, image_rows, ops)
        token = int(decoder.logits(hidden[-1:]).argmax())
        if token in stop_ids:
            break
        answer.append(token)
        start, ids = rows.stop, torch.tensor([token], device=device)
    return answer
