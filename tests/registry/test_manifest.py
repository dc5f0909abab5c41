"""Manifests and alias entries: what may be in them, what they are, and that damage is seen."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from xc_ray.errors import RegistryError
from xc_ray.registry.manifest import (
    AliasEntry,
    BaseRef,
    FileEntry,
    Lineage,
    Manifest,
    Target,
    files_digest,
)
from xc_ray.registry.sealed import seal

SHA = st.binary(min_size=32, max_size=32).map(bytes.hex)
PATHS = st.lists(st.from_regex(r"[A-Za-z0-9_.ä-]{1,8}", fullmatch=True), min_size=1, max_size=3)
ENTRIES = st.builds(
    FileEntry,
    path=PATHS.filter(lambda parts: not {".", ".."} & set(parts)).map("/".join),
    size=st.integers(0, 2**40),
    sha256=SHA,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False).filter(lambda x: abs(x) != float("inf"))
    | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _one_folder(files: list[FileEntry]) -> bool:
    paths = {file.path for file in files}
    parents = {"/".join(p.split("/")[:end]) for p in paths for end in range(1, p.count("/") + 1)}
    return len(paths) == len(files) and not parents & paths


FILES = st.lists(ENTRIES, min_size=1, max_size=5).filter(_one_folder)
MANIFESTS = st.builds(
    lambda files, config, metrics, adapter, version: Manifest(
        name="cats",
        version=version,
        kind="adapter" if adapter else "base",
        base=BaseRef(name="demo", digest="sha256:" + "1" * 64) if adapter else None,
        files=tuple(files),
        config=config,
        lineage=Lineage(metrics=metrics, parent="cats@1"),
    ),
    FILES,
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), JSON, max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False, allow_infinity=False)),
    st.booleans(),
    st.integers(1, 10**8 - 1),
)
slow_data = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)


def sample(**changes: object) -> Manifest:
    values = {
        "name": "cats",
        "version": 3,
        "kind": "adapter",
        "base": BaseRef(name="demo", digest="sha256:" + "1" * 64),
        "files": (FileEntry(path="a.safetensors", size=5, sha256="2" * 64),),
        "config": {"rank": 8, "alpha": 16.0, "name": "Kätzchen"},
        "lineage": Lineage(metrics={"loss": 0.25}),
        **changes,
    }
    return Manifest.model_validate(values)


def entry(**changes: object) -> AliasEntry:
    values = {
        "name": "cats",
        "alias": "prod",
        "number": 4,
        "targets": (Target(version=1, weight=0.9), Target(version=2, weight=0.1)),
        "action": "rollback",
        "restores": 2,
        **changes,
    }
    return AliasEntry.model_validate(values)


@slow_data
@given(MANIFESTS)
def test_manifest_is_read_as_it_is_written(manifest: Manifest):
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data, "here") == manifest
    assert Manifest.from_bytes(data, "here").to_bytes() == data


@slow_data
@given(FILES, st.randoms())
def test_digest_depends_on_the_files_alone(files: list[FileEntry], random):
    shuffled = list(files)
    random.shuffle(shuffled)
    one = sample(files=tuple(files))
    other = sample(files=tuple(shuffled), name="dogs", version=9, config={}, lineage=Lineage())
    assert one.digest == other.digest == files_digest(shuffled)
    assert one.digest.startswith("sha256:")


@slow_data
@given(FILES, st.data())
def test_digest_changes_with_any_file(files: list[FileEntry], data):
    at = data.draw(st.integers(0, len(files) - 1))
    what = data.draw(st.sampled_from(["path", "size", "sha256"]))
    old = files[at]
    other = {"path": f"{old.path}x", "size": old.size + 1, "sha256": "f" * 63 + "0"}[what]
    changed = [*files[:at], old.model_copy(update={what: other}), *files[at + 1 :]]
    assert files_digest(changed) != files_digest(files) or getattr(old, what) == other
    assert files_digest(files[:at] + files[at + 1 :]) != files_digest(files)


@pytest.mark.parametrize("record", [sample(), entry()], ids=["manifest", "alias entry"])
def test_any_flipped_bit_is_refused(record: Manifest | AliasEntry):
    data = record.to_bytes()
    for at in range(len(data)):
        for bit in range(8):
            broken = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises(RegistryError, match="'here' is damaged"):
                type(record).from_bytes(broken, "'here'")


@slow_data
@given(MANIFESTS, st.data())
def test_any_other_bytes_in_place_of_some_are_refused(manifest: Manifest, data):
    whole = manifest.to_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 9, len(whole))))
    put = data.draw(st.binary(max_size=9))
    broken = whole[:start] + put + whole[stop:]
    if broken != whole:
        with pytest.raises(RegistryError, match="is damaged"):
            Manifest.from_bytes(broken, "it")


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_truncated_manifest_is_refused_and_named(cut: int):
    with pytest.raises(RegistryError) as caught:
        Manifest.from_bytes(sample().to_bytes()[:cut], "manifest 'versions/cats/00000003.json'")
    assert caught.value.message.startswith("manifest 'versions/cats/00000003.json' is damaged: ")
    assert "publish anew" in caught.value.message


def test_manifest_of_a_newer_release_is_refused_as_such():
    values = json.loads(sample().to_bytes())
    del values["checksum"]
    with pytest.raises(RegistryError, match="it has schema 2, this release reads 1; update xc_ray"):
        Manifest.from_bytes(seal({**values, "schema": 2, "new": 1}), "it")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"new": 1}, "new: Extra inputs"), ({"version": 0}, "version: Input should be greater")],
)
def test_sealed_manifest_with_wrong_fields_is_refused(change: dict[str, object], message: str):
    values = json.loads(sample().to_bytes())
    del values["checksum"]
    with pytest.raises(RegistryError, match="is damaged: field " + message):
        Manifest.from_bytes(seal({**values, **change}), "it")


@pytest.mark.parametrize(
    "path",
    ["", "/a", "a//b", "a/", "./a", "a/../b", "..", "a\\b", "a\0", "a\nb", "C:x", "a" * 256],
)
def test_path_that_could_leave_the_folder_is_refused(path: str):
    with pytest.raises(ValidationError):
        FileEntry(path=path, size=1, sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "an adapter names its base"),
        ({"kind": "base"}, "a base names none"),
        ({"files": ()}, "at least 1 item"),
        ({"name": "Cats"}, "no name in the registry"),
        ({"config": {"x": float("nan")}}, "finite"),
        ({"config": {"x": object()}}, "config"),
        ({"lineage": {"metrics": {"x": float("inf")}}}, "finite"),
        ({"created": datetime(2025, 1, 1)}, "timezone"),
    ],
)
def test_manifest_that_cannot_be_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        sample(**change)


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["a", "a"], "the same path"), (["a", "a/b"], "below a path that is a file")],
)
def test_files_that_cannot_be_in_one_folder_are_refused(paths: list[str], message: str):
    files = tuple(FileEntry(path=path, size=1, sha256="0" * 64) for path in paths)
    with pytest.raises(ValidationError, match=message):
        sample(files=files)


def test_time_of_creation_is_kept_in_utc():
    when = datetime(2025, 6, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    manifest = sample(created=when)
    assert manifest.created == when
    assert manifest.created.tzinfo is UTC
    assert b'"created":"2025-06-01T10:00:00Z"' in manifest.to_bytes()


def test_two_records_of_the_same_content_differ():
    when = datetime(2025, 6, 1, tzinfo=UTC)
    assert sample(created=when).to_bytes() != sample(created=when).to_bytes()


def test_weights_become_shares_and_the_older_version_goes_first():
    targets = entry(targets=(Target(version=7, weight=1), Target(version=2, weight=3))).targets
    assert targets == (Target(version=2, weight=0.75), Target(version=7, weight=0.25))


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_shares_stay_as_they_are_when_read_again(one: float, other: float):
    first = entry(targets=(Target(version=1, weight=one), Target(version=2, weight=other)))
    assert sum(target.weight for target in first.targets) == pytest.approx(1)
    assert AliasEntry.from_bytes(first.to_bytes(), "it") == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ()}, "at least 1 item"),
        ({"targets": [{"version": v} for v in (1, 2, 3)]}, "at most 2 items"),
        ({"targets": [{"version": 1}, {"version": 1}]}, "a version once"),
        ({"targets": [{"version": 1, "weight": 0}]}, "greater than 0"),
        ({"targets": [{"version": 1, "weight": float("nan")}]}, "finite"),
        ({"action": "promote"}, "a promotion restores none"),
        ({"restores": None}, "a rollback says which"),
        ({"alias": "1"}, "is no alias"),
    ],
)
def test_alias_entry_that_cannot_be_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        entry(**change)
