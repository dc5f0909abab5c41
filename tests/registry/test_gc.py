"""Collecting what no version names, and never what a running push is about to name."""

from datetime import timedelta
from pathlib import Path

import pytest

from tests.registry.folders import DEMO, adapter_folder
from tests.registry.seams import SeamStore
from xc_ray.errors import RegistryError
from xc_ray.registry import gc as collecting
from xc_ray.registry.keys import blob_key, version_key
from xc_ray.registry.location import MAX_TIMEOUT_S
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore
from xc_ray.registry.upload import FRESH_S, RECHECK_S, SETTLE_S, Source, Upload


@pytest.fixture
def seam() -> SeamStore:
    return SeamStore()


def push(registry: Registry, folder: Path) -> Manifest:
    return registry.push(folder, name="cats", kind="adapter", base=DEMO)


def upload_only(store: ObjectStore, folder: Path) -> list[str]:
    """What a push leaves that is killed before its manifest: the keys of its blobs."""
    files = Upload(store, [Source(p.name, p) for p in sorted(folder.iterdir())]).run()
    return [blob_key(file.sha256) for file in files]


# ---------------------------------------------------------------- what is deleted


def test_dry_run_comes_first_and_deletes_nothing(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    push(registry, adapter_folder(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "new").write_bytes(b"12345")
    (unnamed,) = upload_only(store, tmp_path / "b")
    report = registry.gc(grace_s=-5)
    assert (report.blobs, report.size, report.dry_run) == ((unnamed,), 5, True)
    assert store.get(unnamed) == b"12345"
    report = registry.gc(grace_s=-5, dry_run=False)
    assert (report.blobs, report.size, report.dry_run) == ((unnamed,), 5, False)
    assert len(store.list("blobs")) == 2
    assert registry.verify() == []
    assert registry.gc(grace_s=-5, dry_run=False).blobs == ()


def test_young_blobs_wait(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    upload_only(store, adapter_folder(tmp_path / "a"))
    report = registry.gc(dry_run=False)
    assert (report.blobs, report.waiting) == ((), 2)
    assert len(store.list("blobs")) == 2


def test_leftovers_of_killed_writers_go_with_the_grace_period(folder: ObjectStore, tmp_path: Path):
    registry = Registry(folder)
    pushed = push(registry, adapter_folder(tmp_path / "a"))
    root = Path(folder.location.prefix)
    torn = root / f"{blob_key(pushed.files[0].sha256)}#1"
    torn.write_bytes(b"half")
    folder.put("probes/0123", b"1")
    report = registry.gc(dry_run=False)
    assert (report.leftovers, report.probes) == ((), 0)
    report = registry.gc(grace_s=-5)
    assert (report.leftovers, report.probes) == ((torn,), 1)
    assert torn.exists()
    registry.gc(grace_s=-5, dry_run=False)
    assert not torn.exists()
    assert folder.list("probes") == []
    assert registry.verify() == []


def test_gc_deletes_nothing_while_a_manifest_is_damaged(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    push(registry, adapter_folder(tmp_path / "a"))
    store.put(version_key("cats", 1), b"torn")
    for dry_run in (True, False):
        with pytest.raises(
            RegistryError, match=r"cannot tell which blobs are in use: manifest 've"
        ):
            registry.gc(grace_s=-5, dry_run=dry_run)
    store.delete([version_key("cats", 1)])
    store.put("versions/cats/latest", b"?")
    with pytest.raises(RegistryError, match="'versions/cats/latest' is no key of a manifest"):
        registry.gc(grace_s=-5, dry_run=False)
    assert len(store.list("blobs")) == 2


def test_many_blobs_are_deleted_in_batches(
    seam: SeamStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collecting, "BATCH", 3)
    for number in range(10):
        seam.put(blob_key(f"{number:064}"), b"x")
    assert len(Registry(seam).gc(grace_s=-5, dry_run=False).blobs) == 10
    assert seam.list("") == []


# ---------------------------------------------------------------- beside a push


def test_periods_fit_each_other():
    """Twice what a push may rely on, with room for a request and for clocks that differ."""
    assert SETTLE_S > 2 * MAX_TIMEOUT_S
    assert collecting.GRACE_S >= 2 * (FRESH_S + RECHECK_S + SETTLE_S) + 6 * 3600


def test_old_blobs_of_a_killed_push_are_sent_again(seam: SeamStore, tmp_path: Path, monkeypatch):
    """They might be deleted at any moment; young ones, and those of a version, are relied upon."""
    monkeypatch.setattr("xc_ray.registry.registry.Upload", quick_upload)
    registry = Registry(seam)
    one, other = adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b")
    push(registry, one)
    seam.older(hours=100)
    keys = upload_only(seam, other)  # its config is the one that version 1 has
    seam.older(hours=1)
    seam.sent.clear()
    push(registry, other)
    assert seam.sent == []
    third = adapter_folder(tmp_path / "c")
    keys = upload_only(seam, third)
    seam.older(hours=12)
    seam.sent.clear()
    push(registry, third)
    assert seam.sent == keys[1:]
    assert registry.gc(dry_run=False).blobs == ()
    assert registry.verify() == []


def quick_upload(*args, **kwargs) -> Upload:
    """Waits long enough for the deletions of one process's threads, not of another machine's."""
    return Upload(*args, **kwargs, settle_s=0.3)


@pytest.mark.parametrize("verb", ["list", "entry", "put", "create"])
@pytest.mark.parametrize("turn", range(6))
def test_gc_at_any_moment_of_a_push_costs_it_nothing(
    seam: SeamStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, turn: int
):
    """A push takes up what was killed days ago; gc runs whole, just before one of its calls."""
    monkeypatch.setattr("xc_ray.registry.registry.Upload", quick_upload)
    registry = Registry(seam)
    folder = adapter_folder(tmp_path / "a")
    (folder / "third").write_bytes(b"3")
    upload_only(seam, folder)
    seam.older(hours=50)
    calls = 0

    def meddle(called: str, key: str) -> None:
        nonlocal calls
        if called == verb:
            calls += 1
            if calls == turn + 1:
                seam.before = lambda *_: None
                registry.gc(dry_run=False)

    seam.before = meddle
    push(registry, folder)
    seam.before = lambda *_: None
    assert registry.verify() == []


@pytest.mark.parametrize("verb", ["list", "get", "entry"])
@pytest.mark.parametrize("turn", range(4))
def test_push_at_any_moment_of_gc_loses_nothing(
    seam: SeamStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, turn: int
):
    """The other way around: a whole push, just before one of gc's calls (but for the deletion,
    which is under way then: see the next test)."""
    monkeypatch.setattr("xc_ray.registry.registry.Upload", quick_upload)
    registry = Registry(seam)
    push(registry, adapter_folder(tmp_path / "b"))
    folder = adapter_folder(tmp_path / "a")
    (folder / "third").write_bytes(b"3")
    upload_only(seam, folder)
    seam.older(hours=50)
    calls = 0

    def meddle(called: str, key: str) -> None:
        nonlocal calls
        if called == verb:
            calls += 1
            if calls == turn + 1:
                seam.before = lambda *_: None
                push(registry, folder)

    seam.before = meddle
    registry.gc(dry_run=False)
    seam.before = lambda *_: None
    assert registry.verify() == []
    assert registry.versions("cats") == ([1, 2] if calls > turn else [1])


def test_deletion_on_its_way_when_a_push_sends_again_is_noticed(seam: SeamStore, tmp_path: Path):
    """gc has looked a second time, the push sends the blob again, then the deletion arrives."""
    folder = adapter_folder(tmp_path / "a")
    keys = upload_only(seam, folder)
    seam.older(hours=50)
    upload = Upload(seam, [Source(p.name, p) for p in sorted(folder.iterdir())], settle_s=0.2)
    files = upload.run()
    seam.inner.delete(keys)  # what gc had decided on before
    seam.sent.clear()
    upload.ensure(files)
    assert sorted(seam.sent) == sorted(keys)
    assert [one.key for one in seam.list("blobs")] == sorted(keys)


def test_push_that_took_long_looks_again(
    seam: SeamStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = adapter_folder(tmp_path / "a")
    upload = Upload(seam, [Source(p.name, p) for p in sorted(folder.iterdir())], settle_s=0.01)
    files = upload.run()
    seam.sent.clear()
    looked = []
    seam.before = lambda verb, key: looked.append(verb)
    upload.ensure(files)
    assert looked == []
    monkeypatch.setattr("xc_ray.registry.upload.RECHECK_S", -1.0)
    seam.older(hours=7)
    upload.ensure(files)
    assert "entry" in looked
    assert len(seam.sent) == 2
    assert all(seam.age.get(one.key, timedelta()) == timedelta() for one in seam.list("blobs"))
