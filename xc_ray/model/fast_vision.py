"""Tower and projector for serving: squares in, projected rows out; the same weights, less work.

q, k and v are one product, and attention is the fastest that torch has for the device. On a GPU
what lies between the products (norms, residuals, activation) may be compiled, and whole passes may
be CUDA graphs (`PassGraphs`). On CPU both are off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN

from xc_ray.model.projector import merge_patches
from xc_ray.model.xcomposer import ImageEncoder

Attention = Literal["auto", "default", "cudnn", "flash", "efficient", "math"]
# By preference: the first that takes the device, dtype and shape is used.
BACKENDS: dict[Attention, list[SDPBackend]] = {
    "auto": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}

Affine = tuple[Tensor, Tensor]  # weight and bias


class LayerWeights(NamedTuple):
    """One layer of the tower; `qkv` are three maps (3C, C) in one."""

    norm1: Affine
    qkv: Affine
    out: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


class Pointwise:
    """What lies between the products, each a single pass over its rows once it is compiled."""

    def __init__(self, eps: float, activation: Callable[[Tensor], Tensor], compiled: bool) -> None:
        self._eps = eps
        # One compilation for all batch sizes.
        wrap = torch.compile(dynamic=True) if compiled else lambda f: f
        self.activation: Callable[[Tensor], Tensor] = wrap(activation)
        self.norm: Callable[[Tensor, Affine], Tensor] = wrap(self._norm)
        self.add_norm: Callable[[Tensor, Tensor, Affine], tuple[Tensor, Tensor]] = wrap(
            self._add_norm
        )

    def _norm(self, x: Tensor, norm: Affine) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, self._eps)

    def _add_norm(self, x: Tensor, y: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
        x = x + y
        return x, self._norm(x, norm)


class FastVision:
    """Squares (N, 3, S, S) -> projected rows (N, R, C) of an `ImageEncoder`, separators left out.

    R is 400 for tiles of 560 px. The encoder's q, k and v become views of the packed weights and
    can be used as before.
    """

    def __init__(
        self, encoder: ImageEncoder, *, attention: Attention = "auto", compiled: bool = False
    ) -> None:
        clip = encoder.vit.vision_tower.vision_model
        assert isinstance(clip, CLIPVisionModel)
        self.encoder = encoder
        self.on_gpu = encoder.device.type == "cuda"
        self._clip = clip
        self._heads = encoder.config.vision.num_attention_heads
        self._layers = [_layer_weights(layer) for layer in clip.encoder.layers]
        self._pre_norm = _affine(clip.pre_layrnorm)
        self._pointwise = Pointwise(
            encoder.config.vision.layer_norm_eps,
            ACT2FN[encoder.config.vision.hidden_act],
            compiled and self.on_gpu,
        )
        self._attention: Attention = attention if self.on_gpu else "default"

    def __call__(self, squares: Tensor) -> Tensor:
        """Squares (N, 3, S, S) -> rows (N, R, C)."""
        return self.project(self.patches(squares))

    def patches(self, squares: Tensor) -> Tensor:
        """Squares (N, 3, S, S) -> patches (N, P, Cv), as of `VisionTower`."""
        x: Tensor = self._clip.embeddings(squares)
        x = self._pointwise.norm(x, self._pre_norm)
        h = self._pointwise.norm(x, self._layers[0].norm1)
        norms = [layer.norm1 for layer in self._layers[1:]]
        with self._backend():
            for layer, next_norm in zip(self._layers, [*norms, None], strict=True):
                y = F.linear(self._attend(F.linear(h, *layer.qkv)), *layer.out)
                x, h = self._pointwise.add_norm(x, y, layer.norm2)
                y = F.linear(self._pointwise.activation(F.linear(h, *layer.fc1)), *layer.fc2)
                if next_norm is not None:
                    x, h = self._pointwise.add_norm(x, y, next_norm)
        return (x + y)[:, 1:]

    def project(self, patches: Tensor) -> Tensor:
        """Patches (N, P, Cv) -> rows (N, R, C): merged where the family does, and projected."""
        config = self.encoder.config
        rows = patches
        if config.family.tiled:
            side = config.vision.patches_per_side
            rows = merge_patches(patches, side, config.family.merge).flatten(1, 2)
        projected: Tensor = self.encoder.vision_proj(rows)
        return projected

    def _attend(self, qkv: Tensor) -> Tensor:
        n, p, c = qkv.shape
        q, k, v = qkv.view(n, p, 3, self._heads, -1).permute(2, 0, 3, 1, 4)  # (N, H, P, D) each
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, p, c // 3)

    @contextmanager
    def _backend(self) -> Iterator[None]:
        backends = BACKENDS.get(self._attention)
        with sdpa_kernel(backends, set_priority=True) if backends else nullcontext():
            yield


class PassGraphs:
    """CUDA graphs of whole passes: a pass is one launch instead of some three hundred.

    Only for the sizes given, without padding: a square is milliseconds of work, a launch is not.
    """

    def __init__(self, vision: FastVision, sizes: list[int]) -> None:
        config, encoder = vision.encoder.config, vision.encoder
        shape = (max(sizes), 3, config.tile, config.tile)
        self._vision = vision
        self._sizes = sorted(sizes, reverse=True)
        self._squares = torch.zeros(shape, dtype=encoder.dtype, device=encoder.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures all sizes, largest first, in one pool."""
        pool = None
        for size in self._sizes:
            squares = self._squares[:size]
            self._vision(squares)  # kernels compile, and attention is planned, outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                rows = self._vision(squares)
            pool = pool or graph.pool()
            self._graphs[size] = graph, rows

    def can_use(self, num_squares: int) -> bool:
        """Whether passes of this size were captured."""
        return num_squares in self._graphs

    def replay(self, squares: Tensor) -> Tensor:
        """Squares (N, 3, S, S) -> rows (N, R, C) of their own memory."""
        graph, rows = self._graphs[len(squares)]
        self._squares[: len(squares)].copy_(squares)
        graph.replay()
        return rows.clone()


def _affine(module: nn.Module) -> Affine:
    assert isinstance(module, nn.Linear | nn.LayerNorm)
    return module.weight, module.bias


def _layer_weights(layer: Any) -> LayerWeights:  # a CLIPEncoderLayer
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        _affine(layer.layer_norm1),
        _packed(attention.q_proj, attention.k_proj, attention.v_proj),
        _affine(attention.out_proj),
        _affine(layer.layer_norm2),
        _affine(mlp.fc1),
        _affine(mlp.fc2),
    )


@torch.no_grad()
def _packed(*linears: nn.Linear) -> Affine:
    """The linears' weights and biases end to end; they keep views, so nothing is held twice."""
    size = len(linears[0].weight)
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    for i, linear in enumerate(linears):
        linear.weight.data = weight[i * size : (i + 1) * size]
        linear.bias.data = bias[i * size : (i + 1) * size]
    return weight, bias
