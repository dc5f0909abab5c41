"""What S3 servers that share no code honour: moto's and OpenStack Swift's, the same calls to both.

The matrix below is what the registry has to know about a server. Swift 2.38 reads like S3, takes
`If-None-Match: *` and refuses the second of two writers that come one after the other; of writers
that come at once it tells several that they won, because its object server looks first and writes
later. (2.30, in Debian 12, answers every conditional PUT with 501.) A registry in Swift can be
pulled from; the store refuses to write to it.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import S3Store

from tests.registry.published import FILES, manifest_of, read
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server
from tests.swift_server import SwiftServer, missing, swift
from xc_ray.errors import RegistryError
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.keys import blob_key
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import Missing, ObjectStore


@pytest.fixture(scope="session")
def running_swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    folder = tmp_path_factory.mktemp("swift")
    reason = missing(folder)
    if reason is not None:
        pytest.skip(reason)
    with swift(folder) as server:
        yield server


@contextlib.contextmanager
def swift_environment(server: SwiftServer) -> Iterator[None]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with mock.patch.dict(os.environ, {**kept, **server.env}, clear=True):
        yield


@pytest.fixture
def swift_store(running_swift: SwiftServer) -> Iterator[ObjectStore]:
    with swift_environment(running_swift):
        yield ObjectStore.open(running_swift.url(running_swift.make_bucket(), "some/prefix"))


@pytest.fixture(params=["moto", "swift"])
def named(request: pytest.FixtureRequest) -> tuple[str, ObjectStore]:
    fixture = {"moto": "s3", "swift": "swift_store"}[request.param]
    return request.param, request.getfixturevalue(fixture)


# ---------------------------------------------------------------- the matrix


def client(store: ObjectStore) -> S3Store:
    assert isinstance(store._client, S3Store)
    return store._client


def put(store: ObjectStore, key: str, data: bytes) -> None:
    """Without the proof of conditional writes, which our own `put` asks of a server first."""
    obstore.put(client(store), key, data)


def creates_if_absent(store: ObjectStore) -> bool:
    """`If-None-Match: *`: the first PUT succeeds, the second is refused and changes nothing."""
    try:
        obstore.put(client(store), "create", b"one", mode="create")
    except obstore.exceptions.GenericError:
        return False
    with pytest.raises(AlreadyExistsError):
        obstore.put(client(store), "create", b"two", mode="create")
    return store.get("create") == b"one"


def has_one_winner_of_a_race(store: ObjectStore) -> bool:
    """`If-None-Match: *` from eight at once: each time one is told that it won, for sixty keys.

    Swift lets two win for about two keys in three, for fewer where its processes share a busy core.
    """

    def create(key: str, number: int) -> bool:
        try:
            obstore.put(client(store), key, b"%d" % number, mode="create")
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as racers:
        return all(
            sum(racers.map(partial(create, f"race/{number}"), range(8))) == 1
            for number in range(60)
        )


def updates_if_same(store: ObjectStore) -> bool:
    """`If-Match: etag`: a PUT over the object that was read succeeds, over another it does not."""
    put(store, "update", b"one")
    old = obstore.head(client(store), "update")["e_tag"]
    try:
        obstore.put(client(store), "update", b"two", mode={"e_tag": old})
    except obstore.exceptions.GenericError:
        return False
    with pytest.raises(PreconditionError):
        obstore.put(client(store), "update", b"three", mode={"e_tag": old})
    return store.get("update") == b"two"


def reads_ranges(store: ObjectStore) -> bool:
    put(store, "range", bytes(range(100)))
    return store.get_range("range", 7, 11) == bytes([7, 8, 9, 10])


def names_a_missing_object(store: ObjectStore) -> bool:
    with pytest.raises(Missing):
        store.get("nowhere")
    return True


def takes_uploads_in_parts(store: ObjectStore) -> bool:
    """And gives ranges across the border of two parts."""
    data = os.urandom(5 << 20) * 2 + b"end"
    obstore.put(client(store), "parts", data, use_multipart=True, chunk_size=5 << 20)
    across = store.get_range("parts", (5 << 20) - 3, (5 << 20) + 3)
    return store.size("parts") == len(data) and across == data[(5 << 20) - 3 : (5 << 20) + 3]


def lists_in_order_after_a_key(store: ObjectStore) -> bool:
    """ListObjectsV2 with start-after, over several pages."""
    keys = [f"list/{number:03}" for number in range(12)]
    for key in keys:
        put(store, key, b"")
    pages = obstore.list(client(store), "list", offset="list/004", chunk_size=3)
    return [one["path"] for page in pages for one in page] == keys[5:]


def deletes_what_is_not_there(store: ObjectStore) -> bool:
    put(store, "there", b"")
    store.delete(["there", "not-there"])
    return not store.list("there")


FEATURES: dict[str, Callable[[ObjectStore], bool]] = {
    "If-None-Match: * on PUT": creates_if_absent,
    "one winner of a race": has_one_winner_of_a_race,
    "If-Match on PUT": updates_if_same,
    "ranges": reads_ranges,
    "404": names_a_missing_object,
    "multipart uploads": takes_uploads_in_parts,
    "list v2 with start-after": lists_in_order_after_a_key,
    "delete of nothing": deletes_what_is_not_there,
}
NOT_HONOURED = {"moto": set[str](), "swift": {"one winner of a race", "If-Match on PUT"}}


@pytest.mark.parametrize("feature", FEATURES)
def test_server_honours_what_the_matrix_says(feature: str, named: tuple[str, ObjectStore]):
    server, store = named
    assert FEATURES[feature](store) == (feature not in NOT_HONOURED[server])


# ---------------------------------------------------------------- what follows from it


def test_cache_fetches_from_either_server(named: tuple[str, ObjectStore], tmp_path: Path):
    _, store = named
    manifest = manifest_of(FILES)
    for entry in manifest.files:
        put(store, blob_key(entry.sha256), FILES[entry.path])
    cache = LocalCache(tmp_path / "cache", part_bytes=64 << 10)
    with cache.fetch(store, manifest) as lease:
        assert read(lease.folder) == FILES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_server_that_lets_two_writers_win_is_refused(running_swift: SwiftServer, model: Path):
    """By a race that it loses; it is given several chances, as it can win them all by luck."""
    with swift_environment(running_swift):
        for _ in range(5):
            store = ObjectStore.open(running_swift.url(running_swift.make_bucket(), "some/prefix"))
            try:
                Registry(store).push(model, name="model", kind="base")
            except RegistryError as error:
                refusal = error.message
                break
        else:
            pytest.fail("five stores were proven")
        assert re.search(r"told \d of 8 writers .* they had created the same object", refusal)
        assert store.list("") == []  # no file went up in vain, and no probe stays


def test_server_that_ignores_the_condition_is_refused(server: S3Server, model: Path):
    """The other way to lack it: the header goes lost, and every write succeeds."""
    with s3_proxy(server.endpoint) as proxy:
        proxy.fault = lambda _: "skip_precondition"
        url = server.url(server.make_bucket(), endpoint=proxy.endpoint)
        registry = Registry.open(url)
        with pytest.raises(RegistryError, match="it ignores conditional writes"):
            registry.push(model, name="model", kind="base")
        proxy.fault = lambda _: None
        assert registry.store.list("") == []


def test_wrong_key_is_refused_by_a_server_that_checks_signatures(
    swift_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    """moto checks none; Swift does."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = ObjectStore.open(swift_store.url)
    with pytest.raises(RegistryError, match="HTTP 403 SignatureDoesNotMatch; check AWS_ACCESS"):
        store.get("anything")
