"""`ray start` as its users run it: a head with its dashboard, more nodes, and jobs submitted to it.

All nodes are on this machine, each with a raylet, an object store and agents of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.serve_run import free_port
from tests.e2e.train_run import Training

BIN = Path(sys.executable).parent
START_LIMIT_S = 120.0  # of a loaded machine; an idle one with two cores takes about 10
TRAIN_FILE = "train.yaml"


@dataclass
class Node:
    """One `ray start --block`, and every process that it brought with it."""

    process: subprocess.Popen[bytes]
    log: Path
    agent_port: int  # of its dashboard agent

    @property
    def raylet(self) -> int:
        """The process id of the node's raylet."""
        (pid,) = self.named("/raylet/raylet ")
        return pid

    def named(self, words: str) -> list[int]:
        """The ids of the node's processes with these words in their command line."""
        return [pid for pid, title in self.processes().items() if words in title]

    def holds(self, pid: int) -> bool:
        """Whether a process of this id is the node's."""
        return pid in self.processes()

    def processes(self) -> dict[int, str]:
        """Its living processes with their command lines: its session's, and their descendants.

        The driver of a job has a session of its own.
        """
        seen = dict(_living())
        ours: set[int] = set()
        grown = {pid for pid, (_, session, _) in seen.items() if session == self.process.pid}
        while grown - ours:
            ours |= grown
            grown = {pid for pid, (parent, _, _) in seen.items() if parent in ours}
        return {pid: seen[pid][2] for pid in ours}

    def kill(self) -> None:
        """Whatever it takes, one process of its own after another."""
        while running := self.processes():
            for pid in running:
                _kill(pid)
            time.sleep(0.1)
            if self.process.poll() is not None and not self.processes():
                break
        self.process.wait(30)


@dataclass
class Cluster:
    """A running cluster; `nodes[0]` is the head."""

    home: Path
    environment: Mapping[str, str]
    port: int
    dashboard: str
    nodes: list[Node] = field(default_factory=list)
    num_started: int = 0
    metrics_port: int = 0  # of the head's exporter; 0: Ray chooses
    headers: Mapping[str, str] = field(default_factory=dict)  # of requests to the dashboard
    head_options: Sequence[str] = ()

    def start_head(self, num_cpus: float) -> Node:
        """The head, once it answers; a second time it takes the place of one that is dead."""
        folder = self.home / "ray"
        # The other nodes of a real cluster do not leave word on the head's machine that it runs.
        (folder / "ray_current_cluster").unlink(missing_ok=True)
        head = self._start(
            "--head",
            *("--port", str(self.port)),
            *("--dashboard-port", self.dashboard.rsplit(":", 1)[1]),
            *("--ray-client-server-port", str(free_port())),
            *("--temp-dir", str(folder)),
            *(("--metrics-export-port", str(self.metrics_port)) if self.metrics_port else ()),
            "--no-monitor",
            *self.head_options,
            num_cpus=num_cpus,
        )
        self.nodes = [head, *self.nodes[1:-1]]
        self.wait_until(lambda: self.num_alive() > 0, head)
        return head

    def add_node(self, num_cpus: float, **resources: float) -> Node:
        """One more node, once it says that it runs; it says that it has `resources`, GPU or own.

        The head's monitor reads the logs of all, for they are in one folder.
        """
        options = ("--address", f"127.0.0.1:{self.port}", "--include-log-monitor", "false")
        node = self._start(*options, num_cpus=num_cpus, **resources)
        self.wait_until(lambda: "Ray runtime started" in node.log.read_text(), node)
        return node

    def num_alive(self) -> int:
        """How many nodes the head believes to live."""
        answer = self.ask("/api/v0/nodes")
        found = answer.raise_for_status().json()["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in found)

    def status(self, name: str) -> str:
        """What the cluster says of a job."""
        answer = self.ask(f"/api/jobs/{name}")
        return str(answer.raise_for_status().json()["status"])

    def ask(self, path: str) -> httpx.Response:
        """What the head's dashboard answers."""
        url = f"{self.dashboard}{path}"
        return httpx.get(url, headers=dict(self.headers), timeout=30, trust_env=False)

    def wait_until(self, true: Callable[[], bool], node: Node) -> None:
        """Waits for `true()`; the node's last words are the message if it does not come true."""
        deadline = time.monotonic() + START_LIMIT_S
        while not _holds(true):
            if time.monotonic() > deadline or node.process.poll() is not None:
                raise AssertionError(node.log.read_text(errors="replace")[-4000:])
            time.sleep(0.2)

    def _start(self, *options: str, num_cpus: float, **resources: float) -> Node:
        agent_port = free_port()
        num_gpus = resources.pop("GPU", 0)  # float32 on CPU wherever the tests run
        log = self.home / f"node-{self.num_started}.log"
        self.num_started += 1
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    BIN / "ray", "start", "--block", *options,
                    "--num-cpus", f"{num_cpus:g}",
                    "--num-gpus", f"{num_gpus:g}",
                    "--resources", json.dumps(resources),
                    "--object-store-memory", "100000000",
                    "--dashboard-agent-listen-port", str(agent_port),
                    "--disable-usage-stats",
                ],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.nodes.append(Node(process, log, agent_port))
        return self.nodes[-1]


@contextmanager
def ray_cluster(
    num_cpus: float,
    metrics_port: int = 0,
    token: str = "",
    /,
    *,
    head_options: Sequence[str] = (),
    **more: str,
) -> Iterator[Cluster]:
    """A head with its dashboard, and Ray's exporter at `metrics_port`.

    `more` is for the environment of all its processes; `token` is what the head wants if that says
    so; `head_options` are more of its `ray start`.
    """
    # Not tmp_path: Ray puts sockets below, and the path of a socket may not be longer than 107.
    home = Path(tempfile.mkdtemp(prefix="xc-"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        **more,
    }
    port, dashboard = free_port(), free_port()
    cluster = Cluster(
        home,
        environment,
        port,
        f"http://127.0.0.1:{dashboard}",
        metrics_port=metrics_port,
        head_options=head_options,
    )
    if token:
        cluster.headers = {"Authorization": f"Bearer {token}"}
    try:
        cluster.start_head(num_cpus)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.kill()
        shutil.rmtree(home, ignore_errors=True)


class Job(Training):
    """`ray job submit --working-dir . -- python -m xc_ray train train.yaml` from a folder.

    What the command prints is what the job's driver says.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, config: Mapping[str, Any], *options: str
    ) -> None:
        self.cluster, self.config = cluster, config
        (folder / TRAIN_FILE).write_text(yaml.safe_dump(dict(config)))
        self.name = f"job-{time.monotonic_ns()}"
        self.log = folder.with_name(f"{folder.name}-{self.name}.log")  # not to be sent along
        self.out = self.log.with_suffix(".out")
        self.begun = time.monotonic()
        with self.log.open("w") as log, self.out.open("w") as out:
            self.process = subprocess.Popen(
                [
                    BIN / "ray", "job", "submit",
                    "--address", cluster.dashboard,
                    "--submission-id", self.name,
                    "--working-dir", ".",
                    "--", "python", "-m", "xc_ray", "train", TRAIN_FILE, *options,
                ],
                cwd=folder,
                env=cluster.environment,
                stdout=out,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def wait_for_step(self, step: int) -> float:
        """Until a step is told; seconds since the job was submitted."""
        self.wait_until(lambda: f"step {step}/" in self.text)
        return time.monotonic() - self.begun

    def wait(self, code: int = 0) -> dict[str, Any]:
        """The summary, once the job has ended."""
        found = self.process.wait(280)
        assert found == code, self.text[-6000:]
        lines = [line for line in self.text.splitlines() if line.startswith('{"name": ')]
        summary: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return summary

    @contextmanager
    def stopper(self) -> Iterator[Callable[[], None]]:
        """A function that is `ray job stop`, and returns once the job has ended.

        The command starts at once and is held back: by the time it has imported Ray, a run may be
        over.
        """
        held = "from ray.scripts.scripts import main; input(); main()"
        with subprocess.Popen(
            [
                sys.executable,
                "-c",
                held,
                "job",
                "stop",
                "--address",
                self.cluster.dashboard,
                self.name,
            ],
            env=self.cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as command:

            def stop() -> None:
                said, _ = command.communicate("\n", timeout=120)
                assert command.returncode == 0, said
                self.process.wait(60)

            try:
                yield stop
            finally:
                command.kill()


def _holds(true: Callable[[], bool]) -> bool:
    try:
        return true()
    except (httpx.HTTPError, KeyError, TypeError):  # the dashboard is not there yet
        return False


def _living() -> Iterator[tuple[int, tuple[int, int, str]]]:
    """Every process but zombies: parent, session, command line."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if fields[0] != "Z":
            yield int(entry.name), (int(fields[1]), int(fields[3]), title)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
