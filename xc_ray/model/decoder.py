"""InternLM2 (2403.17297) with PLoRA: RMSNorm, packed QKV, GQA, SwiGLU; attention is handed in.

Everything works on a flat batch: T tokens of any number of sequences laid end to end. Module names
are the published tensor names.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xc_ray.model.attention import Attend
from xc_ray.model.config import XComposerConfig
from xc_ray.model.ops import PLAIN, Ops, Rope
from xc_ray.model.plora import ImageRows, PLoRALinear


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (in this order, as published)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (T, C) -> (T, C)."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, C), weight (C,) -> (T, C); see `RMSNorm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one packed projection.

    `wqkv` is grouped by key/value head: each of the Hk groups holds its H / Hk query heads, then
    the key head, then the value head.
    """

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        d = config.decoder
        self.num_kv_heads, self.head_dim = d.num_key_value_heads, d.head_dim
        packed = (d.num_attention_heads + 2 * d.num_key_value_heads) * d.head_dim
        self.wqkv = PLoRALinear(d.hidden_size, packed, config.plora["attention.wqkv"], bias=d.bias)
        self.wo = PLoRALinear(
            d.hidden_size, d.hidden_size, config.plora["attention.wo"], bias=d.bias
        )

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        image_rows: ImageRows,
        attend: Attend,
        layer: int,
        ops: Ops = PLAIN,
    ) -> Tensor:
        """x (T, C), rope two of (T, D) -> what `wo` takes, (T, C)."""
        qkv = ops.linear(self.wqkv, x, image_rows)
        packed = qkv.view(len(x), self.num_kv_heads, -1, self.head_dim)  # (T, Hk, H / Hk + 2, D)
        return ops.attention(attend, layer, packed, rope).reshape(len(x), -1)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        size, inner = config.decoder.hidden_size, config.decoder.intermediate_size
        self.w1 = PLoRALinear(size, inner, config.plora["feed_forward.w1"])
        self.w3 = PLoRALinear(size, inner, config.plora["feed_forward.w3"])
        self.w2 = PLoRALinear(inner, size, config.plora["feed_forward.w2"])

    def forward(
        self, x: Tensor, image_rows: ImageRows, residual: Tensor, ops: Ops = PLAIN
    ) -> Tensor:
        """residual (T, C) + w2(silu(w1 x) · w3 x) of x (T, C)."""
        gated = ops.gated(self.w1, self.w3, x, image_rows)
        return ops.linear_add(self.w2, gated, image_rows, residual)


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        d = config.decoder
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(d.hidden_size, d.rms_norm_eps)
        self.ffn_norm = RMSNorm(d.hidden_size, d.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        image_rows: ImageRows,
        attend: Attend,
        layer: int,
        ops: Ops = PLAIN,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x (T, C) -> (T, C), or (S, C) of the text rows `wanted` (S,) int64 alone.

        What others need of a row, its keys and values, is stored by then.
        """
        out = self.attention(ops.norm(self.attention_norm, x), rope, image_rows, attend, layer, ops)
        if wanted is not None:
            x, out, image_rows = x.index_select(0, wanted), out.index_select(0, wanted), None
            if not len(wanted):
                return x
            ops = ops.of_rows(wanted)
        x = ops.linear_add(self.attention.wo, out, image_rows, x)
        result: Tensor = self.feed_forward(ops.norm(self.ffn_norm, x), image_rows, x, ops)
        return result


class DecoderBody(nn.Module):
    """Embeddings, layers and the last norm (the published `model.` names)."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        d = config.decoder
        self.tok_embeddings = nn.Embedding(d.vocab_size, d.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(d.num_hidden_layers)])
        self.norm = RMSNorm(d.hidden_size, d.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        attend: Attend,
        image_rows: ImageRows = None,
        ops: Ops = PLAIN,
        wanted: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Embeddings x (T, C) -> hidden states (T, C) after the last norm.

        `rope` is what `rope_table` gives, (T, D) each. With `wanted` (S,), text rows, the states of
        these alone, (S, C): the last layer need not be computed for the others. `recompute` keeps
        only the layers' inputs for the backward pass, in which each layer runs again (1604.06174).
        """
        cos, sin = (t.to(x.dtype) for t in rope)
        for number, layer in enumerate(self.layers):
            last = wanted if number == len(self.layers) - 1 else None
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x = run(x, (cos, sin), image_rows, attend, number, ops, last)
        if not len(x):
            return x
        result: Tensor = ops.norm(self.norm, x)
        return result


class Decoder(nn.Module):
    """The language model: ids and picture embeddings in, hidden states and logits out."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderBody(config)
        self.output = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; ids and embeddings must be there too."""
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of hidden states and the cache."""
        return self.output.weight.dtype

    def embed(
        self, ids: Tensor, image_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of the flat batch and which of them are pictures.

        ids (T,) int64 with virtual ids `vocab_size + row`; image_embeddings (rows, C), needed if
        ids hold any -> x (T, C) and the picture rows (Ti,) int64, None if there are none.
        """
        vocab = self.config.decoder.vocab_size
        if image_embeddings is None:
            return self.model.tok_embeddings(ids), None
        image_rows = (ids >= vocab).nonzero().squeeze(1)
        if not len(image_rows):
            return self.model.tok_embeddings(ids), None
        x = self.model.tok_embeddings(ids.clamp(max=vocab - 1))
        pictures = image_embeddings.index_select(0, ids.index_select(0, image_rows) - vocab)
        return x.index_copy(0, image_rows, pictures.to(x.dtype)), image_rows

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        attend: Attend,
        image_rows: ImageRows = None,
        ops: Ops = PLAIN,
        wanted: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """x (T, C) -> hidden states (T, C); see `DecoderBody`."""
        result: Tensor = self.model(x, rope, attend, image_rows, ops, wanted, recompute)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (T, C) -> logits (T, V) in float32 (float64 stays)."""
        scores: Tensor = self.output(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
