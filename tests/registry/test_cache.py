"""The node-local cache: what `fetch` gives, what it trusts, and what it throws out."""

import gc
import logging
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.registry.published import FILES, manifest_of, publish, read
from xc_ray.errors import RegistryError
from xc_ray.registry.cache import Lease, LocalCache
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.store import Missing, ObjectStore

MODELS = {
    name: {"config.json": b"{}", "weights": name.encode() * 20_000} for name in ("a", "b", "c")
}
SIZE = 20_002  # of each of these, the two bytes of config.json included


@pytest.fixture
def cache(tmp_path: Path) -> LocalCache:
    return LocalCache(tmp_path / "cache", parallel=4, part_bytes=64 << 10)


def blob_of(cache: LocalCache, manifest: Manifest, path: str) -> Path:
    (entry,) = (entry for entry in manifest.files if entry.path == path)
    return cache._files.blobs / entry.sha256


def in_quarantine(cache: LocalCache) -> list[bytes]:
    return [path.read_bytes() for path in sorted(cache._files.quarantined.iterdir())]


def flip(path: Path, *, keep_stamp: bool = False) -> bytes:
    """Changes a bit in the middle of a file; its time too, unless told otherwise."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    if keep_stamp:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return bytes(data)


def test_fetched_folder_holds_exactly_the_files_of_the_manifest(
    store: ObjectStore, cache: LocalCache
):
    manifest = publish(store, FILES)
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == FILES


def test_second_fetch_asks_the_store_for_nothing(cache: LocalCache):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    with cache.fetch(ObjectStore.open("memory://"), manifest) as lease:  # an empty one
        assert read(lease.folder) == FILES


def test_same_bytes_lie_on_the_disk_once_across_versions(cache: LocalCache):
    store = ObjectStore.open("memory://")
    first = publish(store, {"base": b"x" * 100_000, "extra": b"1"}, "one")
    second = publish(store, {"base": b"x" * 100_000, "extra": b"2"}, "two")
    with cache.fetch(store, first) as one, cache.fetch(store, second) as two:
        assert (one.folder / "base").samefile(two.folder / "base")
    assert cache.used_bytes() == 100_002


def test_files_are_read_only(cache: LocalCache):
    store = ObjectStore.open("memory://")
    with cache.fetch(store, publish(store, FILES)) as lease:
        assert stat.S_IMODE((lease.folder / "config.json").stat().st_mode) == 0o444


def test_edit_of_a_cached_file_leaves_the_registry_folder_alone(
    folder: ObjectStore, cache: LocalCache
):
    manifest = publish(folder, FILES)
    with cache.fetch(folder, manifest) as lease:
        flip(lease.folder / "model-00001.safetensors")
    key = blob_key(next(e.sha256 for e in manifest.files if e.path == "model-00001.safetensors"))
    assert folder.get(key) == FILES["model-00001.safetensors"]


def test_progress_counts_the_bytes_of_all_files(cache: LocalCache):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    told: list[tuple[str, int, int]] = []
    cache.fetch(store, manifest, lambda *words: told.append(words)).close()
    assert {total for _, _, total in told} == {manifest.size}
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert counts[-1] == manifest.size
    assert [path for path, _, _ in told].count("model-00001.safetensors") == 5  # 300 KiB by 64 KiB


def test_changed_file_is_found_by_its_stamp_and_fetched_again(
    cache: LocalCache, caplog: pytest.LogCaptureFixture
):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    damaged = flip(blob_of(cache, manifest, "model-00002.safetensors"))
    with caplog.at_level(logging.WARNING), cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == FILES
    assert in_quarantine(cache) == [damaged]
    assert "is damaged: moved to" in caplog.text


def test_time_of_a_checked_file_is_one_that_no_later_write_leaves(cache: LocalCache):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    before = time.time()
    cache.fetch(store, manifest).close()
    blob = blob_of(cache, manifest, "config.json")
    assert blob.stat().st_mtime < before
    os.utime(blob)
    cache.fetch(store, manifest).close()
    assert blob.stat().st_mtime < time.time() - 0.9


def test_change_that_keeps_the_stamp_is_found_by_verify_only(cache: LocalCache):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    damaged = flip(blob_of(cache, manifest, "model-00001.safetensors"), keep_stamp=True)
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) != FILES
    with cache.fetch(store, manifest, verify=True) as lease:
        assert read(lease.folder) == FILES
    assert in_quarantine(cache) == [damaged]


def test_sound_file_with_another_stamp_is_read_once_and_kept(cache: LocalCache):
    store, empty = ObjectStore.open("memory://"), ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    blob = blob_of(cache, manifest, "config.json")
    os.utime(blob)
    cache.fetch(empty, manifest).close()
    assert cache._files.is_sound(blob, blob.name, len(FILES["config.json"]))
    assert not in_quarantine(cache)


@pytest.mark.parametrize("size", [0, 10, 400_000])
def test_file_of_another_size_is_fetched_again(cache: LocalCache, size: int):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    os.truncate(blob_of(cache, manifest, "model-00001.safetensors"), size)
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == FILES


def test_folder_is_mended_file_by_file(cache: LocalCache):
    store, empty = ObjectStore.open("memory://"), ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    with cache.fetch(store, manifest) as lease:
        (lease.folder / "config.json").unlink()
        (lease.folder / "tokenizer" / "empty.txt").unlink()
        (lease.folder / "tokenizer" / "empty.txt").mkdir()
        (lease.folder / "stray.py").write_text("print()")
        (lease.folder / "model-00002.safetensors").unlink()
        (lease.folder / "model-00002.safetensors").symlink_to("/dev/null")
        inode = lease.folder.stat().st_ino
        with cache.fetch(empty, manifest) as again:
            assert read(again.folder) == FILES
            assert not (again.folder / "model-00002.safetensors").is_symlink()
            assert again.folder.stat().st_ino == inode
    assert b"print()" in [
        path.read_bytes() for path in cache._files.quarantined.iterdir() if path.is_file()
    ]


def test_unreadable_stamp_is_no_stamp(cache: LocalCache):
    store, empty = ObjectStore.open("memory://"), ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    for stamp in cache._files.stamps.iterdir():
        stamp.write_bytes(b"\xff\x00")
    with cache.fetch(empty, manifest) as lease:
        assert read(lease.folder) == FILES


def test_failed_fetches_leave_no_open_files(cache: LocalCache):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    store.delete([blob_key(manifest.files[1].sha256)])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(Missing):
            cache.fetch(store, manifest)
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_in_the_place_of_the_folder_is_put_aside(cache: LocalCache):
    store = ObjectStore.open("memory://")
    manifest = publish(store, FILES)
    cache.fetch(store, manifest).close()
    folder = cache._files.models / manifest.digest.removeprefix("sha256:")
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("what?")
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == FILES


def test_blob_that_the_store_lacks_is_named(store: ObjectStore, cache: LocalCache):
    manifest = publish(store, FILES)
    key = blob_key(manifest.files[1].sha256)
    store.delete([key])
    with pytest.raises(Missing, match=f"there is no '{key}'"):
        cache.fetch(store, manifest)


def test_cache_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=f"cache {tmp_path}/file/cache cannot be used: .*Not a"):
        LocalCache(tmp_path / "file" / "cache").fetch(
            ObjectStore.open("memory://"), manifest_of(FILES)
        )


# ---------------------------------------------------------------- eviction


def fill(cache: LocalCache, store: ObjectStore, names: str) -> dict[str, Path]:
    """Fetches models, each used a second after the one before."""
    folders = {}
    for second, name in enumerate(names):
        with cache.fetch(store, publish(store, MODELS[name], name)) as lease:
            folders[name] = lease.folder
        os.utime(lease.folder, (1_000_000 + second, 1_000_000 + second))
    return folders


def test_model_used_longest_ago_makes_room(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=2 * SIZE)
    folders = fill(cache, store, "aba")  # b was used longest ago
    cache.fetch(store, publish(store, MODELS["c"], "c")).close()
    assert {name: path.exists() for name, path in folders.items()} == {"a": True, "b": False}
    assert read(folders["a"]) == MODELS["a"]  # the blob that all share is still there


def test_fetch_of_what_is_there_counts_as_use(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=2 * SIZE)
    folders = fill(cache, store, "ab")
    with cache.fetch(store, publish(store, MODELS["a"], "a")) as lease:
        assert lease.folder.stat().st_mtime > 2_000_000  # at its beginning and at its end
    cache.fetch(store, publish(store, MODELS["c"], "c")).close()
    assert {name: path.exists() for name, path in folders.items()} == {"a": True, "b": False}


def test_what_is_being_fetched_counts_in_full_from_its_beginning(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=SIZE, part_bytes=1_000)
    used: list[int] = []
    manifest = publish(store, {"weights": b"x" * SIZE})
    cache.fetch(store, manifest, lambda *_: used.append(cache.used_bytes())).close()
    assert len(used) > 20
    assert set(used) == {SIZE}


def test_end_of_a_lease_counts_as_use(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=2 * SIZE)
    with cache.fetch(store, publish(store, MODELS["a"], "a")) as lease:
        fill(cache, store, "b")
        os.utime(lease.folder, (1, 1))
    cache.fetch(store, publish(store, MODELS["c"], "c")).close()
    assert read(lease.folder) == MODELS["a"]


def test_damaged_file_is_fetched_again_where_the_model_just_fits(tmp_path: Path):
    store = ObjectStore.open("memory://")
    manifest = publish(store, MODELS["a"])
    cache = LocalCache(tmp_path / "cache", max_bytes=manifest.size)
    cache.fetch(store, manifest).close()
    flip(blob_of(cache, manifest, "weights"))
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == MODELS["a"]


def test_evicted_model_frees_its_bytes(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache")
    fill(cache, store, "abc")
    assert cache.used_bytes() == 2 + 60_000
    assert cache.shrink(45_000) == 2 + 40_000
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache" / "blobs").iterdir())
    assert on_disk == 2 + 40_000
    assert len(list((tmp_path / "cache" / "stamps").iterdir())) == 3
    assert cache.shrink(0) == 0
    assert not any(
        path.is_file() for path in (tmp_path / "cache").rglob("*") if path.name != "room"
    )


def test_leased_model_is_never_evicted(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=2 * SIZE)
    fill(cache, store, "b")
    with cache.fetch(store, publish(store, MODELS["a"], "a")) as lease:
        os.utime(lease.folder, (1, 1))
        cache.fetch(store, publish(store, MODELS["c"], "c")).close()
        cache.shrink(0)
        assert read(lease.folder) == MODELS["a"]
    assert cache.shrink(0) == 0
    assert not lease.folder.exists()


def test_lease_that_is_dropped_unclosed_holds_on(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache")
    folder = cache.fetch(store, publish(store, MODELS["a"], "a")).folder
    gc.collect()
    cache.shrink(0)
    assert read(folder) == MODELS["a"]


def test_no_room_beside_what_is_leased_is_said(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=30_000)
    with (
        cache.fetch(store, publish(store, MODELS["a"], "a")) as lease,
        pytest.raises(
            RegistryError, match=r"may hold 30000 bytes: 20002 bytes are in use and 20000"
        ),
    ):
        cache.fetch(store, publish(store, MODELS["b"], "b"))
    assert read(lease.folder) == MODELS["a"]


def test_model_larger_than_the_cache_is_refused_and_evicts_nothing(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=30_000)
    folders = fill(cache, store, "a")
    with pytest.raises(
        RegistryError, match=r"model@1 takes 517\d+ bytes, the cache .* may hold 300"
    ):
        cache.fetch(store, publish(store, FILES))
    assert folders["a"].exists()


def test_quarantine_goes_before_any_model(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=3 * SIZE)
    folders = fill(cache, store, "ab")
    flip(folders["a"] / "weights")
    cache.fetch(store, publish(store, MODELS["a"], "a")).close()
    assert len(in_quarantine(cache)) == 1
    cache.fetch(store, publish(store, MODELS["c"], "c")).close()
    assert not in_quarantine(cache)
    assert all(path.exists() for path in folders.values())


def test_what_a_dead_process_left_goes_first(tmp_path: Path):
    store = ObjectStore.open("memory://")
    cache = LocalCache(tmp_path / "cache", max_bytes=3 * SIZE)
    folders = fill(cache, store, "a")
    left = tmp_path / "cache" / "tmp"
    (left / f"{'0' * 64}.blob").write_bytes(bytes(SIZE))
    (left / f"{'1' * 64}.folder").mkdir()
    (left / f"{'1' * 64}.folder" / "weights").write_bytes(bytes(SIZE))
    cache.fetch(store, publish(store, MODELS["c"], "c")).close()
    cache.fetch(store, publish(store, MODELS["b"], "b")).close()
    assert not list(left.iterdir())
    assert folders["a"].exists()


# ---------------------------------------------------------------- any order of things


class Cached(RuleBasedStateMachine):
    """Fetch, damage, evict and lease in any order: what fetch gives holds the manifest's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.store = ObjectStore.open("memory://")
        self.manifests = {name: publish(self.store, MODELS[name], name) for name in MODELS}
        # Two of the three fit; a third has room for a quarantined file only.
        self.cache = LocalCache(Path(self.place.name), 2 * SIZE + 100, part_bytes=7_000)
        self.leases: dict[str, Lease] = {}

    def teardown(self) -> None:
        for lease in self.leases.values():
            lease.close()
        self.place.cleanup()

    @rule(name=st.sampled_from(sorted(MODELS)), verify=st.booleans(), keep=st.booleans())
    def fetch(self, name: str, verify: bool, keep: bool) -> None:
        try:
            lease = self.cache.fetch(self.store, self.manifests[name], verify=verify)
        except RegistryError as error:
            if "may hold" not in str(error) or not self.leases:
                raise
            return
        assert read(lease.folder) == MODELS[name]
        if keep and name not in self.leases:
            self.leases[name] = lease
        else:
            lease.close()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.leases.pop(data.draw(st.sampled_from(sorted(self.leases)))).close()

    @rule(to_bytes=st.sampled_from([0, SIZE, 2 * SIZE]))
    def shrink(self, to_bytes: int) -> None:
        used = self.cache.shrink(to_bytes)
        assert used <= max(to_bytes, len(self.leases) * (SIZE + len("what?")))

    @rule(
        name=st.sampled_from(sorted(MODELS)),
        path=st.sampled_from(["weights", "config.json"]),
        how=st.sampled_from(
            ["flip", "cut", "remove", "replace", "stray", "lose stamp", "lose blob"]
        ),
    )
    def damage(self, name: str, path: str, how: str) -> None:
        manifest = self.manifests[name]
        file = self.cache._files.models / manifest.digest.removeprefix("sha256:") / path
        if not file.exists():
            return
        blob = blob_of(self.cache, manifest, path)
        match how:
            case "flip":
                flip(file)
            case "cut":
                os.truncate(file, 1)
            case "remove":
                file.unlink()
            case "replace":
                file.unlink()
                file.write_bytes(MODELS[name][path])
            case "stray":
                file.with_name("stray").write_text("what?")
            case "lose stamp":
                (self.cache._files.stamps / blob.name).unlink(missing_ok=True)
            case "lose blob":
                blob.unlink(missing_ok=True)

    @invariant()
    def leased_folders_stay(self) -> None:
        assert all(lease.folder.is_dir() for lease in self.leases.values())


TestAnyOrder = Cached.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
