"""A real HTTP proxy in front of an S3 server: it counts, and breaks the answers it is told to.

    with s3_proxy(server.endpoint) as proxy:
        proxy.fault = lambda asked: "truncate" if asked.method == "GET" else None

Every request goes on to the server as it came, but for the faults, which are about the answer
(`skip_precondition` apart, which takes `If-None-Match` out of the request).
"""

import contextlib
import http.client
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[
    "truncate",  # half of the body, then the connection ends
    "short",  # half of the body, and a Content-Length that says so
    "long",  # a Content-Length of more than there is, then the connection ends
    "long_open",  # the same, and the connection stays open
    "flip",  # one bit of the body is another
    "whole",  # 200 and the whole object, where a range was asked for
    "503",
    "hang",  # no byte of an answer, until the proxy is closed
    "hang_body",  # the same after half of the body
    "skip_precondition",
]
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    number: int  # how often this method and path were asked for before

    @property
    def is_blob(self) -> bool:
        return self.method == "GET" and "/blobs/" in self.path


@dataclass
class Proxy:
    """A running proxy; `fault` may be replaced at any time."""

    endpoint: str
    fault: Callable[[Request], Fault | None] = lambda _: None
    requests: list[Request] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    counted: threading.Lock = field(default_factory=threading.Lock)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def ranges(self) -> Counter[tuple[str, str | None]]:
        """How often each range of each blob was read."""
        return Counter((asked.path, asked.range) for asked in self.requests if asked.is_blob)

    def count(self, method: str, path: str, range_: str | None) -> Request:
        with self.counted:
            asked = Request(method, path, range_, self.seen[method, path])
            self.seen[method, path] += 1
            self.requests.append(asked)
            return asked


@contextlib.contextmanager
def s3_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy on a free port, until the end of the block."""
    target = urlsplit(upstream).netloc
    proxy = Proxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.upstream = http.client.HTTPConnection(target, timeout=60)

        def finish(self) -> None:
            self.upstream.close()
            with contextlib.suppress(OSError):
                super().finish()

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:
                self.close_connection = True

        def answer(self) -> None:
            body = self._body()
            asked = proxy.count(self.command, self.path, self.headers.get("range"))
            fault = proxy.fault(asked)
            if fault == "503":
                return self._send(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            if fault == "hang":
                return self._hang()
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
            if fault == "skip_precondition":
                headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
            if fault == "whole":
                headers = {k: v for k, v in headers.items() if k.lower() != "range"}
            self.upstream.request(self.command, self.path, body=body, headers=headers)
            reply = self.upstream.getresponse()
            data = reply.read()
            kept = {k: v for k, v in reply.getheaders() if k.lower() not in HOP}
            length = int(reply.headers.get("content-length") or len(data))
            if self.command == "HEAD" or reply.status >= 300:
                fault = None
            self._break(reply.status, kept, data, length, fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def _break(
            self, status: int, headers: dict[str, str], data: bytes, length: int, fault: str | None
        ) -> None:
            half = data[: len(data) // 2]
            match fault:
                case "truncate":
                    self._send(status, headers, half, length)
                    self._cut()
                case "short":
                    self._send(status, headers, half)
                case "long":
                    self._send(status, headers, data, length + 1000)
                    self._cut()
                case "long_open":
                    self._send(status, headers, data, length + 1000)
                    self._hang()
                case "flip":
                    at = len(data) // 3
                    flipped = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
                    self._send(status, headers, flipped)
                case "hang_body":
                    self._send(status, headers, half, length)
                    self._hang()
                case _:
                    self._send(status, headers, data, length)

        def _send(
            self, status: int, headers: dict[str, str], body: bytes, length: int | None = None
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _cut(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def _hang(self) -> None:
            proxy.closing.wait(120)
            self._cut()

        def log_message(self, *_: object) -> None:
            """Keeps the test's output clean."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
