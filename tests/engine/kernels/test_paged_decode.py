"""The decode kernel against its torch meaning: on a GPU compiled, elsewhere interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine.attention import plain_paged_decode
from xc_ray.engine.kernels.paged_decode import paged_decode
from xc_ray.engine.kv_cache import quantise
from xc_ray.model.rope import rotate

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def made(
    lengths: list[int], heads: int, kv_heads: int, size: int, block: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """New tokens, and a cache of what is before them: blocks scattered, infinities elsewhere."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    on_device = torch.Generator(DEVICE).manual_seed(sum(lengths) + heads)
    counts = [-(-n // block) for n in lengths]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.full((len(lengths) + 1, max(counts) + 2), num_blocks - 1, dtype=torch.int32)
    keys, values = (
        torch.randn(
            num_blocks, block, kv_heads, size, generator=on_device, device=DEVICE, dtype=dtype
        )
        for _ in range(2)
    )
    written = torch.zeros(num_blocks, block, dtype=torch.bool, device=DEVICE)
    lanes = torch.randperm(len(lengths), generator=generator)
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[lanes[i], :count] = torch.tensor(blocks, dtype=torch.int32)
        for j, b in enumerate(blocks):
            written[b, : max(0, min(block, length - 1 - j * block))] = True
    keys[~written], values[~written] = float("inf"), float("inf")
    packed = (len(lengths), kv_heads, heads // kv_heads + 2, size)
    angles = 6 * torch.rand(len(lengths), size // 2, generator=generator).repeat(1, 2)
    made = {
        "qkv": torch.randn(packed, generator=generator).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": keys,
        "values": values,
        "tables": tables,
        "lanes": lanes,
        "positions": torch.tensor(lengths) - 1,
    }
    return {name: t.to(DEVICE) for name, t in made.items()}


def expected(c: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the rotated keys and the values that are to be stored, in float32."""
    qkv, cos, sin = (c[name].float() for name in ("qkv", "cos", "sin"))
    rows, _, _, size = qkv.shape
    q = rotate(qkv[:, :, :-2].reshape(rows, -1, size), cos, sin)
    k, v = rotate(qkv[:, :, -2], cos, sin), qkv[:, :, -1]
    q, k = (t.to(c["qkv"].dtype).float() for t in (q, k))
    tables = c["tables"][c["lanes"]].long()
    keys, values = (torch.nan_to_num(c[n].float(), posinf=0.0)[tables] for n in ("keys", "values"))
    block = keys.shape[2]
    for i, place in enumerate(c["positions"].tolist()):
        keys[i, place // block, place % block] = k[i]
        values[i, place // block, place % block] = v[i]
    return plain_paged_decode(q, keys, values, c["positions"] + 1), k, v


def stored(c: dict[str, Tensor], name: str) -> Tensor:
    """What the cache holds at the new tokens' slots."""
    block = c["keys"].shape[1]
    blocks = c["tables"][c["lanes"], c["positions"] // block].long()
    return c[name][blocks, c["positions"] % block].float()


def assert_decodes(c: dict[str, Tensor], splits: int, rtol: float, atol: float) -> None:
    want, k, v = expected(c)
    before = {name: c[name].clone() for name in ("keys", "values")}
    out = paged_decode(**c, splits=splits)
    assert out.dtype == c["qkv"].dtype
    torch.testing.assert_close(out.float(), want, rtol=rtol, atol=atol)
    for name, new in (("keys", k), ("values", v)):
        torch.testing.assert_close(stored(c, name), new, rtol=rtol, atol=atol)
        changed = (c[name] != before[name]).flatten(2).any(-1)
        assert changed.sum() <= len(k)  # nothing but the new tokens' slots


@settings(max_examples=20 if ON_GPU else 12, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([(4, 2), (4, 4), (4, 1), (20, 1)]),
    st.sampled_from([4, 16, 7]),
    st.sampled_from([1, 2, 8]),
)
def test_it_is_attention_over_the_sequences_own_blocks(
    lengths: list[int], heads: tuple[int, int], block: int, splits: int
) -> None:
    c = made(lengths, *heads, 8, block, torch.float32)
    assert_decodes(c, splits, 1e-4, TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", [8, 24, 128])
def test_head_sizes_need_not_be_powers_of_two(size: int) -> None:
    c = made([5, 17], 4, 2, size, 16, torch.float32)
    assert_decodes(c, 2, 1e-4, TOLERANCE[torch.float32])


@pytest.mark.parametrize("splits", [1, 4])
def test_half_precision_is_close(splits: int) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter's bf16 product is wrong
    c = made([1, 63, 64, 65, 200], 8, 2, 32, 64, dtype)
    assert_decodes(c, splits, 0, TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [1, 4])
def test_what_projections_lack_is_added_first(splits: int) -> None:
    c = made([1, 9, 30], 4, 2, 8, 4, torch.float32)
    part = torch.randn(c["qkv"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want, k, v = expected(c)
    out = paged_decode(**(c | {"qkv": c["qkv"] - part}), splits=splits, delta=part)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored(c, "keys"), k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored(c, "values"), v, rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    c = made([9, 30, 3], 4, 2, 8, 4, torch.float32)
    together = paged_decode(**c, splits=2)
    for i in range(3):
        alone = {**c, **{n: c[n][i : i + 1] for n in ("qkv", "cos", "sin", "lanes", "positions")}}
        assert torch.equal(paged_decode(**alone, splits=2)[0], together[i])


@pytest.mark.parametrize("splits", [1, 4])
def test_eight_bit_numbers_are_scaled_by_token_and_head(splits: int) -> None:
    c = made([3, 40], 4, 2, 32, 16, torch.float32)
    for name in ("keys", "values"):
        c[name] = torch.nan_to_num(c[name], posinf=0.0)
    scaled = {}
    for name in ("keys", "values"):
        c[name] = c[name] * torch.rand(c[name].shape[:3], device=DEVICE)[..., None] * 9
        scaled[name], scaled[name + "_scales"] = quantise(c[name])
        c[name] = scaled[name].float() * scaled[name + "_scales"][..., None]
    want, k, v = expected(c)
    c["keys"], c["values"] = scaled["keys"], scaled["values"]
    scales = {"key_scales": scaled["keys_scales"], "value_scales": scaled["values_scales"]}
    out = paged_decode(**c, **scales, splits=splits)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    for name, new in (("keys", k), ("values", v)):
        numbers = c[name].view(torch.uint8)
        got = stored({**c, name: numbers}, name).to(torch.uint8).view(torch.float8_e4m3fn).float()
        got *= stored({**c, name: scaled[name + "_scales"]}, name)[..., None]
        near = (got - new).abs() <= 0.07 * new.abs().amax(-1, keepdim=True)
        # The interpreter loses the carry from mantissa to exponent when it rounds to e4m3.
        assert near.all() if ON_GPU else near.float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (16, 1), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lengths_of_one_to_thirty_two_thousand(heads: tuple[int, int], dtype: torch.dtype) -> None:
    lengths = [1, 2, 64, 65, 1000, 8191, 32768]
    for splits in (1, 32):
        c = made(lengths, *heads, 128, 64, dtype)
        assert_decodes(c, splits, 1e-2, TOLERANCE[dtype])
