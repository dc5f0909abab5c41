"""Greedy decoding without a cache: the whole sequence is computed anew for every token."""

import torch
from torch import Tensor

from xc_ray.engine.sequence import FinishReason, SamplingParams
from xc_ray.model.attention import DenseAttend
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.rope import inverse_frequencies, rope_table


@torch.inference_mode()
def dense_logits(
    decoder: Decoder,
    ids: list[int],
    pictures: Tensor | None,
    rope_length: int,
    ops: Ops = PLAIN,
) -> Tensor:
    """Logits (T, V) of one whole sequence, rope scaled for `rope_length`."""
    x, image_rows = decoder.embed(torch.tensor(ids), pictures)
    wide = torch.promote_types(decoder.dtype, torch.float32)
    frequencies = inverse_frequencies(decoder.config.decoder, rope_length, dtype=wide)
    rope = rope_table(torch.arange(len(ids)), frequencies)
    return decoder.logits(decoder(x, rope, DenseAttend([len(ids)]), image_rows, ops))


def greedy(
    decoder: Decoder,
    ids: list[int],
    params: SamplingParams,
    pictures: Tensor | None = None,
    ops: Ops = PLAIN,
) -> tuple[list[int], FinishReason, list[float]]:
    """Answer ids without a stop id, why it ended, and by how much each best logit led.

    Rope is scaled for prompt + max_tokens throughout, as the engine fixes it at admission.
    """
    answer: list[int] = []
    leads: list[float] = []
    while len(answer) < params.max_tokens:
        whole = dense_logits(decoder, ids + answer, pictures, len(ids) + params.max_tokens, ops)
        best = whole[-1].topk(2)
        leads.append(float(best.values[0] - best.values[1]))
        if int(best.indices[0]) in params.stop_token_ids:
            return answer, FinishReason.STOP, leads
        answer.append(int(best.indices[0]))
    return answer, FinishReason.LENGTH, leads
