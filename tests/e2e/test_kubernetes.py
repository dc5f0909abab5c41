"""What the manifests of k8s/ run, as processes on this machine: no cluster of Kubernetes is needed.

`kubectl kustomize` renders an overlay; its `serveConfigV2` is deployed by `serve deploy` as KubeRay
does it, as soon as there is a head. Nodes are raylets with the sizes of the groups. Replaced are
names that only a cluster knows: addresses, ports (all nodes share this machine's), and mounts.

Where the manifests want GPUs, Ray is told that there are some. Nothing can compute on them: the
same shares are moved from `args`, by which replicas choose their device, to Serve's own options,
by which Ray places them; and the model is the demo one.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.adapters import write_adapter
from tests.e2e.ray_cluster import BIN, Node, ray_cluster
from tests.e2e.serve_cluster import ServeCluster, replica_pids
from tests.e2e.serve_run import ROOT, body, free_port
from tests.manifests import KUBECTL, Document, amounts, cluster, groups, of_kind, pods
from tests.s3_server import NO_PROXY, S3Server, credentials, s3_server
from xc_ray.hub import resolve_model
from xc_ray.keys import digest_of, new_key
from xc_ray.model.weights import Checkpoint
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry

REDIS = shutil.which("redis-server")
NEEDED = (KUBECTL, REDIS, shutil.which("wget"))

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(None in NEEDED, reason="needs kubectl, redis-server (Debian) and wget"),
]

PASSWORD = "0123456789abcdef"
DASHBOARD_PORT, AGENT_PORT, SERVE_PORT = 8265, 52365, 8000  # in the manifests
HERE = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR")  # folders of the image
Note = Callable[[str, object], None]


@pytest.fixture
def note(record_testsuite_property: Note) -> Note:
    """Keeps a figure with the results of the run."""
    return record_testsuite_property


@dataclass
class Deployed(ServeCluster):
    """An overlay's application; `url` is that of its workers, which the service leads to."""

    overlay: str
    key: str
    redis_command: list[str]
    redis: "subprocess.Popen[bytes]"
    s3: S3Server
    streaming: threading.Event = field(default_factory=threading.Event)

    def chat(self, model: str = "demo", key: str | None = None) -> httpx.Response:
        """A request of a few tokens, by the key of the key file unless told."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        url = f"{self.url}/v1/chat/completions"
        sent = body("12 + 30 = ", max_tokens=20, model=model)
        return httpx.post(url, json=sent, headers=headers, timeout=120, trust_env=False)

    def stream(self) -> str:
        """A long answer; its last event. `streaming` is set when it has begun."""
        sent = body("Who are you?", max_tokens=4000, ignore_eos=True, stream=True)
        headers = {"Authorization": f"Bearer {self.key}"}
        url, last = f"{self.url}/v1/chat/completions", ""
        options: dict[str, Any] = {"json": sent, "headers": headers, "timeout": 120}
        with httpx.stream("POST", url, trust_env=False, **options) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.streaming.set()
                    last = line.removeprefix("data: ")
        return last

    def answers(self, model: str = "demo") -> bool:
        try:
            return self.chat(model).status_code == 200
        except httpx.TransportError:
            return False

    def probe(self, kind: str, node: Node) -> int:
        """The exit code of a probe of a node's container, at the ports that it has here."""
        is_head = node is self.cluster.nodes[0]
        spec = pods(self.overlay)[
            "head" if is_head else f"worker {groups(self.overlay)[0]['groupName']}"
        ]
        command = spec["spec"]["containers"][0][kind]["exec"]["command"]
        here = {
            AGENT_PORT: node.agent_port,
            DASHBOARD_PORT: self.cluster.dashboard.rsplit(":", 1)[1],
            SERVE_PORT: self.url.rsplit(":", 1)[1],
        }
        script = command[-1]
        for theirs, ours in here.items():
            assert f":{theirs}/" in script or theirs != AGENT_PORT
            script = script.replace(f":{theirs}/", f":{ours}/")
        done = subprocess.run(
            [*command[:-1], script],
            env={**os.environ, **NO_PROXY},
            check=False, capture_output=True, timeout=60,
        )  # fmt: skip
        return done.returncode

    def start_redis(self) -> None:
        """By the command of its container, whose data outlive it."""
        self.redis = redis_server(self.redis_command)


def redis_server(command: list[str]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "REDIS_PASSWORD": PASSWORD}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def redis_command(folder: Path, port: int) -> list[str]:
    """The command of the container with a folder and a port of this machine."""
    (container,) = pods("kind-cpu")["xc-ray-redis"]["spec"]["containers"]
    *shell, script = container["command"]
    assert script.count("dir /data\n") == 1
    here = f"dir {folder}\nbind 127.0.0.1\nport {port}\n"
    return [*shell, script.replace("dir /data\n", here)]


def environment_of(overlay: str) -> dict[str, str]:
    """What the containers of Ray have in theirs, but for folders of the image."""
    (container,) = pods(overlay)["head"]["spec"]["containers"]
    return {e["name"]: e["value"] for e in container["env"] if e["name"] not in HERE}


def config_of(overlay: str, keys: Path, registry: str, port: int) -> dict[str, Any]:
    """`serveConfigV2`, as a file of this machine."""
    (service,) = of_kind(overlay, "RayService")
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    assert config["http_options"] == {"host": "0.0.0.0", "port": SERVE_PORT}
    config["http_options"]["port"] = port
    application["args"] |= {"keys": str(keys), "registry": registry}
    return config


def on_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """What is in the way of a machine without GPUs is moved or replaced; see above."""
    (application,) = config["applications"]
    args = application["args"]
    args |= {"model": "demo"}
    for name, part in (("Decoder", "decoder"), ("VisionEncoder", "encoder")):
        asked = args[part]
        assert asked["num_gpus"] > 0
        (deployment,) = (d for d in application["deployments"] if d["name"] == name)
        shares = ("num_cpus", "num_gpus", "resources")
        deployment["ray_actor_options"] = {k: asked[k] for k in shares if k in asked}
        asked["num_gpus"] = 0
    return config


@contextmanager
def deployed(
    overlay: str, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
) -> Iterator[Deployed]:
    """The application of an overlay on a head, which has Redis behind it and runs no replica."""
    key, port, head_port = new_key(), free_port(), free_port()
    start = cluster(overlay)["headGroupSpec"]["rayStartParams"]
    redis_port = free_port()
    with (
        s3_server() as s3,
        credentials(s3),
        tempfile.TemporaryDirectory(prefix="xc-", ignore_cleanup_errors=True) as folder,
    ):
        home = Path(folder)
        keys = home / "keys.yaml"
        keys.write_text(json.dumps({"keys": [{"name": "team-a", "sha256": digest_of(key)}]}))
        command = redis_command(home, redis_port)
        registry = s3.url(s3.make_bucket("xc-ray"), "registry")
        more = environment_of(overlay) | {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home),
            "XDG_DATA_HOME": str(home),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis_port}",
            "RAY_external_storage_namespace": "xc",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay sets it
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port),
        }
        redis = redis_server(command)
        served: Deployed | None = None
        try:
            with ray_cluster(
                float(start["num-cpus"]), head_options=("--redis-password", PASSWORD), **more
            ) as running:
                config = change(config_of(overlay, keys, registry, head_port))
                url = f"http://127.0.0.1:{port}"
                served = Deployed(running, url, config, overlay, key, command, redis, s3)
                served.deploy()
                yield served
        finally:
            last = served.redis if served else redis
            last.kill()
            last.wait()


def join(served: Deployed, group: Document) -> Node:
    """A worker of a group: what Ray counts there is what its container may take."""
    counted = amounts(group)
    return served.cluster.add_node(counted.pop("CPU"), **counted)


# ---------------------------------------------------------------- a laptop


@pytest.fixture(scope="class")
def laptop() -> Iterator[Deployed]:
    """overlays/kind-cpu; its worker joins after the application was deployed."""
    with deployed("kind-cpu") as served:
        (group,) = groups("kind-cpu")
        join(served, group)
        served.wait_until_settled()
        served.wait_until(served.answers)
        yield served


class TestALaptop:
    def test_probes_say_that_head_and_worker_are_ready(self, laptop: Deployed) -> None:
        head, worker = laptop.cluster.nodes
        for node in (head, worker):
            assert laptop.probe("readinessProbe", node) == 0
            assert laptop.probe("livenessProbe", node) == 0

    def test_no_replica_is_on_the_head(self, laptop: Deployed) -> None:
        head, worker = laptop.cluster.nodes
        for pids in replica_pids(laptop).values():
            assert pids
            assert all(worker.holds(pid) and not head.holds(pid) for pid in pids)

    def test_the_key_of_the_mounted_file_opens_it(self, laptop: Deployed) -> None:
        assert laptop.chat(key="xcr_wrong").status_code == 401
        answer = laptop.chat()
        assert answer.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"

    def test_logs_are_json(self, laptop: Deployed) -> None:
        laptop.chat()
        (log,) = laptop.cluster.home.glob("ray/session_latest/logs/serve/replica_xc_ray_Ingress*")
        last = json.loads(log.read_text().splitlines()[-1])
        assert last["deployment"] == "xc_ray_Ingress"
        assert last["request_id"]

    def test_the_training_jobs_entry_point_brings_an_adapter(
        self, laptop: Deployed, tmp_path: Path, note: Note
    ) -> None:
        """overlays/kind-cpu-training: its file as it stands, but for 4 steps."""
        began = time.monotonic()
        said = submit(laptop, tmp_path)
        assert '"adapter": "json@1"' in said, said[-3000:]
        note("job_s", round(time.monotonic() - began, 1))
        laptop.wait_until(lambda: laptop.answers("demo:json"))
        assert laptop.chat("demo:json").json()["model"] == "demo:json@1"

    def test_it_heals_once_another_worker_joins(self, laptop: Deployed, note: Note) -> None:
        _, lost = laptop.cluster.nodes
        lost.kill()
        laptop.wait_until(lambda: not laptop.answers())
        (group,) = groups("kind-cpu")
        joined = time.monotonic()
        worker = join(laptop, group)
        laptop.wait_until(lambda: laptop.probe("readinessProbe", worker) == 0)
        laptop.wait_until(laptop.answers)
        note("laptop_worker_joined_answers_s", round(time.monotonic() - joined, 1))
        laptop.wait_until_settled()
        assert all(worker.holds(pid) for pids in replica_pids(laptop).values() for pid in pids)

    def test_a_worker_that_is_told_to_end_finishes_its_answers(
        self, laptop: Deployed, tmp_path: Path, note: Note
    ) -> None:
        """Its preStop hook runs beside another worker, for which this one's replicas leave."""
        (group,) = groups("kind-cpu")
        ending, before = laptop.cluster.nodes[-1], replica_pids(laptop)
        worker = join(laptop, group)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(laptop.stream)
            laptop.wait_until(laptop.streaming.is_set)
            told = time.monotonic()
            drained = pool.submit(pre_stop, laptop, group, ending, tmp_path)
            while not drained.done():
                assert laptop.answers()
                time.sleep(1)
            note("drain_s", round(time.monotonic() - told, 1))
            done = drained.result()
            assert (done.returncode, done.stderr) == (0, b"")
            assert answer.done()
            assert answer.result() == "[DONE]"
        ending.kill()
        laptop.wait_until_settled()
        after = replica_pids(laptop)
        assert all(worker.holds(pid) for pids in after.values() for pid in pids)
        assert not any(after[name] & before[name] for name in after)
        assert laptop.answers()

    def test_a_store_that_is_gone_keeps_only_what_is_not_loaded(
        self, laptop: Deployed, tmp_path: Path
    ) -> None:
        """It is stopped as a process, so that it keeps what it holds in memory."""
        registry = Registry.open(laptop.config["applications"][0]["args"]["registry"])
        demo = resolve_model("demo")
        if "demo" not in registry.names():
            import_checkpoint(demo, registry, "demo")
        for seed, name in enumerate(("loaded", "not-loaded")):
            folder = write_adapter(tmp_path / name, Checkpoint.open(demo).config, seed=seed)
            push_adapter(folder, registry, name, "demo")
        laptop.wait_until(lambda: laptop.answers("demo:loaded"))
        os.kill(laptop.s3.pid, signal.SIGSTOP)
        try:
            assert laptop.answers()
            assert laptop.answers("demo:loaded")
            assert laptop.chat("demo:not-loaded").status_code == 500
        finally:
            os.kill(laptop.s3.pid, signal.SIGCONT)
        laptop.wait_until(lambda: laptop.answers("demo:not-loaded"))

    def test_without_redis_what_runs_goes_on_until_both_are_back(
        self, laptop: Deployed, note: Note
    ) -> None:
        """The head ends without its Redis, and comes back with what Redis has kept on its disk."""
        head, before = laptop.cluster.nodes[0], replica_pids(laptop)
        laptop.redis.kill()
        laptop.redis.wait()
        killed = time.monotonic()
        while head.process.poll() is None:
            assert time.monotonic() < killed + 120
            assert laptop.answers()
            time.sleep(0.5)
        note("redis_killed_head_ends_s", round(time.monotonic() - killed, 1))
        head.kill()
        assert laptop.answers()
        laptop.start_redis()
        started = time.monotonic()
        laptop.cluster.start_head(0)
        laptop.wait_until(lambda: runs(laptop))
        note("redis_back_whole_s", round(time.monotonic() - started, 1))
        assert laptop.answers()
        assert replica_pids(laptop) == before


def pre_stop(
    served: Deployed, group: Document, node: Node, folder: Path
) -> subprocess.CompletedProcess[bytes]:
    """Runs the preStop hook of a group's pods for a node.

    In its pod a node is alone; here commands of that name tell `ray` which node is meant, and let
    `pgrep` see the processes of this one only.
    """
    (container,) = group["template"]["spec"]["containers"]
    path, limit = container["lifecycle"]["preStop"]["exec"]["command"]
    assert path == "/usr/local/bin/drain-node"
    nodes = httpx.get(f"{served.cluster.dashboard}/api/v0/nodes?detail=true", trust_env=False)
    found = nodes.raise_for_status().json()["data"]["result"]["result"]
    title = node.processes()[node.raylet]
    (node_id,) = (e["node_id"] for e in found if f"--node_id={e['node_id']}" in title)
    for name, command in {
        "ray": f'{BIN / "ray"} "$@" --node-id {node_id}',
        "pgrep": f'{shutil.which("pgrep")} -s {node.process.pid} "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (folder / name).chmod(0o755)
    environment = dict(served.cluster.environment)
    environment |= {
        "PATH": f"{folder}:{environment['PATH']}",
        "RAY_ADDRESS": f"127.0.0.1:{served.cluster.port}",
    }
    hook = [ROOT / "docker/drain-node", limit]
    return subprocess.run(hook, env=environment, check=False, capture_output=True, timeout=300)


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize("overlay", ["gpu-single-node", "gpu-autoscaled"])
def test_replicas_are_where_their_gpus_are_and_move_with_them(overlay: str, note: Note) -> None:
    with deployed(overlay, on_cpu) as served:
        nodes = {group["groupName"]: join(served, group) for group in groups(overlay)}
        served.wait_until_settled()
        served.wait_until(served.answers)
        assert placed(served, nodes) == PLACES[overlay]
        holder = PLACES[overlay]["Decoder"]
        (group,) = (g for g in groups(overlay) if g["groupName"] == holder)
        second = join(served, group)
        killed = time.monotonic()
        nodes[holder].kill()
        served.wait_until(lambda: len(served.replicas("Decoder")) == 1)
        served.wait_until(served.answers)
        note(f"{overlay}_worker_killed_answers_s", round(time.monotonic() - killed, 1))
        served.wait_until_settled()
        assert placed(served, nodes | {holder: second}) == PLACES[overlay]


PLACES = {
    "gpu-single-node": {"Decoder": "gpu", "Ingress": "gpu", "VisionEncoder": "gpu"},
    "gpu-autoscaled": {"Decoder": "decoder", "Ingress": "cpu", "VisionEncoder": "encoder"},
}


def placed(served: Deployed, nodes: Mapping[str, Node]) -> dict[str, str]:
    """The group of the node, or of the nodes, that hold the replicas of each deployment."""
    return {
        name: " ".join(sorted({g for g, node in nodes.items() for pid in pids if node.holds(pid)}))
        for name, pids in replica_pids(served).items()
    }


def runs(served: Deployed) -> bool:
    """Whether Serve says so, once there is one to ask."""
    try:
        return bool(served.status()["status"] == "RUNNING")
    except (httpx.HTTPError, KeyError):
        return False


# ---------------------------------------------------------------- training


def submit(served: Deployed, folder: Path) -> str:
    """The RayJob's entry point by `ray job submit`, as KubeRay's submitter does it; its log."""
    overlay = "kind-cpu-training"
    (job,) = of_kind(overlay, "RayJob")
    (config_map,) = of_kind(overlay, "ConfigMap")
    config = yaml.safe_load(config_map["data"]["train_config.yaml"])
    theirs = "endpoint=http://xc-ray-s3:9000&region=us-east-1"
    ours = f"endpoint={served.s3.endpoint}&region={served.s3.region}"
    for key in ("registry", "storage"):
        assert theirs in config[key]
        config[key] = config[key].replace(theirs, ours)
    assert config["registry"] == served.config["applications"][0]["args"]["registry"]
    config["training"]["max_steps"] = 4
    config["publish"]["promote"]["below"] = 100  # so few steps teach nothing
    file = folder / "train_config.yaml"
    file.write_text(yaml.safe_dump(config))
    mounted = "/etc/xc_ray/train/train_config.yaml"
    entrypoint = shlex.split(job["spec"]["entrypoint"])
    assert mounted in entrypoint
    command = [str(file) if word == mounted else word for word in entrypoint]
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--address", served.cluster.dashboard, "--", *command],
        env=dict(served.cluster.environment),
        check=False, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
