"""Replicas follow the load: decoders up and down, the encoder to zero and back."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e.serve_run import (
    ENDLESS,
    RED_CIRCLE,
    ServeRun,
    ask,
    body,
    image,
    serve_run,
    text_of,
    until,
)
from xc_ray.config import ServeFile

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

NUM_LANES = 4
Note = Callable[[str, object], None]
LIMIT_S = 60.0  # of a loaded machine, for a replica to start or to end
POLICY = "xc_ray.serve.scale:"
SCALING: dict[str, dict[str, Any]] = {
    "Decoder": {
        "max_replicas": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_period_s": 3,
        "policy": {"policy_function": POLICY + "DecoderPolicy"},
    },
    "VisionEncoder": {
        "min_replicas": 0,
        "initial_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "downscale_to_zero_delay_s": 3,
        "look_back_period_s": 3,
        "policy": {"policy_function": POLICY + "EncoderPolicy"},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServeRun]:
    args = {"decoder": {"max_num_seqs": NUM_LANES}}  # which a few streams fill
    with serve_run(
        args,
        SCALING,
        RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
        RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
    ) as running:
        ServeFile.read(running.log.with_name("serve_config.yaml"))
        yield running


@contextmanager
def streams(server: ServeRun, number: int) -> Iterator[None]:
    """So many answers that do not end are read inside the block."""
    leave = threading.Event()
    begun = threading.Barrier(number + 1)

    def read(i: int) -> None:
        request = body(f"Count to {i}.", stream=True, **ENDLESS)
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=request, timeout=120, trust_env=False) as response:
            lines = response.iter_lines()
            next(lines)
            begun.wait(LIMIT_S)
            while not leave.is_set():
                next(lines)

    with ThreadPoolExecutor(number) as threads:
        reading = [threads.submit(read, i) for i in range(number)]
        try:
            begun.wait(LIMIT_S)
            yield
        finally:
            leave.set()
        for future in reading:
            future.result(LIMIT_S)


def count(server: ServeRun, deployment: str) -> int:
    return len(server.replicas(deployment))


@pytest.fixture
def note(record_testsuite_property: Note) -> Note:
    """Keeps a figure with the results of the run."""
    return record_testsuite_property


def sum_of(server: ServeRun) -> str:
    return text_of(ask(server, "12 + 30 = ", max_tokens=20))


def answers(server: ServeRun) -> bool:
    """Whether a sum is answered soon; it is right then."""
    request = body("12 + 30 = ", max_tokens=20)
    try:
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=request, timeout=5, trust_env=False
        )
    except httpx.ReadTimeout:
        return False
    assert text_of(response) == "12 + 30 = 42"
    return True


def test_decoders_follow_the_load_up_and_down(server: ServeRun, note: Note) -> None:
    assert count(server, "Decoder") == 1
    with streams(server, NUM_LANES):  # all lanes of one are taken: 1 / 0.8 of a decoder
        begun = time.monotonic()
        until(lambda: count(server, "Decoder") == 2, LIMIT_S, server)
        until(lambda: answers(server), LIMIT_S, server)  # by the second: the first has no lane left
        note("autoscale_second_decoder_s", round(time.monotonic() - begun, 1))
        assert count(server, "Decoder") == 2
    until(lambda: count(server, "Decoder") == 1, LIMIT_S, server)
    assert sum_of(server) == "12 + 30 = 42"


def test_the_encoder_goes_to_zero_and_a_picture_brings_it_back(
    server: ServeRun, note: Note
) -> None:
    until(lambda: count(server, "VisionEncoder") == 0, LIMIT_S, server)
    assert sum_of(server) == "12 + 30 = 42"  # text needs none
    assert count(server, "VisionEncoder") == 0
    begun = time.monotonic()
    assert text_of(ask(server, image(RED_CIRCLE), "What is it?")) == "A red circle."
    note("autoscale_picture_from_zero_s", round(time.monotonic() - begun, 1))
    assert count(server, "VisionEncoder") == 1
    assert "autoscaling stats" not in server.log.read_text(errors="replace")  # Serve's complaints
