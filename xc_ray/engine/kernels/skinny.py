"""Products of a few rows, where reading the weights takes the time: x Wᵀ + b and SwiGLU's pair.

A decode step multiplies T rows (one per sequence) by every weight of the model. Up to some 180 rows
an H200 could read the weights for longer than it computes, so a kernel here is as good as the
number of bytes it keeps in flight. Two forms: `vector` multiplies on CUDA cores (1 to 4 rows),
`matrix` on tensor cores with the weights as the tall side, acc (BLOCK_N, rows) = W xᵀ, so that a
16-row batch does not pay for 64. Where N is too small to fill the device, `split_k` programs share
a tile's K; the one that arrives last adds their float32 sums in fixed order.

Every result is the same on every run, and a row's result does not depend on other rows. Nothing
synchronizes, so CUDA graphs capture all of it. `benchmarks/engine_products.py` measured `TILES`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, whose values have no Python types; triton has no stubs.

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_ROWS = 256  # beyond, a product is bound by computing and cuBLAS is the better tool
MAX_VECTOR_ROWS = 4  # one set of accumulators per row: more would not fit in registers
MIN_MATRIX_ROWS = 16  # fewer rows are padded to this
NUM_COUNTERS = 1024  # the most tiles that a split product may have


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    A program owns `block_n` columns of the output and walks K in steps of `block_k`, or the
    `split_k`-th part of it. `boxes` reads through TMA descriptors instead of pointers;
    `evict_first` marks the weights as the first to leave the L2 cache (`vector` only: Triton's
    asynchronous copies have no such mark); `early` starts the kernel before its predecessor has
    ended (programmatic dependent launch) and asks for its first weights meanwhile. For `vector`,
    `num_stages` 1 reads straight to registers.
    """

    kind: Literal["vector", "matrix"]
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    split_k: int = 1
    boxes: bool = False
    evict_first: bool = False
    early: bool = False


# (N, K, rows bucket) -> tile, None where cuBLAS is faster. N of the gated pair is both matrices'.
# On an H200: benchmarks/engine_products.py.
TILES: dict[tuple[int, int, int], Tile | None] = {
    # wqkv
    (6144, 4096, 1): Tile("vector", 4, 1024, 1, 4, evict_first=True),
    (6144, 4096, 2): Tile("matrix", 64, 128, 5, 4),
    (6144, 4096, 4): Tile("matrix", 64, 128, 5, 4),
    (6144, 4096, 8): Tile("matrix", 64, 128, 5, 4),
    (6144, 4096, 16): Tile("matrix", 64, 128, 5, 4),
    (6144, 4096, 32): Tile("matrix", 64, 128, 5, 4),
    (6144, 4096, 64): None,
    (6144, 4096, 128): None,
    (6144, 4096, 256): None,
    # wo
    (4096, 4096, 1): Tile("vector", 2, 1024, 1, 4),
    (4096, 4096, 2): Tile("vector", 4, 1024, 1, 4, evict_first=True),
    (4096, 4096, 4): Tile("matrix", 64, 128, 4, 4, split_k=2),
    (4096, 4096, 8): Tile("matrix", 32, 256, 4, 4, boxes=True),
    (4096, 4096, 16): Tile("matrix", 64, 128, 4, 4, split_k=2),
    (4096, 4096, 32): Tile("matrix", 32, 256, 4, 4, boxes=True),
    (4096, 4096, 64): None,
    (4096, 4096, 128): None,
    (4096, 4096, 256): None,
    # gated
    (28672, 4096, 1): Tile("vector", 2, 1024, 1, 4),
    (28672, 4096, 2): Tile("matrix", 64, 128, 3, 4, boxes=True),
    (28672, 4096, 4): Tile("matrix", 64, 128, 3, 4, boxes=True),
    (28672, 4096, 8): Tile("matrix", 64, 128, 3, 4, boxes=True),
    (28672, 4096, 16): Tile("matrix", 64, 128, 3, 4, boxes=True),
    (28672, 4096, 32): Tile("matrix", 64, 64, 5, 4, boxes=True),
    (28672, 4096, 64): Tile("matrix", 64, 64, 3, 4),
    (28672, 4096, 128): Tile("matrix", 64, 64, 3, 4, boxes=True),
    (28672, 4096, 256): None,
    # w2
    (4096, 14336, 1): Tile("vector", 4, 2048, 1, 4),
    (4096, 14336, 2): Tile("vector", 4, 1024, 1, 4, evict_first=True),
    (4096, 14336, 4): Tile("matrix", 64, 128, 4, 4, split_k=2),
    (4096, 14336, 8): Tile("matrix", 64, 128, 4, 4, split_k=4, boxes=True),
    (4096, 14336, 16): Tile("matrix", 64, 128, 4, 4, split_k=4, boxes=True),
    (4096, 14336, 32): Tile("matrix", 64, 128, 4, 4, split_k=2),
    (4096, 14336, 64): Tile("matrix", 64, 128, 4, 4, split_k=2),
    (4096, 14336, 128): None,
    (4096, 14336, 256): None,
    # head
    (92544, 4096, 1): Tile("vector", 8, 1024, 4, 4),
    (92544, 4096, 2): Tile("matrix", 64, 128, 5, 4, boxes=True),
    (92544, 4096, 4): Tile("matrix", 64, 128, 5, 4),
    (92544, 4096, 8): Tile("matrix", 128, 128, 4, 8),
    (92544, 4096, 16): Tile("matrix", 64, 128, 5, 4, boxes=True),
    (92544, 4096, 32): Tile("matrix", 128, 128, 4, 8),
    (92544, 4096, 64): Tile("matrix", 128, 128, 4, 8, boxes=True),
    (92544, 4096, 128): None,
    (92544, 4096, 256): None,
}


def bucket(rows: int) -> int:
    """The rows bucket of `TILES`: the next power of two."""
    return int(triton.next_power_of_2(rows))


def choose(n: int, k: int, rows: int) -> Tile | None:
    """The tile for (rows, K) x (N, K)ᵀ; None: cuBLAS, also for shapes not measured."""
    if rows > MAX_ROWS:
        return None
    return TILES.get((n, k, bucket(rows)))


def make_counters(device: torch.device | str) -> Tensor:
    """What split products of one stream share: zeros, which each launch leaves as zeros."""
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """x (T, K), weight (N, K), bias (N,) -> (T, N), all contiguous and of one dtype.

    `counters` of `make_counters` spares a split product the zeroing of its own; they may not be
    shared between streams.
    """
    tile = choose(len(weight), weight.shape[1], len(x))
    if tile is None:
        return plain_linear(x, weight, bias, out=out)
    return launch(tile, x, weight, bias=bias, out=out, counters=counters)


def add_linear(
    residual: Tensor, x: Tensor, weight: Tensor, *, counters: Tensor | None = None
) -> Tensor:
    """Adds x Wᵀ to residual (T, N), in place and in the same kernel; the product is rounded first.

    Counters as of `linear`.
    """
    tile = choose(len(weight), weight.shape[1], len(x))
    if tile is None:
        return residual.add_(F.linear(x, weight))
    return launch(tile, x, weight, out=residual, add=True, counters=counters)


def gated(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """silu(x w1ᵀ) · (x w3ᵀ) in one kernel: x (T, K), w1 and w3 (N, K) -> (T, N)."""
    tile = choose(2 * len(w1), w1.shape[1], len(x))
    if tile is None:
        return plain_gated(x, w1, w3)
    return launch(tile, x, w1, w3)


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """What `linear` means."""
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def plain_gated(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """What `gated` means, roundings included."""
    return F.silu(F.linear(x, w1)) * F.linear(x, w3)


def launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    other: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    counters: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """The product of `linear`, or with `other` (w3) that of `gated`, cut as `tile` says.

    With `add` it is added to what `out` holds.
    """
    (rows, k), n = x.shape, len(weight)
    assert all(t.is_contiguous() for t in (x, weight, other, bias, out) if t is not None)
    assert weight.shape == (n, k)
    assert other is None or (other.shape == (n, k) and bias is None)
    if out is None:
        assert not add
        out = x.new_empty(rows, n)
    assert out.shape == (rows, n)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.early:
        options["launch_pdl"] = True
    sizes = {
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN": k % tile.block_k == 0,
        "EARLY": tile.early,
        "ADD": add,
    }
    programs = triton.cdiv(n, tile.block_n)
    if tile.kind == "vector":
        assert rows <= MAX_VECTOR_ROWS
        assert tile.split_k == 1
        assert not tile.boxes
        evict = "evict_first" if tile.evict_first else ""
        _vector_kernel[(programs,)](
            x, weight, other, bias, out, rows, n, k,
            ROWS=bucket(rows), STAGES=tile.num_stages, EVICT=evict, **sizes, **options,
        )  # fmt: skip
        return out
    assert not tile.evict_first
    assert other is None or tile.split_k == 1
    padded = max(MIN_MATRIX_ROWS, bucket(rows))
    partials = None
    if tile.split_k > 1:
        assert programs <= NUM_COUNTERS
        partials = x.new_empty(tile.split_k * programs * tile.block_n * padded, dtype=torch.float32)
        counters = make_counters(x.device) if counters is None else counters
    inputs = (x, weight, other)
    if tile.boxes:
        box = [tile.block_n, tile.block_k]
        inputs = (
            TensorDescriptor.from_tensor(x, [padded, tile.block_k]),
            TensorDescriptor.from_tensor(weight, box),
            None if other is None else TensorDescriptor.from_tensor(other, box),
        )
    _matrix_kernel[(programs, tile.split_k)](
        *inputs, bias, out, partials, counters if tile.split_k > 1 else None, rows, n, k,
        ROWS=padded, SPLIT_K=tile.split_k, BOXES=tile.boxes, **sizes, **options,
    )  # fmt: skip
    return out


# The kernels. Arguments: x (rows, k), weight and other (n, k), bias (n,), out (rows, n); `other`
# and `bias` may be None. `rows` is not specialized: all batch sizes of a bucket share one binary.


@triton.jit(do_not_specialize=["rows"])
def _vector_kernel(
    x, weight, other, bias, out, rows, n, k,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, EARLY: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)[None, :]
    # Columns past the end read the last row again: cheaper than a mask, and never stored.
    begins = tl.minimum(columns, n - 1).to(tl.int64)[:, None] * k
    if EARLY:
        _begin_early(weight, other, begins, 0, k, BLOCK_K)
    sums: tl.tuple = ()
    others: tl.tuple = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.full([BLOCK_N, BLOCK_K // 8], 0.0, tl.float32),)
        others += (tl.full([BLOCK_N, BLOCK_K // 8], 0.0, tl.float32),)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        mask = None if EVEN else start + steps < k
        w = _load(weight + begins + start + steps, mask, EVICT).to(tl.float32)
        v = w
        if other is not None:
            v = _load(other + begins + start + steps, mask, EVICT).to(tl.float32)
        new_sums: tl.tuple = ()
        new_others: tl.tuple = ()
        for row in tl.static_range(ROWS):
            # Rows past the end read the last one again, and are not stored.
            line = x + tl.minimum(row, rows - 1) * k
            xs = _load(line + start + steps, mask, "").to(tl.float32)
            new_sums += (sums[row] + _eighths(w * xs),)
            if other is not None:
                new_others += (others[row] + _eighths(v * xs),)
            else:
                new_others += (others[row],)
        sums = new_sums
        others = new_others
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], axis=1)
        z = y
        if other is not None:
            z = tl.sum(others[row], axis=1)
        y = _finish(y, z, other, bias, columns, n, out.dtype.element_ty)
        _store(out + row * n + columns, y, (columns < n) & (row < rows), ADD)


@triton.jit
def _eighths(products):
    # (BLOCK_N, BLOCK_K) -> (BLOCK_N, BLOCK_K / 8): each thread adds the eight numbers of one of its
    # loads, so that accumulators take a fraction of the registers that the loads need.
    split = tl.reshape(products, [products.shape[0], products.shape[1] // 8, 8])
    return tl.sum(split, axis=2)


@triton.jit(do_not_specialize=["rows"])
def _matrix_kernel(
    x, weight, other, bias, out, partials, counters, rows, n, k,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr, BOXES: tl.constexpr, EARLY: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = tl.arange(0, ROWS)
    steps = tl.arange(0, BLOCK_K)[None, :]
    begins = tl.minimum(columns, n - 1).to(tl.int64)[:, None] * k
    x_begins = lines[:, None] * k
    share = (k + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    first = part * share
    last = tl.minimum(first + share, k)
    if EARLY:
        if BOXES:
            gdc_launch_dependents()
            gdc_wait()
        else:
            _begin_early(weight, other, begins, first, k, BLOCK_K)
    y = tl.full([BLOCK_N, ROWS], 0.0, tl.float32)
    z = y
    for start in tl.range(first, last, BLOCK_K):
        if BOXES:
            xs = x.load([0, start])
            w = weight.load([tile * BLOCK_N, start])
        else:
            mask = None if EVEN else start + steps < k
            x_mask = lines[:, None] < rows if EVEN else (lines[:, None] < rows) & mask
            xs = _load(x + x_begins + start + steps, x_mask, "")
            w = _load(weight + begins + start + steps, mask, "")
        y = tl.dot(w, xs.T, y, input_precision="ieee")
        if other is not None:
            if BOXES:
                v = other.load([tile * BLOCK_N, start])
            else:
                v = _load(other + begins + start + steps, mask, "")
            z = tl.dot(v, xs.T, z, input_precision="ieee")
    stored = (lines[:, None] < rows) & (columns[None, :] < n)
    places = out + lines[:, None] * n + columns[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if SPLIT_K == 1:
        result = _finish(y, z, other, bias, columns[:, None], n, dtype)
        _store(places, result.T, stored, ADD)
    else:
        cells = tl.arange(0, BLOCK_N)[:, None] * ROWS + lines[None, :]
        cells += tile * (BLOCK_N * ROWS)
        stride = tl.num_programs(0) * (BLOCK_N * ROWS)
        used = (lines < rows)[None, :] & (columns < n)[:, None]
        tl.store(partials + part * stride + cells, y, mask=used)
        # The barrier puts every thread's sums before the one thread's release; whoever counts to
        # the end has acquired all of them, and reads past the L1 cache.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            y = tl.full([BLOCK_N, ROWS], 0.0, tl.float32)
            for other_part in tl.static_range(SPLIT_K):
                place = partials + other_part * stride + cells
                y += tl.load(place, mask=used, other=0.0, cache_modifier=".cg")
            result = _finish(y, y, other, bias, columns[:, None], n, dtype)
            _store(places, result.T, stored, ADD)
            tl.store(counters + tile, 0)


@triton.jit
def _load(pointers, mask, EVICT: tl.constexpr):
    if mask is None:
        return tl.load(pointers, eviction_policy=EVICT)
    else:
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def _store(places, y, mask, ADD: tl.constexpr):
    if ADD:
        y = (tl.load(places, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
    tl.store(places, y, mask=mask)


@triton.jit
def _finish(y, z, other, bias, columns, n, DTYPE: tl.constexpr):
    # Accumulators -> output, rounded where plain torch rounds.
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
    y = y.to(DTYPE)
    if other is not None:
        wide = y.to(tl.float32)
        silu = (wide / (1.0 + tl.exp(-wide))).to(DTYPE)
        y = (silu.to(tl.float32) * z.to(DTYPE).to(tl.float32)).to(DTYPE)
    return y


@triton.jit
def _begin_early(weight, other, begins, first, k, BLOCK_K: tl.constexpr):
    # Until the wait returns, the predecessor may still be writing x: only weights are touched.
    gdc_launch_dependents()
    ahead = tl.minimum(first + 64 * tl.arange(0, BLOCK_K // 16), k - 1)[None, :]
    _prefetch(weight + begins + ahead)
    if other is not None:
        _prefetch(other + begins + ahead)
    gdc_wait()


@triton.jit
def _prefetch(pointers):
    # One 128-byte line of the L2 cache per pointer; BLOCK_K // 16 of them are four steps of bf16.
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
