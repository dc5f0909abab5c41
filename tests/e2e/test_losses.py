"""What is lost when something dies under streams: a node, an ingress, Serve's controller."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.ray_cluster import Node
from tests.e2e.serve_cluster import ServeCluster, serve_cluster
from tests.e2e.serve_run import body, image
from tests.e2e.streams import CUT, DONE, Ended, Streams
from tests.pictures import shapes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STREAMS = 8
SUM = body("12 + 30 = ", max_tokens=20)
LONG = body("Who are you?", max_tokens=2000, ignore_eos=True)
# A node of one CPU has room for one decoder and one encoder.
ARGS = {"ingress": {"num_cpus": 0}, "decoder": {"num_cpus": 0.5}, "encoder": {"num_cpus": 0.5}}
LOST = "replica_lost"
Note = Callable[[str, object], None]


@pytest.fixture(scope="class")
def served() -> Iterator[ServeCluster]:
    """One replica of each deployment on the head, and a decoder and an encoder on another node."""
    with serve_cluster(ARGS, num_cpus=1) as running:
        running.cluster.add_node(1)
        for name in ("Decoder", "VisionEncoder"):
            running.deployment(name)["num_replicas"] = 2
        running.deploy()
        running.wait_until_settled()
        yield running


@pytest.fixture
def note(record_testsuite_property: Note) -> Note:
    """Keeps a figure with the results of the run."""
    return record_testsuite_property


def streams_of(served: ServeCluster) -> Streams:
    """Long streams on every decoder, and short requests twice a second."""
    return Streams(served.url, [LONG] * NUM_STREAMS, short_request, every_s=0.5, apart_s=0.3)


def short_request(number: int) -> dict[str, Any]:
    """A stream, a whole answer, and a picture that no cache has, in turn."""
    if number % 3 == 2:
        return body(image(shapes("red circle", size=(90 + number, 60))), "What is it?")
    return SUM | {"stream": number % 3 == 0}


def node_of_replicas(served: ServeCluster) -> Node:
    """The node that is not the head and holds replicas."""
    (node,) = {
        id(node): node
        for node in served.cluster.nodes[1:]
        for pid in served.replicas("Decoder")
        if node.holds(pid)
    }.values()
    return node


def whole(served: ServeCluster) -> bool:
    return all(len(served.running(name)) == 2 for name in ("Decoder", "VisionEncoder"))


def new_ones(streams: Streams, since: float) -> list[Ended]:
    """Short requests that were sent after a moment."""
    return [ended for ended in streams.short if ended.begun > since]


def assert_served(streams: Streams, since: float) -> float:
    """No request that was sent after a moment has failed; seconds that the slowest took."""
    sent = new_ones(streams, since)
    assert len(sent) > 20
    assert {ended.how for ended in sent} == {DONE}
    assert {ended.text for ended in sent} == {"12 + 30 = 42", "A red circle."}
    return max(ended.seconds for ended in sent)


def assert_some_lost(streams: Streams, since: float) -> float:
    """Streams are whole or ended by an error event; seconds from a moment until the last of those.

    Each decoder had some.
    """
    assert set(streams.how()) == {DONE, LOST}
    return max(e.begun + e.seconds - since for e in streams.long if e.how == LOST)


class TestWhileTheHeadLives:
    def test_a_killed_node_costs_its_streams_and_no_new_request(
        self, served: ServeCluster, note: Note
    ) -> None:
        lost = node_of_replicas(served)
        served.cluster.add_node(1)  # room for what is lost
        with streams_of(served) as streams:
            served.wait_until(lambda: streams.begun == NUM_STREAMS)
            killed = time.monotonic()
            lost.kill()
            served.wait_until(lambda: not whole(served))
            note("node_killed_noticed_s", round(time.monotonic() - killed, 1))
            served.wait_until(lambda: whole(served))
            note("node_killed_whole_s", round(time.monotonic() - killed, 1))
        note("node_killed_streams_end_s", round(assert_some_lost(streams, killed), 1))
        note("node_killed_slowest_s", round(assert_served(streams, killed), 1))

    def test_a_silent_node_costs_its_streams_and_new_requests_time(
        self, served: ServeCluster, note: Note
    ) -> None:
        """As if its machine had lost its power: nobody closes its connections."""
        lost = node_of_replicas(served)
        with streams_of(served) as streams:
            served.wait_until(lambda: streams.begun == NUM_STREAMS)
            stopped = time.monotonic()
            for pid in lost.processes():
                os.kill(pid, signal.SIGSTOP)
            served.wait_until(lambda: not whole(served))
            note("node_silent_noticed_s", round(time.monotonic() - stopped, 1))
            joined = time.monotonic()
            served.cluster.add_node(1)
            note("node_joins_s", round(time.monotonic() - joined, 1))
            served.wait_until(lambda: whole(served))
            note("node_joined_whole_s", round(time.monotonic() - joined, 1))
        lost.kill()
        note("node_silent_streams_end_s", round(assert_some_lost(streams, stopped), 1))
        note("node_silent_slowest_s", round(assert_served(streams, stopped), 1))
        late = sum(ended.seconds > 10 for ended in new_ones(streams, stopped))
        note("node_silent_late", f"{late} of {len(new_ones(streams, stopped))}")

    def test_a_killed_controller_is_missed_by_nobody(
        self, served: ServeCluster, note: Note
    ) -> None:
        (controller,) = served.cluster.nodes[0].named("ray::ServeController")
        replicas = {name: served.replicas(name) for name in ("Ingress", "Decoder")}
        with streams_of(served) as streams:
            served.wait_until(lambda: streams.begun == NUM_STREAMS)
            killed = time.monotonic()
            os.kill(controller, signal.SIGKILL)
            served.wait_until(lambda: runs(served) and whole(served))
            note("controller_killed_whole_s", round(time.monotonic() - killed, 1))
            served.wait_until(lambda: len(new_ones(streams, killed)) > 20)
        assert served.cluster.nodes[0].named("ray::ServeController") != [controller]
        assert streams.how() == {DONE: NUM_STREAMS}
        note("controller_killed_slowest_s", round(assert_served(streams, killed), 1))
        assert {name: served.replicas(name) for name in replicas} == replicas
        served.deployment("Decoder")["num_replicas"] = 1
        served.deploy()
        served.wait_until(lambda: len(served.running("Decoder")) == 1)
        served.wait_until_settled()

    def test_a_killed_ingress_cuts_its_streams(self, served: ServeCluster, note: Note) -> None:
        served.deployment("Ingress")["num_replicas"] = 2
        served.deploy()
        served.wait_until_settled()
        with streams_of(served) as streams:
            served.wait_until(lambda: streams.begun == NUM_STREAMS)
            lost = served.replicas("Ingress").pop()
            killed = time.monotonic()
            os.kill(lost, signal.SIGKILL)
            served.wait_until(lambda: len(served.replicas("Ingress") - {lost}) == 2)
            served.wait_until(lambda: len(served.running("Ingress")) == 2)
            note("ingress_killed_whole_s", round(time.monotonic() - killed, 1))
            served.wait_until(lambda: len(new_ones(streams, killed)) > 20)
        how = Counter(ended.how.partition(":")[0] for ended in streams.long)
        note("ingress_killed_streams", dict(how))
        note("ingress_killed_slowest_s", round(assert_served(streams, killed), 1))
        assert set(how) == {DONE, CUT}


def runs(served: ServeCluster) -> bool:
    """Whether Serve says so, once there is one to ask."""
    try:
        return bool(served.status()["status"] == "RUNNING")
    except (httpx.HTTPError, KeyError):
        return False
