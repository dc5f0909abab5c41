"""Several processes in one cache folder: one downloads each blob, and a dead one leaves nothing.

The processes are real ones, killed with SIGKILL at random moments; the store is an S3 server behind
a proxy that counts what is read.
"""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.registry.published import FILES, manifest_of, publish, read
from tests.s3_proxy import Proxy, s3_proxy
from tests.s3_server import S3Server
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.lock import Lock
from xc_ray.registry.store import ObjectStore

# Prints what it fetched, and holds the lease until its input ends.
FETCH = """
import json, sys
from pathlib import Path
from tests.registry.published import manifest_of, read
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.store import ObjectStore
folder, url, files, limit = json.loads(sys.argv[1])
files = {path: bytes.fromhex(data) * times for path, (data, times) in files.items()}
cache = LocalCache(Path(folder), limit, parallel=4, part_bytes=64 << 10)
print("ready", flush=True)
with cache.fetch(ObjectStore.open(url), manifest_of(files)) as lease:
    assert read(lease.folder) == files
    print(lease.folder, flush=True)
    sys.stdin.read()
"""
# Fetches two models in turn, of which the cache can hold one.
CHURN = """
import sys
from pathlib import Path
from tests.registry.published import FILES, manifest_of
from tests.registry.test_cache_processes import MODEL
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.store import ObjectStore
cache = LocalCache(Path(sys.argv[1]), int(sys.argv[3]), part_bytes=64 << 10)
store = ObjectStore.open(sys.argv[2])
print("ready", flush=True)
while True:
    cache.fetch(store, manifest_of(MODEL)).close()
    cache.fetch(store, manifest_of(FILES)).close()
"""
SHARDS = {f"shard-{number}": (f"{number:02x}ab", 150_000) for number in range(6)}
MODEL = {path: bytes.fromhex(data) * times for path, (data, times) in SHARDS.items()}
KILLS = 16


def python(script: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def fetcher(folder: Path, url: str, limit: int | None = None) -> "subprocess.Popen[str]":
    return python(FETCH, json.dumps([str(folder), url, SHARDS, limit]))


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with s3_proxy(server.endpoint) as running:
        yield running


@pytest.fixture
def url(server: S3Server, proxy: Proxy) -> str:
    bucket = server.make_bucket()
    publish(ObjectStore.open(server.url(bucket)), MODEL)
    return server.url(bucket, endpoint=proxy.endpoint)


def test_processes_that_fetch_at_once_download_each_blob_once(
    tmp_path: Path, url: str, proxy: Proxy
):
    running = [fetcher(tmp_path / "cache", url) for _ in range(4)]
    for process in running:
        assert line(process) == "ready"
    folders = {line(process) for process in running}
    for process in running:
        _, errors = process.communicate("")
        assert process.returncode == 0, errors
    assert len(folders) == 1
    ranges = proxy.ranges()
    assert len(ranges) == sum(-(-len(data) // (64 << 10)) for data in MODEL.values())
    assert set(ranges.values()) == {1}


def test_threads_that_fetch_at_once_download_each_blob_once(tmp_path: Path, url: str, proxy: Proxy):
    cache = LocalCache(tmp_path / "cache", part_bytes=64 << 10)
    store, manifest = ObjectStore.open(url), manifest_of(MODEL)
    with ThreadPoolExecutor(4) as pool:
        leases = list(pool.map(lambda _: cache.fetch(store, manifest), range(4)))
    assert {lease.folder for lease in leases} == {leases[0].folder}
    assert read(leases[0].folder) == MODEL
    assert set(proxy.ranges().values()) == {1}


def test_models_that_share_blobs_download_them_once_though_fetched_at_once(
    tmp_path: Path, server: S3Server, proxy: Proxy
):
    bucket = server.make_bucket()
    contents = [{**MODEL, "config.json": b"%d" % number} for number in range(3)]
    manifests = [publish(ObjectStore.open(server.url(bucket)), files) for files in contents]
    cache = LocalCache(tmp_path / "cache", part_bytes=64 << 10)
    store = ObjectStore.open(server.url(bucket, endpoint=proxy.endpoint))
    with ThreadPoolExecutor(3) as pool:
        leases = list(pool.map(lambda manifest: cache.fetch(store, manifest), manifests))
    assert [read(lease.folder) for lease in leases] == contents
    assert set(proxy.ranges().values()) == {1}


def test_nothing_torn_is_visible_after_kill_at_any_moment(tmp_path: Path, url: str):
    """Kills fetch after fetch; what is visible in between is whole, and the last one succeeds."""
    chance = random.Random(4)
    where = tmp_path / "cache"
    expected = {entry.sha256: MODEL[entry.path] for entry in manifest_of(MODEL).files}
    seen_partial = 0
    started = time.monotonic()
    process = fetcher(where, url)
    line(process)
    line(process)
    whole_s = time.monotonic() - started  # from the interpreter's start on; the fetch is its end
    process.communicate("")
    for _ in range(KILLS):
        subprocess.run(["rm", "-rf", str(where)], check=True)
        for _ in range(2):  # the second finds what the first left
            process = fetcher(where, url)
            assert line(process) == "ready"
            time.sleep(chance.uniform(0, 0.15 * whole_s))
            kill(process)
            blobs = list((where / "blobs").glob("*"))
            for blob in blobs:
                assert blob.read_bytes() == expected[blob.name]
            for folder in (where / "models").glob("*"):
                assert read(folder) == MODEL
            seen_partial += any((where / "tmp").glob("*"))
    assert seen_partial > KILLS // 10  # some kills came in the middle
    with LocalCache(where).fetch(ObjectStore.open(url), manifest_of(MODEL)) as lease:
        assert read(lease.folder) == MODEL
    assert not list((where / "tmp").iterdir())


def test_nothing_torn_is_visible_after_kill_while_models_are_evicted(
    tmp_path: Path, folder: ObjectStore
):
    chance = random.Random(5)
    models = {name: publish(folder, files) for name, files in {"a": MODEL, "b": FILES}.items()}
    contents = {"a": MODEL, "b": FILES}
    limit = models["a"].size + 1000
    where = tmp_path / "cache"
    cache = LocalCache(where, limit)
    whole = {m.digest.removeprefix("sha256:"): contents[name] for name, m in models.items()}
    bytes_of = {e.sha256: contents[n][e.path] for n, m in models.items() for e in m.files}
    for _ in range(KILLS):
        process = python(CHURN, str(where), folder.url, str(limit))
        assert line(process) == "ready"
        time.sleep(chance.uniform(0, 0.3))
        kill(process)
        for blob in (where / "blobs").glob("*"):
            assert blob.read_bytes() == bytes_of[blob.name]
        for model in (where / "models").glob("*"):
            assert read(model) == whole[model.name]
        assert cache.used_bytes() <= limit
    for name in ("a", "b"):
        with cache.fetch(folder, models[name]) as lease:
            assert read(lease.folder) == contents[name]
    assert cache.shrink(0) == 0


def test_lease_of_another_process_holds_until_it_is_killed(tmp_path: Path, url: str):
    process = fetcher(tmp_path / "cache", url)
    assert line(process) == "ready"
    folder = Path(line(process))
    cache = LocalCache(tmp_path / "cache")
    cache.shrink(0)
    assert read(folder) == MODEL
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cache.shrink(0) == 0
    assert not folder.exists()


def test_lock_of_a_dead_process_is_free(tmp_path: Path):
    script = "import sys, time; from pathlib import Path; from xc_ray.registry.lock import Lock\n"
    script += f"lock = Lock.take(Path({str(tmp_path / 'lock')!r})); print('held', flush=True)\n"
    script += "sys.stdin.read()"
    process = python(script)
    assert line(process) == "held"
    assert Lock.try_take(tmp_path / "lock") is None
    kill(process)
    with Lock.take(tmp_path / "lock"):
        pass


def test_who_waits_for_a_lock_file_that_is_removed_gets_the_next_one(tmp_path: Path):
    path = tmp_path / "lock"
    first = Lock.take(path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Lock.take, path)
        time.sleep(0.2)
        assert not waiting.done()
        first.remove()
        second = waiting.result(10)
    assert Lock.try_take(path) is None
    second.close()


def test_lock_is_not_held_on_a_file_that_was_removed(tmp_path: Path):
    path = tmp_path / "lock"
    first = Lock.take(path)
    handle = os.open(path, os.O_RDWR)  # who waits for the file that is about to go
    first.remove()
    fcntl.flock(handle, fcntl.LOCK_EX)
    second = Lock.take(path)
    assert not os.path.samestat(os.stat(path), os.fstat(handle))
    os.close(handle)
    second.close()


def test_shared_holders_keep_out_who_wants_it_alone(tmp_path: Path):
    path = tmp_path / "lock"
    one, two = Lock.take(path, shared=True), Lock.take(path, shared=True)
    one.close()
    assert Lock.try_take(path) is None
    two.close()
    two.close()
    with Lock.take(path):
        assert Lock.try_take(path) is None


def test_small_cache_serves_processes_with_different_models(tmp_path: Path, server: S3Server):
    """Two models in a cache for one: each process gets the right bytes, or is told of no room."""
    bucket = server.make_bucket()
    store = ObjectStore.open(server.url(bucket))
    publish(store, MODEL)
    publish(store, FILES)
    size = sum(map(len, MODEL.values()))
    small = LocalCache(tmp_path / "cache", size + 1000)
    for _ in range(3):
        process = fetcher(tmp_path / "cache", server.url(bucket), size + 1000)
        assert line(process) == "ready"
        line(process)
        process.communicate("")
        assert process.returncode == 0
        with small.fetch(store, manifest_of(FILES)) as lease:
            assert read(lease.folder) == FILES
        assert small.used_bytes() <= size + 1000
