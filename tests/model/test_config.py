import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xc_ray.demo.make import demo_config, tiny_config
from xc_ray.errors import CheckpointError
from xc_ray.model.config import (
    FAMILIES,
    PLORA_LINEARS,
    PLoRAConfig,
    RopeScaling,
    Shapes,
    TokenIds,
    Variant,
    VisionConfig,
    XComposerConfig,
    preset,
    read_config_json,
)
from xc_ray.model.weights import published_state
from xc_ray.model.xcomposer import XComposer

POSITIONS = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
PLORA_A = "model.layers.0.attention.wqkv.Plora_A.weight"


def shapes_of(config: XComposerConfig) -> Shapes:
    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in published_state(XComposer(config)).items()}


@pytest.fixture(scope="module")
def published_shapes() -> Callable[[Variant], Shapes]:
    """Shapes of every tensor of a published 7B checkpoint."""
    made: dict[Variant, Shapes] = {}

    def shapes(variant: Variant) -> Shapes:
        if variant not in made:
            made[variant] = shapes_of(preset(variant))
        return made[variant]

    return shapes


def published_json(variant: Variant) -> dict[str, Any]:
    """What a published config.json holds: the language model, and nothing of the rest."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2" if variant == "2.5" else "internlm",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 92544,
        "bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 24576 if variant == "2.5" else 32768,
        "max_length": 16384 if FAMILIES[variant].tiled else 4096,
        "rope_scaling": {"factor": 1.0, "type": "dynamic"},
        "img_size": 224,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    }


# Inference


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_published_checkpoint_is_told_by_its_shapes(
    variant: Variant, published_shapes: Callable[[Variant], Shapes]
) -> None:
    config = XComposerConfig.from_dict(published_json(variant), published_shapes(variant))
    assert config == preset(variant)


@pytest.mark.parametrize(
    ("variant", "tile", "side", "one_picture", "largest"),
    [
        ("2.0", 224, 16, 256, None),
        ("2.0-VL", 490, 35, 1225, None),
        ("2.0-4KHD", 336, 12, 313, ((9, 6), 8041)),
        ("2.5", 560, 20, 841, ((4, 6), 10101)),
    ],
)
def test_the_published_sizes_and_token_counts(
    variant: Variant,
    tile: int,
    side: int,
    one_picture: int,
    largest: tuple[tuple[int, int], int] | None,
) -> None:
    config = preset(variant)
    assert (config.tile, config.tokens_per_side) == (tile, side)
    assert config.image_tokens(1, 1) == one_picture
    if largest:
        assert config.image_tokens(*largest[0]) == largest[1]


@pytest.mark.parametrize(
    ("variant", "rows", "cols", "tokens"),
    [
        ("2.0-4KHD", 4, 4, 2509),
        ("2.0-4KHD", 5, 5, 3817),
        ("2.5", 2, 3, 2861),
        ("2.5", 3, 4, 5281),
    ],
)
def test_tokens_of_a_tiled_picture(variant: Variant, rows: int, cols: int, tokens: int) -> None:
    assert preset(variant).image_tokens(rows, cols) == tokens


def test_the_published_models_are_of_7b_size() -> None:
    d = preset("2.5").decoder
    assert (d.head_dim, d.kv_numbers_per_token) == (128, 65_536)
    assert VisionConfig() == preset("2.5").vision
    assert [preset(v).projector_in for v in FAMILIES] == [1024, 1024, 4096, 4096]
    assert [preset(v).vision.num_positions for v in FAMILIES] == [257, 1226, 577, 1601]


def test_only_4khd_has_a_small_plora_on_the_packed_projection() -> None:
    for variant in FAMILIES:
        plora = dict(preset(variant).plora)
        wqkv = plora.pop("attention.wqkv")
        assert wqkv == (PLoRAConfig(8, 2.0) if variant == "2.0-4KHD" else PLoRAConfig(256, 1.0))
        assert set(plora.values()) == {PLoRAConfig(256, 1.0)}


def test_an_answer_ends_at_the_end_of_the_turn_or_of_the_text() -> None:
    assert preset("2.5").stop_token_ids == {2, 92542}


def test_the_variant_is_read_from_shapes_and_never_from_a_name(
    published_shapes: Callable[[Variant], Shapes],
) -> None:
    raw = published_json("2.0-VL") | {"architectures": ["InternLMXComposer2d5ForCausalLM"]}
    assert XComposerConfig.from_dict(raw, published_shapes("2.0-VL")).variant == "2.0-VL"


def test_the_image_size_of_the_file_is_not_believed(
    published_shapes: Callable[[Variant], Shapes],
) -> None:
    raw = published_json("2.0-4KHD") | {"img_size": 490}
    assert XComposerConfig.from_dict(raw, published_shapes("2.0-4KHD")).tile == 336


@pytest.mark.parametrize("config", [*map(tiny_config, FAMILIES), demo_config(), preset("2.5")])
def test_a_saved_config_needs_no_shapes(config: XComposerConfig) -> None:
    saved = json.loads(json.dumps(config.to_dict()))
    assert XComposerConfig.from_dict(saved, {}) == config


def test_a_config_of_unusual_values_survives_saving() -> None:
    tiny = tiny_config("2.0-4KHD")
    config = replace(
        tiny,
        vision=replace(tiny.vision, num_attention_heads=4, hidden_act="gelu", layer_norm_eps=1e-3),
        decoder=replace(
            tiny.decoder, bias=True, rope_scaling=RopeScaling("linear", 4.0), rope_theta=500.0
        ),
        plora={n: PLoRAConfig(i + 1, i / 2) for i, n in enumerate(PLORA_LINEARS)},
        tokens=TokenIds(5, 6, 7, 8, 9, 10),
        torch_dtype="float16",
    )
    assert XComposerConfig.from_dict(json.loads(json.dumps(config.to_dict())), {}) == config


# Explicit fields


def saved(**changes: Any) -> dict[str, Any]:
    """The tiny 2.5 model's config.json with some fields changed; ... takes one out."""
    raw = {**tiny_config("2.5").to_dict(), **changes}
    return {k: v for k, v in raw.items() if v is not ...}


def read(shapes: Shapes | None = None, **changes: Any) -> XComposerConfig:
    return XComposerConfig.from_dict(saved(**changes), shapes or {})


def test_explicit_fields_win_over_shapes(published_shapes: Callable[[Variant], Shapes]) -> None:
    explicit = {
        "variant": "2.5",
        "vision": {"num_attention_heads": 8, "hidden_act": "gelu"},
        "tile": 56,
        "plora": {"attention.wqkv": {"scaling": 0.5}},
        "tokens": {"end_of_turn": 7},
    }
    config = XComposerConfig.from_dict(
        published_json("2.0-VL") | explicit, published_shapes("2.0-VL")
    )
    assert config.variant == "2.5"
    assert config.vision == replace(
        preset("2.5").vision, num_attention_heads=8, hidden_act="gelu", image_size=56
    )
    assert config.plora["attention.wqkv"] == PLoRAConfig(256, 0.5)
    assert config.plora["attention.wo"] == PLoRAConfig(256, 1.0)
    assert config.tokens == TokenIds(end_of_turn=7)


def test_a_default_plora_serves_the_linears_that_are_not_named() -> None:
    plora = {"default": {"rank": 3, "scaling": 4.0}, "attention.wo": {"rank": 5, "scaling": 6.0}}
    config = read(plora=plora)
    assert config.plora["attention.wo"] == PLoRAConfig(5, 6.0)
    assert config.plora["feed_forward.w2"] == PLoRAConfig(3, 4.0)


def test_the_head_count_of_the_tower_is_clips_unless_told(
    published_shapes: Callable[[Variant], Shapes],
) -> None:
    config = XComposerConfig.from_dict(published_json("2.5"), published_shapes("2.5"))
    assert config.vision.num_attention_heads == 16


def test_what_a_file_leaves_out_has_the_original_config_classs_default() -> None:
    config = read(bias=..., rope_theta=..., rope_scaling=..., max_position_embeddings=...)
    d = config.decoder
    assert (d.bias, d.rope_theta, d.rope_scaling, d.max_position_embeddings) == (
        True,
        10_000.0,
        None,
        2048,
    )
    assert read(num_key_value_heads=None).decoder.num_key_value_heads == 4


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"type": "dynamic", "factor": 2}, RopeScaling("dynamic", 2.0)),
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope_type": "dynamic", "factor": 1.0}, RopeScaling("dynamic", 1.0)),
    ],
)
def test_rope_scaling_is_null_dynamic_or_linear(
    scaling: dict[str, Any] | None, expected: RopeScaling | None
) -> None:
    assert read(rope_scaling=scaling).decoder.rope_scaling == expected


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, "'vocab_size' is None, expected a whole number"),
        ({"vocab_size": "1024"}, "'vocab_size' is '1024', expected a whole number"),
        ({"hidden_size": 32.0}, "'hidden_size' is 32.0, expected a whole number"),
        ({"hidden_size": True}, "'hidden_size' is True, expected a whole number"),
        ({"num_hidden_layers": -1}, "'num_hidden_layers' is -1, expected a whole number"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small', expected a number"),
        ({"rope_theta": float("inf")}, "'rope_theta' is inf, expected a number"),
        ({"bias": "no"}, "'bias' is 'no', expected true or false"),
        ({"torch_dtype": 16}, "'torch_dtype' is 16, expected a string"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        (
            {"tie_word_embeddings": True},
            "expected false: the family has an output matrix of its own",
        ),
        ({"variant": "3.0"}, "'variant' is '3.0', expected one of 2.0, 2.0-VL, 2.0-4KHD, 2.5"),
        ({"vision": "large"}, "'vision' is 'large', expected an object"),
        ({"vision": []}, "'vision' is [], expected an object"),
        ({"plora": 5}, "'plora' is 5, expected an object"),
        ({"plora": {"default": 5}}, "expected an object"),
        ({"plora": {"default": {"rank": 4}}}, "'scaling' is None, expected a number"),
        ({"tokens": [1, 2]}, "'tokens' is [1, 2], expected an object"),
        ({"tokens": {"bos": "<s>"}}, "tokens: 'bos' is '<s>', expected a whole number"),
        (
            {"eos_token_id": [2, 3], "tokens": ...},
            "'eos_token_id' is [2, 3], expected a whole number",
        ),
        ({"rope_scaling": "dynamic"}, "'rope_scaling' is 'dynamic', expected an object"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "expected null, or type 'dynamic' or 'linear' with a factor",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
            "rope_scaling: 'factor' is 0.5, expected a number of at least 1",
        ),
        (
            {"num_attention_heads": 3},
            "hidden_size 32, num_attention_heads 3 and num_key_value_heads 2 do not divide one "
            "another",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 do not divide one another"),
        (
            {"vision": {**asdict(tiny_config("2.5").vision), "num_attention_heads": 5}},
            "vision: hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        ({"tile": 70}, "a tile of 70 px is not a whole number of 2×2 groups of 14 px patches"),
        (
            {"tokens": {"end_of_turn": 1024, "start_of_turn": 4}},
            "token id end_of_turn = 1024 is outside the vocabulary of 1024; write the right one "
            'into config.json: "tokens": {"end_of_turn": ...}',
        ),
        ({"tokens": ...}, "token id start_of_turn = 92543 is outside the vocabulary of 1024"),
        # sizes of nothing
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"tile": 0}, "tile"),
        ({"vision": {"hidden_size": 32, "patch_size": 0}}, "patch_size"),
        ({"vision": {"hidden_size": 32, "num_attention_heads": 0}}, "num_attention_heads"),
        ({"vision": {"hidden_size": 32, "hidden_act": "wave"}}, "'hidden_act' is 'wave'"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert message in caught.value.message


def test_a_plora_rank_without_a_known_scaling_is_refused(
    published_shapes: Callable[[Variant], Shapes],
) -> None:
    shapes = {**published_shapes("2.5"), PLORA_A: (64, 4096)}
    with pytest.raises(CheckpointError) as caught:
        XComposerConfig.from_dict(published_json("2.5"), shapes)
    assert caught.value.message == (
        "the PLoRA scaling of attention.wqkv with rank 64 is unknown (known ranks: 8, 256); write "
        'it into config.json, for example "plora": {"attention.wqkv": {"scaling": 1.0}}'
    )
    told = published_json("2.5") | {"plora": {"attention.wqkv": {"scaling": 1.0}}}
    config = XComposerConfig.from_dict(told, shapes)
    assert config.plora["attention.wqkv"] == PLoRAConfig(64, 1.0)


def test_a_checkpoint_without_plora_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"no PLoRA rank for attention\.wqkv: neither a tensor"
    ):
        read(plora=...)


@pytest.mark.parametrize(("rows", "seen"), [(123, "has 123 rows"), (None, "is missing")])
def test_a_variant_that_cannot_be_told_is_refused(
    rows: int | None, seen: str, published_shapes: Callable[[Variant], Shapes]
) -> None:
    shapes = dict(published_shapes("2.5"))
    del shapes[POSITIONS]
    if rows:
        shapes[POSITIONS] = (rows, 1024)
    with pytest.raises(CheckpointError) as caught:
        XComposerConfig.from_dict(published_json("2.5"), shapes)
    assert f"the vision position table {seen}, known are 257 (2.0), " in caught.value.message
    assert caught.value.message.endswith(
        "write 'variant' into config.json (2.0, 2.0-VL, 2.0-4KHD, 2.5)"
    )


def test_a_tower_of_unknown_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the vision tower's sizes are unknown"):
        read(vision=..., tile=...)


# Files


def test_a_config_file_is_read_from_its_folder(tiny: Callable[[Variant], Path]) -> None:
    raw = read_config_json(tiny("2.0"))
    assert XComposerConfig.from_dict(raw, {}) == tiny_config("2.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json; is it the folder of a checkpoint?"),
        ("{", "is not valid JSON: "),
        ("[1]", "must hold a JSON object, found list"),
    ],
)
def test_a_config_file_that_is_none_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_config_json(tmp_path)
    assert message in caught.value.message


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder; give the folder of a checkpoint"):
        read_config_json(tmp_path / "none")
