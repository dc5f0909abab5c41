"""InternLM2 with PLoRA (2403.17297, 2401.16420) on one page, row by row."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.reference.rope import frequencies, rotated
from xc_ray.model.config import XComposerConfig

Linear = Callable[[str, Tensor], Tensor]


def logits(
    config: XComposerConfig,
    tensors: Mapping[str, Tensor],
    ids: list[int],
    pictures: Tensor | None = None,
    *,
    rope_length: int | None = None,
) -> Tensor:
    """Logits (T, V) of one sequence; an id of `vocab_size + row` is that row of `pictures`.

    The angles follow from `rope_length`, the sequence's own length if not given.
    """
    d = config.decoder
    angles = frequencies(d, rope_length or len(ids))
    is_picture = [i >= d.vocab_size for i in ids]
    rows = []
    for i in ids:
        if i >= d.vocab_size:
            assert pictures is not None
            rows.append(pictures[i - d.vocab_size])
        else:
            rows.append(tensors["model.tok_embeddings.weight"][i])
    x = torch.stack(rows)  # (T, C)
    for n in range(d.num_hidden_layers):
        layer = f"model.layers.{n}."

        def linear(name: str, rows: Tensor, layer: str = layer) -> Tensor:
            return partial_lora(config, tensors, layer, name, rows, is_picture)

        h = rms_norm(x, tensors[layer + "attention_norm.weight"], d.rms_norm_eps)
        x = x + attention(config, linear, h, angles)
        h = rms_norm(x, tensors[layer + "ffn_norm.weight"], d.rms_norm_eps)
        gate, up = linear("feed_forward.w1", h), linear("feed_forward.w3", h)
        x = x + linear("feed_forward.w2", gate * gate.sigmoid() * up)
    x = rms_norm(x, tensors["model.norm.weight"], d.rms_norm_eps)
    return x @ tensors["output.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row over its root mean square, times the weight."""
    return torch.stack([row / math.sqrt(float((row * row).mean()) + eps) * weight for row in x])


def partial_lora(
    config: XComposerConfig,
    tensors: Mapping[str, Tensor],
    layer: str,
    name: str,
    x: Tensor,
    is_picture: list[bool],
) -> Tensor:
    """W x (+ bias) for every row, + scaling · B A x for picture rows."""
    weight, bias = tensors[layer + name + ".weight"], tensors.get(layer + name + ".bias")
    a, b = (tensors[f"{layer}{name}.Plora_{matrix}.weight"] for matrix in "AB")
    out = []
    for row, picture in zip(x, is_picture, strict=True):
        y = weight @ row
        if bias is not None:
            y = y + bias
        out.append(y + config.plora[name].scaling * (b @ (a @ row)) if picture else y)
    return torch.stack(out)


def attention(config: XComposerConfig, linear: Linear, x: Tensor, angles: list[float]) -> Tensor:
    """Causal attention; row g of a packed vector's groups: its query heads, the key, the value."""
    d = config.decoder
    size, group = d.head_dim, d.num_attention_heads // d.num_key_value_heads
    packed = linear("attention.wqkv", x)  # (T, (H + 2 Hk)·D)
    out = torch.zeros(len(x), d.num_attention_heads * size, dtype=x.dtype)
    for head in range(d.num_attention_heads):
        first = head // group * (group + 2)  # the first head of this query's group
        q, k, v = (
            packed[:, size * at : size * (at + 1)]
            for at in (first + head % group, first + group, first + group + 1)
        )
        q, k = (
            torch.tensor(
                [rotated(row.tolist(), p, angles) for p, row in enumerate(t)], dtype=x.dtype
            )
            for t in (q, k)
        )
        for row in range(len(x)):
            weights = (k[: row + 1] @ q[row] / math.sqrt(size)).softmax(0)
            out[row, size * head : size * (head + 1)] = weights @ v[: row + 1]
    return linear("attention.wo", out)
