import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.demo.make import tiny_config
from xc_ray.engine.config import EngineConfig, KVCacheDtype
from xc_ray.engine.kv_cache import KVCache, quantise

CONFIG = tiny_config("2.5").decoder  # two layers, two key heads of size 8
CPU = torch.device("cpu")


def cache_of(tokens: int, size: int = 4, kind: KVCacheDtype = "auto") -> KVCache:
    limits = EngineConfig(10_000, tokens, block_size=size, kv_cache_dtype=kind)
    return KVCache(CONFIG, limits, device=CPU, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "each"), [("auto", 8.0), ("fp8", 1 + 4 / 8)])
def test_a_cache_takes_the_bytes_of_its_blocks_and_one_more(
    kind: KVCacheDtype, each: float
) -> None:
    """In 8 bits, a byte a number and a float32 scale a head of eight."""
    cache = cache_of(50, 4, kind)
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    taken = sum(t.nbytes for t in tensors if t is not None)
    assert taken == (13 + 1) * 4 * CONFIG.kv_numbers_per_token * each
    assert cache.spare == 13


@pytest.mark.parametrize("kind", ["auto", "fp8"])
def test_what_is_written_to_slots_is_read_by_blocks(kind: KVCacheDtype) -> None:
    cache = cache_of(16, 4, kind)
    # Numbers that 8 bits hold as they are: powers of two.
    k, v = 2.0 ** torch.randint(-3, 4, (2, 6, 2, 8), dtype=torch.float64)
    slots = torch.tensor([14, 15, 4, 5, 6, 7])  # places 2 and 3 of block 3, then block 1
    cache.write(1, slots, k, v)
    keys, values = cache.read(1, torch.tensor([3, 1]), 7)
    assert keys.shape == (7, 2, 8)
    assert keys.dtype == torch.float64
    torch.testing.assert_close(keys[2:], k[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(values[2:], v[:5], rtol=1e-6, atol=0)
    assert not keys[:2].any()  # never written
    assert not cache.read(0, torch.tensor([3, 1]), 8)[0].any()  # another layer
    k2, v2 = cache.gather(1, torch.tensor([[3], [1]]))
    assert k2.shape == v2.shape == (2, 1, 4, 2, 8)
    torch.testing.assert_close(k2[1, 0], k[2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(v2[0, 0, 2:], v[:2], rtol=1e-6, atol=0)


def test_a_slot_is_written_over() -> None:
    cache = cache_of(8, 4, "fp8")
    for scale in (1000.0, 0.001):  # the scale too
        k = torch.full((1, 2, 8), scale, dtype=torch.float64)
        cache.write(0, torch.tensor([5]), k, -k)
        keys, values = cache.read(0, torch.tensor([1]), 2)
        torch.testing.assert_close(keys[1:], k, rtol=1e-6, atol=0)
        torch.testing.assert_close(values[1:], -k, rtol=1e-6, atol=0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8),
    st.integers(-30, 30),
)
def test_8_bits_keep_each_number_within_a_sixteenth(numbers: list[float], exponent: int) -> None:
    """Half a step of e4m3, with three bits behind the point: 2⁻⁴ of a number.

    Of small ones, half of the least step: 2⁻⁹ times the scale.
    """
    x = torch.tensor([numbers], dtype=torch.float64) * 2.0**exponent
    stored, scales = quantise(x)
    assert stored.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    back = stored.double() * scales.double()[:, None]
    step = scales.double()[:, None] * 2.0**-9
    bound = torch.maximum(x.abs() * 2.0**-4, step / 2) * (1 + 1e-6)
    assert ((back - x).abs() <= bound).all()
    # So, in parts of the head's largest number, which keeps its own value:
    largest = x.abs().amax()
    if largest > 1e-9:
        assert (back - x).abs().amax() <= 2.0**-4 * largest * (1 + 1e-6)
        assert back.abs().amax() == pytest.approx(float(largest), rel=1e-6)


def test_a_head_of_zeros_stays_one() -> None:
    stored, scales = quantise(torch.zeros(3, 2, 8))
    assert not stored.float().any()
    assert scales.isfinite().all()
    assert (scales > 0).all()


def test_each_token_and_head_has_its_own_scale() -> None:
    x = torch.ones(2, 3, 8) * torch.tensor([1.0, 1e-3, 1e3])[:, None]
    x[1] *= 7
    stored, scales = quantise(x)
    torch.testing.assert_close(stored.float() * scales[..., None], x)
    assert (stored.float().abs() == 448).all()
