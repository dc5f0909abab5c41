"""kill -9 of one decoder of two while streams run: who hears of it, and who does not."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.serve_run import (
    RED_CIRCLE,
    ServeRun,
    assert_right,
    body,
    haproxy,
    image,
    post,
    serve_run,
    text_of,
    until,
)
from tests.e2e.streams import DONE, Streams, how, in_turn

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STREAMS = 24
NUM_WHOLE = 8
ARGS = {"decoder": {"max_num_seqs": 64, "kv_cache_tokens": 100_000}}
NUM_TOKENS = 1200
LOST = "replica_lost"


@pytest.fixture(scope="module", params=["python", "haproxy"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeRun]:
    proxy = haproxy(tmp_path_factory.mktemp("proxy")) if request.param == "haproxy" else {}
    with serve_run(ARGS, num_decoders=2, **proxy) as running:
        yield running


def test_only_streams_that_had_begun_on_a_lost_decoder_hear_of_it(server: ServeRun) -> None:
    assert_right(server)
    decoders = server.replicas("Decoder")
    shorts = [body("12 + 30 = ", max_tokens=20), body(image(RED_CIRCLE), "What is it?")]
    longs = [long(i) for i in range(NUM_STREAMS)]
    with (
        ThreadPoolExecutor(NUM_WHOLE) as pool,
        Streams(server.url, longs, in_turn(*shorts)) as streams,
    ):
        whole = [pool.submit(post, server, json=long(i)) for i in range(NUM_WHOLE)]
        until(lambda: streams.num_running == NUM_STREAMS, 60, server)
        under_way = len(streams.short)
        os.kill(min(decoders), signal.SIGKILL)
        until(lambda: len(server.replicas("Decoder") - decoders) == 1, 60, server)
        assert streams.num_running > 0
        answers = [future.result() for future in whole]
    assert all(text_of(answer) for answer in answers)
    assert {a.json()["usage"]["completion_tokens"] for a in answers} == {NUM_TOKENS}
    ended = streams.how()
    assert ended.keys() == {DONE, LOST}
    assert ended.total() == NUM_STREAMS
    shorts_whole = [e for i, e in enumerate(streams.short) if i != under_way or e.how != LOST]
    assert how(shorts_whole) == {DONE: len(shorts_whole)}
    assert {e.text for e in shorts_whole} == {"12 + 30 = 42", "A red circle."}
    assert_right(server)


def long(index: int) -> dict[str, Any]:
    """Requests with a beginning of their own, longer than a block: they spread over decoders."""
    text = f"{index}. " + "Who are you? " * 24
    return body(text, max_tokens=NUM_TOKENS, ignore_eos=True)
