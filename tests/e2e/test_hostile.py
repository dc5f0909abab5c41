"""The table of tests/hostile.py, sent to a started server.

The server wants a key, as one that others reach does, and the rows have it; so that what is behind
the key is met by all of them, and whoever has none is turned away before any of it (`Strangers`).
tests/e2e/test_bad_input.py has a server without keys.

Each row is answered as it says. After each, nobody has connected to the forbidden listener, nobody
has opened the secret file, and the next request is served; after all of them no replica was lost,
memory is bounded, and logs hold nothing that was confidential. The listener and the file would
notice: the first two tests show it.
"""

import base64
import errno
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from tests.e2e.serve_run import (
    RED_CIRCLE,
    ServeRun,
    assert_error,
    assert_right,
    body,
    data_url,
    image,
    serve_run,
)
from tests.hostile import (
    ADDRESSES_INSIDE,
    BEARER,
    BODIES,
    CHAT,
    FILES,
    KEY,
    LOCAL_PATHS,
    MALFORMED,
    MODEL_NAMES,
    OTHER_PORTS,
    REDIRECTED_ASTRAY,
    REDIRECTED_INSIDE,
    STRANGERS,
    WIRE,
    Body,
    File,
    Stranger,
    Wire,
)
from tests.local_http import Asked, Reply, Served, serving
from xc_ray.keys import digest_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

ALLOWED = "127.0.0.2"
BODY_LIMIT_S = 3.0
HELD_LIMIT_BYTES = 128 << 20
ARGS: dict[str, Any] = {
    "media": {"allow_private": [f"{ALLOWED}/32"], "timeout_s": 2},
    "limits": {"max_body_s": BODY_LIMIT_S, "max_decode_s": 2, "max_held_bytes": HELD_LIMIT_BYTES},
}
# A row takes a second or two at most; the rest is for a machine that does other things as well.
ROW_LIMIT_S = 40.0
# What the tests' own bodies and pictures may take for a while, of a replica.
MEMORY_LIMIT_BYTES = 1 << 30
AGAIN_LIMIT_BYTES = 64 << 20  # 19 MB seen
HOLDS_KEY = {"authorization": f"Bearer {KEY}"}
MARK = b"nobody logs this picture"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeRun]:
    """One that knows one key; all rows but those of strangers hold it."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "hostile", "sha256": digest_of(KEY)}]}))
    with serve_run(ARGS | {"keys": str(keys)}, key=KEY) as running:
        yield running


@dataclass
class Forbidden:
    """A listener on every address of this machine, and how often somebody connected."""

    port: int
    hits: int = 0
    rest: list[socket.socket] = field(default_factory=list)


@contextmanager
def listening() -> Iterator[Forbidden]:
    """It answers with a picture, so that who gets through also gets an answer."""
    two = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if two else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, dualstack_ipv6=two)
    forbidden = Forbidden(listener.getsockname()[1])
    head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: image/png\r\n"
    answered = f"{head}content-length: {len(RED_CIRCLE)}\r\n\r\n".encode() + RED_CIRCLE

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            forbidden.hits += 1
            forbidden.rest.append(connection)
            connection.sendall(answered)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield forbidden
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in forbidden.rest:
            connection.close()


@pytest.fixture(scope="module")
def forbidden() -> Iterator[Forbidden]:
    with listening() as listener:
        yield listener


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipe: who opens it waits there, and can be seen."""
    path = tmp_path_factory.mktemp("secret") / "secret.png"
    os.mkfifo(path)
    return path


def is_open(pipe: Path) -> bool:
    """Whether somebody is reading it."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return False
    return True


@pytest.fixture(scope="module")
def web() -> Iterator[Served]:
    """The server that may be asked; its pages redirect, dawdle and flood."""

    def answer(asked: Asked) -> Reply:
        page, _, target = asked.path.partition("?")
        if page == "/to":
            return Reply(b"", 302, {"location": unquote(target)})
        chunks = {"/flood.png": flood, "/drip.png": drip}.get(page)
        kind = {"/a.html": "text/html"}.get(page, "image/png")
        return Reply(chunks() if chunks else RED_CIRCLE, headers={"content-type": kind})

    with serving(answer, ALLOWED) as served:
        yield served


def flood() -> Iterator[bytes]:
    while True:
        yield bytes(1 << 20)


def drip() -> Iterator[bytes]:
    for _ in range(1000):
        time.sleep(0.05)
        yield b"x"


@dataclass
class Memory:
    """Resident bytes of the replicas that a request goes through, before the table."""

    before: dict[int, int]

    @classmethod
    def of(cls, server: ServeRun) -> "Memory":
        names = ("Ingress", "VisionEncoder", "Decoder")
        return cls({pid: resident(pid)[0] for pid in map(server.replica, names)})


def resident(pid: int) -> tuple[int, int]:
    """Bytes now, and at their most."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


@pytest.fixture(scope="module")
def memory(server: ServeRun) -> Memory:
    assert_right(server)
    return Memory.of(server)


@pytest.fixture(autouse=True)
def unharmed(
    server: ServeRun, forbidden: Forbidden, secret: Path, memory: Memory
) -> Iterator[None]:
    """What must not have happened, whatever the row."""
    hits, began = forbidden.hits, time.monotonic()
    yield
    assert time.monotonic() - began < ROW_LIMIT_S
    assert forbidden.hits == hits
    assert not is_open(secret)
    assert sent(server, json=body("hi", max_tokens=1)).status_code == 200


def sent(server: ServeRun, **content: Any) -> httpx.Response:
    headers = HOLDS_KEY | content.pop("headers", {})
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, timeout=ROW_LIMIT_S, trust_env=False, headers=headers, **content)


def asked_for(server: ServeRun, url: str) -> httpx.Response:
    # httpx writes JSON as UTF-8, where a lone surrogate has no place; these are escaped.
    return sent(server, json=body(image(url, detail="low"), "What is it?", max_tokens=2))


class TestTheTrapsWork:
    def test_the_forbidden_listener_counts(self) -> None:
        with listening() as other:
            for host in ("127.0.0.1", "localhost"):
                assert httpx.get(f"http://{host}:{other.port}/", trust_env=False).is_success
            assert other.hits == 2

    def test_the_secret_file_tells(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        assert is_open(pipe)
        os.close(reader)
        assert not is_open(pipe)

    def test_the_allowed_server_is_asked(self, server: ServeRun, web: Served) -> None:
        """The control: it is not that nothing is fetched at all."""
        for url in (f"{web.url}/a.png", f"{web.url}/to?/a.png"):
            response = asked_for(server, url)
            assert response.status_code == 200, response.text


class TestUrls:
    @pytest.mark.parametrize("url", ADDRESSES_INSIDE)
    def test_of_an_address_inside(self, server: ServeRun, forbidden: Forbidden, url: str) -> None:
        response = asked_for(server, url.format(port=forbidden.port))
        assert_error(response, 400, "forbidden_image_url", ("not a public address",))

    # A lone surrogate is no JSON, an empty URL no value: both are among the bodies.
    @pytest.mark.parametrize("url", [u for u in MALFORMED if u and "\ud800" not in u])
    def test_of_no_meaning(self, server: ServeRun, forbidden: Forbidden, url: str) -> None:
        response = asked_for(server, url.replace("{port}", str(forbidden.port)))
        assert_error(response, 400, "invalid_image_url", ())

    @pytest.mark.parametrize("url", OTHER_PORTS)
    def test_of_another_port(self, server: ServeRun, url: str) -> None:
        assert_error(asked_for(server, url), 400, "forbidden_image_url", ("port", "not allowed"))

    @pytest.mark.parametrize("url", LOCAL_PATHS)
    def test_of_a_file(self, server: ServeRun, secret: Path, url: str) -> None:
        response = asked_for(server, url.format(secret=secret))
        assert_error(response, 400, "invalid_image_url", ())

    @pytest.mark.parametrize("target", REDIRECTED_INSIDE)
    def test_redirected_inside(
        self, server: ServeRun, forbidden: Forbidden, web: Served, target: str
    ) -> None:
        target = target.format(port=forbidden.port, allowed=web.url)
        response = asked_for(server, f"{web.url}/to?{target}")
        assert_error(response, 400, "forbidden_image_url", ())

    @pytest.mark.parametrize("target", REDIRECTED_ASTRAY)
    def test_redirected_astray(
        self, server: ServeRun, forbidden: Forbidden, web: Served, secret: Path, target: str
    ) -> None:
        target = target.format(port=forbidden.port, secret=secret)
        response = asked_for(server, f"{web.url}/to?{quote(target, safe=':/?@')}")
        error = assert_error(response, 400, None, ())
        assert error["code"] in ("image_fetch_failed", "invalid_image_url")

    @pytest.mark.parametrize(
        ("page", "code"),
        [
            ("flood.png", "image_too_large"),
            ("drip.png", "image_fetch_timeout"),
            ("a.html", "invalid_image_type"),
            ("to?/to?/to?/to?/to?/a.png", "image_fetch_failed"),
        ],
    )
    def test_of_a_server_that_misbehaves(
        self, server: ServeRun, web: Served, page: str, code: str
    ) -> None:
        assert_error(asked_for(server, f"{web.url}/{page}"), 400, code, ())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.what)
def test_a_file(server: ServeRun, file: File) -> None:
    response = asked_for(server, data_url(file.make(), file.type))
    if file.code is None:
        assert response.status_code == 200, response.text
    else:
        assert_error(response, 400, file.code, ())


@pytest.mark.parametrize("row", BODIES, ids=lambda row: row.what)
def test_a_body(server: ServeRun, row: Body) -> None:
    response = sent(server, content=row.make(), headers={"content-type": row.type})
    if row.status == 200:
        assert response.status_code == 200, response.text
    else:
        assert_error(response, row.status, row.code, ())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_name_of_a_model(server: ServeRun, name: str) -> None:
    asked = sent(server, json=body("hi", model=name))
    url = f"{server.url}/v1/models/{quote(name, safe='')}"
    shown = httpx.get(url, trust_env=False, timeout=ROW_LIMIT_S, headers=HOLDS_KEY)
    # Starlette takes a last line break in a path for none.
    for response in (asked,) if name.endswith("\n") else (asked, shown):
        assert response.status_code in (400, 404), response.text
        error = response.json()["error"]
        assert len(error["message"].splitlines()) == 1
        assert error["message"].isprintable()
        assert "root:" not in error["message"]


@pytest.mark.parametrize("row", WIRE, ids=lambda row: row.what)
def test_a_connection(server: ServeRun, row: Wire) -> None:
    assert answered(server, row.send) in row.statuses


def answered(server: ServeRun, send: bytes) -> int | None:
    """The status that a connection gets for its bytes, None if it is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=ROW_LIMIT_S) as client:
        try:
            client.sendall(send)
            answer = client.recv(1 << 16)
        except ConnectionError:
            answer = b""
    assert b"Traceback" not in answer
    return int(answer.split(b" ", 2)[1]) if answer else None


class TestStrangers:
    @pytest.mark.parametrize("who", STRANGERS, ids=lambda who: who.what)
    def test_are_turned_away_from_every_route(self, server: ServeRun, who: Stranger) -> None:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/demo"),
            ("GET", "/openapi.json"),
            ("GET", "/v1/none"),
            ("GET", "/healthz/%2e%2e/v1/models"),
        ):
            url = httpx.URL(f"{server.url}{path}{who.query}")
            content = body("hi", max_tokens=1) if method == "POST" else None
            headers = [*who.headers, (b"host", b"a")]
            response = httpx.request(
                method, url, json=content, headers=headers, timeout=ROW_LIMIT_S, trust_env=False
            )
            assert_error(response, 401, "invalid_api_key", ())
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text

    def test_nothing_of_theirs_is_read_or_fetched(self, server: ServeRun, web: Served) -> None:
        asked = len(web.asked)
        for row in BODIES:
            response = sent(server, content=row.make(), headers={"authorization": "Bearer other"})
            assert_error(response, 401, "invalid_api_key", ())
        for wire in WIRE:
            status = answered(server, wire.send.replace(BEARER, b""))
            assert status in (401, *wire.statuses), wire.what
        picture = json.dumps(body(image(f"{web.url}/a.png"), "?")).encode()
        for header in ({"authorization": "Bearer other"}, {"authorization": ""}):
            response = sent(server, content=picture, headers=header)
            assert_error(response, 401, "invalid_api_key", ())
        assert len(web.asked) == asked

    def test_whoever_announces_a_large_body_is_told_before_it_comes(self, server: ServeRun) -> None:
        head = CHAT.replace(BEARER, b"") + b"Content-Length: 60000000\r\n\r\n"
        began = time.monotonic()
        assert answered(server, head) == 401
        assert time.monotonic() - began < BODY_LIMIT_S  # none of it was waited for


def test_a_body_that_drips_is_not_waited_for(server: ServeRun) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(CHAT + b"Content-Length: 1000\r\n\r\n")
        client.settimeout(0.1)
        began, answer = time.monotonic(), b""
        while not answer.endswith(b"}") and time.monotonic() - began < BODY_LIMIT_S + 10:
            if not answer:
                client.sendall(b" ")
            with suppress(TimeoutError):
                answer += client.recv(1 << 16)  # its head may come by itself
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"not complete after 3 s" in answer


def test_many_at_once_take_no_more(server: ServeRun, web: Served) -> None:
    """32 floods in one request: what is fetched for a request counts together."""
    flood = image(f"{web.url}/flood.png")
    response = sent(server, json=body(*[flood] * 32, "?"))
    error = assert_error(response, 400, None, ())
    assert error["code"] in ("image_too_large", "image_fetch_timeout")


def test_many_bodies_at_once_are_bounded_together(server: ServeRun) -> None:
    """960 MB, each within its own bounds: most are refused, and the others are answered.

    Each client sends its body but for the end, and the end once all have got so far.
    """
    num, size, chunk = 120, 8_000_000, bytes([32]) * 1_000_000
    whole = json.dumps(body("hi", max_tokens=1)).encode()
    all_sent = threading.Barrier(num)
    ingress = server.replica("Ingress")
    before, _ = resident(ingress)
    Path(f"/proc/{ingress}/clear_refs").write_text("5")  # the most begins anew

    def padded() -> Iterator[bytes]:
        try:
            yield whole[:-1]
            for _ in range(size // len(chunk)):
                yield chunk
        finally:  # refused before the end, too
            with suppress(threading.BrokenBarrierError):
                all_sent.wait(2 * BODY_LIMIT_S)
        yield whole[-1:]

    def send(_: int) -> httpx.Response:
        length = {"content-length": str(len(whole) + size)}
        return sent(server, content=padded(), headers=length)

    with ThreadPoolExecutor(num) as pool:
        responses = list(pool.map(send, range(num)))
    statuses = Counter(response.status_code for response in responses)
    _, most = resident(ingress)
    # Of those that found room the slow ones are not waited for, and others take their places.
    assert statuses.keys() <= {200, 408, 429}
    assert statuses[429] > num / 4
    for response in responses:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "2"
            assert response.json()["error"]["code"] == "overloaded"
    # Three times as much was seen, and without the bound all that was sent.
    assert most - before < 5 * HELD_LIMIT_BYTES
    assert_right(server)


def test_no_replica_was_lost_and_memory_is_bounded(server: ServeRun, memory: Memory) -> None:
    """Allocators keep room of the largest (up to 600 MB seen): the same once more fits into it."""
    once = Memory.of(server).before
    assert once.keys() == memory.before.keys()
    for file in FILES:
        asked_for(server, data_url(file.make(), file.type))
    for row in BODIES:
        sent(server, content=row.make(), headers={"content-type": row.type})
    for pid, before in memory.before.items():
        now, most = resident(pid)
        assert most - before < MEMORY_LIMIT_BYTES
        assert now - once[pid] < AGAIN_LIMIT_BYTES
    assert_right(server)


def test_logs_hold_neither_keys_nor_pictures(server: ServeRun) -> None:
    assert_error(asked_for(server, data_url(MARK)), 400, "invalid_image", ())
    assert_error(sent(server, content=data_url(MARK).encode()), 400, "invalid_json", ())
    found = [KEY.encode(), base64.b64encode(MARK)[:20]]
    read = 0
    for path in server.log.parent.rglob("*"):
        if path.is_file() and (path.suffix in (".log", ".out", ".err") or path == server.log):
            content = path.read_bytes()
            read += len(content)
            assert not [words for words in found if words in content], path
    assert read > 1000
