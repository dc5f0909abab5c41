"""The store on memory, a folder and a real S3 server over HTTP; gs:// and az:// only as far as the
making of a client, for want of a server here."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from obstore.store import AzureStore, GCSStore

from tests.local_http import Asked, Reply, serving
from tests.s3_proxy import Fault, Request, s3_proxy
from tests.s3_server import S3Server
from xc_ray.errors import ConfigError, InvalidRequest, RegistryError
from xc_ray.registry.client import open_clients
from xc_ray.registry.location import Location
from xc_ray.registry.store import PART_BYTES, RACERS, RACES, Missing, ObjectStore

KEPT = ("etag", "last-modified", "content-type")  # headers of an answer that a client needs


def refused(call) -> str:
    """The message of the RegistryError that a call ends with."""
    with pytest.raises(RegistryError) as caught:
        call()
    return caught.value.message


def proxied(server: S3Server, endpoint: str) -> ObjectStore:
    return ObjectStore.open(
        server.url(server.make_bucket(), "p").replace(server.endpoint, endpoint)
    )


# ---------------------------------------------------------------- every store


def test_what_was_put_is_got(store: ObjectStore):
    store.put("a/b.json", b"hello")
    store.put("a/empty", b"")
    assert store.get("a/b.json") == b"hello"
    assert store.get("a/empty") == b""
    assert store.size("a/b.json") == 5
    assert store.get_range("a/b.json", 1, 3) == b"el"


def test_put_replaces_what_is_there(store: ObjectStore):
    store.put("k", b"one")
    store.put("k", b"other")
    assert store.get("k") == b"other"


def test_missing_object_is_missing(store: ObjectStore):
    for call in (
        lambda: store.get("no/such"),
        lambda: store.size("no/such"),
        lambda: store.get_range("no/such", 0, 1),
    ):
        with pytest.raises(Missing, match="there is no 'no/such'") as caught:
            call()
        assert caught.value.message.startswith(store.location.place)


def test_range_beyond_the_end_is_refused_and_named(store: ObjectStore):
    store.put("k", b"12345")
    assert "'k' gave 2 of the 7 bytes from 3 to 10" in refused(lambda: store.get_range("k", 3, 10))
    assert "'k'" in refused(lambda: store.get_range("k", 5, 6))
    with pytest.raises(ValueError, match="holds no byte"):
        store.get_range("k", 2, 2)


def test_file_goes_up_in_parts_and_is_whole(store: ObjectStore, tmp_path: Path):
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * PART_BYTES + 17))
    store.put("large", file)
    assert store.size("large") == 2 * PART_BYTES + 17
    assert store.get("large") == file.read_bytes()


def test_file_is_never_whole_in_memory(folder: ObjectStore, tmp_path: Path):
    """A sparse file of 600 MiB, in a process of its own whose peak is read afterwards."""
    file = tmp_path / "sparse"
    with file.open("wb") as out:
        out.truncate(600 << 20)
    script = (
        "import re, sys; from pathlib import Path; from xc_ray.registry.store import *;"
        "s = ObjectStore.open(sys.argv[1]); s.put('k', Path(sys.argv[2]));"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1];"
        "print(s.size('k'), peak)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder.url, str(file)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    size, peak_kib = map(int, done.stdout.split())
    assert size == 600 << 20
    assert peak_kib < 300 << 10


def test_chunks_are_written_as_they_come(store: ObjectStore):
    chunks = [b"a" * (5 << 20), b"", b"b" * (6 << 20), b"c"]
    store.put_chunks("k", iter(chunks), sum(map(len, chunks)))
    assert store.get("k") == b"".join(chunks)
    store.put_chunks("none", iter(()), 0)
    assert store.get("none") == b""


@pytest.mark.parametrize("error", [InvalidRequest("no"), OSError("the disk"), KeyboardInterrupt()])
def test_nothing_is_written_when_the_chunks_end_in_an_error(store: ObjectStore, error):
    def chunks() -> Iterator[bytes]:
        yield b"a" * PART_BYTES
        yield b"b" * PART_BYTES
        raise error

    with pytest.raises(type(error)):
        store.put_chunks("k", chunks(), 3 * PART_BYTES)
    assert store.list("") == []


def test_put_if_absent_is_told_whether_it_wrote(store: ObjectStore):
    assert store.put_if_absent("n/1", b"mine")
    assert not store.put_if_absent("n/1", b"yours")
    assert store.get("n/1") == b"mine"
    assert [one.key for one in store.list("")] == ["n/1"]  # no probe is left


def test_put_if_absent_has_one_winner_among_threads(store: ObjectStore):
    def write(writer: int) -> list[int]:
        return [key for key in range(30) if store.put_if_absent(f"n/{key}", b"%d" % writer)]

    with ThreadPoolExecutor(8) as pool:
        won = Counter(key for keys in pool.map(write, range(8)) for key in keys)
    assert won == dict.fromkeys(range(30), 1)


def test_list_is_by_key_and_within_whole_segments(store: ObjectStore):
    for key in ("a/b/2", "a/b/10", "a/bc/1", "a/b.json", "z"):
        store.put(key, key.encode())
    assert [one.key for one in store.list("a/b")] == ["a/b/10", "a/b/2"]
    assert [one.key for one in store.list("a/b/")] == ["a/b/10", "a/b/2"]
    assert [one.key for one in store.list("")] == sorted(
        ["a/b/2", "a/b/10", "a/bc/1", "a/b.json", "z"]
    )
    assert [one.key for one in store.list("a", after="a/b/10")] == ["a/b/2", "a/bc/1"]
    assert store.list("nothing/here") == []
    (one,) = store.list("a/bc")
    assert one.size == 6
    assert abs(datetime.now(UTC) - one.modified) < timedelta(minutes=1)


def test_list_gives_all_pages(store: ObjectStore):
    keys = [f"many/{number:04}" for number in range(2_100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert [one.key for one in store.list("many")] == keys


def test_delete_does_not_mind_what_is_not_there(store: ObjectStore):
    store.put("a", b"")
    store.put("b", b"")
    store.delete(["no", "a", "such"])
    store.delete([])
    assert [one.key for one in store.list("")] == ["b"]


def test_stores_are_used_from_many_threads_at_once(store: ObjectStore):
    def round_trip(number: int) -> bool:
        store.put(f"k/{number}", b"%d" % number)
        return store.get(f"k/{number}") == b"%d" % number

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(round_trip, range(100)))


# ---------------------------------------------------------------- settings


def test_opening_a_store_touches_nothing(tmp_path: Path):
    ObjectStore.open(str(tmp_path / "new"))
    ObjectStore.open("s3://bucket?endpoint=http://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


def test_store_travels_by_its_setting(s3: ObjectStore, folder: ObjectStore):
    for store in (s3, folder):
        store.put("k", b"v")
        assert pickle.loads(pickle.dumps(store)).get("k") == b"v"
    with pytest.raises(TypeError, match="memory:// stays in its process"):
        pickle.dumps(ObjectStore.open("memory://"))


def test_clients_of_google_and_azure_are_made_from_their_settings(monkeypatch: pytest.MonkeyPatch):
    """No server for them runs here: this shows the way from the setting to the client, no more.

    (The emulator on PyPI, gcp-storage-emulator, knows Google's JSON interface; obstore speaks XML.)
    """
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    (google, _) = open_clients(Location.parse("gs://bucket/some/prefix"))
    assert isinstance(google, GCSStore)
    assert (google.config["bucket"], google.prefix) == ("bucket", "some/prefix")
    (azure, _) = open_clients(Location.parse("az://container/p?account=me"))
    assert isinstance(azure, AzureStore)
    assert (azure.config["account_name"], azure.prefix) == ("me", "p")
    assert ObjectStore.open("az://container/p?account=me").filesystem()[1] == "container/p"
    assert ObjectStore.open("gs://bucket/some/prefix").filesystem()[1] == "bucket/some/prefix"


# ---------------------------------------------------------------- conditional writes


def test_store_that_ignores_preconditions_is_refused_at_the_first_write(server: S3Server):
    with s3_proxy(server.endpoint) as proxy:
        proxy.fault = lambda asked: "skip_precondition"
        store = proxied(server, proxy.endpoint)
        for _ in range(2):
            message = refused(lambda: store.put_if_absent("versions/x/1", b"1"))
            assert "ignores conditional writes" in message
            assert f"at {proxy.endpoint} wrote 'probes/" in message
            assert "a proxy in between may also drop the header" in message
        proxy.fault = lambda _: None
        assert store.list("") == []  # neither the object nor a probe


def test_store_is_proven_once(server: S3Server):
    with s3_proxy(server.endpoint) as proxy:
        store = proxied(server, proxy.endpoint)
        for number in range(5):
            assert store.put_if_absent(f"n/{number}", b"x")
        # Two puts and a delete, then the races, whose objects are deleted too.
        probes = [asked for asked in proxy.requests if "/probes/" in asked.path]
        assert len(probes) == 3 + RACES * (RACERS + 1)
        puts = sum(asked.method == "PUT" for asked in proxy.requests)
        assert puts == 2 + RACES * RACERS + 5


def test_write_whose_answer_was_lost_counts_as_done(server: S3Server):
    """The server writes, the connection breaks before its answer: asked again, it says 412."""
    broken = threading.Event()

    def fault(asked: Request) -> Fault | None:
        if asked.method == "PUT" and "/n/1" in asked.path and not broken.is_set():
            broken.set()
            return "long"
        return None

    with s3_proxy(server.endpoint) as proxy:
        proxy.fault = fault
        store = proxied(server, proxy.endpoint)
        assert store.put_if_absent("n/1", b"mine")
        assert broken.is_set()
        assert not store.put_if_absent("n/1", b"yours")
        assert store.get("n/1") == b"mine"


def test_write_that_never_arrives_is_an_error(server: S3Server):
    with s3_proxy(server.endpoint) as proxy:
        store = proxied(server, proxy.endpoint)
        assert store.put_if_absent("n/0", b"0")
        proxy.fault = lambda asked: "503" if asked.method == "PUT" else None
        message = refused(lambda: store.put_if_absent("n/1", b"1"))
        assert "cannot create 'n/1'" in message
        assert "HTTP 503 SlowDown" in message


def test_writer_asks_again_after_a_conflict_that_nobody_won(server: S3Server):
    """S3 answers 409 to conditional writes that met, and then may have written neither."""
    conflicts = 2

    def answer(asked: Asked) -> Reply | None:
        nonlocal conflicts
        if asked.method == "PUT" and "/n/1" in asked.path and conflicts:
            conflicts -= 1
            return Reply(b"<Error><Code>ConditionalRequestConflict</Code></Error>", 409)
        return None

    with in_front_of(server.endpoint, answer) as endpoint:
        store = proxied(server, endpoint)
        assert store.put_if_absent("n/1", b"mine")
        assert conflicts == 0
        assert store.get("n/1") == b"mine"
        conflicts = 100
        message = refused(lambda: store.put_if_absent("n/11", b"mine"))
        assert "HTTP 409 ConditionalRequestConflict; another writer was busy with" in message


@contextmanager
def in_front_of(upstream: str, answer: Callable[[Asked], Reply | None]) -> Iterator[str]:
    """A server that passes on to `upstream` what `answer` has no reply to."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked = Asked(self.command, self.path, dict(self.headers), body)
            reply = answer(asked)
            if reply is None:
                url = f"{upstream}{asked.path}"
                got = httpx.request(asked.method, url, headers=asked.headers, content=body)
                reply = Reply(got.content, got.status_code)
                reply.headers.update({n: got.headers[n] for n in KEPT if n in got.headers})
            assert isinstance(reply.body, bytes)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_PUT = do_DELETE = pass_on

        def log_message(self, *_: object) -> None:
            """Keeps the test's output clean."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


# ---------------------------------------------------------------- failures


def test_missing_bucket_is_named(server: S3Server):
    store = ObjectStore.open(server.url("no-such-bucket", "prefix"))
    for verb, call in {
        "read": lambda: store.get("k"),
        "list": lambda: store.list("k"),
        "write": lambda: store.put("k", b""),
        "create": lambda: store.put_if_absent("k", b""),
        "delete": lambda: store.delete(["k"]),
    }.items():
        message = refused(call)
        assert message.startswith(f"cannot {verb} '"), message
        where = f"bucket 'no-such-bucket', prefix 'prefix' at {server.endpoint}"
        assert f"in {where}: HTTP 404 NoSuchBucket; create the bucket or correct it" in message


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "SignatureDoesNotMatch", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (401, "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (400, "AuthorizationHeaderMalformed", "check the region (now us-east-1) and path_style"),
        (503, "SlowDown", "try again; if it stays, look into the store's own log"),
        (501, "NotImplemented", "this server lacks what the registry needs"),
    ],
)
def test_refusal_names_place_key_status_and_what_to_do(
    server: S3Server, status: int, code: str, advice: str
):
    body = f"<Error><Code>{code}</Code><Message>{server.env['AWS_SECRET_ACCESS_KEY']}</Message>"
    with serving(lambda _: Reply(body.encode(), status)) as answering:
        store = ObjectStore.open(f"s3://models/team?endpoint={answering.url}")
        message = refused(lambda: store.get("versions/x"))
    assert message.startswith(
        f"cannot read 'versions/x' in bucket 'models', prefix 'team' at {answering.url}: "
        f"HTTP {status} {code}; "
    )
    assert advice in message
    assert "testing" not in message  # neither key id nor secret


def test_bucket_of_another_region_is_told_as_such(server: S3Server):
    with serving(lambda _: Reply(b"", 301)) as answering:
        store = ObjectStore.open(f"s3://models?endpoint={answering.url}&region=eu-west-1")
        message = refused(lambda: store.get("k"))
    assert "it sent us elsewhere; check the region (now eu-west-1) and path_style" in message


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:1", "the connection was refused"),
        ("http://no-such-host.invalid", "the host name is unknown"),
    ],
)
def test_dead_endpoint_fails_within_seconds(server: S3Server, endpoint: str, reason: str):
    store = ObjectStore.open(f"s3://models?endpoint={endpoint}")
    started = time.monotonic()
    message = refused(lambda: store.get("k"))
    assert f"bucket 'models' at {endpoint}: {reason}; check the endpoint" in message
    assert "cannot create" in refused(lambda: store.put_if_absent("k", b""))
    assert time.monotonic() - started < 20


def test_endpoint_that_never_answers_fails_in_time(server: S3Server):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        store = ObjectStore.open(f"s3://models?endpoint={endpoint}&timeout_s=0.5")
        for call in (lambda: store.get("k"), lambda: store.put("k", b"v"), lambda: store.list("")):
            started = time.monotonic()
            assert "no answer in time" in refused(call)
            assert time.monotonic() - started < 5


def test_https_to_a_server_without_it_is_told_as_such(server: S3Server):
    store = ObjectStore.open(f"s3://models?endpoint={server.endpoint.replace('http', 'https')}")
    assert "it does not speak TLS; write http:// if that is meant" in refused(
        lambda: store.get("k")
    )


def test_missing_credentials_are_told_as_such(server: S3Server, monkeypatch: pytest.MonkeyPatch):
    """Without keys the client asks the cloud's own address for them, here one that refuses."""
    for name in server.env:
        monkeypatch.delenv(name)
    with serving(lambda _: Reply(b"", 404)) as instance:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", instance.url)
        message = refused(lambda: ObjectStore.open(server.url("bucket")).get("k"))
    assert "no credentials were found; set AWS_ACCESS_KEY_ID" in message


def test_broken_answers_are_overcome_or_named(server: S3Server):
    with s3_proxy(server.endpoint) as proxy:
        store = proxied(server, proxy.endpoint)
        store.put("k", os.urandom(100_000))
        whole = store.get("k")
        # What is missing is asked for again from where it broke off. Where nothing is missing but
        # the length was a lie, the server says that there is nothing.
        faults: dict[Fault, str] = {
            "truncate": "the connection was cut",
            "long": "HTTP 416 InvalidRange; the object is shorter than it was said",
        }
        for fault, reason in faults.items():
            told: Fault = fault
            proxy.fault = lambda _: told  # noqa: B023 - called within this turn only
            message = refused(lambda: store.get("k"))
            assert "cannot read 'k'" in message
            assert reason in message
        proxy.fault = lambda asked: "truncate" if len(proxy.requests) % 3 else None
        assert store.get("k") == whole


def test_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    store = ObjectStore.open(str(tmp_path / "file" / "registry"))
    message = refused(lambda: store.put("k", b""))
    assert f"cannot write 'k' in folder {tmp_path}/file/registry: " in message
    assert "check that the folder may be written, has room, and allows hard links" in message


def test_half_written_files_are_no_objects_and_can_be_found(folder: ObjectStore):
    folder.put("a/b", b"whole")
    root = Path(folder.location.prefix)
    (root / "a" / "c#1").write_bytes(b"ha")
    (root / "a" / "b#2").write_bytes(b"lf")
    assert [one.key for one in folder.list("")] == ["a/b"]
    with pytest.raises(Missing):
        folder.get("a/c")
    later = datetime.now(UTC) + timedelta(seconds=5)
    assert sorted(folder.leftovers(before=later)) == [root / "a" / "b#2", root / "a" / "c#1"]
    assert list(folder.leftovers(before=later - timedelta(hours=1))) == []


# ---------------------------------------------------------------- the same place for pyarrow


def test_pyarrow_reads_what_the_store_wrote_and_writes_what_it_reads(
    s3: ObjectStore, folder: ObjectStore
):
    for store in (s3, folder):
        filesystem, path = store.filesystem()
        store.put("runs/one/ours", b"from the store")
        with filesystem.open_input_file(f"{path}/runs/one/ours") as file:
            assert file.read() == b"from the store"
        filesystem.create_dir(f"{path}/runs/two")
        with filesystem.open_output_stream(f"{path}/runs/two/theirs") as out:
            out.write(b"from pyarrow")
        assert store.get("runs/two/theirs") == b"from pyarrow"


def test_memory_holds_no_checkpoints():
    with pytest.raises(ConfigError, match="memory:// cannot hold checkpoints"):
        ObjectStore.open("memory://").filesystem()


def test_azure_without_an_account_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match=r"names no account; add \?account=NAME"):
        ObjectStore.open("az://container").filesystem()
