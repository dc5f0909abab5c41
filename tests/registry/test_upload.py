"""Pushes that break off and are taken up again, and files that change under one's hands."""

import os
import time
from pathlib import Path

import pytest

from tests.registry.folders import DEMO, adapter_folder
from tests.registry.seams import SeamStore
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server
from xc_ray.errors import InvalidRequest, RegistryError
from xc_ray.registry.keys import blob_key
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import PART_BYTES, ObjectStore
from xc_ray.registry.upload import Source, Upload


def sources(folder: Path) -> list[Source]:
    return [Source(path.name, path) for path in sorted(folder.iterdir())]


def test_second_push_sends_only_what_the_first_did_not(tmp_path: Path):
    store = SeamStore()
    registry = Registry(store)
    for number in range(6):
        (tmp_path / f"{number}.bin").write_bytes(os.urandom(100 + number))

    def break_off(verb: str, key: str) -> None:
        if verb == "put" and len(store.sent) == 4:
            raise RegistryError("the line is dead")

    store.before = break_off
    with pytest.raises(RegistryError, match="the line is dead"):
        registry.push(tmp_path, name="base", kind="base")
    assert registry.names() == []
    first = set(store.sent)
    assert len(first) == 4
    store.sent.clear()
    store.before = lambda verb, key: None
    registry.push(tmp_path, name="base", kind="base")
    assert len(store.sent) == 2
    assert first.isdisjoint(store.sent)
    assert registry.verify() == []


def test_over_http_a_second_push_sends_only_its_manifest(server: S3Server, tmp_path: Path):
    with s3_proxy(server.endpoint) as proxy:
        url = server.url(server.make_bucket(), "p").replace(server.endpoint, proxy.endpoint)
        registry = Registry.open(url)
        folder = adapter_folder(tmp_path / "a", size=2 * PART_BYTES)
        registry.push(folder, name="cats", kind="adapter", base=DEMO)
        puts = [asked.path for asked in proxy.requests if asked.method == "PUT"]
        assert sum("partNumber=" in path for path in puts) == 2
        del proxy.requests[:]
        registry.push(folder, name="cats", kind="adapter", base=DEMO)
        puts = [asked.path for asked in proxy.requests if asked.method == "PUT"]
        assert [path.rsplit("/", 1)[1] for path in puts] == ["00000002.json"]


def test_blob_of_the_wrong_size_is_sent_again(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    folder = adapter_folder(tmp_path / "a")
    pushed = registry.push(folder, name="cats", kind="adapter", base=DEMO)
    store.put(blob_key(pushed.files[1].sha256), b"half")
    registry.push(folder, name="cats", kind="adapter", base=DEMO)
    assert registry.verify() == []


def test_large_file_that_changes_while_it_is_sent_is_refused(tmp_path: Path):
    """Between hashing and sending: the seam is the look whether the blob is there."""
    store = SeamStore()
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(PART_BYTES + 1))

    def change(verb: str, key: str) -> None:
        if verb == "entry":
            with file.open("r+b") as out:
                out.seek(100)
                out.write(b"other")

    store.before = change
    with pytest.raises(InvalidRequest, match=r"'model\.safetensors' changed while it"):
        Registry(store).push(tmp_path, name="base", kind="base")
    assert store.list("") == []


@pytest.mark.parametrize("size", [0, 10, PART_BYTES - 1])
def test_large_file_that_shrinks_while_it_is_sent_is_refused(tmp_path: Path, size: int):
    store = SeamStore()
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(PART_BYTES + 1))
    store.before = lambda verb, key: os.truncate(file, size) if verb == "entry" else None
    with pytest.raises(InvalidRequest, match="changed while it was being read"):
        Registry(store).push(tmp_path, name="base", kind="base")
    assert store.list("") == []


def test_file_that_cannot_be_read_is_an_error_of_the_disk(store: ObjectStore, tmp_path: Path):
    (tmp_path / "a").write_bytes(b"1")
    upload = Upload(store, sources(tmp_path))
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError):
        upload.run()


def test_after_a_failure_no_further_file_is_begun(tmp_path: Path):
    store = SeamStore()
    for number in range(60):
        (tmp_path / f"{number:02}").write_bytes(b"%d" % number)

    def fail(verb: str, key: str) -> None:
        time.sleep(0.02)
        if verb == "put":
            raise RegistryError("no room")

    store.before = fail
    with pytest.raises(RegistryError, match="no room"):
        Upload(store, sources(tmp_path)).run()
    asked = []
    store.before = lambda verb, key: asked.append(key)
    time.sleep(0.2)
    assert asked == []
