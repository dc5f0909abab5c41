"""Serve on all interfaces: with keys, as their file changes, and without any."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve.schema import ApplicationStatus

from tests.serve.conftest import Cluster
from xc_ray.keys import digest_of, new_key

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

HOST = "0.0.0.0"
ON_CPU: dict[str, Any] = {"encoder": {"num_gpus": 0}, "decoder": {"num_gpus": 0}}
GUARDED = ("/v1/models", "/v1/models/keyed", "/openapi.json", "/none")
START_LIMIT_S = 150.0
RELOAD_LIMIT_S = 20.0  # it is looked for every 2 s

Tiny = Callable[..., Path]


def write(path: Path, **keys: str) -> None:
    entries = [{"name": name, "sha256": digest_of(key)} for name, key in keys.items()]
    path.write_text(json.dumps({"keys": entries}), encoding="utf-8")


class Client:
    """Requests to one application."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.url = f"http://127.0.0.1:{cluster.port}/{name}"
        self.name = name

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return httpx.get(self.url + path, headers=bearer(key), timeout=30, trust_env=False)

    def chat(self, key: str | None = None) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": self.name, "messages": messages, "max_tokens": 2, "temperature": 0}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=bearer(key), timeout=120, trust_env=False)

    def wait(self, limit_s: float, path: str, status: int, key: str | None = None) -> None:
        deadline = time.monotonic() + limit_s
        while (response := self.get(path, key)).status_code != status:
            assert time.monotonic() < deadline, response.text
            time.sleep(0.2)


def bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def test_keys_open_it_and_without_any_it_serves_nobody(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    old, new = new_key(), new_key()
    keys = tmp_path / "keys.json"
    write(keys, old=old)
    base = {"model": str(tiny())} | ON_CPU
    cluster.deploy(
        keyed=base | {"served_model_name": "keyed", "keys": str(keys)},
        bare=base | {"served_model_name": "bare"},
        broken=base | {"keys": str(tmp_path / "none.json")},
    )
    failed = cluster.settled("broken")
    assert failed.status == ApplicationStatus.DEPLOY_FAILED
    assert "none.json: No such file or directory" in failed.message

    keyed = Client(cluster, "keyed")
    settled = cluster.settled("keyed")
    assert settled.status == ApplicationStatus.RUNNING, settled
    keyed.wait(START_LIMIT_S, "/readyz", 200)
    for path in GUARDED:
        assert keyed.get(path).status_code == 401
        assert keyed.get(path, new).status_code == 401
    refused = keyed.chat(new)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert keyed.chat().status_code == 401
    assert keyed.chat(old).status_code == 200

    write(keys, new=new)
    keyed.wait(RELOAD_LIMIT_S, "/v1/models", 200, new)
    assert keyed.chat(new).status_code == 200
    assert keyed.chat(old).status_code == 401
    keys.unlink()
    time.sleep(5)
    assert keyed.chat(new).status_code == 200

    # By now the others answer, and so this one's decoder could.
    bare = Client(cluster, "bare")
    settled = cluster.settled("bare")
    assert settled.status == ApplicationStatus.RUNNING, settled
    for key in (None, new):
        response = bare.get("/readyz", key)
        assert response.status_code == 503
        assert "`insecure: true`" in response.json()["reason"]
        assert (bare.chat(key).status_code, bare.chat(key).json()["error"]["code"]) == (
            503,
            "no_keys",
        )
        assert bare.get("/v1/models", key).status_code == 503
    assert bare.get("/healthz").status_code == 200
