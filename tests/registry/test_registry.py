"""Push, find, point and roll back, on memory, a folder and a real S3 server."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.registry.folders import DEMO, adapter_folder
from xc_ray.errors import InvalidRequest, NotFound, RegistryError
from xc_ray.registry.keys import alias_key, blob_key, version_key
from xc_ray.registry.manifest import Lineage, Manifest
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore


@pytest.fixture
def registry(store: ObjectStore) -> Registry:
    return Registry(store)


def push(registry: Registry, folder: Path, name: str = "cats") -> Manifest:
    return registry.push(folder, name=name, kind="adapter", base=DEMO)


# ---------------------------------------------------------------- push


def test_pushed_version_is_what_the_folder_was(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    (folder / "sub").mkdir()
    (folder / "sub" / "empty.txt").write_bytes(b"")
    lineage = Lineage(metrics={"loss": 0.5}, dataset_digest="sha256:x", code_version="abc")
    pushed = registry.push(
        folder, name="cats", kind="adapter", base=DEMO, config={"rank": 8}, lineage=lineage
    )
    found = registry.manifest("cats", 1)
    assert found == pushed
    assert (found.name, found.version, found.kind, found.base) == ("cats", 1, "adapter", DEMO)
    assert (found.config, found.lineage) == ({"rank": 8}, lineage)
    for file in found.files:
        data = registry.store.get(blob_key(file.sha256)) if file.size else b""
        assert data == (folder / file.path).read_bytes()
        assert file.size == len(data)
    assert [file.path for file in found.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "sub/empty.txt",
    ]
    assert registry.verify() == []


def test_large_files_are_pushed_in_parts(registry: Registry, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(os.urandom((20 << 20) + 1))
    manifest = registry.push(tmp_path, name="base", kind="base")
    assert manifest.size == (20 << 20) + 1
    assert registry.verify() == []


def test_versions_count_up_and_share_their_bytes(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    first, second = push(registry, folder), push(registry, folder)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    third = push(registry, folder)
    assert [first.version, second.version, third.version] == [1, 2, 3]
    assert registry.versions("cats") == [1, 2, 3]
    assert first.digest == second.digest != third.digest
    assert len(registry.store.list("blobs")) == 3  # one safetensors, two configs


def test_names_with_a_common_start_are_kept_apart(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    for name in ("cat", "cats", "cat.s", "cat"):
        push(registry, folder, name)
    assert registry.names() == ["cat", "cat.s", "cats"]
    assert registry.versions("cat") == [1, 2]
    assert registry.versions("ca") == []


def test_only_the_named_files_are_pushed_when_some_are_named(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    files = [Path("adapter_config.json"), folder / "adapter_model.safetensors"]
    pushed = registry.push(folder, name="cats", kind="adapter", base=DEMO, files=files)
    assert [file.path for file in pushed.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_hidden_files_stay_here_and_links_are_followed(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / ".env").write_text("secret")
    (tmp_path / "elsewhere").write_text("linked")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere")
    assert [file.path for file in push(registry, folder).files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "link.txt",
    ]


def test_progress_counts_up_to_all_bytes(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    (folder / "large").write_bytes(os.urandom(20 << 20))
    for _ in range(2):  # sent, and found there
        seen: list[tuple[str, int, int]] = []

        def note(*step: Any, seen: list[tuple[str, int, int]] = seen) -> None:
            seen.append(step)

        pushed = registry.push(folder, name="base", kind="base", progress=note)
        done = [step[1] for step in seen]
        assert done == sorted(done)
        assert done[-1] == pushed.size
        assert {step[2] for step in seen} == {pushed.size}
        assert {step[0] for step in seen} == {file.path for file in pushed.files}


def test_name_keeps_its_kind(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    push(registry, folder)
    with pytest.raises(InvalidRequest, match=r"'cats' is of kind adapter \(version 1\) and cannot"):
        registry.push(folder, name="cats", kind="base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Cats"}, "'Cats' is no name in the registry"),
        ({"name": "a/b"}, "'a/b' is no name"),
        ({"base": None}, "an adapter names its base"),
        ({"config": {"x": float("nan")}}, "config.x.float: Input should be a finite number"),
        ({"files": [Path("no.txt")]}, "no.txt' is not a file"),
        ({"files": [Path("/etc/hosts")]}, "'/etc/hosts' is not in the folder"),
        ({"files": [Path("../outside")]}, "is no relative path of plain names"),
        ({"files": []}, "has no files to push"),
    ],
)
def test_push_that_cannot_be_is_refused_before_anything_is_sent(
    registry: Registry, tmp_path: Path, change: dict[str, object], message: str
):
    folder = adapter_folder(tmp_path / "a")
    (tmp_path / "outside").write_text("x")
    values = {"name": "cats", "kind": "adapter", "base": DEMO, **change}
    with pytest.raises(InvalidRequest) as caught:
        registry.push(folder, **values)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert registry.store.list("") == []


def test_folder_that_is_none_is_refused(registry: Registry, tmp_path: Path):
    with pytest.raises(InvalidRequest, match="is not a folder"):
        push(registry, tmp_path / "no")
    with pytest.raises(InvalidRequest, match="has no files to push"):
        push(registry, tmp_path)


# ---------------------------------------------------------------- resolve


def test_references_mean_versions(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    one = push(registry, folder)
    (folder / "adapter_config.json").write_text("{}")
    two = push(registry, folder)
    three = push(registry, folder)  # the bytes of two
    assert registry.resolve("cats") == three
    assert registry.resolve("cats@1") == one
    assert registry.resolve(f"cats@{one.digest}") == one
    assert registry.resolve(f"cats@{two.digest}") == three
    registry.promote("cats", [(2, 1)], "canary")
    assert registry.resolve("cats@canary") == two
    assert registry.resolve("cats") == three
    registry.promote("cats", [(1, 1)], "prod")
    assert registry.resolve("cats") == one


def test_canary_is_chosen_by_who_asks(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    push(registry, folder)
    push(registry, folder)
    registry.promote("cats", [(1, 0.75), (2, 0.25)], "prod")
    got = [registry.resolve("cats", sticky=f"user {number}").version for number in range(60)]
    assert got[:9] == [registry.resolve("cats", sticky=f"user {n}").version for n in range(9)]
    assert 5 <= got.count(2) <= 25
    assert registry.resolve("cats").version == 1


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("dogs", "'dogs' is not in the registry; there is birds and cats"),
        ("cat", "'cat' is not in the registry; did you mean cats?"),
        ("cats@7", "'cats' has no version 7; it has 1 and 2"),
        ("cats@canary", "'cats' has no alias 'canary'; it has prod"),
        ("birds@prod", "'birds' has no alias 'prod'; it has none"),
        ("cats@sha256:" + "0" * 64, "no version of 'cats' has the digest sha256:000"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(
    registry: Registry, tmp_path: Path, ref: str, message: str
):
    folder = adapter_folder(tmp_path / "a")
    for name in ("cats", "cats", "birds"):
        push(registry, folder, name)
    registry.promote("cats", [(1, 1)], "prod")
    for catalogue in (registry, registry.snapshot()):
        with pytest.raises(NotFound) as caught:
            catalogue.resolve(ref)
        assert message in caught.value.message
        assert caught.value.code == "model_not_found"


def test_empty_registry_says_so(registry: Registry):
    with pytest.raises(NotFound, match="'cats' is not in the registry; it is empty"):
        registry.resolve("cats")
    with pytest.raises(NotFound, match="it is empty"):
        registry.manifest("cats", 1)
    assert registry.names() == []


# ---------------------------------------------------------------- aliases


def test_log_tells_where_an_alias_pointed(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    for _ in range(3):
        push(registry, folder)
    for targets in ([(1, 1.0)], [(2, 1.0)], [(2, 9.0), (3, 1.0)]):
        registry.promote("cats", targets, "prod")
    registry.rollback("cats", "prod")
    log = registry.log("cats", "prod")
    assert [entry.number for entry in log] == [1, 2, 3, 4]
    assert [entry.action for entry in log] == ["promote", "promote", "promote", "rollback"]
    assert [t.version for entry in log for t in entry.targets] == [1, 2, 2, 3, 2]
    assert log[2].targets[0].weight == pytest.approx(0.9)
    assert log[3].restores == 2
    assert registry.aliases("cats") == {"prod": log[3]}


def test_rollback_of_a_rollback_goes_further_back(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    for _ in range(4):
        push(registry, folder)
    for version in (1, 2, 3):
        registry.promote("cats", [(version, 1)], "prod")
    assert [registry.rollback("cats", "prod").restores for _ in range(2)] == [2, 1]
    with pytest.raises(InvalidRequest, match="has pointed at version 1 from the start"):
        registry.rollback("cats", "prod")
    registry.promote("cats", [(4, 1)], "prod")
    assert registry.rollback("cats", "prod").restores == 1  # what was before, not what was undone
    assert registry.resolve("cats").version == 1


def test_rollback_passes_over_entries_that_change_nothing(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    push(registry, folder)
    push(registry, folder)
    for version in (1, 2, 2, 2):
        registry.promote("cats", [(version, 1)], "prod")
    assert registry.rollback("cats", "prod").restores == 1


def test_alias_points_only_at_what_exists(registry: Registry, tmp_path: Path):
    push(registry, adapter_folder(tmp_path / "a"))
    with pytest.raises(NotFound, match="'cats' has no version 2; it has 1"):
        registry.promote("cats", [(1, 1), (2, 1)], "prod")
    with pytest.raises(NotFound, match="'dogs' is not in the registry"):
        registry.promote("dogs", [(1, 1)], "prod")
    with pytest.raises(InvalidRequest, match="'1' is no alias"):
        registry.promote("cats", [(1, 1)], "1")
    with pytest.raises(InvalidRequest, match="weight: Input should be greater than 0"):
        registry.promote("cats", [(1, 0)], "prod")
    with pytest.raises(NotFound, match="'cats' has no alias 'prod'"):
        registry.rollback("cats", "prod")
    with pytest.raises(NotFound, match="'cats' has no alias 'prod'"):
        registry.log("cats", "prod")


# ---------------------------------------------------------------- damage


def test_damaged_manifest_is_refused_by_name(registry: Registry, tmp_path: Path):
    folder = adapter_folder(tmp_path / "a")
    push(registry, folder)
    push(registry, folder)
    key = version_key("cats", 2)
    registry.store.put(key, registry.store.get(key)[:-9])
    for call in (
        lambda: registry.manifest("cats", 2),
        lambda: registry.resolve("cats"),
        lambda: registry.promote("cats", [(2, 1)], "prod"),
    ):
        with pytest.raises(RegistryError, match=f"manifest '{key}' in .* is damaged"):
            call()
    assert registry.resolve("cats@1").version == 1
    assert push(registry, folder).version == 3


def test_manifest_under_another_key_is_damage(registry: Registry, tmp_path: Path):
    push(registry, adapter_folder(tmp_path / "a"))
    registry.store.put(version_key("dogs", 1), registry.store.get(version_key("cats", 1)))
    with pytest.raises(RegistryError, match="is damaged: it is the one of cats@1"):
        registry.manifest("dogs", 1)


def test_damaged_alias_entry_stops_its_alias_until_it_is_moved(registry: Registry, tmp_path: Path):
    push(registry, adapter_folder(tmp_path / "a"))
    registry.promote("cats", [(1, 1)], "prod")
    key = alias_key("cats", "prod", 1)
    registry.store.put(key, b"{}")
    for call in (
        lambda: registry.resolve("cats"),
        lambda: registry.log("cats", "prod"),
        lambda: registry.aliases("cats"),
    ):
        with pytest.raises(RegistryError, match=f"alias entry '{key}' in .* is damaged"):
            call()
    registry.promote("cats", [(1, 1)], "prod")
    assert registry.resolve("cats").version == 1
