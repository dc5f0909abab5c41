import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xc_ray.demo.make import save_random, tiny_config
from xc_ray.errors import CheckpointError
from xc_ray.model.config import Variant
from xc_ray.model.layout import read_layout
from xc_ray.model.shards import published_files, safetensors_chunks
from xc_ray.model.weights import Checkpoint


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[Variant], Path]) -> Path:
    """A copy of the tiny 2.5 checkpoint that a test may change."""
    return Path(shutil.copytree(tiny("2.5"), tmp_path / "model"))


def names(folder: Path) -> list[str]:
    return [f.name for f in published_files(read_layout(folder))]


def as_bin(folder: Path, shards: int) -> dict[str, Tensor]:
    """Turns the weights into `.bin`, and gives them."""
    state = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = {n: state[n] for n in list(state)[i::shards]}
        name = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 123}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return state


def test_code_and_other_files_are_left_out(folder: Path):
    for name in ("modeling.py", "README.md", ".hidden.json", "notes.txt", "weights.pt"):
        (folder / name).write_text("raise SystemExit")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "sub.json").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")  # no index names it
    assert names(folder) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_shards_come_with_their_index_and_without_the_one_of_old_shards(tmp_path: Path):
    save_random(tmp_path, tiny_config("2.0"), max_shard_bytes=200_000)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    found = names(tmp_path)
    assert "model-00001-of-00003.safetensors" in found
    assert "model.safetensors.index.json" in found
    assert not any("bin" in name for name in found)
    assert all(f.as_it_is for f in published_files(read_layout(tmp_path)))


@pytest.mark.parametrize("shards", [1, 3])
def test_old_shards_become_safetensors_with_the_same_tensors(
    folder: Path, shards: int, tmp_path: Path
):
    state = as_bin(folder, shards)
    extra = {"model.layers.0.attention.wo.lora_web_A.weight": torch.ones(2, 32)}
    first = sorted(folder.glob("*.bin"))[0]
    torch.save({**torch.load(first), **extra}, first)
    made = tmp_path / "made"
    made.mkdir()
    for file in published_files(read_layout(folder)):
        file.write(made)
    stored: dict[str, Tensor] = {}
    for path in made.glob("*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == state.keys() | extra.keys()
    assert all(torch.equal(stored[n], t) for n, t in {**state, **extra}.items())
    loaded = Checkpoint.open(made)
    assert loaded.extra_lora == ("lora_web",)
    if shards > 1:
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 123}
        assert index["weight_map"].keys() == stored.keys()


def test_the_same_tensors_are_the_same_bytes(folder: Path):
    as_bin(folder, 2)
    once, again = (
        [b"".join(f.chunks()) for f in published_files(read_layout(folder))] for _ in range(2)
    )
    assert once == again


def test_any_plain_tensor_survives(tmp_path: Path):
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12, dtype=torch.int16).view(3, 4).T,
        "half": torch.randn(3, dtype=torch.bfloat16),
        "bits": torch.tensor([True, False, True]),
        "tied": torch.randn(2, 2),
    }
    tensors["again"] = tensors["tied"]
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(safetensors_chunks(tensors, path)))
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)


def test_a_tensor_that_safetensors_cannot_hold_is_named(tmp_path: Path):
    tensors = {"fine": torch.zeros(1), "bad": torch.eye(3).to_sparse(), "odd": torch.zeros(1) * 1j}
    with pytest.raises(
        CheckpointError, match=r"x\.bin holds tensors that safetensors cannot: bad, o"
    ):
        list(safetensors_chunks(tensors, Path("x.bin")))


def test_weights_under_another_name_are_refused(folder: Path):
    (folder / "model.safetensors").rename(folder / "modeling.py")
    index = {"weight_map": dict.fromkeys(load_file(folder / "modeling.py"), "modeling.py")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"keeps weights in modeling\.py; they belong in"):
        names(folder)


def test_shards_that_would_take_one_name_are_refused(folder: Path):
    state = as_bin(folder, 1)
    half = len(state) // 2
    torch.save(dict(list(state.items())[:half]), folder / "pytorch_model.bin")
    torch.save(dict(list(state.items())[half:]), folder / "model.bin")
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has shards of one name in two formats"):
        names(folder)
