"""Verify: silent on a sound registry, and a sentence for every kind of damage."""

from pathlib import Path

import pytest

from tests.registry.folders import DEMO, adapter_folder
from xc_ray.errors import NotFound
from xc_ray.registry.keys import alias_key, blob_key, version_key
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore


@pytest.fixture
def registry(store: ObjectStore) -> Registry:
    return Registry(store)


@pytest.fixture
def pushed(registry: Registry, tmp_path: Path) -> Manifest:
    """The second of two versions, both behind the alias prod."""
    folder = adapter_folder(tmp_path / "a")
    first = registry.push(folder, name="cats", kind="adapter", base=DEMO)
    second = registry.push(folder, name="cats", kind="adapter", base=DEMO)
    registry.promote("cats", [(first.version, 1)], "prod")
    registry.promote("cats", [(second.version, 1)], "prod")
    registry.rollback("cats", "prod")
    return second


def flip(store: ObjectStore, key: str, at: int) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 0x20
    store.put(key, bytes(data))


def test_sound_registry_gives_no_sentence(registry: Registry, pushed: Manifest):
    assert registry.verify() == []
    assert registry.verify(["cats"]) == []


def test_progress_counts_the_bytes_of_each_blob_once(registry: Registry, pushed: Manifest):
    seen: list[tuple[str, int, int]] = []
    registry.verify(progress=lambda *step: seen.append(step))
    assert seen[-1][1:] == (pushed.size, pushed.size)
    assert [key for key, _, _ in seen] == [blob_key(file.sha256) for file in pushed.files]


@pytest.mark.parametrize("at", [0, 1500, 2999])
def test_flipped_bit_of_a_blob_is_found_and_its_users_named(
    registry: Registry, pushed: Manifest, at: int
):
    (weights,) = (file for file in pushed.files if file.path.endswith(".safetensors"))
    flip(registry.store, blob_key(weights.sha256), at)
    (problem,) = registry.verify()
    assert problem.startswith(
        f"blob '{blob_key(weights.sha256)}' in {registry.store.location.place}"
    )
    assert "is damaged: its sha256 is" in problem
    assert "needed by cats@1 adapter_model.safetensors; cats@2 adapter_model" in problem


def test_truncated_and_missing_blobs_are_found(registry: Registry, pushed: Manifest):
    config, weights = (blob_key(file.sha256) for file in pushed.files)
    registry.store.put(weights, registry.store.get(weights)[:-1])
    registry.store.delete([config])
    problems = registry.verify(["cats"])
    assert len(problems) == 2
    assert f"blob '{config}' in {registry.store.location.place} is missing" in problems[0]
    assert "has 2999 bytes instead of 3000" in problems[1]


def test_blob_that_nobody_needs_is_read_too(registry: Registry, pushed: Manifest):
    registry.store.put(blob_key("a" * 64), b"not that")
    (problem,) = registry.verify()
    assert "is damaged" in problem
    assert "needed by no version" in problem
    assert registry.verify(["cats"]) == []


def test_damaged_manifest_is_found_with_what_hangs_on_it(registry: Registry, pushed: Manifest):
    flip(registry.store, version_key("cats", 1), 100)
    problems = "\n".join(registry.verify())
    assert "manifest 'versions/cats/00000001.json'" in problems
    assert "entry 'aliases/cats/prod/00000001.json'" in problems
    assert "points at cats@1, which is missing or damaged" in problems


def test_missing_numbers_are_found(registry: Registry, pushed: Manifest):
    registry.store.delete([version_key("cats", 1), alias_key("cats", "prod", 1)])
    problems = "\n".join(registry.verify())
    assert "there is no 'versions/cats/00000001.json'" in problems
    assert "there is no 'aliases/cats/prod/00000001.json'" in problems
    assert "'aliases/cats/prod/00000003.json'" in problems
    assert "restores entry 1, which is missing, damaged or points elsewhere" in problems


def test_what_is_not_ours_is_named(registry: Registry, pushed: Manifest):
    for key in ("versions/cats/notes.txt", "aliases/cats/prod/1.json", "blobs/sha256/x"):
        registry.store.put(key, b"?")
    problems = registry.verify()
    assert [problem.split("'")[1] for problem in problems] == [
        "versions/cats/notes.txt",
        "aliases/cats/prod/1.json",
        "blobs/sha256/x",
    ]


def test_other_names_are_left_alone_when_some_are_named(registry: Registry, pushed: Manifest):
    registry.store.put(version_key("dogs", 1), b"?")
    assert registry.verify(["cats"]) == []
    with pytest.raises(NotFound, match="'birds' is not in the registry"):
        registry.verify(["birds"])
