from typing import Any

import pytest

from xc_ray.engine.config import EngineConfig
from xc_ray.errors import ConfigError


def test_limits_that_can_work_are_accepted() -> None:
    config = EngineConfig(max_model_len=16, kv_cache_tokens=16)
    assert (config.max_num_seqs, config.max_prefill_tokens, config.block_size) == (32, 4096, 64)
    assert (config.kv_cache_dtype, config.prefix_cache, config.overlap) == ("auto", True, True)


@pytest.mark.parametrize(
    "name",
    ["max_model_len", "kv_cache_tokens", "max_num_seqs", "max_prefill_tokens", "block_size"],
)
def test_a_limit_below_one_is_refused(name: str) -> None:
    limits: dict[str, Any] = {"max_model_len": 16, "kv_cache_tokens": 16, name: 0}
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**limits)
    assert caught.value.message == f"{name} is 0, the least is 1"
    assert caught.value.param == name


def test_an_unknown_cache_dtype_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(16, 16, kv_cache_dtype="int4")  # type: ignore[arg-type]  # the point
    assert caught.value.message == "kv_cache_dtype is 'int4', expected auto or fp8"
    assert caught.value.param == "kv_cache_dtype"


def test_no_adapters_have_room_unless_asked_for() -> None:
    config = EngineConfig(16, 16)
    assert (config.max_loras, config.max_lora_rank) == (0, 64)


def test_a_negative_number_of_adapters_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(16, 16, max_loras=-1)
    assert caught.value.message == "max_loras is -1, the least is 0"
    assert caught.value.param == "max_loras"


@pytest.mark.parametrize("rank", [0, 65])
def test_a_largest_rank_that_no_slot_holds_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(16, 16, max_loras=1, max_lora_rank=rank)
    assert caught.value.message == f"max_lora_rank is {rank}, expected 1 to 64"
    assert caught.value.param == "max_lora_rank"


@pytest.mark.parametrize(
    ("rank", "padded"), [(1, 16), (16, 16), (17, 32), (33, 48), (63, 64), (64, 64)]
)
def test_ranks_are_padded_to_what_tensor_cores_multiply(rank: int, padded: int) -> None:
    assert EngineConfig(16, 16, max_lora_rank=rank).padded_lora_rank == padded


@pytest.mark.parametrize(
    ("length", "tokens", "size", "num_blocks", "max_blocks", "longest"),
    [
        (16, 16, 4, 4, 4, 16),
        (17, 100, 4, 25, 5, 17),  # a last block that is not full
        (100, 17, 4, 5, 5, 20),  # the cache is rounded up to whole blocks
        (10, 1, 64, 1, 1, 10),
        (100, 1, 64, 1, 1, 64),
    ],
)
def test_capacity_is_counted_in_whole_blocks(
    length: int, tokens: int, size: int, num_blocks: int, max_blocks: int, longest: int
) -> None:
    config = EngineConfig(length, tokens, block_size=size)
    assert config.num_blocks == num_blocks
    assert config.max_blocks == max_blocks
    assert config.max_sequence_tokens == longest
