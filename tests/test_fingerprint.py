import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xc_ray.errors import CheckpointError
from xc_ray.fingerprint import file_entries, fingerprint
from xc_ray.model.config import Variant
from xc_ray.model.layout import read_layout
from xc_ray.model.shards import published_files
from xc_ray.registry.manifest import FileEntry, files_digest

LONG_AGO_NS = 10_000_000_000


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[Variant], Path]) -> Path:
    """A copy of the tiny 2.5 checkpoint, written some time ago."""
    copy = Path(shutil.copytree(tiny("2.5"), tmp_path / "model"))
    for path in copy.iterdir():
        age(path)
    return copy


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "known.json"


def age(path: Path) -> None:
    then = time.time_ns() - LONG_AGO_NS
    os.utime(path, ns=(then, then))


def remembered(memory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(memory.read_text())
    return content


def test_the_digest_is_that_of_the_published_files(folder: Path, memory: Path):
    (folder / "modeling.py").write_text("# code is no part of it")
    entries = [
        FileEntry(
            path=name,
            size=(folder / name).stat().st_size,
            sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        )
        for name in ("config.json", "model.safetensors", "tokenizer.model")
    ]
    assert fingerprint(folder, memory=memory) == files_digest(entries)


def test_old_shards_have_the_digest_of_what_they_are_converted_to(
    folder: Path, memory: Path, tmp_path: Path
):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    age(folder / "pytorch_model.bin")
    converted = tmp_path / "converted"
    converted.mkdir()
    for file in published_files(read_layout(folder)):
        file.write(converted)
    found = fingerprint(folder, memory=memory)
    assert found == fingerprint(converted, memory=memory)
    assert found == fingerprint(folder, memory=memory)  # remembered
    assert any(key.endswith("pytorch_model.bin as safetensors") for key in remembered(memory))


def test_what_is_remembered_is_not_read_again(folder: Path, memory: Path):
    first = fingerprint(folder, memory=memory)
    weights = folder / "model.safetensors"
    known = remembered(memory)
    assert len(known) == 3
    known[str(weights)][2] = "0" * 64
    memory.write_text(json.dumps(known))
    assert fingerprint(folder, memory=memory) != first
    age(weights)  # another time: it is read
    assert fingerprint(folder, memory=memory) == first


@pytest.mark.parametrize("change", ["bytes", "time", "file"])
def test_a_changed_file_is_hashed_again(folder: Path, memory: Path, change: str):
    first = fingerprint(folder, memory=memory)
    path, status = folder / "tokenizer.model", (folder / "tokenizer.model").stat()
    other = path.read_bytes()[:-1] + b"?"
    if change == "file":  # the same size and time, another inode
        path.rename(folder / "old")
    path.write_bytes(other + (b"!" if change == "bytes" else b""))
    if change == "time":
        age(path)
    else:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(folder, memory=memory) != first


def test_a_file_written_just_now_is_not_remembered(folder: Path, memory: Path):
    os.utime(folder / "config.json")
    fingerprint(folder, memory=memory)
    assert {Path(key).name for key in remembered(memory)} == {
        "model.safetensors",
        "tokenizer.model",
    }


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": 1}', '{"a": [[1], 2, "zz"]}', "\x00", '{"a": [[1], 2, "00"]}']
)
def test_a_damaged_memory_is_forgotten(folder: Path, memory: Path, content: str):
    memory.parent.mkdir()
    memory.write_text(content)
    expected = fingerprint(folder, memory=memory.with_name("other.json"))
    assert fingerprint(folder, memory=memory) == expected
    assert len(remembered(memory)) == 3


def test_a_memory_that_cannot_be_written_does_no_harm(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert fingerprint(folder, memory=tmp_path / "file" / "known.json").startswith("sha256:")


def test_a_folder_that_is_not_a_whole_model_has_none(folder: Path, memory: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        fingerprint(folder, memory=memory)


def test_by_default_it_is_remembered_in_the_users_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file_entries(published_files(read_layout(folder)))
    assert len(remembered(tmp_path / "home" / "xc_ray" / "fingerprints.json")) == 3
