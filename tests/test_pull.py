import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from xc_ray.errors import ConfigError, RegistryError
from xc_ray.pull import pull
from xc_ray.registry.keys import blob_key
from xc_ray.registry.lock import Lock
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.registry import Registry

CONTENT = {"config.json": b"{}", "a/model.safetensors": b"x" * 3_000_000, "b/same": b"{}"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(str(tmp_path / "store"))


@pytest.fixture
def manifest(registry: Registry, tmp_path: Path) -> Manifest:
    for name, data in CONTENT.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return registry.push(tmp_path / "source", name="m", kind="base")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_the_folder_holds_files_of_ones_own_and_nothing_is_left_beside_it(registry, manifest, out):
    pull(registry.store, manifest, out / "m")
    assert content(out / "m") == CONTENT
    assert os.listdir(out) == ["m"]
    for path in (out / "m").rglob("*.*"):
        assert path.is_dir() or (path.stat().st_nlink, stat.S_IMODE(path.stat().st_mode)) == (
            1,
            0o644,
        )


def test_equal_files_do_not_share_their_bytes(registry, manifest, out):
    pull(registry.store, manifest, out / "m")
    (out / "m" / "config.json").write_bytes(b"mine")
    assert (out / "m" / "b" / "same").read_bytes() == b"{}"


def test_an_existing_folder_is_not_touched(registry, manifest, out):
    (out / "m").mkdir()
    with pytest.raises(ConfigError, match="m exists; name a folder that does not"):
        pull(registry.store, manifest, out / "m")
    assert os.listdir(out) == ["m"]


def test_a_parent_that_is_missing_is_named(registry, manifest, out):
    with pytest.raises(ConfigError, match="no is not a folder; make it first"):
        pull(registry.store, manifest, out / "no" / "m")


def test_two_cannot_pull_into_one_folder_at_once(registry, manifest, out):
    with Lock.take(out / ".m.pull.lock"), pytest.raises(ConfigError, match="another process pulls"):
        pull(registry.store, manifest, out / "m")
    pull(registry.store, manifest, out / "m")


def test_damage_is_refused_and_what_is_whole_stays_for_the_next_try(
    registry: Registry, manifest: Manifest, out: Path, tmp_path: Path
):
    entry = next(e for e in manifest.files if e.path == "config.json")
    blob = tmp_path / "store" / blob_key(entry.sha256)
    blob.write_bytes(b"[]")
    with pytest.raises(RegistryError, match="damaged"):
        pull(registry.store, manifest, out / "m")
    assert os.listdir(out) == [".m.pull"]
    blob.write_bytes(b"{}")
    pull(registry.store, manifest, out / "m")
    assert content(out / "m") == CONTENT
    assert os.listdir(out) == ["m"]


def test_progress_counts_the_bytes_of_the_whole_version(registry, manifest, out):
    told: list[tuple[int, int]] = []
    pull(registry.store, manifest, out / "m", lambda _, done, total: told.append((done, total)))
    size = sum(map(len, CONTENT.values()))
    assert told[-1] == (size, size)
    assert told == sorted(told)


@pytest.mark.parametrize("moment", ["made.rename", "rmtree"])
def test_a_pull_that_dies_at_its_end_is_whole_or_absent(
    registry: Registry, manifest: Manifest, out: Path, monkeypatch, moment: str
):
    class Died(Exception):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    rename: Callable[..., Path] = Path.rename
    with monkeypatch.context() as patch:
        if moment == "rmtree":
            patch.setattr("xc_ray.pull.shutil.rmtree", die)
            (out / ".m.pull" / "made").mkdir(parents=True)
        else:
            patch.setattr(Path, "rename", lambda a, b: die() if a.name == "made" else rename(a, b))
        with pytest.raises(Died):
            pull(registry.store, manifest, out / "m")
    assert not (out / "m").exists()
    pull(registry.store, manifest, out / "m")
    assert content(out / "m") == CONTENT
