"""`serve run` as a subprocess, for the benchmarks: what a user starts, until it is ready."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[1]
READY_TIMEOUT_S = 400
# What Serve reads from the environment of every process.
MODES: dict[str, dict[str, str]] = {
    "default": {},
    "grpc": {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"},
    # Without HAProxy, and with direct ingress left on, no proxy would start.
    "throughput": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    },
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that are started meanwhile; the other modes' are taken away."""
    before = dict(os.environ)
    for name in {name for mode in MODES.values() for name in mode}:
        os.environ.pop(name, None)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def serving_args(
    port: int, *, replicas: Mapping[str, int] | None = None, **args: Any
) -> Iterator[str]:
    """serve_config.yaml on a port, with `args` on top of its own; gives the URL."""
    values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    values["applications"][0]["args"] |= args
    for deployment in values["applications"][0]["deployments"]:
        deployment["num_replicas"] = (replicas or {}).get(deployment["name"], 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump(values))
        with serving(path, port):
            yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def serving(serve_file: Path, port: int) -> Iterator[tuple[Path, float]]:
    """`serve run` until ready; gives its log file and the seconds it took."""
    log = serve_file.with_suffix(".log")
    started = time.monotonic()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(serve_file)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=15).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - started > READY_TIMEOUT_S:
                sys.exit(f"serve run did not get ready:\n{log.read_text()[-6000:]}")
            time.sleep(0.2)
        yield log, round(time.monotonic() - started, 1)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
