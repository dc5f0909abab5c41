"""The decoder's `Ops` and the engine's Attend on a GPU: few kernels a layer, same meaning."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from xc_ray.engine.attention import PagedAttend, Rows, key_slots
from xc_ray.engine.kernels import skinny
from xc_ray.engine.kernels.low_rank import add_low_rank
from xc_ray.engine.kernels.paged_decode import paged_decode
from xc_ray.engine.kernels.pointwise import rms_norm, rotate_and_store, silu_mul
from xc_ray.engine.kv_cache import KVCache
from xc_ray.model.attention import Attend, causal_attention, varlen_attention
from xc_ray.model.decoder import Decoder, DecoderLayer, RMSNorm
from xc_ray.model.ops import Ops, Rope
from xc_ray.model.plora import ImageRows, PLoRALinear

_HALF = (torch.bfloat16, torch.float16)
# Programs that fill a device of 132 multiprocessors a few times over: with fewer sequences and key
# heads than this, the keys of each are split.
_PROGRAMS = 1024
_MAX_SPLITS = 32
# cuDNN's attention is faster than flash attention (H200, one sequence of 2k tokens: 0.10 against
# 0.19 ms; 8k: 0.92 against 1.75), but it takes 40 ms to plan each new length. So lengths are padded
# to multiples of this, which start-up plans, where that does not make them longer by a quarter.
CUDNN_STEP = 1024


class FusedOps(Ops):
    """Triton kernels between the products, and for products of at most `max_skinny_rows` rows.

    That is what CUDA graphs are captured for: no step compiles a kernel that start-up did not.
    """

    def __init__(self, device: torch.device, max_skinny_rows: int) -> None:
        self.max_skinny_rows = max_skinny_rows
        self.counters = skinny.make_counters(device)

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `Ops`."""
        assert isinstance(module, RMSNorm)
        return rms_norm(x, module.weight, module.eps)

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        if image_rows is None and isinstance(module, PLoRALinear) and self._skinny(x):
            return skinny.linear(x, module.weight, module.bias, counters=self.counters)
        if isinstance(module, PLoRALinear):
            return _add_low_rank(module, F.linear(x, module.weight, module.bias), x, image_rows)
        return super().linear(module, x, image_rows)

    def linear_add(
        self, module: nn.Module, x: Tensor, image_rows: ImageRows, residual: Tensor
    ) -> Tensor:
        """See `Ops`; the result takes the residual's place."""
        if not isinstance(module, PLoRALinear) or module.bias is not None:
            return residual.add_(self.linear(module, x, image_rows))
        n, k = module.weight.shape
        if image_rows is None and self._skinny(x) and skinny.choose(n, k, len(x)):
            return skinny.add_linear(residual, x, module.weight, counters=self.counters)
        residual.addmm_(x, module.weight.T)
        return _add_low_rank(module, residual, x, image_rows)

    def gated(self, w1: nn.Module, w3: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        if (
            image_rows is None
            and isinstance(w1, PLoRALinear)
            and isinstance(w3, PLoRALinear)
            and self._skinny(x)
            and skinny.choose(2 * len(w1.weight), w1.weight.shape[1], len(x))
        ):
            return skinny.gated(x, w1.weight, w3.weight)
        return silu_mul(self.gates(w1, w3, x, image_rows))

    def gates(self, w1: nn.Module, w3: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """Both products of `gated` side by side: x (T, C) -> (T, 2 inner)."""
        both = _joined(w1, w3)
        if both is None:
            return torch.cat([self.linear(w, x, image_rows) for w in (w1, w3)], 1)
        if image_rows is None and self._skinny(x):
            return skinny.linear(x, both, counters=self.counters)
        y = F.linear(x, both)  # (T, 2 I)
        for module, half in zip((w1, w3), y.chunk(2, 1), strict=True):
            _add_low_rank(module, half, x, image_rows)
        return y

    def head(self, module: nn.Module, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Ops`."""
        assert isinstance(module, nn.Linear)
        assert module.bias is None
        if self._skinny(x):
            return skinny.linear(x, module.weight, out=out, counters=self.counters)
        return torch.mm(x, module.weight.T, out=out)

    def attention(self, attend: Attend, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """See `Ops`."""
        assert isinstance(attend, FusedAttend)
        return attend.packed(layer, qkv, rope)

    def _skinny(self, x: Tensor) -> bool:
        return x.dtype in _HALF and len(x) <= self.max_skinny_rows


def join_gates(decoder: Decoder) -> None:
    """Lays each layer's w1 and w3 one behind the other, so that one product serves both.

    Once: the graphs of an engine that runs the same decoder keep their addresses.
    """
    for layer in decoder.model.layers:
        assert isinstance(layer, DecoderLayer)
        pair = layer.feed_forward.w1, layer.feed_forward.w3
        if _joined(*pair) is not None:
            continue
        both = torch.cat([w.weight.data for w in pair])
        for w, part in zip(pair, both.chunk(2), strict=True):
            w.weight.data = part


def _joined(w1: nn.Module, w3: nn.Module) -> Tensor | None:
    """w1 and w3 (I, C) as one (2 I, C), if `join_gates` laid them so."""
    if not (isinstance(w1, PLoRALinear) and isinstance(w3, PLoRALinear)):
        return None
    if w1.bias is not None or w3.bias is not None:
        return None
    first, second = w1.weight, w3.weight
    if first.data_ptr() + first.nbytes != second.data_ptr():
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    rows, columns = first.shape
    return first.as_strided((2 * rows, columns), (columns, 1))


def _add_low_rank(module: nn.Module, y: Tensor, x: Tensor, image_rows: ImageRows) -> Tensor:
    assert isinstance(module, PLoRALinear)
    if not isinstance(image_rows, Tensor):
        return module.add_low_rank(y, x, image_rows)  # rows that stand together: views serve
    a, b = module.Plora_A.weight, module.Plora_B.weight
    return add_low_rank(y, x, image_rows, a, b, module.plora_scaling)


class FusedAttend(PagedAttend):
    """Attention of one step on a GPU; rotation and the cache's write are one kernel."""

    def __init__(self, cache: KVCache, rows: Rows, sizes: "Lengths | None") -> None:
        super().__init__(cache, rows)
        self.sizes = sizes
        heads = cache.keys.shape[3]
        self.splits = num_splits(rows.num_decode * heads, rows.tables.shape[1])
        # Where the chunks' keys stand, once for all layers; None if nothing is read back.
        self.keys_at: Tensor | None = None
        if sizes is not None and any(span.blocks is not None for span in rows.spans):
            self.keys_at = key_slots(
                rows.tables, sizes.lanes, sizes.keys, sizes.num_keys, cache.block_size
            )

    def packed(self, layer: int, qkv: Tensor, rope: Rope, delta: Tensor | None = None) -> Tensor:
        """Packed projections (T, Hk, G + 2, D), not rotated -> (T, H, D).

        `delta`, like qkv, is added to it first; in steps of decoding rows alone.
        """
        n = self.rows.num_decode
        cos, sin = rope
        assert delta is None or not self.rows.spans
        outs = [self._decode(layer, qkv[:n], cos[:n], sin[:n], delta)] if n else []
        if self.rows.spans:
            chunks = qkv[n:]
            q = rotate_and_store(
                chunks,
                cos[n:],
                sin[n:],
                self.rows.slots[n:],
                *self._stored(layer),
                *self._scales(layer),
            )
            # Keys and values of the chunks are read where they stand, in the packed rows.
            outs += self.prefill(layer, q, chunks[:, :, -2], chunks[:, :, -1])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, delta: Tensor | None
    ) -> Tensor:
        key_scales, value_scales = self._scales(layer)
        return paged_decode(
            qkv,
            cos,
            sin,
            *self._stored(layer),
            self.rows.tables,
            self.rows.lanes,
            self.rows.positions,
            splits=self.splits,
            key_scales=key_scales,
            value_scales=value_scales,
            delta=delta,
        )

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """See `PagedAttend`: one call for all chunks, cuDNN's for a long one alone."""
        spans, sizes = self.rows.spans, self.sizes
        if sizes is None or q.dtype not in _HALF:
            return super().prefill(layer, q, k, v)
        if len(spans) == 1 and spans[0].blocks is None and padded(len(q)) is not None:
            return [_square(q, k, v)]
        if self.keys_at is not None:
            k, v = self.cache.pick(layer, self.keys_at)
        ends = sizes.queries, sizes.keys
        return [varlen_attention(q, k, v, *ends, sizes.max_new, sizes.max_keys)]

    def _stored(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.keys[layer], self.cache.values[layer]

    def _scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        cache = self.cache
        if cache.key_scales is None or cache.value_scales is None:
            return None, None
        return cache.key_scales[layer], cache.value_scales[layer]


def padded(num_tokens: int) -> int | None:
    """The length that cuDNN computes for a chunk of so many tokens; None: flash attention does."""
    whole = -(-num_tokens // CUDNN_STEP) * CUDNN_STEP
    return whole if whole <= 1.25 * num_tokens else None


def _square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence over itself; rows behind it, which pad, change nothing."""
    num = len(q)
    more = (padded(num) or num) - num
    if more:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return causal_attention(q, k.contiguous(), v.contiguous())[:num]


class Lengths:
    """Lanes of a step's chunks, and the cumulative lengths of their queries and of their keys.

    int32 on the device, as variable-length attention wants them.
    """

    def __init__(self, chunks: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        queries, keys = [0], [0]
        lanes = [lane for *_, lane in chunks]
        for past, new, _ in chunks:
            queries.append(queries[-1] + new)
            keys.append(keys[-1] + past + new)
        packed = torch.tensor([queries, keys, [*lanes, 0]], dtype=torch.int32).pin_memory()
        self.queries, self.keys, on_device = packed.to(device, non_blocking=True)
        self.lanes = on_device[:-1]
        self.num_keys = keys[-1]
        self.max_new = max(new for _, new, _ in chunks)
        self.max_keys = max(past + new for past, new, _ in chunks)


def num_splits(programs: int, num_blocks: int) -> int:
    """Programs among which the keys of one sequence and key head are divided; a power of two."""
    splits = 1
    while splits < min(_MAX_SPLITS, num_blocks) and programs * splits * 2 <= _PROGRAMS:
        splits *= 2
    return splits
