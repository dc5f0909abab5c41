"""What Ray's exporter says after a few requests, and the log lines that one request leaves."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serve_cluster import ServeCluster, serve_cluster
from tests.e2e.serve_run import ENDLESS, RED_CIRCLE, body, free_port, haproxy, image
from tests.serve.exported import exported

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

PARTS = ("ingress", "encoder", "decoder")
ARGS: dict[str, Any] = {part: {"num_cpus": 0.1} for part in PARTS}
TOP = {
    "logging_config": {"encoding": "JSON"},
    "tracing_config": {"enabled": True, "sampling_ratio": 1.0},
}
SAMPLE = re.compile(r"ray_(xc_ray_\w+)\{(.*)\} (\S+)")
EXPORT_LIMIT_S = 60.0  # Ray's processes report every 10 s
DEPLOYMENTS = ("Ingress", "Decoder", "VisionEncoder")


class House:
    """A server, and how to ask it."""

    def __init__(self, served: ServeCluster, metrics_port: int) -> None:
        self.served = served
        self.exporter = f"http://127.0.0.1:{metrics_port}/metrics"
        self.client = httpx.Client(base_url=served.url, timeout=120, trust_env=False)

    def ask(self, *parts: Any, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        body_of = body(*parts, **fields)
        return self.client.post("/v1/chat/completions", json=body_of, headers=headers)

    def leave_after(self, seconds: float, asked: dict[str, Any]) -> None:
        """Asks, and hangs up in the middle of the answer."""
        until = time.monotonic() + seconds
        with (
            suppress(httpx.ReadTimeout),
            self.client.stream(
                "POST", "/v1/chat/completions", json=asked, timeout=seconds
            ) as response,
        ):
            for _ in response.iter_bytes():
                if time.monotonic() > until:
                    return

    def samples(self) -> dict[str, float]:
        """Sums over replicas: by name, and by name and each tag that is ours."""
        found: dict[str, float] = {}
        text = httpx.get(self.exporter, timeout=30, trust_env=False).text
        for name, tags, value in SAMPLE.findall(text):
            ours = re.findall(r'((?:outcome|code|result|limit)="[^"]*")', tags)
            for key in (name, *(f"{name} {tag}" for tag in ours)):
                found[key] = found.get(key, 0.0) + float(value)
        return found

    def expect(self, true: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The samples once they are so."""
        deadline = time.monotonic() + EXPORT_LIMIT_S
        while not true(samples := self.samples()):
            assert time.monotonic() < deadline, samples
            time.sleep(1)
        return samples

    def logs(self, deployment: str) -> list[dict[str, Any]]:
        """The lines of a deployment's replicas."""
        found = []
        for log in self._files(f"replica_xc_ray_{deployment}_*.log"):
            found += [json.loads(line) for line in log.read_text().splitlines()]
        return found

    def spans(self, deployment: str) -> str:
        files = self._files(f"replica_xc_ray_{deployment}_*_tracing.json")
        return "".join(file.read_text() for file in files)

    def _files(self, pattern: str) -> list[Path]:
        return list((self.served.cluster.home / "ray").glob(f"session_2*/logs/serve/**/{pattern}"))


@pytest.fixture(scope="module", params=["Serve's proxy", "HAProxy"])
def house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    port, more = free_port(), {}
    if request.param == "HAProxy":
        at_once = {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}
        more = haproxy(tmp_path_factory.mktemp("haproxy")) | at_once
    with serve_cluster(ARGS, top=TOP, metrics_port=port, **more) as served:
        house = House(served, port)
        yield house
        house.client.close()


def test_the_exporter_counts_what_was_asked(house: House) -> None:
    usages = [
        house.ask(*parts).raise_for_status().json()["usage"]
        for parts in (["12 + 30 = "], [image(RED_CIRCLE), "What is it?"])
    ]
    with house.client.stream(
        "POST", "/v1/chat/completions", json=body("hi", stream=True, max_tokens=5, ignore_eos=True)
    ) as stream:
        assert stream.read().endswith(b"data: [DONE]\n\n")
    assert house.ask("hi", model="other").status_code == 404
    assert house.client.get("/metrics").status_code == 404
    found = house.expect(lambda samples: samples.get("xc_ray_requests_total") == 4)
    assert found['xc_ray_requests_total outcome="ok"'] == 3
    assert found['xc_ray_requests_total code="model_not_found"'] == 1
    assert found["xc_ray_first_token_seconds_count"] == 3
    assert 1 <= found["xc_ray_token_interval_seconds_count"] <= 3
    generated = sum(usage["completion_tokens"] for usage in usages) + 5
    assert found["xc_ray_generated_tokens_total"] == generated
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    assert found["xc_ray_prompt_tokens_total"] > prompt
    image_tokens = usages[1]["prompt_tokens_details"]["image_tokens"]
    assert found["xc_ray_image_tokens_total"] == image_tokens > 0
    assert found["xc_ray_tiles_total"] >= 1
    assert found["xc_ray_open_requests"] == 0
    found = house.expect(lambda samples: samples.get("xc_ray_queue_seconds_count") == 3)
    assert found["xc_ray_prefilled_tokens_total"] > prompt
    assert found["xc_ray_step_sequences_count"] >= generated
    assert found["xc_ray_step_seconds_total"] > 0
    for gauge in ("kv_use", "running_sequences", "waiting_sequences", "queued_sequences"):
        assert found[f"xc_ray_{gauge}"] == 0
    names = {f"ray_{name}" for name in found if " " not in name}
    assert names <= set(exported()), names - set(exported())
    found = house.expect(lambda samples: "xc_ray_encoder_pass_squares_sum" in samples)
    assert found['xc_ray_encoder_pictures_total result="miss"'] == 1
    assert found["xc_ray_encoder_pass_squares_sum"] >= found["xc_ray_tiles_total"]


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_is_no_error(house: House, stream: bool) -> None:
    before = house.samples()
    house.leave_after(1.0, body("Tell me all.", stream=stream, **ENDLESS))
    found = house.expect(
        lambda samples: samples["xc_ray_requests_total"] > before["xc_ray_requests_total"]
    )
    left = 'xc_ray_requests_total outcome="client_left"'
    assert found[left] == before.get(left, 0) + 1
    assert house.expect(lambda samples: samples["xc_ray_open_requests"] == 0)


@pytest.mark.parametrize("given", ["of-the-client-1", None])
def test_the_id_of_a_request_is_in_the_lines_of_all_deployments(
    house: House, given: str | None
) -> None:
    """Each says something of its own; the answer says the id."""
    headers = {"x-request-id": given} if given else None
    picture = image(RED_CIRCLE + bytes([1 if given else 2]))  # nobody has seen it
    response = house.ask(picture, "What colour is it?", headers=headers).raise_for_status()
    request_id, name = response.headers["x-request-id"], response.json()["id"]
    assert given is None or request_id == given
    words = {"Ingress": f"{name}: ok", "Decoder": "1 pictures, let in", "VisionEncoder": "encoded"}
    for deployment, said in words.items():
        lines = [x for x in house.logs(deployment) if x.get("request_id") == request_id]
        assert any(said in line["message"] for line in lines), (deployment, lines)
        assert {line["deployment"] for line in lines} == {f"xc_ray_{deployment}"}


def test_spans_of_all_deployments_have_one_trace(house: House) -> None:
    house.ask(image(RED_CIRCLE + b"3"), "What is it?").raise_for_status()
    traces = [
        set(re.findall(r'"trace_id": "(\w+)"', house.spans(deployment)))
        for deployment in DEPLOYMENTS
    ]
    assert set.intersection(*traces), traces
