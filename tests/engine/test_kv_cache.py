import torch

from xc_ray.demo.make import tiny_config
from xc_ray.engine.kv_cache import KVCache

CONFIG = tiny_config("2.5").decoder  # two layers, two key heads of size 8
CPU = torch.device("cpu")


def test_a_cache_takes_the_bytes_that_its_capacity_says() -> None:
    cache = KVCache(CONFIG, 50, device=CPU, dtype=torch.float32)
    numbers = cache.keys.numel() + cache.values.numel()
    assert numbers == 50 * CONFIG.kv_numbers_per_token
    assert cache.ranges.num_free == 50


def test_what_is_written_to_slots_is_read_as_a_range() -> None:
    cache = KVCache(CONFIG, 10, device=CPU, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    cache.write(1, torch.tensor([5, 3, 4]), k, v)
    keys, values = cache.read(1, 3, 3)
    assert torch.equal(keys, k[[1, 2, 0]])
    assert torch.equal(values, v[[1, 2, 0]])
    assert not cache.keys[0].any()
    assert not cache.read(1, 6, 4)[0].any()
