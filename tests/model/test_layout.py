import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xc_ray.demo.make import tiny_config
from xc_ray.errors import CheckpointError
from xc_ray.model.config import FAMILIES, Variant, preset
from xc_ray.model.layout import LISTED, expected_shapes, name_list, read_layout
from xc_ray.model.weights import Checkpoint, published_state, save_checkpoint
from xc_ray.model.xcomposer import XComposer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[Variant], Path]) -> Path:
    """A copy of the tiny 2.5 checkpoint that a test may break."""
    return Path(shutil.copytree(tiny("2.5"), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path, tiny: Callable[[Variant], Path]) -> Path:
    """The tiny 2.5 checkpoint in several shards."""
    source = tiny("2.5")
    folder = tmp_path / "sharded"
    state = load_file(source / "model.safetensors")
    save_checkpoint(folder, tiny_config("2.5"), state, max_shard_bytes=150_000)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_layout(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def write_header(path: Path, header: Any, tail: bytes = b"") -> None:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + tail)


def test_a_layout_knows_shape_and_file_of_every_tensor(sharded: Path) -> None:
    layout = read_layout(sharded)
    state = {k: v for f in sharded.glob("*.safetensors") for k, v in load_file(f).items()}
    assert layout.shapes == {n: tuple(t.shape) for n, t in state.items()}
    assert layout.config == tiny_config("2.5")
    assert len(set(layout.files.values())) == len(list(sharded.glob("*.safetensors"))) > 2
    for name, path in layout.files.items():
        assert name in load_file(path)


def test_old_and_new_files_have_the_same_layout(folder: Path) -> None:
    expected = read_layout(folder).shapes
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    layout = read_layout(folder)
    assert layout.shapes == expected
    assert set(layout.files.values()) == {folder / "pytorch_model.bin"}


def test_safetensors_are_taken_before_old_files(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    assert set(read_layout(folder).files.values()) == {folder / "model.safetensors"}


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin nor an index of "
        "shards"
    )


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    count = len(list(sharded.glob("*.safetensors")))
    (sharded / INDEX).unlink()
    assert refusal(sharded) == f"{sharded} has {count} shards but no {INDEX}; copy the index too"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    (sharded / shards[1]).unlink()
    assert refusal(sharded) == (
        f"{sharded} lacks 1 of {len(shards)} shards: {shards[1]}; download them again"
    )


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""]
)
def test_an_index_cannot_reach_out_of_its_folder(folder: Path, name: str) -> None:
    outside = folder.parent / "model.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"output.weight": name}}))
    message = refusal(folder)
    assert "names files outside its folder; copy the checkpoint whole" in message or (
        "lacks 1 of 1 shards" in message
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "null",
        "[]",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": {"output.weight": 5}}',
        '{"weight_map": {"output.weight": null}}',
        '{"weight_map": {"output.weight": ["a"]}}',
        '{"weight_map": {"output.weight": "a", "model.norm.weight": 1}}',
    ],
)
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert f"{folder / INDEX} is not an index of shards: " in refusal(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 500, -1])
def test_a_file_that_is_cut_short_is_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(folder)
    assert message.startswith(f"{path} is damaged or cut short (")
    assert message.endswith("); download it again")


def test_a_file_with_bytes_to_spare_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "is damaged or cut short" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe not JSON",
        b"[" * 100_000,
        [1],
        {"output.weight": 5},
        {"output.weight": {"shape": [1]}},
        {"output.weight": {"shape": [1], "data_offsets": []}},
        {"output.weight": {"shape": 3, "data_offsets": [0, 0]}},
        {"output.weight": {"shape": [1], "data_offsets": [0, "9"]}},
        struct.pack("<Q", 1 << 60),
    ],
    ids=range(9),
)
def test_a_file_with_a_damaged_header_is_refused(folder: Path, header: Any) -> None:
    path = folder / "model.safetensors"
    write_header(path, header)
    assert refusal(folder).startswith(f"{path} is damaged or cut short (")


def test_a_header_longer_than_its_file_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "a header of 1152921504606846976 bytes" in refusal(folder)


def test_a_layer_of_no_number_is_listed_as_unexpected(folder: Path) -> None:
    name = "vit.vision_tower.vision_model.encoder.layers.first.mlp.fc1.weight"
    state = load_file(folder / "model.safetensors")
    save_file({**state, name: torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*layers\.first"):
        Checkpoint.open(folder)


def test_a_long_list_of_names_is_cut_short_with_a_count() -> None:
    names = [f"n{i}" for i in range(LISTED + 3)]
    assert name_list(names[:2]) == "n0, n1"
    assert name_list(names[:LISTED]).endswith(f"n{LISTED - 1}")
    assert name_list(names).endswith(f"n{LISTED - 1} and 3 more")


@pytest.mark.parametrize("variant", list(FAMILIES))
def test_the_expected_tensors_are_those_of_the_network(variant: Variant) -> None:
    for config in (tiny_config(variant), preset(variant)):
        with torch.device("meta"):
            state = published_state(XComposer(config))
        assert expected_shapes(config) == {name: tuple(t.shape) for name, t in state.items()}


def test_a_bias_is_expected_where_the_config_says_so() -> None:
    config = tiny_config("2.5")
    config = replace(config, decoder=replace(config.decoder, bias=True))
    with torch.device("meta"):
        state = published_state(XComposer(config))
    assert expected_shapes(config) == {name: tuple(t.shape) for name, t in state.items()}
