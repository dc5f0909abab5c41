import pytest

from xc_ray.engine.config import EngineConfig
from xc_ray.errors import ConfigError


def test_limits_that_can_work_are_accepted() -> None:
    config = EngineConfig(max_model_len=16, kv_cache_tokens=16)
    assert (config.max_num_seqs, config.max_prefill_tokens) == (32, 4096)


@pytest.mark.parametrize(
    "name", ["max_model_len", "kv_cache_tokens", "max_num_seqs", "max_prefill_tokens"]
)
def test_a_limit_below_one_is_refused(name: str) -> None:
    limits = {"max_model_len": 16, "kv_cache_tokens": 16, name: 0}
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**limits)
    assert caught.value.message == f"{name} is 0, the least is 1"
    assert caught.value.param == name


def test_a_cache_smaller_than_the_longest_request_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(max_model_len=16_384, kv_cache_tokens=16_383)
    assert caught.value.message == (
        "the key/value cache holds 16,383 tokens and max_model_len is 16,384: the longest request "
        "would never start; give the decoder more memory or lower max_model_len"
    )
