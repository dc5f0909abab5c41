import json
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.adapters import settings_of
from xc_ray.errors import CheckpointError
from xc_ray.model.adapter_config import AdapterConfig, read_adapter_config

WO = "model.layers.1.attention.wo"


def read(folder: Path, **changes: Any) -> AdapterConfig:
    (folder / "adapter_config.json").write_text(json.dumps(settings_of() | changes))
    return read_adapter_config(folder)


def test_what_peft_writes_by_default_has_no_problem(tmp_path: Path):
    LoraConfig(r=6, lora_alpha=9, target_modules=["attention.wo"]).save_pretrained(str(tmp_path))
    config = read_adapter_config(tmp_path)
    assert config.problems == ()
    assert (config.rank, config.alpha, config.rslora) == (6, 9.0, False)
    assert config.target_modules == ("attention.wo",)


def test_every_field_of_peft_that_changes_the_result_is_refused_by_name(tmp_path: Path):
    """What this version of peft has, and a field that a later one may have."""
    known = LoraConfig(target_modules=["wo"]).to_dict().keys()
    silent = {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
        *("ensure_weight_tying", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    }
    read_here = {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("init_lora_weights", "bias"),
    }
    assert silent | read_here <= known
    for name in [*sorted(known - silent - read_here), "new_in_peft_1"]:
        (problem,) = read(tmp_path, **{name: {"some": "thing"}}).problems
        assert problem.startswith(f'{name} is {{"some": "thing"}}: ')
        assert read(tmp_path, **{name: None}).problems == ()
    for name in silent:
        assert read(tmp_path, **{name: {"some": "thing"}}).problems == ()


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA', expected 'LORA'"),
        ("r", None, "r is null, expected a number"),
        ("r", 0, "r is 0.0, expected a whole number of at least 1"),
        ("r", 2.5, "r is 2.5, expected a whole number of at least 1"),
        ("r", True, "r is true, expected a number"),
        ("lora_alpha", "8", "lora_alpha is '8', expected a number"),
        ("lora_alpha", float("nan"), "lora_alpha is NaN, expected a number"),
        ("lora_alpha", 10**400, "lora_alpha is 1000"),
        ("use_rslora", 1, "use_rslora is 1, expected true or false"),
        ("bias", "lora_only", "bias is 'lora_only', expected 'none'"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4', which chang"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", 1, "init_lora_weights is 1, expected"),
        ("use_dora", True, "use_dora is true: DoRA also rescales the weights; train plain LoRA"),
        ("modules_to_save", ["output"], 'modules_to_save is ["output"]: whole modules'),
        ("rank_pattern", [4], "rank_pattern is [4], expected an object of patterns"),
        ("rank_pattern", {"wo": "4"}, "rank_pattern: 'wo' is '4', expected a number"),
        ("rank_pattern", {"wo": 0}, "wo is 0.0, expected a whole number"),
        ("alpha_pattern", {"(wo": 4}, "alpha_pattern holds '(wo', no regular expression"),
        ("alpha_pattern", {"a)(b": 4}, "alpha_pattern holds 'a)(b', no regular expression"),
        ("alpha_pattern", {"(.+)+x": 4}, "holds '(.+)+x'; write a simpler pattern"),
        ("target_modules", None, "target_modules is null, expected a list of module names"),
        ("target_modules", [], "target_modules is [], expected a list of module names"),
        ("target_modules", [1], "target_modules is [1], expected a list of module names"),
        ("target_modules", ".*.*.*.*.*", "'.*.*.*.*.*'; write a simpler pattern"),
        ("exclude_modules", 5, "exclude_modules is 5, expected a list of module names"),
        ("layers_to_transform", "all", "layers_to_transform is 'all', expected layer numbers"),
        ("layers_pattern", 5, "layers_pattern is 5, expected a name or a list of names"),
        ("a strange key", 5, "'a strange key' is 5: not known to leave the result as it is"),
    ],
)
def test_problem_names_field_value_and_what_is_expected(
    tmp_path: Path, field: str, value: Any, problem: str
):
    (found,) = read(tmp_path, **{field: value}).problems
    assert problem in found


def test_every_problem_is_listed(tmp_path: Path):
    found = read(tmp_path, r=0, bias="all", use_dora=True, target_modules=None, lora_bias=True)
    assert len(found.problems) == 5


def test_the_first_pattern_that_fits_the_end_of_a_name_counts(tmp_path: Path):
    config = read(
        tmp_path,
        rank_pattern={"o": 1, r"1\.attention\.wo": 2, "wo": 3},
        alpha_pattern={"^model.layers.0.attention.wo": 5},
    )
    assert config.rank_of(WO) == 2
    assert config.rank_of("model.layers.0.attention.wo") == 3
    assert config.rank_of("model.layers.0.attention.wqkv") == 4
    assert config.scaling_of("model.layers.0.attention.wo", 2) == 2.5
    assert config.scaling_of(WO, 2) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        ('{"r": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        (" " * 2_000_000, "has 2,000,000 bytes; that is no adapter_config.json"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    tmp_path: Path, content: str | bytes, message: str
):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_adapter_config(tmp_path)


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path):
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter_config(tmp_path)


def test_a_pattern_that_is_let_through_is_quick(tmp_path: Path):
    config = read(tmp_path, target_modules=r".*.+.*.+x")
    assert config.problems == ()
    start = time.perf_counter()
    for layer in range(32):
        assert not config.targets(f"model.layers.{layer}.feed_forward.w1")
    assert time.perf_counter() - start < 5
