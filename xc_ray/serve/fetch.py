"""image_url -> bytes: data URLs, and http(s) within limits of host, size, type and time.

    data:    ──> length ──> decode ──> bytes
    http(s): ──> parse ──> resolve ──> check every address ──> connect to those ──> bytes
                   └────────────────── redirect: all of it again ──────────┘

A URL is parsed once and resolved once per hop; what was checked is what is connected to, so that
neither a second parser nor a second look-up of the name can lead into the server's own network. The
name itself stays in the Host header and in the TLS handshake.
"""

import asyncio
import base64
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import httpx

from xc_ray.errors import ConfigError, MediaError

MIB: Final = 2**20
SHOWN_CHARS: Final = 80  # of a URL in a message

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
# (host, port) -> every address of the host; OSError if it has none.
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

logger = logging.getLogger("ray.serve")

_MAX_URL_CHARS: Final = 8192
_MAX_DATA_HEAD_CHARS: Final = 256
_MAX_ADDRESSES: Final = 4  # of one host, tried in turn
_INLINE_CHARS: Final = MIB  # of base64; more is decoded in a thread
_SLICE_CHARS: Final = 256 * 1024  # of base64, about 1 ms; a slice holds the interpreter's lock
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# The second is what S3 says of an object that was stored without a type.
_UNTYPED: Final = frozenset({"", "application/octet-stream", "binary/octet-stream"})

_FORBIDDEN_CHARACTER: Final = re.compile(r"[\x00-\x20\x7f-\xa0\\\s\ud800-\udfff]")
_USERINFO: Final = re.compile(r"([a-z][a-z0-9+.-]*:)?//[^/?#]*@", re.IGNORECASE)
_HOST_NAME: Final = re.compile(r"(?=.{1,253}$)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")

_GLOBAL_IPV6: Final = ipaddress.ip_network("2000::/3")  # what is assigned to the public so far
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
# Not private by `ipaddress`, and still not the public internet.
_NOT_PUBLIC: Final[tuple[Network, ...]] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's services of the host
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # protocol assignments, with Teredo
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
    )
)


@dataclass(frozen=True)
class MediaPolicy:
    """Where pictures may come from, and how much of them.

    Attributes:
        max_image_bytes: of one picture, as sent.
        timeout_s: for a whole fetch: look-up, redirects and body.
        connect_timeout_s: for one connection, TLS included.
        max_redirects: hops after the first.
        allow_hosts: if given, the only hosts to fetch from, redirects included; `*.example.org`
            stands for every name below example.org.
        allow_private: CIDR networks to fetch from although they are not public, on any port.
        allowed_ports: of public hosts.
    """

    max_image_bytes: int = 20 * MIB
    timeout_s: float = 10.0
    connect_timeout_s: float = 3.0
    max_redirects: int = 3
    allow_hosts: tuple[str, ...] | None = None
    allow_private: tuple[str, ...] = ()
    allowed_ports: tuple[int, ...] = (80, 443)


@dataclass
class Room:
    """Bytes that the pictures of one request may have together, of those that are fetched.

    `taken` is told how many have come, and may raise.
    """

    max_bytes: int
    used: int = 0
    taken: Callable[[int], None] = lambda _: None

    def take(self, num_bytes: int) -> None:
        """Raises MediaError if there are not so many left, or what `taken` raises."""
        self.used += num_bytes
        if self.used > self.max_bytes:
            problem = (
                f"the images of this request are larger than {self.max_bytes:,} bytes together; "
                "send fewer or smaller ones"
            )
            raise MediaError(problem, code="image_too_large")
        self.taken(num_bytes)


async def resolve(host: str, port: int) -> list[str]:
    """Every address of `host` in the system's order of preference.

    Raises:
        OSError: it has none, or the look-up failed.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: Address) -> bool:
    """Whether `address` is of the public internet, the IPv4 address inside an IPv6 one included."""
    address = _unwrapped(address)
    if any(address in network for network in _NOT_PUBLIC):
        return False
    if address.is_multicast or not address.is_global:
        return False
    return address.version == 4 or address in _GLOBAL_IPV6


def _unwrapped(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) % 2**32)
    return address


class Fetcher:
    """Fetches pictures under a policy; one instance serves a whole process.

    `resolver` looks host names up, `ssl_context` says whom to trust (default: certifi's list).

    Raises:
        ConfigError: `allow_private` holds what is not a network.
    """

    def __init__(
        self,
        policy: MediaPolicy | None = None,
        *,
        resolver: Resolver = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy or MediaPolicy()
        self._allow_private = _networks(self._policy.allow_private)
        self._resolver = resolver
        # The bare transport: no proxy, cookies, redirects or decompression. No connection is kept:
        # they are pooled by address, and one that was made for a name must not serve another.
        self._transport = httpx.AsyncHTTPTransport(
            verify=ssl_context or True,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def fetch(self, url: str, room: Room | None = None) -> bytes:
        """The bytes behind `url`: one at least, `max_image_bytes` at most, and no more than `room`.

        Raises:
            MediaError: with code invalid_image_url, forbidden_image_url, invalid_image_type,
                image_too_large, image_fetch_failed or image_fetch_timeout. The message shows the
                URL as it was sent, shortened, and never an address that its host resolves to.
        """
        try:
            if url[:5].lower() == "data:":
                return await _decode(url, self._policy.max_image_bytes)
            async with asyncio.timeout(self._policy.timeout_s):
                return await self._follow(url, room or Room(self._policy.max_image_bytes))
        except MediaError as exc:
            raise MediaError(f"{_shown(url)}: {exc.message}", code=exc.code) from None
        except (TimeoutError, httpx.TimeoutException):
            connect_s, all_s = self._policy.connect_timeout_s, self._policy.timeout_s
            problem = (
                f"the server took too long; it has {connect_s:g} s to connect, {all_s:g} s in all"
            )
            raise MediaError(f"{_shown(url)}: {problem}", code="image_fetch_timeout") from None
        except httpx.TransportError as exc:
            logger.info("image not fetched: %r", exc)
            problem = "the server cannot be reached, or it broke off"
            raise MediaError(f"{_shown(url)}: {problem}", code="image_fetch_failed") from None

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()

    async def _follow(self, text: str, room: Room) -> bytes:
        url = _parse(text)
        for _ in range(self._policy.max_redirects + 1):
            response = await self._open(url)
            try:
                if response.status_code not in _REDIRECTS:
                    return await _body(response, self._policy.max_image_bytes, room)
                url = _redirected(url, response.headers.get("location", ""))
            finally:
                await response.aclose()
        problem = f"more than {self._policy.max_redirects} redirects"
        raise MediaError(problem, code="image_fetch_failed")

    async def _open(self, url: httpx.URL) -> httpx.Response:
        """The response of the first address that takes a connection, its body not yet read."""
        addresses = await self._checked_addresses(url)
        for address in addresses[:-1]:
            try:
                return await self._get(url, address)
            except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                logger.info("image host: next address after %r", exc)
        return await self._get(url, addresses[-1])

    async def _get(self, url: httpx.URL, address: Address) -> httpx.Response:
        timeout = httpx.Timeout(self._policy.timeout_s, connect=self._policy.connect_timeout_s)
        request = httpx.Request(
            "GET",
            url.copy_with(host=str(address)),
            headers={
                "Host": url.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "Connection": "close",
                "User-Agent": "xc_ray",
            },
            extensions={
                "timeout": timeout.as_dict(),
                "sni_hostname": _host(url),  # the certificate is checked against it, too
            },
        )
        return await self._transport.handle_async_request(request)

    async def _checked_addresses(self, url: httpx.URL) -> list[Address]:
        host = _host(url)
        port = _port(url)
        if not self._host_allowed(host):
            problem = "its host is not among those that this server fetches from"
            raise MediaError(problem, code="forbidden_image_url")
        literal = _literal(host)
        addresses = [literal] if literal else await self._resolved(host, port)
        trusted = [any(_unwrapped(a) in n for n in self._allow_private) for a in addresses]
        if not all(t or is_public(a) for t, a in zip(trusted, addresses, strict=True)):
            problem = (
                "the host of this URL is not a public address; use one that is, or send the image "
                "as a data URL"
            )
            raise MediaError(problem, code="forbidden_image_url")
        if port not in self._policy.allowed_ports and not all(trusted):
            allowed = ", ".join(map(str, self._policy.allowed_ports))
            problem = f"port {port} is not allowed; use {allowed}"
            raise MediaError(problem, code="forbidden_image_url")
        return addresses[:_MAX_ADDRESSES]

    async def _resolved(self, host: str, port: int) -> list[Address]:
        try:
            addresses = [ipaddress.ip_address(a) for a in await self._resolver(host, port)]
        except (OSError, ValueError) as exc:
            logger.info("image host not resolved: %r", exc)
            addresses = []
        if not addresses:
            raise MediaError("its host name cannot be resolved", code="image_fetch_failed")
        return addresses

    def _host_allowed(self, host: str) -> bool:
        if self._policy.allow_hosts is None:
            return True
        patterns = [pattern.lower() for pattern in self._policy.allow_hosts]
        return any(p == host or (p[:2] == "*." and host.endswith(p[1:])) for p in patterns)


def _networks(cidrs: Iterable[str]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(cidr) for cidr in cidrs)
    except ValueError as exc:
        raise ConfigError(f"allow_private takes networks such as 10.0.0.0/8: {exc}") from None


def _parse(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """An absolute http(s) URL with a host that is a name or a plain address."""
    if len(text) > _MAX_URL_CHARS:
        raise _invalid(f"it has {len(text)} characters, more than {_MAX_URL_CHARS}")
    if _FORBIDDEN_CHARACTER.search(text):
        raise _invalid("it holds a space, control character or backslash; percent-encode it")
    if _USERINFO.match(text):
        raise _invalid("it holds a user name or password; leave them out")
    try:
        url = base.join(text) if base and text else httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise _invalid("it is not a valid URL") from None
    if url.scheme not in ("http", "https"):
        raise _invalid("it must begin with http://, https:// or data:")
    if not 0 < _port(url) < 2**16:
        raise _invalid("its port is out of range")
    _literal(_host(url))
    return url


def _redirected(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return _parse(location, base=url)
    except MediaError as exc:
        problem = f"redirected to a URL that cannot be used: {exc.message}"
        raise MediaError(problem, code="image_fetch_failed") from None


def _port(url: httpx.URL) -> int:
    default = 443 if url.scheme == "https" else 80
    return default if url.port is None else url.port


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii").removesuffix(".")


def _literal(host: str) -> Address | None:
    """The address that `host` is, None for a name; anything between the two is refused.

    What ends in a number is an address for the system's resolver (WHATWG URL, "ends in a number"),
    which would read 0177.1 and 2130706433 as 127.0.0.1.
    """
    try:
        if ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]):
            address = ipaddress.ip_address(host)
            if "%" not in host:
                return address
        elif _HOST_NAME.fullmatch(host):
            return None
    except ValueError:
        pass
    raise _invalid("its host is neither a name nor an address such as 93.184.215.14")


def _invalid(problem: str) -> MediaError:
    return MediaError(problem, code="invalid_image_url")


async def _body(response: httpx.Response, max_bytes: int, room: Room) -> bytes:
    _check_head(response, max_bytes)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        _check_size(len(body), max_bytes)
        room.take(len(chunk))
    if not body:
        raise MediaError("the server sent no data", code="image_fetch_failed")
    return bytes(body)


def _check_head(response: httpx.Response, max_bytes: int) -> None:
    if response.status_code != 200:
        problem = f"the server answered with status {response.status_code}, expected 200"
        raise MediaError(problem, code="image_fetch_failed")
    _check_type(response.headers.get("content-type", ""))
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        problem = f"the server sent content-encoding {_quoted(encoding)} unasked"
        raise MediaError(problem, code="image_fetch_failed")
    length = response.headers.get("content-length", "")
    if length.isdecimal():
        _check_size(int(length), max_bytes)


def _check_type(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _UNTYPED and not kind.startswith("image/"):
        raise MediaError(f"its type is {_quoted(kind)}, not image/*", code="invalid_image_type")


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        problem = f"it is larger than {max_bytes} bytes; send a smaller image"
        raise MediaError(problem, code="image_too_large")


async def _decode(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data URL (RFC 2397); its size is checked before it is decoded."""
    comma = url.find(",", 0, _MAX_DATA_HEAD_CHARS)
    kind, *parameters = url[len("data:") : max(comma, 0)].split(";")
    if comma < 0 or not parameters or parameters[-1].lower() != "base64":
        raise _invalid("it must look like data:image/png;base64,…")
    _check_type(kind)
    num_chars = len(url) - comma - 1
    num_padding = 2 - len(url[-2:].rstrip("="))
    _check_size(num_chars // 4 * 3 - num_padding, max_bytes)
    if num_chars <= _INLINE_CHARS:
        return _base64(url, comma + 1)
    return await asyncio.to_thread(_base64, url, comma + 1)


def _base64(text: str, start: int) -> bytes:
    """Decode from `start` on, in slices: one call over 20 MiB would hold up every other thread."""
    try:
        slices = [
            base64.b64decode(text[i : i + _SLICE_CHARS], validate=True)
            for i in range(start, len(text), _SLICE_CHARS)
        ]
    except ValueError:
        slices = []
    # Each slice may be padded by itself; only the end of the whole may.
    if not slices or text.find("=", start, len(text) - 2) >= 0:
        raise _invalid("its data is not base64 (with padding; no line breaks, no percent-encoding)")
    return b"".join(slices)


def _shown(url: str) -> str:
    if url[:5].lower() == "data:":
        return "image data URL"
    # A data URL behind a stray character is not shown either.
    in_there = "data:" in url[:SHOWN_CHARS].lower()
    return f"image URL of {len(url)} characters" if in_there else f"image URL {_quoted(url)}"


def _quoted(text: str) -> str:
    cut = text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in cut) + '"'
