"""Two decoders behind one ingress: conversations stay where their cache is, while that lives."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import pytest

from tests.e2e.serve_run import (
    ServeRun,
    assistant,
    cpu_s,
    image,
    post,
    serve_run,
    until,
    user,
)
from tests.pictures import shapes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

PARTS = ("ingress", "encoder", "decoder")
ARGS: dict[str, Any] = {part: {"num_cpus": 0.1} for part in PARTS}
COLOURS, KINDS = ("red", "orange", "green", "blue"), ("circle", "square", "triangle", "star")
LATER = ("What colour is it?", "What shape is it?", "What is it?")


@pytest.fixture(scope="module")
def server() -> Iterator[ServeRun]:
    with serve_run(ARGS, num_decoders=2) as running:
        until(lambda: healthy_decoders(running) == 2, 120, running)
        yield running


def healthy_decoders(server: ServeRun) -> float | None:
    return metric(server, "serve_deployment_replica_healthy", 'deployment="Decoder"')


class Talk:
    """A conversation about one shape, in a picture that no other has."""

    def __init__(self, server: ServeRun, colour: str, kind: str, size: tuple[int, int]) -> None:
        self.server = server
        self.what = f"{colour} {kind}"
        self.part = image(shapes(self.what, size=size))
        self.messages: list[dict[str, Any]] = []
        self.usage: dict[str, Any] = {}

    def ask(self, question: str) -> str:
        """The next turn's answer."""
        parts = [question] if self.messages else [self.part, question]
        self.messages.append(user(*parts))
        body = {"model": "demo", "messages": self.messages, "temperature": 0, "max_tokens": 12}
        response = post(self.server, json=body)
        assert response.status_code == 200, response.text
        self.usage = response.json()["usage"]
        answer = str(response.json()["choices"][0]["message"]["content"])
        self.messages.append(assistant(answer))
        return answer

    def begin(self) -> str:
        """The first turn, and what it says."""
        answer = self.ask("What is it?")
        assert self.cached == 0
        return answer

    @property
    def cached(self) -> int:
        """Tokens of the last turn's prompt that its decoder had in its cache."""
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])

    @property
    def image_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["image_tokens"])


def metric(server: ServeRun, name: str, label: str = "") -> float | None:
    """The sum of a metric's values over all processes, None while nobody has it."""
    found = []
    for place in server.log.parent.glob("ray/prom_metrics_service_discovery.json"):
        for target in (t for group in json.loads(place.read_text()) for t in group["targets"]):
            try:
                text = httpx.get(f"http://{target}/metrics", timeout=10, trust_env=False).text
            except httpx.TransportError:
                continue
            lines = [line for line in text.splitlines() if line.startswith(f"ray_{name}")]
            found += [float(line.rsplit(" ", 1)[1]) for line in lines if label in line]
    return sum(found) if found else None


def used(server: ServeRun, before: dict[int, float] | None = None) -> dict[int, float]:
    """Seconds of CPU of each decoder, since `before` or since its start."""
    before = before or {}
    return {pid: cpu_s(pid) - before.get(pid, 0) for pid in server.replicas("Decoder")}


def test_every_later_turn_over_a_picture_is_a_hit_and_pictures_spread(server: ServeRun) -> None:
    talks = [Talk(server, c, k, (640, 480)) for c, k in product(COLOURS, KINDS)]
    before = used(server)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(Talk.begin, talks))
    assert answers.count("A red circle.") == 1
    work = used(server, before)
    assert min(work.values()) > 0.1 * sum(work.values())  # a tenth of 16: once in 2,000 runs not
    for question in LATER:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(Talk.ask, talks, [question] * len(talks)))
        assert all(talk.cached > talk.image_tokens // 64 * 64 - 64 for talk in talks)
    until(lambda: metric(server, "xc_ray_routing_requests", 'held="yes"') == 48, 60, server)
    until(lambda: metric(server, "xc_ray_routing_outstanding_tokens") == 0, 60, server)


def test_another_question_about_a_picture_is_a_hit(server: ServeRun) -> None:
    for kind in KINDS:
        Talk(server, "purple", kind, (640, 480)).begin()
        again = Talk(server, "purple", kind, (640, 480))
        assert again.ask("What colour is it?") == "Purple."
        assert again.cached > 0


def test_a_killed_decoder_costs_its_cache_alone(server: ServeRun) -> None:
    talks = [Talk(server, "red", "circle", (620 + i, 470)) for i in range(6)]
    holder = {}
    for talk in talks:
        before = used(server)
        assert talk.begin() == "A red circle."
        work = used(server, before)
        holder[talk] = max(work, key=lambda pid: work[pid])
    lost = holder[talks[0]]
    os.kill(lost, signal.SIGKILL)
    for talk in talks:
        assert talk.ask("What colour is it?") == "Red."
        assert (talk.cached > 0) == (holder[talk] != lost)
    for talk in talks:
        assert talk.ask("What is it?") == "A red circle."
        assert talk.cached > 0
    until(lambda: len(server.replicas("Decoder") - {lost}) == 2, 120, server)
