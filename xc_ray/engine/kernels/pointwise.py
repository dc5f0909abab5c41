"""What stands between the products of a decoder layer, one kernel each.

Every kernel rounds where its torch meaning (`model.decoder`, `model.rope`) rounds, but for
`rotate_and_store`, which rounds once where `rotate` rounds three times.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, whose values have no Python types; triton has no stubs.

import torch
import triton
import triton.language as tl
from torch import Tensor

from xc_ray.engine.kv_cache import E4M3_MAX


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, C) / its rms, in float32, cast back, times the weight (C,); see `RMSNorm`."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    padded = triton.next_power_of_2(size)
    _rms_norm[(len(x),)](
        x,
        weight,
        out,
        x.stride(0),
        eps,
        SIZE=size,
        PADDED=padded,
        num_warps=_warps(padded),
    )
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds delta (T, C) to x, in place; then as `rms_norm`."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    padded = triton.next_power_of_2(size)
    assert x.is_contiguous()
    assert delta.is_contiguous()
    _add_rms_norm[(len(x),)](
        x, delta, weight, out, eps, SIZE=size, PADDED=padded, num_warps=_warps(padded)
    )
    return out


def silu_mul(gate_up: Tensor, delta: Tensor | None = None) -> Tensor:
    """silu(gate) · up: (T, 2 I), contiguous, gates first -> (T, I).

    With `delta` (T, 2 I) that is added to both first.
    """
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, size, device=gate_up.device, dtype=gate_up.dtype)
    block = min(2048, triton.next_power_of_2(size))
    grid = (rows, triton.cdiv(size, block))
    _silu_mul[grid](gate_up, delta, out, size, BLOCK=block, num_warps=4)
    return out


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Rotates packed projections and stores keys and values in the cache, in one pass.

    qkv (T, Hk, G + 2, D), whose key heads are rotated in place; cos, sin (T, D); slots (T,); keys,
    values (N, B, Hk, D), with scales (N, B, Hk) if they are 8-bit -> rotated queries (T, H, D).
    """
    rows, num_kv_heads, packed, size = qkv.shape
    group = packed - 2
    q = torch.empty(rows, num_kv_heads * group, size, device=qkv.device, dtype=qkv.dtype)
    _rotate_and_store[(rows, num_kv_heads)](
        qkv,
        cos,
        sin,
        slots,
        q,
        keys,
        values,
        keys if key_scales is None else key_scales,
        values if value_scales is None else value_scales,
        GROUP=group,
        PADDED=triton.next_power_of_2(packed),
        HALF=size // 2,
        PADDED_HALF=triton.next_power_of_2(size // 2),
        KV_HEADS=num_kv_heads,
        SCALED=key_scales is not None,
        LARGEST=E4M3_MAX,
        num_warps=1,
    )
    return q


def _warps(padded: int) -> int:
    return min(16, max(1, padded // 512))


@triton.jit
def _rms_norm(x, weight, out, stride, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PADDED)
    mask = c < SIZE
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    wide = tl.load(x + row * stride + c, mask=mask, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    dtype = out.dtype.element_ty
    tl.store(out + row * SIZE + c, (normed.to(dtype).to(tl.float32) * w).to(dtype), mask=mask)


@triton.jit
def _add_rms_norm(x, delta, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PADDED)
    mask = c < SIZE
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    wide = tl.load(x + row * SIZE + c, mask=mask, other=0.0).to(tl.float32)
    wide += tl.load(delta + row * SIZE + c, mask=mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    total = wide.to(dtype)
    tl.store(x + row * SIZE + c, total, mask=mask)
    wide = total.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    tl.store(out + row * SIZE + c, (normed.to(dtype).to(tl.float32) * w).to(dtype), mask=mask)


@triton.jit
def _silu_mul(gate_up, delta, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    g = tl.load(gate_up + row * 2 * size + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * size + size + i, mask=mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if delta is not None:
        g += tl.load(delta + row * 2 * size + i, mask=mask, other=0.0).to(tl.float32)
        u += tl.load(delta + row * 2 * size + size + i, mask=mask, other=0.0).to(tl.float32)
        g = g.to(dtype).to(tl.float32)
        u = u.to(dtype).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(out + row * size + i, (silu * u).to(dtype), mask=mask)


# The slots of prompts stand behind those of decoding rows: see `paged_decode`.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotate_and_store(
    qkv,
    cos,
    sin,
    slots,
    q,
    keys,
    values,
    key_scales,
    value_scales,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    SIZE: tl.constexpr = 2 * HALF
    j = tl.arange(0, PADDED)  # query heads of the group, then the key, then the value
    d = tl.arange(0, PADDED_HALF)
    inside = d[None, :] < HALF
    at = ((row * KV_HEADS + head) * (GROUP + 2) + j[:, None]) * SIZE + d[None, :]
    loaded = inside & (j[:, None] < GROUP + 2)
    first = tl.load(qkv + at, mask=loaded, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + HALF, mask=loaded, other=0.0).to(tl.float32)
    # Both halves of a table row are the same angles.
    c = tl.load(cos + row * SIZE + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * SIZE + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    turns = j[:, None] <= GROUP
    left = tl.where(turns, first * c - second * s, first)
    right = tl.where(turns, second * c + first * s, second)
    dtype = qkv.dtype.element_ty
    left = left.to(dtype)
    right = right.to(dtype)
    is_query = inside & (j[:, None] < GROUP)
    to_q = (row * KV_HEADS * GROUP + head * GROUP + j[:, None]) * SIZE + d[None, :]
    tl.store(q + to_q, left, mask=is_query)
    tl.store(q + to_q + HALF, right, mask=is_query)
    is_key = inside & (j[:, None] == GROUP)
    tl.store(qkv + at, left, mask=is_key)
    tl.store(qkv + at + HALF, right, mask=is_key)
    is_value = inside & (j[:, None] == GROUP + 1)
    slot = tl.load(slots + row).to(tl.int64) * KV_HEADS + head
    to_cache = slot * SIZE + d[None, :] + tl.zeros_like(j)[:, None]
    if SCALED:
        wide_left = left.to(tl.float32)
        wide_right = right.to(tl.float32)
        top = tl.max(tl.maximum(tl.abs(wide_left), tl.abs(wide_right)), 1)  # (PADDED,)
        scale = tl.maximum(top / LARGEST, 1e-12)
        left = (wide_left / scale[:, None]).to(keys.dtype.element_ty)
        right = (wide_right / scale[:, None]).to(keys.dtype.element_ty)
        tl.store(key_scales + slot + tl.zeros_like(j), scale, mask=j == GROUP)
        tl.store(value_scales + slot + tl.zeros_like(j), scale, mask=j == GROUP + 1)
    tl.store(keys + to_cache, left, mask=is_key)
    tl.store(keys + to_cache + HALF, right, mask=is_key)
    tl.store(values + to_cache, left, mask=is_value)
    tl.store(values + to_cache + HALF, right, mask=is_value)
