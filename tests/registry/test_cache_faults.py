"""The cache when the store lies, breaks off or hangs, and when the disk is full: real ones of each.

A proxy stands in front of the S3 server and breaks what comes back. Whatever happens, nothing torn
is left, the error names the file and the cause, and the next fetch of a mended store succeeds.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry.published import FILES, publish, read
from tests.s3_proxy import Fault, Proxy, Request, s3_proxy
from tests.s3_server import S3Server
from xc_ray.errors import RegistryError
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.store import ObjectStore

BIG = "model-00001.safetensors"
TIMEOUT_S = 0.5


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with s3_proxy(server.endpoint) as running:
        yield running


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.make_bucket()


@pytest.fixture
def manifest(server: S3Server, bucket: str) -> Manifest:
    return publish(ObjectStore.open(server.url(bucket)), FILES)


@pytest.fixture
def behind(server: S3Server, proxy: Proxy, bucket: str) -> ObjectStore:
    """The bucket of `manifest`, seen through the proxy."""
    url = server.url(bucket, endpoint=proxy.endpoint)
    return ObjectStore.open(f"{url}&timeout_s={TIMEOUT_S:g}")


@pytest.fixture
def cache(tmp_path: Path) -> LocalCache:
    return LocalCache(tmp_path / "cache", parallel=4, part_bytes=100 << 10)


def key_of(manifest: Manifest, path: str) -> str:
    return blob_key(next(entry.sha256 for entry in manifest.files if entry.path == path))


def leftovers(cache: LocalCache) -> list[Path]:
    return [*cache._files.tmp.iterdir(), *cache._files.models.iterdir()]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("truncate", "connection was cut"),
        ("short", "."),
        # obstore asks for the rest, of which there is none.
        ("long", "connection was cut|Content-Range"),
        ("long_open", "."),
        ("flip", "came with SHA-256 [0-9a-f]{64}: it is damaged"),
        ("whole", "."),
        ("503", "HTTP 503"),
        ("hang", "no answer in time"),
        ("hang_body", "no answer in time"),
    ],
)
def test_store_that_lies_is_refused_and_named(
    fault: Fault,
    cause: str,
    cache: LocalCache,
    behind: ObjectStore,
    proxy: Proxy,
    manifest: Manifest,
):
    key = key_of(manifest, BIG)
    proxy.fault = lambda asked: fault if asked.path.endswith(key) else None
    started = time.monotonic()
    with pytest.raises(RegistryError, match=cause) as caught:
        cache.fetch(behind, manifest)
    assert time.monotonic() - started < 30 * TIMEOUT_S  # three attempts, and a busy machine
    assert key in caught.value.message
    assert not leftovers(cache)
    proxy.fault = lambda _: None
    with cache.fetch(behind, manifest) as lease:
        assert read(lease.folder) == FILES


@pytest.mark.parametrize("fault", ["truncate", "long", "503", "hang", "hang_body"])
def test_fault_that_passes_is_not_seen(
    fault: Fault, cache: LocalCache, behind: ObjectStore, proxy: Proxy, manifest: Manifest
):
    def first_time(asked: Request) -> Fault | None:
        return fault if asked.is_blob and asked.number == 0 else None

    proxy.fault = first_time
    with cache.fetch(behind, manifest) as lease:
        assert read(lease.folder) == FILES


def test_whole_blobs_are_kept_when_another_fails(
    cache: LocalCache, behind: ObjectStore, proxy: Proxy, manifest: Manifest
):
    key = key_of(manifest, "config.json")
    others = [e.sha256 for e in manifest.files if e.size and not key.endswith(e.sha256)]

    def flip_at_the_end(asked: Request) -> Fault | None:
        if not asked.path.endswith(key):
            return None
        end = time.monotonic() + 30
        while not all((cache._files.blobs / sha256).exists() for sha256 in others):
            assert time.monotonic() < end
            time.sleep(0.01)
        return "flip"

    proxy.fault = flip_at_the_end
    with pytest.raises(RegistryError, match=r"config.json|copy.json"):
        cache.fetch(behind, manifest)
    proxy.fault = lambda _: None
    proxy.requests.clear()
    with cache.fetch(behind, manifest) as lease:
        assert read(lease.folder) == FILES
    assert {asked.path.endswith(key) for asked in proxy.requests} == {True}


@pytest.mark.parametrize("how", ["flip", "cut", "grow"])
def test_damaged_blob_of_a_folder_is_refused_and_named(
    how: str, folder: ObjectStore, cache: LocalCache
):
    manifest = publish(folder, FILES)
    key = key_of(manifest, BIG)
    path = Path(folder.location.prefix, key)
    data = bytearray(path.read_bytes())
    match how:
        case "flip":
            data[-5] ^= 16
        case "cut":
            del data[-5:]
        case "grow":  # what is asked for is there: the bytes past it are never read
            data += b"more"
    path.write_bytes(data)
    if how == "grow":
        cache.fetch(folder, manifest).close()
        return
    with pytest.raises(RegistryError, match="damaged") as caught:
        cache.fetch(folder, manifest)
    assert key in caught.value.message
    assert not leftovers(cache)
    folder.put(key, FILES[BIG])
    with cache.fetch(folder, manifest) as lease:
        assert read(lease.folder) == FILES


# ---------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a file system here: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_model_that_the_disk_has_no_room_for_is_refused_before_the_download(small_disk: Path):
    store = ObjectStore.open("memory://")
    manifest = publish(store, {"weights": b"x" * (2 << 20)})
    cache = LocalCache(small_disk / "cache")
    with pytest.raises(RegistryError, match=r"model@1 needs 2097152 bytes more, the disk .* free"):
        cache.fetch(store, manifest)
    assert not leftovers(cache)


def test_disk_that_fills_up_meanwhile_is_named_and_the_file_removed(small_disk: Path):
    store = ObjectStore.open("memory://")
    files = {"weights": b"x" * (700 << 10)}
    manifest = publish(store, files)
    cache = LocalCache(small_disk / "cache", parallel=1, part_bytes=64 << 10)
    other = small_disk / "other"

    def fill_up(_: str, done: int, __: int) -> None:
        if not other.exists():
            other.write_bytes(bytes(500 << 10))

    with pytest.raises(RegistryError, match=r"cannot write weights .*No space left .*make room"):
        cache.fetch(store, manifest, fill_up)
    assert not leftovers(cache)
    other.unlink()
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == files


LIMITED = """
import resource, sys
from pathlib import Path
from tests.registry.published import FILES, manifest_of
from xc_ray.errors import RegistryError
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.store import ObjectStore
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    LocalCache(Path(sys.argv[1])).fetch(ObjectStore.open(sys.argv[2]), manifest_of(FILES))
except RegistryError as error:
    print(error)
"""


def test_file_larger_than_the_process_may_write_is_named(tmp_path: Path, folder: ObjectStore):
    publish(folder, FILES)
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "cache"), folder.url]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.startswith("cannot write model-0000")  # of either
    assert f"bytes) to the cache {tmp_path}/cache: File too large; neither" in done.stdout
    assert not list((tmp_path / "cache" / "tmp").iterdir())
