"""Replicas come and go while many long streams run: none is cut, and no request fails."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.serve_cluster import ServeCluster, replica_pids, serve_cluster
from tests.e2e.serve_run import body
from tests.e2e.streams import DONE, Streams

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_STREAMS = 200
LEAST_S = 60.0
LONG = body("Who are you?", max_tokens=500, ignore_eos=True)
# Room for all streams in one decoder.
ARGS = {"decoder": {"max_num_seqs": NUM_STREAMS, "kv_cache_tokens": 200_000}}


@pytest.fixture(scope="module")
def served() -> Iterator[ServeCluster]:
    with serve_cluster(ARGS, decoders=2) as running:
        yield running


def test_updates_scaling_and_changed_settings_cut_nothing(served: ServeCluster) -> None:
    before = replica_pids(served)
    with Streams(served.url, NUM_STREAMS, LONG) as streams:
        served.wait_until(lambda: streams.num_running == NUM_STREAMS)

        def bounds(config: dict[str, Any]) -> None:
            served.deployment("Ingress")["max_ongoing_requests"] = 2000

        served.deploy(bounds)  # in place

        def one_decoder(config: dict[str, Any]) -> None:
            served.deployment("Decoder")["num_replicas"] = 1

        served.deploy(one_decoder)
        served.wait_until(lambda: served.running("Decoder") == 1)

        def new_args(config: dict[str, Any]) -> None:
            config["applications"][0]["args"]["limits"] = {"heartbeat_s": 5}

        served.deploy(new_args)
        served.wait_until(lambda: bool(new_ones(served, before)))
        assert streams.num_running > NUM_STREAMS / 2  # most went through all of it
    served.wait_until_settled()
    assert streams.how() == {DONE: NUM_STREAMS}
    assert min(ended.seconds for ended in streams.long) >= LEAST_S
    assert {ended.how for ended in streams.short} == {DONE}
    assert {ended.text for ended in streams.short} == {"12 + 30 = 42"}
    assert all(served.replicas(name).isdisjoint(pids) for name, pids in before.items())


def new_ones(served: ServeCluster, before: dict[str, set[int]]) -> set[int]:
    """Decoders that took the place of those before."""
    return served.replicas("Decoder") - before["Decoder"]
