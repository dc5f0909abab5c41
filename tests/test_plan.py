from dataclasses import replace

import pytest
import torch

from xc_ray.config import AUTO_ENCODER_SHARE, ServeConfig
from xc_ray.demo.make import demo_config, tiny_config
from xc_ray.engine.config import EngineConfig, KVCacheDtype
from xc_ray.engine.kv_cache import KVCache
from xc_ray.engine.lora import LoraPool
from xc_ray.errors import ConfigError
from xc_ray.model.config import FAMILIES, XComposerConfig, preset
from xc_ray.model.decoder import Decoder
from xc_ray.model.xcomposer import XComposer
from xc_ray.plan import (
    ADAPTER_CONTEXT_BYTES,
    Plan,
    adapter_bytes,
    budget_of,
    decoder_parameters,
    decoder_plan,
    encoder_plan,
    engine_limits,
    plora_parameters,
    projector_parameters,
    render,
    slots_that_fit,
    vision_parameters,
)

CONFIGS = {
    "demo": demo_config(),
    "tiny with biases": replace(
        tiny_config("2.5"), decoder=replace(tiny_config("2.5").decoder, bias=True)
    ),
    **{f"tiny {v}": tiny_config(v) for v in FAMILIES},
    **{f"published {v}": preset(v) for v in FAMILIES},
}
PLAN = Plan("the decoder", 10_000_000, {"weights": 6_000_000, "context": 1_000_000}, 1000)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameter_counts_are_those_of_the_model_that_would_be_built(
    config: XComposerConfig,
) -> None:
    with torch.device("meta"):
        model = XComposer(config)
    count = {"decoder": 0, "plora": 0, "tower": 0, "projector": 0}
    for name, p in model.named_parameters():
        if "Plora" in name:
            part = "plora"
        elif name.startswith("decoder."):
            part = "decoder"
        else:
            part = "tower" if ".vit." in name else "projector"
        count[part] += p.numel()
    assert decoder_parameters(config) == count["decoder"]
    assert plora_parameters(config) == count["plora"]
    assert vision_parameters(config) == count["tower"]
    assert projector_parameters(config) == count["projector"]


def test_the_published_sizes_are_those_of_the_papers_models() -> None:
    config = preset("2.5")
    assert decoder_parameters(config) == pytest.approx(7.738e9, rel=1e-3)
    assert plora_parameters(config) == pytest.approx(0.604e9, rel=1e-3)
    assert plora_parameters(preset("2.0-4KHD")) == pytest.approx(0.523e9, rel=1e-3)
    assert 0.303e9 <= vision_parameters(config) <= 0.305e9
    assert decoder_plan(config, 0).kv_bytes_per_token == 128 * 1024


def test_the_cache_gets_what_the_parts_leave() -> None:
    assert PLAN.fixed == 7_000_000
    assert PLAN.kv_tokens == 3000
    assert replace(PLAN, budget=6_000_000).kv_tokens == 0
    assert replace(PLAN, kv_bytes_per_token=0).kv_tokens == 0


def test_a_plan_that_fits_to_the_byte_is_accepted() -> None:
    PLAN.check(3000)
    replace(PLAN, budget=7_000_000).check()


def test_a_plan_without_room_for_the_longest_request_says_what_it_needs() -> None:
    with pytest.raises(ConfigError) as caught:
        PLAN.check(3001)
    assert caught.value.message == (
        "the decoder needs 0.01 GB (weights 0.01, context 0.00, cache for 3,001 tokens 0.00) and "
        "its share is 0.01 GB; raise its num_gpus or lower max_model_len or max_prefill_tokens"
    )
    assert caught.value.param == "num_gpus"


def test_an_encoder_whose_parts_do_not_fit_is_told_to_take_a_larger_share() -> None:
    plan = encoder_plan(preset("2.5"), 1_000_000_000)
    with pytest.raises(ConfigError) as caught:
        plan.check()
    assert caught.value.message.startswith("the vision encoder needs ")
    assert caught.value.message.endswith("its share is 1.00 GB; raise its num_gpus")


def test_an_encoder_as_served_by_default_fits_its_share_of_a_24_gb_card() -> None:
    served = ServeConfig(model="demo")
    plan = encoder_plan(
        preset("2.5"),
        budget_of(AUTO_ENCODER_SHARE, 24_000_000_000),
        max_squares=served.encoder.max_squares,
        max_tiles=served.limits.max_tiles,
        cuda_graphs=served.encoder.cuda_graphs,
    )
    plan.check()
    assert served.encoder.cuda_graphs


def test_the_7b_decoder_does_not_fit_a_small_card_and_fits_a_large_one() -> None:
    config = preset("2.5")
    with pytest.raises(ConfigError, match="the decoder needs "):
        decoder_plan(config, 16_000_000_000).check(16384)
    decoder_plan(config, 40_000_000_000).check(16384)


def test_tower_and_decoder_with_a_24_tile_picture_share_21_gib() -> None:
    config, total = preset("2.5"), 21 << 30
    encoder = encoder_plan(config, total, cuda_graphs=False)
    decoder = decoder_plan(config, total - encoder.fixed, max_num_seqs=1, max_prefill_tokens=1024)
    decoder.check(config.image_tokens(4, 6) + 1024)


def test_more_prefill_tokens_and_more_squares_take_more_memory() -> None:
    config = preset("2.5")
    small, large = (decoder_plan(config, 0, max_prefill_tokens=n) for n in (512, 4096))
    assert small.fixed < large.fixed
    few, many = (encoder_plan(config, 0, max_squares=n) for n in (1, 64))
    assert few.fixed < many.fixed
    assert many.fixed > encoder_plan(config, 0, max_squares=64, cuda_graphs=False).fixed


def test_numbers_of_twice_the_bytes_take_twice_the_memory() -> None:
    half, whole = (decoder_plan(preset("2.5"), 0, number_bytes=n) for n in (2, 4))
    assert whole.parts["decoder"] == 2 * half.parts["decoder"]
    assert whole.kv_bytes_per_token == 2 * half.kv_bytes_per_token


@pytest.mark.parametrize(("max_num_seqs", "tokens"), [(3, 1500), (6, 3000), (7, 3000)])
def test_the_cache_takes_the_rest_of_the_budget_as_far_as_requests_can_use_it(
    max_num_seqs: int, tokens: int
) -> None:
    limits = engine_limits(
        PLAN,
        max_model_len=500,
        max_num_seqs=max_num_seqs,
        max_prefill_tokens=64,
        kv_cache_tokens=None,
    )
    assert limits == EngineConfig(500, tokens, max_num_seqs, 64)


def test_the_engine_gets_the_cache_asked_for_if_it_fits() -> None:
    def limits(kv_cache_tokens: int) -> int:
        return engine_limits(
            PLAN,
            max_model_len=500,
            max_num_seqs=3,
            max_prefill_tokens=64,
            kv_cache_tokens=kv_cache_tokens,
        ).kv_cache_tokens

    assert limits(2000) == 2000
    with pytest.raises(ConfigError) as caught:
        limits(3001)
    assert caught.value.message == (
        "kv_cache_tokens is 3,001, the decoder's share of 0.01 GB holds 3,000; lower it or raise "
        "num_gpus"
    )
    with pytest.raises(ConfigError, match="longest request would be cut short"):
        limits(499)


def test_the_table_tells_every_part_and_what_the_cache_holds() -> None:
    config = preset("2.5")
    table = render(
        [encoder_plan(config, 5_000_000_000), decoder_plan(config, 30_000_000_000)],
        max_model_len=16384,
    )
    for words in ("the vision encoder: share 5.00 GB", "tower", "projector", "PLoRA", "left"):
        assert words in table
    (cache,) = [line for line in table.splitlines() if "KV cache" in line]
    assert "tokens of 128 KiB" in cache
    assert "the longest request (16,384)" in cache


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_bytes_of_a_token_are_those_of_the_cache_that_would_be_made(dtype: KVCacheDtype) -> None:
    config = tiny_config("2.5")
    limits = EngineConfig(64, 64, block_size=16, kv_cache_dtype=dtype)
    cache = KVCache(config.decoder, limits, device=torch.device("cpu"), dtype=torch.bfloat16)
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    size = sum(t.nbytes for t in tensors if t is not None)
    tokens = 64 + 16  # and the spare block
    assert size == tokens * decoder_plan(config, 0, kv_cache_dtype=dtype).kv_bytes_per_token


@pytest.mark.parametrize("rank", [1, 16, 17, 64])
def test_a_slot_takes_what_the_engine_gives_an_adapter(rank: int) -> None:
    config = CONFIGS["tiny 2.5"]
    limits = EngineConfig(64, 64, max_loras=3, max_lora_rank=rank)
    pool = LoraPool(Decoder(config), limits).slots.pool
    assert adapter_bytes(config, rank, 4) == pool[0].nbytes
    plan = decoder_plan(config, 10**9, number_bytes=4, adapter_slots=3, adapter_rank=rank)
    assert plan.parts["adapters"] == pool.nbytes


def test_a_slot_of_the_published_model_takes_300_mb() -> None:
    assert adapter_bytes(preset("2.5"), 64, 2) == pytest.approx(302e6, rel=1e-2)


def test_without_slots_a_plan_has_no_part_for_them() -> None:
    assert "adapters" not in decoder_plan(CONFIGS["demo"], 10**9).parts


@pytest.mark.parametrize(
    ("budget", "cache", "slots"),
    [
        (10_000_000, 0, 5),  # 3 MB are left
        (10_000_000, 1000, 4),
        (10_000_000, 3000, 0),
        (1_000_000, 0, 0),
        (10**9, 0, 5),
    ],
)
def test_slots_are_what_the_rest_holds_beside_the_cache(
    budget: int, cache: int, slots: int
) -> None:
    plan = replace(PLAN, budget=budget + ADAPTER_CONTEXT_BYTES)
    assert slots_that_fit(plan, 500_000, kv_cache_tokens=cache, most=5) == slots


def test_a_long_prompt_in_small_chunks_reads_more_than_it_computes() -> None:
    config = preset("2.5")
    short, long = (
        decoder_plan(config, 0, max_prefill_tokens=512, max_model_len=n) for n in (4_096, 65_536)
    )
    # Keys and values of 61,000 tokens, less what the chunk's own rows take.
    assert long.parts["activations"] > short.parts["activations"] + 61_000 * 4_096 - 85_000_000
    plain = decoder_plan(config, 0, max_prefill_tokens=8192)
    assert plain == decoder_plan(config, 0, max_prefill_tokens=8192, max_model_len=4_096)


def test_keys_of_8_bits_take_more_while_they_are_read_and_less_where_they_are_kept() -> None:
    config = preset("2.5")
    plain, small = (
        decoder_plan(config, 0, max_model_len=200_000, kv_cache_dtype=kind)
        for kind in ("auto", "fp8")
    )
    assert small.parts["activations"] > 2 * plain.parts["activations"]
    assert small.kv_bytes_per_token < 0.6 * plain.kv_bytes_per_token


def test_a_token_of_every_lane_is_computed_beside_the_prompts() -> None:
    few, many = (
        decoder_plan(preset("2.5"), 0, max_num_seqs=n, cuda_graphs=False).parts["activations"]
        for n in (1, 257)
    )
    # 256 rows of 150 KB, and what sampling takes of 92,544 ids.
    assert many - few > 256 * (150_000 + 92_544 * 28)


def test_graphs_of_decode_steps_take_memory_of_their_own() -> None:
    with_graphs, without = (
        decoder_plan(preset("2.5"), 0, max_num_seqs=128, cuda_graphs=on) for on in (True, False)
    )
    assert with_graphs.fixed - without.fixed >= 46 << 20


def test_a_whole_gpu_is_less_than_its_memory() -> None:
    assert budget_of(0.25, 80_000) == 20_000
    assert budget_of(1.0, 80_000) == budget_of(2.0, 80_000) == 78_400
