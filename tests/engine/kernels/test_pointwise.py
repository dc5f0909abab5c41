"""The kernels between the products, against their torch meaning."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine.kernels.pointwise import add_rms_norm, rms_norm, rotate_and_store, silu_mul
from xc_ray.engine.kv_cache import quantise
from xc_ray.model.decoder import RMSNorm
from xc_ray.model.rope import rope_table, rotate

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 48, 4096])
def test_norm_is_the_models(size: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(size, 1e-5).to(DEVICE, dtype)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = (rows(5, size) * 30).to(dtype)
    got = rms_norm(x, norm.weight, norm.eps)
    want = norm(x)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * step, atol=1e-6)
    if dtype != torch.float32:  # the order of a sum shows in a last place here and there alone
        assert (got != want).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_added_before_a_norm_stays_added(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-5).to(DEVICE, dtype)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, delta = rows(5, 48).to(dtype), rows(5, 48, seed=1).to(dtype)
    total = x + delta
    got = add_rms_norm(x, delta, norm.weight, norm.eps)
    assert torch.equal(x, total)
    torch.testing.assert_close(got, norm(total), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_adds_first_where_something_is_to_be_added(dtype: torch.dtype) -> None:
    both, delta = rows(3, 2 * 130).to(dtype), rows(3, 2 * 130, seed=1).to(dtype)
    gate, up = (both + delta).chunk(2, 1)
    torch.testing.assert_close(
        silu_mul(both, delta), F.silu(gate) * up, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 2048, 2500])
def test_silu_mul_is_the_models(size: int, dtype: torch.dtype) -> None:
    gate, up = (8 * rows(3, size)).to(dtype), rows(3, size, seed=1).to(dtype)
    got = silu_mul(torch.cat([gate, up], 1))
    want = F.silu(gate) * up
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (4, 4, 24), (32, 8, 128)])
def test_rotated_keys_and_values_land_in_their_slots(
    heads: int, kv_heads: int, size: int, scaled: bool
) -> None:
    num, block, group = 5, 4, heads // kv_heads
    qkv = rows(num, kv_heads, group + 2, size)
    given = qkv.clone()
    frequencies = rows(size // 2, seed=2)
    rope = rope_table(torch.tensor([0, 9, 3, 3000, 7], device=DEVICE), frequencies)
    slots = torch.tensor([5, 0, 11, 2, 7], device=DEVICE)
    stored = torch.float8_e4m3fn if scaled else torch.float32
    keys, values = (
        torch.zeros(3, block, kv_heads, size, device=DEVICE).to(stored) for _ in range(2)
    )
    scales = (
        tuple(torch.zeros(3, block, kv_heads, device=DEVICE) for _ in range(2)) if scaled else ()
    )
    q = rotate_and_store(qkv, *rope, slots, keys, values, *scales)
    want_q = rotate(given[:, :, :-2].reshape(num, heads, size), *rope)
    want_k, want_v = rotate(given[:, :, -2], *rope), given[:, :, -1]
    torch.testing.assert_close(q, want_q, rtol=1e-5, atol=1e-5)
    # What attention over the chunk itself reads: keys turned where they stand, values as they were.
    torch.testing.assert_close(qkv[:, :, -2], want_k, rtol=1e-5, atol=1e-5)
    assert torch.equal(qkv[:, :, -1], want_v)
    for cache, want, scale in zip(
        (keys, values), (want_k, want_v), scales or (None, None), strict=True
    ):
        flat = cache.view(torch.uint8 if scaled else stored).flatten(0, 1)
        got = flat[slots].view(stored).float()
        others = [i for i in range(3 * block) if i not in slots.tolist()]
        assert not flat[others].any()
        if scale is None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            numbers, want_scale = quantise(want)
            torch.testing.assert_close(scale.flatten(0, 1)[slots], want_scale, rtol=1e-5, atol=1e-6)
            restored = numbers.float() * want_scale[..., None]
            got = got * scale.flatten(0, 1)[slots][..., None]
            # One step of e4m3's three mantissa bits, where rounding falls the other way.
            near = (got - restored).abs() <= 0.13 * restored.abs() + 0.01
            # The interpreter loses the carry from mantissa to exponent when it rounds to e4m3.
            assert near.all() if ON_GPU else near.float().mean() > 0.95
