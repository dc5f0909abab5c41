import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from xc_ray.errors import CheckpointError
from xc_ray.model.bin_file import load_bin

STATE = {"output.weight": torch.arange(6.0).view(2, 3), "model.norm.weight": torch.ones(3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_bin(path)
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix(str(path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_read_from_files_of_either_form(
    path: Path, zipped: bool, dtype: torch.dtype
) -> None:
    state = {n: t.to(dtype) for n, t in STATE.items()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = load_bin(path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


class Harmful:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "before zip", "bare pickle"])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(path: Path, form: str) -> None:
    proof = path.parent / "proof"
    content = {"output.weight": Harmful(proof)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert refusal(path).startswith(" is not a file of plain tensors: ")
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"a": 5}, {1: torch.zeros(1)}, {"a": [1]}, torch.zeros(1)]
)
def test_a_file_of_something_else_is_refused(path: Path, content: Any) -> None:
    torch.save(content, path)
    assert refusal(path) == " holds something other than named tensors"


@pytest.mark.parametrize("size", [0, 10, 100, -1000, -1])
def test_a_file_that_is_cut_short_is_refused(path: Path, size: int) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(path)
    assert message.startswith(" is not a file of plain tensors: ")
    assert "mmap" not in message  # how we read it is not what is wrong with it


def test_a_file_of_no_kind_is_refused(path: Path) -> None:
    path.write_bytes(b"neither zip nor pickle")
    assert refusal(path).startswith(" is not a file of plain tensors: ")
