"""Fetching pictures: what is fetched, within which limits, and what is never connected to."""

import asyncio
import base64
import datetime
import ipaddress
import pickle
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import ADDRESSES_INSIDE, MALFORMED, NAMES, NAMES_INSIDE
from xc_ray.errors import ConfigError, MediaError
from xc_ray.serve.fetch import Fetcher, MediaPolicy, Room, is_public, resolve

PNG = b"\x89PNG\r\n\x1a\n not a real one, the fetcher does not look"
LOOPBACK = ("127.0.0.0/8",)
TRUST_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server on this machine, with all that was asked of it."""

    port: int = 0
    connections: int = 0
    requests: list[str] = field(default_factory=list)

    def url(self, path: str = "/picture.png", host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@asynccontextmanager
async def serving(
    answer: Answer, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    server = Server()
    writers = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        writers.append(writer)
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            server.requests.append(request)
            await answer(request.split(" ")[1], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left, as it should when it has seen enough
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, host, 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for writer in writers:
            writer.transport.abort()
        await listener.wait_closed()


def response(
    body: bytes = PNG, *, status: str = "200 OK", type: str | None = "image/png", **headers: Any
) -> bytes:
    fields = {"Content-Length": len(body), "Content-Type": type}
    fields |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def saying(raw: bytes) -> Answer:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    return answer


def redirects(targets: dict[str, str | None]) -> Answer:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        if path in targets:
            moved = response(b"", status="302 Found", location=targets[path], set_cookie="a=b")
            writer.write(moved)
        else:
            writer.write(response())

    return answer


async def forever(path: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def resolver(names: dict[str, list[str]]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    async def look_up(host: str, port: int) -> Sequence[str]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return names[host]

    return look_up


async def fetch(url: str, policy: MediaPolicy | None = None, **kwargs: Any) -> bytes:
    kwargs.setdefault("resolver", resolver({}))  # no test asks a name server
    kwargs.setdefault("ssl_context", TRUST_NOBODY)  # reading certifi's list takes its time
    fetcher = Fetcher(policy or MediaPolicy(allow_private=LOOPBACK), **kwargs)
    try:
        return await fetcher.fetch(url)
    finally:
        await fetcher.aclose()


async def refusal(url: str, policy: MediaPolicy | None = None, **kwargs: Any) -> MediaError:
    with pytest.raises(MediaError) as caught:
        await fetch(url, policy, **kwargs)
    assert "\n" not in caught.value.message
    assert caught.value.param is None  # the caller knows which field it was
    return caught.value


class TestPictureOverHttp:
    async def test_the_body_comes_back_as_it_is(self) -> None:
        async with serving(saying(response())) as server:
            assert await fetch(server.url()) == PNG

    async def test_a_body_without_a_length_ends_with_the_connection(self) -> None:
        async with serving(saying(response(content_length=None))) as server:
            assert await fetch(server.url()) == PNG

    async def test_a_chunked_body_is_put_together(self) -> None:
        chunks = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        raw = response(chunks, content_length=None, transfer_encoding="chunked")
        async with serving(saying(raw)) as server:
            assert await fetch(server.url()) == b"abcde"

    async def test_the_request_names_the_host_and_wants_no_compression(self) -> None:
        async with serving(saying(response())) as server:
            names = resolver({"pictures.test": ["127.0.0.1"]})
            await fetch(server.url("/a?b=1", host="Pictures.test"), resolver=names)
        head = server.requests[0].lower()
        assert head.startswith("get /a?b=1 http/1.1\r\n")
        assert f"\r\nhost: pictures.test:{server.port}\r\n" in head
        assert "\r\naccept-encoding: identity\r\n" in head
        assert "\r\nconnection: close\r\n" in head

    async def test_a_path_in_chinese_is_percent_encoded(self) -> None:
        async with serving(saying(response())) as server:
            await fetch(server.url("/图.png"))
        assert server.requests[0].startswith("GET /%E5%9B%BE.png ")

    @pytest.mark.parametrize(
        "type",
        [
            "image/png",
            "IMAGE/JPEG; charset=binary",
            "application/octet-stream",
            "binary/octet-stream",
            None,
        ],
    )
    async def test_a_picture_or_untyped_bytes_are_taken(self, type: str | None) -> None:
        async with serving(saying(response(type=type))) as server:
            assert await fetch(server.url()) == PNG

    async def test_another_type_is_refused_by_its_name(self) -> None:
        async with serving(saying(response(type="text/html; charset=utf-8"))) as server:
            error = await refusal(server.url())
        assert error.code == "invalid_image_type"
        assert error.message == f'image URL "{server.url()}": its type is "text/html", not image/*'

    @pytest.mark.parametrize("status", ["404 Not Found", "206 Partial", "304 Same", "500 Oops"])
    async def test_a_status_other_than_200_is_told(self, status: str) -> None:
        async with serving(saying(response(status=status))) as server:
            error = await refusal(server.url())
        assert error.code == "image_fetch_failed"
        assert f"status {status[:3]}, expected 200" in error.message

    async def test_a_compressed_body_is_refused(self) -> None:
        async with serving(saying(response(content_encoding="gzip"))) as server:
            error = await refusal(server.url())
        assert error.code == "image_fetch_failed"
        assert 'content-encoding "gzip"' in error.message

    async def test_an_empty_body_is_no_picture(self) -> None:
        async with serving(saying(response(b""))) as server:
            error = await refusal(server.url())
        assert (error.code, "no data" in error.message) == ("image_fetch_failed", True)

    async def test_a_body_cut_short_is_an_error(self) -> None:
        async with serving(saying(response(content_length=1000))) as server:
            assert (await refusal(server.url())).code == "image_fetch_failed"

    async def test_an_answer_that_is_not_http_is_an_error(self) -> None:
        async with serving(saying(b"220 smtp.test ESMTP\r\n")) as server:
            error = await refusal(server.url())
        assert error.code == "image_fetch_failed"
        assert "smtp" not in error.message

    async def test_a_refused_connection_is_an_error(self) -> None:
        async with serving(saying(response())) as server:
            url = server.url()
        error = await refusal(url)
        assert error.code == "image_fetch_failed"
        assert error.message.endswith("the server cannot be reached, or it broke off")

    @pytest.mark.parametrize("order", [["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
    async def test_the_first_address_that_takes_a_connection_serves(self, order: list[str]) -> None:
        async with serving(saying(response())) as server:
            names = resolver({"pictures.test": order})
            assert await fetch(server.url(host="pictures.test"), resolver=names) == PNG

    async def test_every_fetch_has_a_connection_of_its_own(self) -> None:
        """One made for a name, and by TLS to that name, must not serve another name."""
        names = resolver({"a.test": ["127.0.0.1"], "b.test": ["127.0.0.1"]})
        fetcher = Fetcher(MediaPolicy(allow_private=LOOPBACK), resolver=names)
        async with serving(saying(response())) as server:
            for host in ("a.test", "b.test", "b.test"):
                await fetcher.fetch(server.url(host=host))
            assert server.connections == 3
        await fetcher.aclose()

    async def test_the_connection_is_closed_when_the_answer_is_refused(self) -> None:
        closed = asyncio.Event()

        async def answer(path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(response(b"", status="404 Not Found", content_length=1000))
            while not writer.transport.is_closing():
                writer.write(b"x")
                await asyncio.sleep(0.01)
            closed.set()

        fetcher = Fetcher(MediaPolicy(allow_private=LOOPBACK))
        async with serving(answer) as server:
            with pytest.raises(MediaError):
                await fetcher.fetch(server.url())
            await asyncio.wait_for(closed.wait(), 5)
        await fetcher.aclose()

    async def test_the_pictures_of_a_request_have_room_together(self) -> None:
        """Counted as they come, so that many at once take no more."""
        fetcher = Fetcher(MediaPolicy(allow_private=LOOPBACK))
        async with serving(saying(response(b"x" * 600))) as server:
            room = Room(1500)
            tasks = [fetcher.fetch(server.url(), room) for _ in range(4)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, MediaError)]
        assert len(refused) == 2
        assert {r.code for r in refused} == {"image_too_large"}
        assert refused[0].message.endswith(
            "the images of this request are larger than 1,500 bytes together; send fewer or "
            "smaller ones"
        )
        await fetcher.aclose()

    async def test_names_are_looked_up_by_the_system_unless_told_otherwise(self) -> None:
        policy = MediaPolicy(allow_private=("127.0.0.0/8", "::1/128"))
        async with serving(saying(response())) as server:
            assert await fetch(server.url(host="localhost"), policy, resolver=resolve) == PNG

    @pytest.mark.parametrize("addresses", [[], ["not an address"]])
    async def test_a_name_without_an_address_is_an_error(self, addresses: list[str]) -> None:
        error = await refusal(
            "http://pictures.test/", resolver=resolver({"pictures.test": addresses})
        )
        assert error.code == "image_fetch_failed"
        assert error.message == (
            'image URL "http://pictures.test/": its host name cannot be resolved'
        )

    async def test_a_name_that_the_name_server_does_not_know_is_an_error(self) -> None:
        error = await refusal("http://unknown.test/")
        assert error.code == "image_fetch_failed"
        assert "cannot be resolved" in error.message

    async def test_proxies_of_the_environment_are_not_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with (
            serving(saying(response(b"proxy"))) as proxy,
            serving(saying(response())) as server,
        ):
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            assert await fetch(server.url()) == PNG
        assert proxy.connections == 0

    async def test_a_long_url_is_shortened_in_the_message(self) -> None:
        error = await refusal("http://unknown.test/" + "x" * 500)
        assert re.search(r'"http://unknown\.test/x{59}…"', error.message)


class TestSize:
    async def test_the_limit_itself_is_allowed(self) -> None:
        policy = MediaPolicy(max_image_bytes=len(PNG), allow_private=LOOPBACK)
        async with serving(saying(response())) as server:
            assert await fetch(server.url(), policy) == PNG

    async def test_a_declared_length_past_the_limit_is_refused_before_the_body(self) -> None:
        async def answer(path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(response(b"", content_length=10**12))
            await forever(path, writer)

        async with serving(answer) as server:
            error = await refusal(server.url())
        assert error.code == "image_too_large"
        assert error.message.endswith("it is larger than 20971520 bytes; send a smaller image")

    async def test_a_body_past_the_limit_is_left_unread(self) -> None:
        sent = 0

        async def answer(path: str, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(response(b"", content_length=None))
            while True:
                writer.write(bytes(2**16))
                sent += 2**16
                await writer.drain()

        policy = MediaPolicy(max_image_bytes=2**17, allow_private=LOOPBACK)
        async with serving(answer) as server:
            assert (await refusal(server.url(), policy)).code == "image_too_large"
        assert sent < 2**26  # the limit and what sockets hold

    async def test_no_more_is_read_than_a_lying_length_promised(self) -> None:
        async with serving(saying(response(b"x" * 10_000, content_length=4))) as server:
            assert await fetch(server.url()) == b"xxxx"


class TestTime:
    policy = MediaPolicy(timeout_s=0.3, allow_private=LOOPBACK)

    @staticmethod
    async def drip(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(
            response(b"", content_length=1000) if path == "/body" else b"HTTP/1.1 200 OK\r\n"
        )
        while True:
            writer.write(b"x: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    @pytest.mark.parametrize("path", ["/body", "/head"])
    async def test_a_server_that_drips_is_cut_off_after_the_total_time(self, path: str) -> None:
        async with serving(self.drip) as server:
            start = time.monotonic()
            error = await refusal(server.url(path), self.policy)
            assert time.monotonic() - start < 5
        assert error.code == "image_fetch_timeout"
        assert error.message.endswith("it has 3 s to connect, 0.3 s in all")

    async def test_a_silent_server_is_cut_off(self) -> None:
        async with serving(forever) as server:
            assert (await refusal(server.url(), self.policy)).code == "image_fetch_timeout"

    async def test_a_server_that_does_not_finish_connecting_is_cut_off_earlier(self) -> None:
        policy = MediaPolicy(connect_timeout_s=0.2, allow_private=LOOPBACK)
        async with serving(forever) as server:  # no TLS there
            start = time.monotonic()
            error = await refusal(server.url(scheme="https"), policy)
            assert time.monotonic() - start < 5
        assert error.code == "image_fetch_timeout"
        assert error.message.endswith("it has 0.2 s to connect, 10 s in all")

    async def test_the_time_of_a_look_up_counts(self) -> None:
        async def slow(host: str, port: int) -> list[str]:
            await asyncio.sleep(3600)
            return ["127.0.0.1"]

        error = await refusal("http://pictures.test/", self.policy, resolver=slow)
        assert error.code == "image_fetch_timeout"

    async def test_the_time_of_all_redirects_counts_together(self) -> None:
        async def answer(path: str, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.15)
            writer.write(response(b"", status="302 Found", location=f"{path}x"))

        policy = MediaPolicy(timeout_s=0.4, max_redirects=1000, allow_private=LOOPBACK)
        async with serving(answer) as server:
            assert (await refusal(server.url(), policy)).code == "image_fetch_timeout"

    async def test_a_cancelled_fetch_closes_its_connection(self) -> None:
        closed = asyncio.Event()

        async def answer(path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(response(b"", content_length=1000))
            while not writer.transport.is_closing():
                writer.write(b"x")
                await asyncio.sleep(0.01)
            closed.set()

        async with serving(answer) as server:
            task = asyncio.create_task(fetch(server.url()))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(closed.wait(), 5)


class TestRedirects:
    async def test_they_are_followed_relative_and_absolute(self) -> None:
        targets: dict[str, str | None] = {"/a": "b?c", "/b?c": "//pictures.test:{port}/d"}
        async with serving(redirects(targets)) as server:
            targets["/b?c"] = f"//pictures.test:{server.port}/d"
            names = resolver({"pictures.test": ["127.0.0.1"]})
            assert await fetch(server.url("/a"), resolver=names) == PNG
        assert [r.split(" ")[1] for r in server.requests] == ["/a", "/b?c", "/d"]

    async def test_no_cookie_is_carried_along(self) -> None:
        async with serving(redirects({"/a": "/b"})) as server:
            await fetch(server.url("/a"))
        assert "cookie" not in server.requests[1].lower()

    async def test_the_limit_itself_is_allowed_and_one_more_is_not(self) -> None:
        async with serving(redirects({"/0": "/1", "/1": "/2", "/2": "/3", "/3": "/4"})) as server:
            assert await fetch(server.url("/1")) == PNG
            error = await refusal(server.url("/0"))
        assert error.code == "image_fetch_failed"
        assert error.message.endswith("more than 3 redirects")

    async def test_a_loop_ends(self) -> None:
        async with serving(redirects({"/a": "/b", "/b": "/a"})) as server:
            await refusal(server.url("/a"))
        assert server.connections == 4

    async def test_one_into_the_own_network_is_not_followed(self) -> None:
        policy = MediaPolicy(allow_private=("127.0.0.1/32",))
        async with serving(saying(response()), host="127.0.0.2") as inside:
            targets: dict[str, str | None] = {"/a": inside.url(host="127.0.0.2")}
            async with serving(redirects(targets)) as server:
                error = await refusal(server.url("/a"), policy)
        assert inside.connections == 0
        assert error.code == "forbidden_image_url"
        assert "127.0.0.2" not in error.message

    async def test_one_to_a_host_that_is_not_allowed_is_not_followed(self) -> None:
        policy = MediaPolicy(allow_hosts=("127.0.0.1",), allow_private=LOOPBACK)
        async with serving(saying(response()), host="127.0.0.2") as other:
            targets: dict[str, str | None] = {"/a": other.url(host="127.0.0.2")}
            async with serving(redirects(targets)) as server:
                assert (await refusal(server.url("/a"), policy)).code == "forbidden_image_url"
        assert other.connections == 0

    @pytest.mark.parametrize(
        "location",
        [
            "file:///etc/passwd",
            "data:image/png;base64,QUJD",
            "ftp://h/",
            "http://u@h/",
            "/a b",
            None,
        ],
    )
    async def test_one_that_leads_nowhere_is_an_error(self, location: str | None) -> None:
        async with serving(redirects({"/a": location})) as server:
            error = await refusal(server.url("/a"))
        assert error.code == "image_fetch_failed"
        assert "redirected to a URL that cannot be used" in error.message
        assert "passwd" not in error.message

    async def test_the_host_is_resolved_once_per_hop_and_that_address_is_used(self) -> None:
        """A name that turns to another address after it was checked (DNS rebinding)."""
        answers = [["127.0.0.1"], ["127.0.0.1"], ["127.0.0.2"]]
        asked = []

        async def rebinding(host: str, port: int) -> list[str]:
            asked.append((host, port))
            return answers[len(asked) - 1]

        policy = MediaPolicy(allow_private=("127.0.0.1/32",))
        async with serving(redirects({"/a": "/b"})) as server:
            url = server.url("/a", host="rebind.test")
            assert await fetch(url, policy, resolver=rebinding) == PNG
        assert asked == [("rebind.test", server.port)] * 2


class TestTls:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> Path:
        """A self-signed certificate for pictures.test, with its key."""
        x509 = pytest.importorskip("cryptography.x509")
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures.test")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName("pictures.test")]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        file = tmp_path / "certificate.pem"
        file.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return file

    @pytest.fixture
    def server_side(self, certificate: Path) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        return context

    names = staticmethod(resolver({h: ["127.0.0.1"] for h in ("pictures.test", "other.test")}))

    async def test_the_handshake_names_the_host_and_not_its_address(
        self, certificate: Path, server_side: ssl.SSLContext
    ) -> None:
        asked_for: list[str | None] = []
        server_side.sni_callback = lambda _socket, name, _context: asked_for.append(name)
        trust = ssl.create_default_context(cafile=str(certificate))
        async with serving(saying(response()), tls=server_side) as server:
            url = server.url(host="pictures.test", scheme="https")
            assert await fetch(url, resolver=self.names, ssl_context=trust) == PNG
        assert asked_for == ["pictures.test"]

    async def test_a_certificate_for_another_name_is_refused(
        self, certificate: Path, server_side: ssl.SSLContext
    ) -> None:
        trust = ssl.create_default_context(cafile=str(certificate))
        async with serving(saying(response()), tls=server_side) as server:
            url = server.url(host="other.test", scheme="https")
            error = await refusal(url, resolver=self.names, ssl_context=trust)
        assert error.code == "image_fetch_failed"
        assert server.requests == []

    async def test_a_certificate_that_nobody_signed_is_refused(
        self, server_side: ssl.SSLContext
    ) -> None:
        async with serving(saying(response()), tls=server_side) as server:
            url = server.url(host="pictures.test", scheme="https")
            error = await refusal(url, resolver=self.names, ssl_context=None)
        assert error.code == "image_fetch_failed"
        assert server.requests == []


class TestHostileUrls:
    @pytest.mark.parametrize("url", ADDRESSES_INSIDE + NAMES_INSIDE)
    async def test_nothing_inside_is_connected_to(self, url: str) -> None:
        async with serving(saying(response())) as server:
            # With the port allowed, only the address can be the reason.
            policy = MediaPolicy(allowed_ports=(80, server.port), timeout_s=2)
            error = await refusal(url.format(port=server.port), policy, resolver=resolver(NAMES))
        assert server.connections == 0
        assert error.code == "forbidden_image_url"
        assert error.message.endswith(
            ": the host of this URL is not a public address; use one that is, or send the image as "
            "a data URL"
        )

    @pytest.mark.parametrize("url", MALFORMED)
    async def test_a_malformed_url_is_not_even_looked_up(self, url: str) -> None:
        async with serving(saying(response())) as server:
            # Even where the network is allowed and names resolve.
            error = await refusal(url.replace("{port}", str(server.port)), resolver=resolver(NAMES))
        assert server.connections == 0
        assert error.code == "invalid_image_url"

    @pytest.mark.parametrize(
        "url",
        [
            "HTTP://127.0.0.1:{port}/",
            "http://127.0.0.1.:{port}/",
            "http://inside.test:{port}/",
            "http://mapped.test:{port}/",
            "http://[::ffff:127.0.0.1]:{port}/",
            "http://127。0。0。1:{port}/",
        ],
    )
    async def test_the_same_urls_reach_the_server_once_its_network_is_allowed(
        self, url: str
    ) -> None:
        """The control: it is the policy that kept them out."""
        async with serving(saying(response())) as server:
            names = resolver(NAMES)
            assert await fetch(url.format(port=server.port), resolver=names) == PNG

    async def test_an_open_and_a_closed_port_inside_get_the_same_answer(self) -> None:
        policy = MediaPolicy(allowed_ports=tuple(range(2**16)))
        async with serving(saying(response())) as server:
            opened = await refusal(server.url("/"), policy)
        closed = await refusal(server.url("/"), policy)
        assert (opened.message, opened.code) == (closed.message, closed.code)

    async def test_the_message_does_not_tell_what_a_name_resolves_to(self) -> None:
        error = await refusal("http://inside.test/", MediaPolicy(), resolver=resolver(NAMES))
        assert "127" not in error.message

    @pytest.mark.parametrize("port", [22, 6379, 8080])
    async def test_a_public_host_is_asked_on_allowed_ports_only(self, port: int) -> None:
        names = resolver({"public.test": ["93.184.215.14"]})
        error = await refusal(f"http://public.test:{port}/", MediaPolicy(), resolver=names)
        assert error.code == "forbidden_image_url"
        assert error.message.endswith(f"port {port} is not allowed; use 80, 443")

    async def test_a_name_half_of_which_is_allowed_private_keeps_to_allowed_ports(self) -> None:
        names = resolver({"mixed.test": ["127.0.0.1", "93.184.215.14"]})
        error = await refusal("http://mixed.test:8080/", resolver=names)
        assert "port 8080 is not allowed" in error.message

    @pytest.mark.parametrize(
        ("host", "allowed"),
        [
            ("pictures.test", True),
            ("PICTURES.test.", True),
            ("a.cdn.test", True),
            ("a.b.cdn.test", True),
            ("cdn.test", False),
            ("evilcdn.test", False),
            ("pictures.test.evil.test", False),
            ("127.0.0.1", False),
        ],
    )
    async def test_allow_hosts_narrows_to_names_and_what_is_below_them(
        self, host: str, allowed: bool
    ) -> None:
        policy = MediaPolicy(allow_hosts=("Pictures.test", "*.cdn.test"), allow_private=LOOPBACK)
        names = resolver({h.lower().rstrip("."): ["127.0.0.1"] for h in [host]})
        async with serving(saying(response())) as server:
            if allowed:
                assert await fetch(server.url(host=host), policy, resolver=names) == PNG
            else:
                error = await refusal(server.url(host=host), policy, resolver=names)
                assert error.code == "forbidden_image_url"
                assert "not among those that this server fetches from" in error.message
        assert server.connections == int(allowed)

    async def test_allow_hosts_does_not_open_the_own_network(self) -> None:
        policy = MediaPolicy(allow_hosts=("inside.test",))
        error = await refusal("http://inside.test/", policy, resolver=resolver(NAMES))
        assert "not a public address" in error.message

    def test_a_network_that_is_none_is_a_configuration_error(self) -> None:
        with pytest.raises(ConfigError, match=r"allow_private takes networks .* '10\.0\.0'"):
            Fetcher(MediaPolicy(allow_private=("10.0.0",)))

    url_fetcher = Fetcher(MediaPolicy(allow_hosts=()), resolver=resolver({}))

    @given(
        st.one_of(
            st.text(max_size=60),
            st.text("htps:/@[]%.0x1a中\\ #?;&", max_size=40).map("http://".__add__),
        )
    )
    def test_whatever_the_url_the_only_error_is_a_media_error(self, url: str) -> None:
        with pytest.raises(MediaError) as caught:
            asyncio.run(self.url_fetcher.fetch(url))
        assert caught.value.message.isprintable()


class TestIsPublic:
    @pytest.mark.parametrize(
        "address",
        ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
    )
    def test_addresses_of_the_internet_are(self, address: str) -> None:
        assert is_public(ipaddress.ip_address(address))

    @pytest.mark.parametrize(
        "address",
        """0.0.0.0 0.1.2.3 10.1.2.3 100.64.0.1 100.127.255.254 127.0.0.1 168.63.129.16 169.254.1.1
        172.16.0.1 172.31.255.255 192.0.0.1 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1
        198.51.100.1 203.0.113.1 224.0.0.1 239.1.2.3 240.0.0.1 255.255.255.255
        :: ::1 ::8.8.8.8 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::10.0.0.1
        64:ff9b:1::808:808 100::1 2001::1 2001:db8::1 2002:808:808:: 3fff::1 4000::1 5f00::1
        fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 ff0e::1""".split(),  # noqa: SIM905 - a table
    )
    def test_all_others_are_not(self, address: str) -> None:
        assert not is_public(ipaddress.ip_address(address))

    @given(st.ip_addresses(v=4))
    def test_an_ipv4_address_stays_what_it_is_inside_an_ipv6_one(
        self, address: ipaddress.IPv4Address
    ) -> None:
        for prefix in ("::ffff:0:0", "64:ff9b::"):
            wrapped = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(address))
            assert is_public(wrapped) == is_public(address)


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class TestDataUrls:
    fetcher = Fetcher(MediaPolicy(max_image_bytes=3 * 2**20))

    @given(st.binary(min_size=1, max_size=100))
    def test_what_is_encoded_comes_back(self, content: bytes) -> None:
        assert asyncio.run(self.fetcher.fetch(data_url(content))) == content

    @pytest.mark.parametrize("num_bytes", [2**20, 2**20 + 1, 3 * 2**20 - 1, 3 * 2**20])
    async def test_large_ones_come_back_too(self, num_bytes: int) -> None:
        content = bytes(range(251)) * (num_bytes // 251 + 1)
        content = content[:num_bytes]
        assert await self.fetcher.fetch(data_url(content)) == content

    async def test_large_ones_are_decoded_off_the_event_loop(self) -> None:
        url = data_url(bytes(3 * 2**20))
        task = asyncio.create_task(self.fetcher.fetch(url))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        # Decoded on the loop, the task would be done after the first turn.
        assert turns > 5

    @pytest.mark.parametrize(
        "head",
        [
            "data:image/png;base64,",
            "DATA:IMAGE/PNG;BASE64,",
            "data:;base64,",
            "data:application/octet-stream;base64,",
            "data:image/svg+xml;charset=utf-8;base64,",
        ],
    )
    async def test_heads_in_use_are_taken(self, head: str) -> None:
        assert await self.fetcher.fetch(head + "QUJD") == b"ABC"

    @pytest.mark.parametrize(
        "url",
        [
            "data:",
            "data:image/png",
            "data:,abc",
            "data:image/png,%89PNG",
            "data:image/png;charset=utf-8,abc",
            "data:base64,QUJD",
            "data:image/png;base64",
            "data:image/png;base64;,QUJD",
            "data:image/png;" + "a" * 300 + ";base64,QUJD",
        ],
    )
    async def test_one_that_is_not_marked_as_base64_is_refused(self, url: str) -> None:
        error = await refusal(url)
        assert error.code == "invalid_image_url"
        assert error.message == "image data URL: it must look like data:image/png;base64,…"

    @pytest.mark.parametrize(
        "data",
        [
            "",
            "Q",
            "QQ",
            "QUI",
            "QQ=",
            "=QQQ",
            "====",
            "QQ==QQ==",
            "QUJD\n",
            "QU JD",
            "QU%4A",
            "QUJD%3D",
            "-_-_",
            "中文中文",
            "QUJD" * 2**18 + "QQ==" + "QUJD" * 2**18,  # padding where a slice ends
        ],
    )
    async def test_what_is_not_base64_is_refused(self, data: str) -> None:
        error = await refusal(f"data:image/png;base64,{data}")
        assert error.code == "invalid_image_url"
        assert "its data is not base64 (with padding; no line breaks" in error.message

    async def test_padding_at_the_end_of_an_inner_slice_is_refused(self) -> None:
        inner = base64.b64encode(bytes(256 * 1024 // 4 * 3 - 1)).decode()
        assert inner.endswith("=")
        assert (await refusal(f"data:;base64,{inner}{inner}")).code == "invalid_image_url"

    async def test_another_type_is_refused_by_its_name(self) -> None:
        error = await refusal("data:text/html;base64,QUJD")
        assert error.code == "invalid_image_type"
        assert error.message == 'image data URL: its type is "text/html", not image/*'

    async def test_the_size_is_checked_to_the_byte_and_before_decoding(self) -> None:
        policy = MediaPolicy(max_image_bytes=4)
        assert await fetch(data_url(b"1234"), policy) == b"1234"
        assert (await refusal(data_url(b"12345"), policy)).code == "image_too_large"
        assert (await refusal("data:;base64,!!!!!!!!", policy)).code == "image_too_large"

    @pytest.mark.parametrize("before", ["", " ", "view-source:", "http://h/ "])
    async def test_its_content_is_in_no_message(self, before: str) -> None:
        error = await refusal(f"{before}data:image/png;base64,SECRET!!")
        assert "SECRET" not in error.message


def test_an_error_survives_the_way_between_processes() -> None:
    error = MediaError("what, the value, what to do", code="image_fetch_failed")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.code, copy.status) == (error.message, error.code, 400)
