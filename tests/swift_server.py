"""OpenStack Swift with its S3 interface on this machine: one proxy, one replica, one folder.

An S3-compatible server that shares no code with moto. It is four processes (proxy, account,
container, object) on free ports, without memcached, with one user in the configuration (tempauth).
Needs the package `swift`, and a file system with extended attributes.
"""

import contextlib
import os
import pwd
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import httpx
import obstore
from obstore.store import S3Store

from tests.s3_server import free_port

STORAGE = {"account": "account", "container": "container", "object": "obj"}  # server -> module
START_S = 60
ACCOUNT, USER, SECRET = "test", "tester", "testing"
PYTHON = (sys.executable, "-W", "ignore")  # eventlet warns that it is deprecated
# Swift takes swift.conf from /etc/swift unless it is told otherwise before anything else loads.
SERVER = """
import importlib, sys
module, conf, folder = sys.argv[1:4]
sys.argv = [module, conf, "-v"]
from swift.common.utils import set_swift_dir
set_swift_dir(folder)
importlib.import_module(f"swift.{module}.server").main()
"""
# One device, one replica, 2**4 partitions, for each storage server.
RINGS = """
import sys
from swift.common.ring import RingBuilder
for word in sys.argv[1:]:
    name, port = word.split(":")
    builder = RingBuilder(4, 1, 0)
    place = {"ip": "127.0.0.1", "port": int(port), "device": "d1"}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, **place})
    builder.rebalance()
    builder.get_ring().save(f"{name}.ring.gz")
"""
SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = test
[storage-policy:0]
name = one
default = yes
"""


@dataclass(frozen=True)
class SwiftServer:
    """Where the S3 interface listens, and what a client needs in its environment."""

    endpoint: str
    region: str = "us-east-1"
    env: dict[str, str] = field(
        default_factory=lambda: {
            "AWS_ACCESS_KEY_ID": f"{ACCOUNT}:{USER}",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )

    def make_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        store = S3Store(
            name,
            config={
                "endpoint": self.endpoint,
                "region": self.region,
                "access_key_id": self.env["AWS_ACCESS_KEY_ID"],
                "secret_access_key": self.env["AWS_SECRET_ACCESS_KEY"],
                "virtual_hosted_style_request": False,
            },
        )
        # obstore makes no buckets, but signs the request that makes one.
        httpx.put(obstore.sign(store, "PUT", "", timedelta(minutes=1))).raise_for_status()
        return name

    def url(self, bucket: str, prefix: str = "") -> str:
        """The storage setting of a bucket."""
        path = f"{bucket}/{prefix}".rstrip("/")
        return f"s3://{path}?endpoint={self.endpoint}&region={self.region}&path_style=true"


def missing(folder: Path) -> str | None:
    """Why Swift cannot run with its data in `folder`, or None."""
    if find_spec("swift") is None:
        return "needs the package swift"
    probe = folder / "xattr"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.metadata", b"x" * 1024)
    except OSError as e:
        return f"Swift needs extended attributes in {folder}: {e}"
    return None


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[SwiftServer]:
    """Runs Swift with everything it writes in `folder`; stops it at the end."""
    ports = {name: free_port() for name in (*STORAGE, "proxy")}
    (folder / "devices" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text(SWIFT_CONF)
    for name in STORAGE:
        (folder / f"{name}.conf").write_text(_storage_conf(folder, name, ports[name]))
    (folder / "proxy.conf").write_text(_proxy_conf(folder, ports["proxy"]))
    rings = [f"{name}:{ports[name]}" for name in STORAGE]
    subprocess.run([*PYTHON, "-c", RINGS, *rings], cwd=folder, check=True)
    server = SwiftServer(f"http://127.0.0.1:{ports['proxy']}")
    with contextlib.ExitStack() as running:
        for name, module in {**STORAGE, "proxy": "proxy"}.items():
            running.enter_context(_process(folder, name, module))
        _await(f"{server.endpoint}/healthcheck", folder)
        yield server


def _default(folder: Path, port: int) -> str:
    user = pwd.getpwuid(os.getuid()).pw_name
    return f"""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
recon_cache_path = {folder}
"""


def _storage_conf(folder: Path, name: str, port: int) -> str:
    return f"""{_default(folder, port)}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
fallocate_reserve = 0
"""


def _proxy_conf(folder: Path, port: int) -> str:
    return f"""{_default(folder, port)}
[pipeline:main]
pipeline = catch_errors healthcheck cache listing_formats s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{free_port()}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = {SwiftServer.region}
min_segment_size = 1
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCOUNT}_{USER} = {SECRET} .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


@contextlib.contextmanager
def _process(folder: Path, name: str, module: str) -> Iterator[None]:
    conf = folder / f"{name}.conf"
    command = [*PYTHON, "-c", SERVER, module, str(conf), str(folder)]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(url: str, folder: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    log = (folder / "proxy.log").read_text()[-2000:]
    raise RuntimeError(f"Swift did not answer within {START_S} s:\n{log}")
