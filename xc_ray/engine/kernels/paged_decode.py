"""Attention of one new token a sequence over its blocks of the cache (2309.06180, 2305.13245).

Split over the keys (flash decoding): a sequence's pages are divided among `splits` programs a key
head, so that a few long sequences still fill the device; a second kernel joins their parts. The new
token never makes a way through the cache: its query and key are rotated here, its key and value
are stored for later steps, and the softmax begins with them. The plain meaning is `rotate`,
`KVCache.write` and `engine.attention.plain_paged_decode`, one after another.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, whose values have no Python types; triton has no stubs.

import torch
import triton
import triton.language as tl
from torch import Tensor

from xc_ray.engine.kv_cache import E4M3_MAX

MIN_DOT_ROWS = 16  # tl.dot's least; the query heads of a key head are padded to it
# From here a program has so few pages that more warps to load them are worth it (H200, B = 1).
_MANY_SPLITS = 32
LOG2_E = 1.4426950408889634


def paged_decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lanes: Tensor,
    positions: Tensor,
    *,
    splits: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """Stores the keys and values of new tokens at `positions` (S,) and attends from them.

    qkv (S, Hk, G + 2, D), not rotated; cos, sin (S, D); keys, values (N, B, Hk, D), with scales
    (N, B, Hk) float32 if they are 8-bit; `tables` (lanes, M) int32 block numbers, of which row
    `lanes[i]` is sequence i's -> (S, H, D). `delta`, like qkv, is added to it first.
    """
    num_seqs, num_kv_heads, packed, size = qkv.shape
    group, block = packed - 2, keys.shape[1]
    num_heads = group * num_kv_heads
    assert qkv.is_contiguous()
    assert delta is None or (delta.shape == qkv.shape and delta.is_contiguous())
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    out = torch.empty(num_seqs, num_heads, size, device=qkv.device, dtype=qkv.dtype)
    if splits == 1:
        parts, weights = out, out  # not used
    else:
        shape = (num_seqs, num_heads, splits)
        parts = torch.empty(*shape, size, device=qkv.device, dtype=torch.float32)
        weights = torch.empty(shape, device=qkv.device, dtype=torch.float32)
    _decode[(num_seqs, num_kv_heads, splits)](
        qkv,
        delta,
        cos,
        sin,
        keys,
        values,
        keys if key_scales is None else key_scales,
        values if value_scales is None else value_scales,
        tables,
        lanes,
        positions,
        out,
        parts,
        weights,
        size**-0.5 * LOG2_E,  # exponents of two
        tables.stride(0),
        GROUP=group,
        PADDED=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
        SIZE=size,
        PADDED_SIZE=max(MIN_DOT_ROWS, triton.next_power_of_2(size)),
        BLOCK=block,
        PADDED_BLOCK=max(MIN_DOT_ROWS, triton.next_power_of_2(block)),
        KV_HEADS=num_kv_heads,
        SPLITS=splits,
        SCALED=key_scales is not None,
        LARGEST=E4M3_MAX,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=8 if splits >= _MANY_SPLITS else 4,
        num_stages=2,
    )
    if splits > 1:
        _join[(num_seqs, num_heads)](
            parts,
            weights,
            out,
            SIZE=size,
            PADDED_SIZE=triton.next_power_of_2(size),
            SPLITS=splits,
            PADDED_SPLITS=triton.next_power_of_2(splits),
            num_warps=1,
        )
    return out


# A step with prompts passes slices, which start anywhere: no second compilation for these.
@triton.jit(do_not_specialize_on_alignment=["lanes", "positions"])
def _decode(
    qkv,
    delta,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    lanes,
    positions,
    out,
    parts,
    weights,
    scale,
    table_stride,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    past = tl.load(positions + row).to(tl.int32)
    table = tables + tl.load(lanes + row) * table_stride
    pages = tl.cdiv(past, BLOCK)
    each = tl.cdiv(pages, SPLITS)
    first = split * each
    last = tl.minimum(first + each, pages)
    g = tl.arange(0, PADDED)
    d = tl.arange(0, PADDED_SIZE)
    t = tl.arange(0, PADDED_BLOCK)
    in_group = g < GROUP
    in_size = d < SIZE
    dtype = qkv.dtype.element_ty

    # Rotation: each half of a head turns with the other half.
    at_group = (row * KV_HEADS + head) * ((GROUP + 2) * SIZE)
    packed = qkv + at_group
    HALF: tl.constexpr = SIZE // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    c = tl.load(cos + row * SIZE + d, mask=in_size, other=0.0).to(tl.float32)
    s = tl.load(sin + row * SIZE + d, mask=in_size, other=0.0).to(tl.float32)
    s = tl.where(d < HALF, -s, s)
    q_mask = in_group[:, None] & in_size[None, :]
    own = tl.load(packed + g[:, None] * SIZE + d[None, :], mask=q_mask, other=0.0)
    other = tl.load(packed + g[:, None] * SIZE + partner[None, :], mask=q_mask, other=0.0)
    if delta is not None:
        added = delta + at_group + g[:, None] * SIZE
        own = _sum(own, tl.load(added + d[None, :], mask=q_mask, other=0.0))
        other = _sum(other, tl.load(added + partner[None, :], mask=q_mask, other=0.0))
    query = own.to(tl.float32) * c[None, :] + other.to(tl.float32) * s[None, :]
    query = query.to(dtype)  # (PADDED, D)

    best = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    acc = tl.zeros((PADDED, PADDED_SIZE), tl.float32)
    if split == 0:
        key = packed + GROUP * SIZE
        own_k = tl.load(key + d, mask=in_size, other=0.0)
        other_k = tl.load(key + partner, mask=in_size, other=0.0)
        v_new = tl.load(key + SIZE + d, mask=in_size, other=0.0)
        if delta is not None:
            added_k = delta + at_group + GROUP * SIZE
            own_k = _sum(own_k, tl.load(added_k + d, mask=in_size, other=0.0))
            other_k = _sum(other_k, tl.load(added_k + partner, mask=in_size, other=0.0))
            v_new = _sum(v_new, tl.load(added_k + SIZE + d, mask=in_size, other=0.0))
        k_new = (own_k.to(tl.float32) * c + other_k.to(tl.float32) * s).to(dtype)
        best = tl.sum(query.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        total += 1.0
        acc += v_new.to(tl.float32)[None, :]
        slot = tl.load(table + past // BLOCK).to(tl.int64) * BLOCK + past % BLOCK
        place = slot * KV_HEADS + head
        if SCALED:
            k_scale = tl.maximum(tl.max(tl.abs(k_new.to(tl.float32)), 0) / LARGEST, 1e-12)
            v_scale = tl.maximum(tl.max(tl.abs(v_new.to(tl.float32)), 0) / LARGEST, 1e-12)
            tl.store(key_scales + place, k_scale)
            tl.store(value_scales + place, v_scale)
            k_stored = (k_new.to(tl.float32) / k_scale).to(keys.dtype.element_ty)
            v_stored = (v_new.to(tl.float32) / v_scale).to(keys.dtype.element_ty)
            tl.store(keys + place * SIZE + d, k_stored, mask=in_size)
            tl.store(values + place * SIZE + d, v_stored, mask=in_size)
        else:
            tl.store(keys + place * SIZE + d, k_new, mask=in_size)
            tl.store(values + place * SIZE + d, v_new, mask=in_size)

    within = (t[:, None] * KV_HEADS + head) * SIZE + d[None, :]
    for page in tl.range(first, last):
        block = tl.load(table + page).to(tl.int64)
        seen = (page * BLOCK + t < past) & (t < BLOCK)
        mask = seen[:, None] & in_size[None, :]
        at = block * (BLOCK * KV_HEADS * SIZE) + within
        k = tl.load(keys + at, mask=mask, other=0.0)  # (B, D)
        v = tl.load(values + at, mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(k).to(dtype), input_precision=PRECISION)
        if SCALED:
            scales_at = block * (BLOCK * KV_HEADS) + t * KV_HEADS + head
            score *= tl.load(key_scales + scales_at, mask=seen, other=0.0)[None, :]
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        top = tl.maximum(best, tl.max(score, 1))
        p = tl.exp2(score - top[:, None])  # (PADDED, B)
        faded = tl.exp2(best - top)
        total = total * faded + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(value_scales + scales_at, mask=seen, other=0.0)[None, :]
        acc = acc * faded[:, None] + tl.dot(p.to(dtype), v.to(dtype), input_precision=PRECISION)
        best = top
    at_head = (row * KV_HEADS + head) * GROUP + g
    if SPLITS == 1:
        places = out + at_head[:, None] * SIZE + d[None, :]
        tl.store(places, (acc / total[:, None]).to(dtype), mask=q_mask)
    else:
        # A split without pages stores zeros of weight −inf, which is its `best`.
        whole = tl.where(total > 0, total, 1.0)
        places = parts + (at_head[:, None] * SPLITS + split) * SIZE + d[None, :]
        tl.store(places, acc / whole[:, None], mask=q_mask)
        tl.store(weights + at_head * SPLITS + split, best + tl.log2(whole), mask=in_group)


@triton.jit
def _sum(x, y):
    return (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)


@triton.jit
def _join(
    parts,
    weights,
    out,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    s = tl.arange(0, PADDED_SPLITS)
    d = tl.arange(0, PADDED_SIZE)
    weight = tl.load(weights + at * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    part = tl.load(
        parts + (at * SPLITS + s[:, None]) * SIZE + d[None, :],
        mask=(s[:, None] < SPLITS) & (d[None, :] < SIZE),
        other=0.0,
    )
    share = tl.exp2(weight - tl.max(weight, 0))
    joined = tl.sum(part * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + at * SIZE + d, joined.to(out.dtype.element_ty), mask=d < SIZE)
