"""A real S3 server on this machine: moto's, as a process of its own, spoken to over HTTP.

    with s3_server() as server:
        bucket = server.make_bucket()
        store = ObjectStore.open(server.url(bucket, "prefix"))  # with server.env in the environment

It keeps everything in memory and takes any key. tests/registry/conftest.py has the fixtures.

moto answers `If-None-Match: *` by looking first and writing then, in threads: between the two
another writer could come. (None did in 2,700 tries of six processes at 450 keys, but a test must
not hang on that.) So this process lets one conditional write through at a time, and is then as
atomic as S3 says it is.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import httpx

START_S = 60
NO_PROXY = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


@dataclass(frozen=True)
class S3Server:
    """Where the server listens, and what a client needs in its environment."""

    endpoint: str
    region: str = "eu-west-1"  # not the default, so that a region that is dropped is seen
    pid: int = 0
    env: dict[str, str] = field(
        default_factory=lambda: {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            # No client may go and ask the network who this machine is.
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )

    def make_bucket(self, name: str | None = None) -> str:
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        place = f"<LocationConstraint>{self.region}</LocationConstraint>"
        body = f"<CreateBucketConfiguration>{place}</CreateBucketConfiguration>"
        # The server reads the region out of the signature, which it does not check.
        scope = f"testing/20250101/{self.region}/s3/aws4_request"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}"}
        httpx.put(f"{self.endpoint}/{name}", content=body, headers=headers).raise_for_status()
        return name

    def url(self, bucket: str, prefix: str = "", *, endpoint: str | None = None) -> str:
        """The storage setting of a bucket; `endpoint` names a proxy in front of the server."""
        path = f"{bucket}/{prefix}".rstrip("/")
        where = endpoint or self.endpoint
        return f"s3://{path}?endpoint={where}&region={self.region}&path_style=true"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with no bucket, until the end of the block."""
    port = free_port()
    server = S3Server(f"http://127.0.0.1:{port}")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, str(port)],
        env={**os.environ, **server.env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a line for every request
    )
    try:
        _wait_until_it_answers(server.endpoint, process)
        yield replace(server, pid=process.pid)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def credentials(server: S3Server) -> Iterator[None]:
    """The environment of a client of the server, and nothing of this machine's own AWS settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with mock.patch.dict(os.environ, {**kept, **server.env, **NO_PROXY}, clear=True):
        yield


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_it_answers(endpoint: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended with {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{endpoint}/moto-api/data.json", timeout=5).raise_for_status()
            return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not answer on {endpoint} within {START_S} s")


def serve(port: int) -> None:
    """Runs moto on a port, for ever."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def atomic(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        conditional = "HTTP_IF_NONE_MATCH" in environ and environ["REQUEST_METHOD"] == "PUT"
        with one_at_a_time if conditional else contextlib.nullcontext():
            answer: Iterable[bytes] = app(environ, start_response)
            return answer

    run_simple("127.0.0.1", port, atomic, threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
