import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xc_ray.demo.make import make_model, save_random, tiny_config
from xc_ray.errors import CheckpointError
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.weights import (
    Checkpoint,
    default_dtype,
    published_state,
    save_checkpoint,
)

ANY = "model.layers.1.feed_forward.w2.weight"


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[Variant], Path]) -> Path:
    """A copy of the tiny 2.5 checkpoint that a test may break."""
    return Path(shutil.copytree(tiny("2.5"), tmp_path / "model"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def with_tensors(folder: Path, state: Mapping[str, Tensor]) -> Path:
    save_file(dict(state), folder / "model.safetensors")
    return folder


def as_bin(folder: Path, shards: int = 1) -> Path:
    """The checkpoint in the old layout, in several shards with an index if asked for."""
    state = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        names = list(state)[i::shards]
        torch.save({n: state[n] for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def assert_same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# What is in a checkpoint


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_tensor_of_the_file_becomes_the_models(
    variant: Variant, tiny: Callable[[Variant], Path]
) -> None:
    model = Checkpoint.open(tiny(variant)).load()
    assert_same_tensors(published_state(model), tensors_of(tiny(variant)))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    state = tensors_of(folder)
    del state["output.weight"], state["vision_proj.0.bias"]
    state["model.norm.weight"] = torch.zeros(33)
    state["model.layers.2.attention.wo.weight"] = torch.zeros(32, 32)
    assert refusal(with_tensors(folder, state)) == (
        f"{folder} does not hold the model that its config.json describes; "
        "2 missing: output.weight, vision_proj.0.bias; "
        "1 unexpected: model.layers.2.attention.wo.weight; "
        "1 of another shape: model.norm.weight is [33], config.json asks for [32]"
    )


def test_separators_belong_to_the_tiled_variants_alone(
    tmp_path: Path, tiny: Callable[[Variant], Path]
) -> None:
    untiled = Path(shutil.copytree(tiny("2.0-VL"), tmp_path / "untiled"))
    state = {**tensors_of(untiled), "plora_glb_GN": torch.zeros(1, 1, 32)}
    assert "1 unexpected: plora_glb_GN" in refusal(with_tensors(untiled, state))
    tiled = Path(shutil.copytree(tiny("2.0-4KHD"), tmp_path / "tiled"))
    state = tensors_of(tiled)
    del state["plora_sub_GN"]
    assert "1 missing: plora_sub_GN" in refusal(with_tensors(tiled, state))


@pytest.mark.parametrize(
    "name",
    [
        "vit.vision_tower.vision_model.post_layernorm.weight",
        "vit.vision_tower.vision_model.embeddings.position_ids",
        "model.layers.0.attention.rotary_emb.inv_freq",
        "video_mem_proj.0.weight",
    ],
)
def test_names_that_mean_nothing_to_the_model_are_ignored(folder: Path, name: str) -> None:
    before = published_state(Checkpoint.open(folder).load())
    with_tensors(folder, {**tensors_of(folder), name: torch.ones(3)})
    assert_same_tensors(published_state(Checkpoint.open(folder).load()), before)


@pytest.mark.parametrize(
    "name", ["model.layers.0.position_embedding", "inv_freq", "my.video_mem_proj.0"]
)
def test_names_that_only_look_so_are_not(folder: Path, name: str) -> None:
    with_tensors(folder, {**tensors_of(folder), name: torch.ones(3)})
    assert f"1 unexpected: {name}" in refusal(folder)


def test_extra_lora_sets_are_reported_and_left_off(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = published_state(Checkpoint.open(folder).load())
    extra = {
        f"model.layers.{n}.attention.wqkv.{kind}_{half}.weight": torch.ones(2, 2)
        for n in range(2)
        for kind in ("lora_web", "lora_sft", "lora_dpo")
        for half in "AB"
    }
    checkpoint = Checkpoint.open(with_tensors(folder, {**tensors_of(folder), **extra}))
    assert checkpoint.extra_lora == ("lora_dpo", "lora_sft", "lora_web")
    with caplog.at_level(logging.INFO):
        assert_same_tensors(published_state(checkpoint.load()), before)
    assert "extra LoRA sets lora_dpo, lora_sft, lora_web are not used" in caplog.text


def test_a_checkpoint_without_extra_lora_has_none(tiny: Callable[[Variant], Path]) -> None:
    assert Checkpoint.open(tiny("2.5")).extra_lora == ()


def test_a_config_that_describes_another_model_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    message = refusal(folder)
    assert "17 missing: model.layers.2.attention.wo.Plora_A.weight, " in message


# Loading


def test_tower_and_decoder_load_alone(tiny: Callable[[Variant], Path]) -> None:
    checkpoint = Checkpoint.open(tiny("2.5"))
    whole = checkpoint.load()
    assert_same_tensors(checkpoint.load_vision().state_dict(), whole.vision.state_dict())
    assert_same_tensors(checkpoint.load_decoder().state_dict(), whole.decoder.state_dict())


def test_loading_a_part_reads_no_file_of_the_other_alone(tmp_path: Path) -> None:
    save_random(tmp_path, tiny_config("2.5"), max_shard_bytes=20_000)
    checkpoint = Checkpoint.open(tmp_path)
    expected = checkpoint.load_vision().state_dict()
    others = set(checkpoint.files.values()) - {checkpoint.files[n] for n in expected}
    assert others
    for path in others:
        path.unlink()
    assert_same_tensors(checkpoint.load_vision().state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_load_in_the_dtype_asked_for(
    dtype: torch.dtype, tiny: Callable[[Variant], Path]
) -> None:
    model = Checkpoint.open(tiny("2.5")).load(dtype=dtype)
    state = tensors_of(tiny("2.5"))
    for name, tensor in published_state(model).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name].to(dtype))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_file_of_half_precision_loads_as_float32(tmp_path: Path, stored: torch.dtype) -> None:
    save_random(tmp_path, tiny_config("2.5"), dtype=stored)
    model = Checkpoint.open(tmp_path).load()
    assert model.decoder.dtype == torch.float32
    assert torch.equal(model.decoder.output.weight, tensors_of(tmp_path)["output.weight"].float())


def test_the_default_dtype_is_that_of_the_device() -> None:
    assert default_dtype("cpu") == torch.float32
    assert default_dtype(torch.device("cuda", 1)) == torch.bfloat16


def test_a_loaded_model_runs_and_has_no_tensor_without_data(
    tiny: Callable[[Variant], Path],
) -> None:
    model = Checkpoint.open(tiny("2.5")).load()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    (embeddings,) = model.vision([torch.zeros(56, 56, 3, dtype=torch.uint8)])
    assert embeddings.isfinite().all()


# The old layout


@pytest.mark.parametrize("shards", [1, 3])
def test_an_old_checkpoint_loads_as_the_new_one_does(
    folder: Path, shards: int, tiny: Callable[[Variant], Path]
) -> None:
    checkpoint = Checkpoint.open(as_bin(folder, shards))
    assert_same_tensors(published_state(checkpoint.load()), tensors_of(tiny("2.5")))
    assert_same_tensors(
        checkpoint.load_decoder(dtype=torch.bfloat16).state_dict(),
        Checkpoint.open(tiny("2.5")).load_decoder(dtype=torch.bfloat16).state_dict(),
    )


def test_a_missing_old_shard_is_named(folder: Path) -> None:
    as_bin(folder, 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    assert refusal(folder) == (
        f"{folder} lacks 1 of 3 shards: pytorch_model-00002-of-00003.bin; download them again"
    )


# Writing


def test_a_saved_checkpoint_loads_as_it_was(
    tmp_path: Path, tiny: Callable[[Variant], Path]
) -> None:
    checkpoint = Checkpoint.open(tiny("2.0-4KHD"))
    state = published_state(checkpoint.load())
    for size in (5_000_000_000, 100_000):
        target = tmp_path / str(size)
        save_checkpoint(target, checkpoint.config, state, max_shard_bytes=size)
        again = Checkpoint.open(target)
        assert again.config == checkpoint.config
        assert_same_tensors(published_state(again.load()), state)
    files = sorted(p.name for p in (tmp_path / "100000").iterdir())
    assert "model.safetensors.index.json" in files
    assert len([f for f in files if f.endswith(".safetensors")]) > 2
    whole = tmp_path / "5000000000"
    assert sorted(p.name for p in whole.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_over_a_checkpoint_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    state = published_state(checkpoint.load())
    for size in (100_000, 300_000, 5_000_000_000, 100_000):
        changed = {n: t + 1 for n, t in state.items()}
        save_checkpoint(folder, checkpoint.config, changed, max_shard_bytes=size)
        state = published_state(Checkpoint.open(folder).load())
        assert_same_tensors(state, changed)


def test_a_damaged_file_fails_on_loading_with_its_name(folder: Path) -> None:
    # Two tensors that claim the same bytes: the header alone looks whole.
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = [n for n in header if n.endswith("w1.weight")][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
        checkpoint.load()
