"""PLoRA's two extra products on the picture rows of a flat batch, wherever these rows stand.

Rows are gathered where A reads its input, and B's result is added where it belongs: no copy of
either, and one launch each for all pictures of all requests. The plain meaning is
`PLoRALinear.add_low_rank`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, whose values have no Python types; triton has no stubs.

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_low_rank(
    y: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Adds scaling · B A x to rows (Ti,) int64 of y (T, out), in place; no row comes twice.

    x (T, in), a (R, in), b (out, R), contiguous; y may be some columns of a wider tensor.
    """
    num, rank, size, out = len(rows), len(a), x.shape[1], y.shape[1]
    low = x.new_empty(num, rank)
    wide_rank = max(16, min(128, triton.next_power_of_2(rank)))
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    _rows_times[(triton.cdiv(num, 128), triton.cdiv(rank, wide_rank))](
        x, a, low, rows, num, rank, size, rank, 1.0,
        BLOCK_M=128, BLOCK_N=wide_rank, BLOCK_K=64, GATHER=True, ADD=False,
        PRECISION=precision, num_warps=8, num_stages=4,
    )  # fmt: skip
    _rows_times[(triton.cdiv(num, 128), triton.cdiv(out, 128))](
        low, b, y, rows, num, out, rank, y.stride(0), scaling,
        BLOCK_M=128, BLOCK_N=128, BLOCK_K=min(64, max(16, triton.next_power_of_2(rank))),
        GATHER=False, ADD=True, PRECISION=precision, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


# The picture rows are as many as there are, and stand behind other numbers: one binary for all.
@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["rows"])
def _rows_times(
    x, weight, y, rows, num, n, k, y_stride, scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # x (num, k) or its rows, weight (n, k) -> y (num, n), or added to rows of y
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    place = tl.load(rows + m, mask=m < num, other=0)
    source = place if GATHER else m.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, k, BLOCK_K):
        inside = start + steps < k
        xs = tl.load(
            x + source[:, None] * k + start + steps[None, :],
            mask=(m < num)[:, None] & inside[None, :],
            other=0.0,
        )
        ws = tl.load(
            weight + c.to(tl.int64)[:, None] * k + start + steps[None, :],
            mask=(c < n)[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(xs, ws.T, acc, input_precision=PRECISION)
    stored = (m < num)[:, None] & (c < n)[None, :]
    if ADD:
        at = y + place[:, None] * y_stride + c[None, :]
        acc = tl.load(at, mask=stored, other=0.0).to(tl.float32) + acc * scaling
    else:
        at = y + m.to(tl.int64)[:, None] * y_stride + c[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=stored)
