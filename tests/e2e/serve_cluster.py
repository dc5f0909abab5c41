"""`serve deploy` to a cluster of `ray start`, as an operator does it, again and again."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from tests.e2e.ray_cluster import BIN, Cluster, ray_cluster
from tests.e2e.serve_run import ROOT, free_port

DEPLOY_LIMIT_S = 240.0  # of a loaded machine with two cores
REPLICA = "ray::ServeReplica:xc_ray:"


@dataclass
class ServeCluster:
    """The repository's serve_config.yaml on a cluster; `config` is what was deployed last."""

    cluster: Cluster
    url: str
    config: dict[str, Any]

    def deploy(self, change: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Deploys the changed file; returns at once, as `serve deploy` does."""
        if change is not None:
            change(self.config)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=self.cluster.home) as file:
            yaml.safe_dump(self.config, file)
            file.flush()
            subprocess.run(
                [BIN / "serve", "deploy", "-a", self.cluster.dashboard, file.name],
                cwd=ROOT,
                env=dict(self.cluster.environment),
                check=True,
                capture_output=True,
                timeout=DEPLOY_LIMIT_S,
            )

    def deployment(self, name: str) -> dict[str, Any]:
        """One entry of `deployments:`, to be changed before the next `deploy`."""
        entries = self.config["applications"][0]["deployments"]
        (entry,) = (e for e in entries if e["name"] == name)
        return dict_of(entry)

    def status(self) -> Mapping[str, Any]:
        """What Serve says of the application."""
        answer = self.cluster.ask("/api/serve/applications/").raise_for_status().json()
        return dict_of(answer["applications"].get("xc_ray", {"status": "NOT_STARTED"}))

    def replicas(self, name: str) -> set[int]:
        """The process ids of a deployment's replicas, also of those that are stopping."""
        return {
            pid
            for node in self.cluster.nodes
            for pid, title in node.processes().items()
            if title.startswith(REPLICA + name)
        }

    def running(self, name: str) -> set[int]:
        """The process ids of a deployment's replicas that run, and are not about to stop."""
        # Serve says nothing of deployments while it builds the application.
        replicas = self.status()["deployments"].get(name, {"replicas": []})["replicas"]
        return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    def wait_until(self, true: Callable[[], bool], limit_s: float = DEPLOY_LIMIT_S) -> None:
        """Waits for `true()`."""
        deadline = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.3)

    def wait_until_settled(self) -> None:
        """Waits until what was deployed runs, and what it replaces is stopped."""
        self.wait_until(self._settled)

    def _settled(self) -> bool:
        status = self.status()
        return status["status"] == "RUNNING" and all(
            d["status"] == "HEALTHY" and all(r["state"] == "RUNNING" for r in d["replicas"])
            for d in status["deployments"].values()
        )


def dict_of(value: Any) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value


@contextmanager
def serve_cluster(
    args: Mapping[str, Any],
    *,
    num_cpus: float = 4,
    worker_cpus: Sequence[float] = (),
    decoders: int = 1,
    proxies: str = "HeadOnly",
    top: Mapping[str, Any] | None = None,
    metrics_port: int = 0,
    token: str = "",
    **more: str,
) -> Iterator[ServeCluster]:
    """Deploys and waits; `args` go on top of the file's, and `top` on top of its other keys.

    `num_cpus` are the head's, each of `worker_cpus` those of one more node, `metrics_port` that of
    the head's exporter. `more` is for the environment of all processes, and `token` what the head
    wants if that says so.
    """
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = free_port()
    config["http_options"]["port"] = port
    config["proxy_location"] = proxies
    config |= top or {}
    config["applications"][0]["args"] |= args
    with tempfile.TemporaryDirectory(prefix="xc-") as home:
        environment = {
            "XDG_CACHE_HOME": home,
            "XDG_DATA_HOME": home,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **more,
        }
        with ray_cluster(num_cpus, metrics_port, token, **environment) as cluster:
            for cpus in worker_cpus:
                cluster.add_node(cpus)
            served = ServeCluster(cluster, f"http://127.0.0.1:{port}", config)
            served.deployment("Decoder")["num_replicas"] = decoders
            served.deploy()
            served.wait_until_settled()
            yield served


def replica_pids(served: ServeCluster) -> dict[str, set[int]]:
    """The processes of each deployment."""
    return {name: served.replicas(name) for name in ("Ingress", "Decoder", "VisionEncoder")}
