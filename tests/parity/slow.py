"""Textbook decoding with a cache that only grows, and a way to look inside the model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from xc_ray.model.attention import DenseAttend, causal_attention
from xc_ray.model.config import DecoderConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.rope import inverse_frequencies, rope_table
from xc_ray.model.xcomposer import packed_rope


class CachedAttend:
    """One sequence: keys and values of every layer are kept, new ones appended (an `Attend`)."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.keys:
            k, v = torch.cat((self.keys[layer], k)), torch.cat((self.values[layer], v))
        self.keys[layer], self.values[layer] = k, v
        return causal_attention(q, k, v)


def forward(
    decoder: Decoder,
    x: Tensor,
    lengths: Sequence[int],
    image_rows: Tensor | None = None,
    attend: CachedAttend | None = None,
) -> Tensor:
    """Hidden states (T, C) of whole sequences laid end to end, rope by each one's own length."""
    rope = packed_rope(decoder.config, lengths, x.device)
    hidden: Tensor = decoder(x, rope, attend or DenseAttend(lengths), image_rows)
    return hidden


@dataclass
class Decoding:
    """What a cached decoding gave: the ids, and the logits that chose each of them."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def decode(
    decoder: Decoder,
    x: Tensor,
    image_rows: Tensor | None,
    steps: int,
    *,
    penalty: float = 1.0,
    penalised: Sequence[int] = (),
    stop: Collection[int] = (),
    forced: Sequence[int] | None = None,
) -> Decoding:
    """Greedy continuation of embeddings x (T, C), rope scaled by the prompt's length throughout.

    `penalised` are the prompt's ids if the repetition penalty sees them; `forced` are fed instead
    of the chosen ids. Ends after `steps` logits or a `stop` id.
    """
    frequencies = inverse_frequencies(decoder.config.decoder, len(x))
    attend, result = CachedAttend(), Decoding()
    seen = list(penalised)
    position = 0
    while len(result.logits) < steps:
        rope = rope_table(torch.arange(position, position + len(x)), frequencies)
        hidden = decoder(x, rope, attend, image_rows)
        logits = decoder.logits(hidden[-1:])[0]  # (V,)
        chosen = int(penalise(logits, seen, penalty).argmax())
        result.logits.append(logits)
        result.ids.append(chosen)
        if chosen in stop:
            break
        position += len(x)
        given = forced[len(result.ids) - 1 : len(result.ids)] if forced is not None else [chosen]
        if not given:
            break
        seen += given
        x, image_rows = decoder.embed(torch.tensor(given))
    return result


def penalise(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Repetition penalty (1909.05858): scores of seen ids over it, or times it if negative."""
    result = logits.clone()
    for token in set(seen):
        result[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return result


def steps_at_one_base(config: DecoderConfig, prompt_length: int, steps: int) -> int:
    """How many of `steps` logits the original computes at the base of the prompt's length.

    It scales anew at each length past the limit and keeps the older keys as they are; this is not
    reproduced, see `xc_ray.model.rope`.
    """
    if config.rope_scaling is None or config.rope_scaling.type != "dynamic":
        return steps
    limit = max(prompt_length, config.max_position_embeddings)
    return min(steps, limit - prompt_length + 1)


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of modules in the order in which they were called within the context."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *call: seen.append(call[2])) for m in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
