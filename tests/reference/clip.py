"""A CLIP ViT (2103.00020, 2010.11929) on one page: tensors by published name, head by head."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from xc_ray.model.config import VisionConfig

PREFIX = "vit.vision_tower.vision_model."


def patches(config: VisionConfig, tensors: Mapping[str, Tensor], square: Tensor) -> Tensor:
    """One square (3, S, S) -> the last layer's patch rows (P, C), without a final norm."""

    def get(name: str) -> Tensor:
        return tensors[PREFIX + name]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred**2).mean(-1, keepdim=True) + config.layer_norm_eps)
        return centred * scale * get(name + ".weight") + get(name + ".bias")

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(name + ".weight").T + get(name + ".bias")

    p, side = config.patch_size, config.image_size // config.patch_size
    kernel = get("embeddings.patch_embedding.weight").flatten(1)  # (C, 3·p·p)
    rows = [get("embeddings.class_embedding")]
    for i in range(side):
        for j in range(side):
            patch = square[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            rows.append(kernel @ patch.flatten())
    x = torch.stack(rows) + get("embeddings.position_embedding.weight")
    x = norm(x, "pre_layrnorm")
    for n in range(config.num_hidden_layers):
        layer = f"encoder.layers.{n}."
        h = norm(x, layer + "layer_norm1")
        q, k, v = (linear(h, f"{layer}self_attn.{name}_proj") for name in "qkv")
        heads = []
        size = config.hidden_size // config.num_attention_heads
        for head in range(config.num_attention_heads):
            part = slice(size * head, size * (head + 1))
            weights = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1)
            heads.append(weights @ v[:, part])
        x = x + linear(torch.cat(heads, -1), layer + "self_attn.out_proj")
        h = linear(norm(x, layer + "layer_norm2"), layer + "mlp.fc1")
        h = h * torch.sigmoid(1.702 * h)  # quick GELU
        x = x + linear(h, layer + "mlp.fc2")
    return x[1:]
