"""A Ray cluster with Serve in this process, for what needs one."""

import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema

SETTLED = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOY_FAILED)


@dataclass
class Cluster:
    """Serve, and the applications in it by name; each answers below /name."""

    port: int
    host: str = "127.0.0.1"
    args: dict[str, dict[str, Any]] = field(default_factory=dict)

    def deploy(self, **args: dict[str, Any]) -> None:
        """Brings applications by their `args`, as `serve run` and `serve deploy` do: at once."""
        self.args |= args
        config = {
            "http_options": {"host": self.host, "port": self.port},
            "applications": [
                {
                    "name": name,
                    "route_prefix": f"/{name}",
                    "import_path": "xc_ray.serve.app:build",
                    "args": args,
                }
                for name, args in self.args.items()
            ],
        }
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate(config))

    def settled(self, name: str, limit_s: float = 200) -> ApplicationStatusOverview:
        """The application's status, once it runs or has failed."""
        deadline = time.monotonic() + limit_s
        while (status := serve.status().applications[name]).status not in SETTLED:
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
        return status

    def ask(self, name: str, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
        """A greedy request of a few tokens."""
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
        body = {"model": name, "messages": messages, "max_tokens": 6, "temperature": 0} | fields
        url = f"http://127.0.0.1:{self.port}/{name}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=120, trust_env=False)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One machine with one GPU, by its word; nothing runs there yet.

    A module's `HOST` is the address that Serve listens on.
    """
    host = getattr(request.module, "HOST", "127.0.0.1")
    # Not tmp_path: Ray puts sockets below, and the path of a socket may not be longer than 107.
    home = tempfile.mkdtemp(prefix="xc-")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        ray.init(
            address="local",
            num_cpus=8,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200_000_000,
            _temp_dir=home,
        )
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            yield Cluster(port, host)
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(home, ignore_errors=True)
