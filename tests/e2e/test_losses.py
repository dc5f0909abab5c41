"""What is lost when something dies under streams: a node, Serve's controller, the head."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.adapters import write_adapter
from tests.e2e.ray_cluster import Node
from tests.e2e.serve_cluster import ServeCluster, replica_pids, serve_cluster
from tests.e2e.serve_run import body, free_port, image
from tests.e2e.streams import CUT, DONE, Ended, Streams
from tests.pictures import shapes
from xc_ray.hub import resolve_model
from xc_ray.model.weights import Checkpoint
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry

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
            replicas, head = served.replicas("Ingress"), served.cluster.nodes[0]
            # Serve's proxy asks those of its own node, where there are any.
            asked = {pid for pid in replicas if head.holds(pid)} or replicas
            lost = min(asked)
            killed = time.monotonic()
            os.kill(lost, signal.SIGKILL)
            served.wait_until(lambda: len(served.replicas("Ingress") - {lost}) == 2)
            served.wait_until(lambda: len(served.running("Ingress")) == 2)
            note("ingress_killed_whole_s", round(time.monotonic() - killed, 1))
            served.wait_until(lambda: len(new_ones(streams, killed)) > 20)
        how = Counter(ended.how.partition(":")[0] for ended in streams.long)
        note("ingress_killed_streams", dict(how))
        note("ingress_killed_slowest_s", round(assert_served(streams, killed), 1))
        assert set(how) == ({CUT} if len(asked) == 1 else {DONE, CUT})


REDIS = shutil.which("redis-server")


@pytest.fixture(scope="class")
def redis() -> Iterator[str]:
    """The address of a Redis of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="xc-") as folder:
        command = [str(REDIS), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        with subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL) as process:
            yield f"127.0.0.1:{port}"
            process.kill()


@pytest.fixture(scope="class")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The demo model as `base`; of the adapter `cats` two versions, and prod is the first."""
    home = tmp_path_factory.mktemp("registry")
    registry = Registry.open(str(home / "registry"))
    demo = resolve_model("demo")
    import_checkpoint(demo, registry, "base")
    for seed in (1, 2):
        folder = write_adapter(home / f"cats-{seed}", Checkpoint.open(demo).config, seed=seed)
        push_adapter(folder, registry, "cats", "base")
    return registry


@contextmanager
def empty_head(args: Mapping[str, Any], **more: Any) -> Iterator[ServeCluster]:
    """The head holds no replica, another node all of them; `more` is for the environment.

    Clients come in by the other node's proxy. Both nodes are on this machine, where their proxies
    would share a port by SO_REUSEPORT.
    """
    port = free_port()
    # An ingress that takes no CPU may be on the head, and is lost with it.
    args = dict(ARGS) | {"ingress": {"num_cpus": 0.1}} | dict(args)
    with serve_cluster(
        args,
        num_cpus=0,
        worker_cpus=[2],
        proxies="EveryNode",
        RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(port),
        **more,
    ) as running:
        running.url = f"http://127.0.0.1:{port}"
        running.wait_until(lambda: proxied(running))  # it comes after the replicas
        yield running


@pytest.fixture(scope="class")
def behind_redis(redis: str, registry: Registry) -> Iterator[ServeCluster]:
    """The head keeps its state in Redis; what is served comes from a registry."""
    with empty_head(
        {
            "model": "base",
            "served_model_name": "demo",
            "registry": registry.store.url,
            "adapters": {"poll_s": 0.5},
        },
        RAY_REDIS_ADDRESS=redis,
        RAY_external_storage_namespace="xc",
        RAY_gcs_rpc_server_reconnect_timeout_s="600",  # as KubeRay sets it; Ray's own is 60
    ) as running:
        yield running


@pytest.mark.skipif(REDIS is None, reason="needs redis-server (Debian: redis-server)")
class TestTheHead:
    @pytest.mark.parametrize("part", ["gcs", "all"])
    def test_that_dies_and_comes_back_is_missed_by_no_client(
        self, behind_redis: ServeCluster, registry: Registry, note: Note, part: str
    ) -> None:
        served = behind_redis
        head = served.cluster.nodes[0]
        before = replica_pids(served)
        registry.promote("cats", [(1, 1.0)], "prod")
        served.wait_until(lambda: version_of_cats(served) == 1)
        with streams_of(served) as streams:
            served.wait_until(lambda: streams.begun == NUM_STREAMS)
            killed = time.monotonic()
            if part == "gcs":
                (gcs,) = head.named("/gcs/gcs_server ")
                os.kill(gcs, signal.SIGKILL)
                head.process.wait(60)  # the rest of the head ends by itself
                note("gcs_killed_head_ends_s", round(time.monotonic() - killed, 1))
            head.kill()
            moved = time.monotonic()
            registry.promote("cats", [(2, 1.0)], "prod")
            served.wait_until(lambda: version_of_cats(served) == 2)
            note(f"head_{part}_gone_alias_s", round(time.monotonic() - moved, 1))
            served.wait_until(lambda: len(new_ones(streams, killed)) > 20)
        assert streams.how() == {DONE: NUM_STREAMS}
        note(f"head_{part}_gone_slowest_s", round(assert_served(streams, killed), 1))
        note(f"head_{part}_gone_s", round(time.monotonic() - killed, 1))
        num_starts = 1
        while not comes_back(served, note, part):
            num_starts += 1
            assert num_starts <= 3, served.cluster.nodes[0].log.read_text()[-4000:]
        note(f"head_{part}_starts", num_starts)
        assert replica_pids(served) == before
        for num_decoders in (2, 1):  # it deploys again; and leaves a core for the next head
            served.deployment("Decoder")["num_replicas"] = num_decoders
            served.deploy()
            served.wait_until_settled()
            assert len(served.replicas("Decoder")) == num_decoders


class TestTheHeadWithoutRedis:
    def test_that_dies_takes_all_with_it_when_it_comes_back(self, note: Note) -> None:
        longest = [LONG | {"max_tokens": 6000}] * NUM_STREAMS
        with empty_head({}) as served:
            node = served.cluster.nodes[1]
            with Streams(served.url, longest, short_request, every_s=0.5) as streams:
                served.wait_until(lambda: streams.begun == NUM_STREAMS)
                killed = time.monotonic()
                served.cluster.nodes[0].kill()
                served.wait_until(lambda: len(new_ones(streams, killed)) > 20)
                assert_served(streams, killed)  # until then, as if nothing had happened
                assert streams.num_running == NUM_STREAMS
                started = time.monotonic()
                assert any(head_stays(served) for _ in range(3))
                note("head_new_answers_s", round(time.monotonic() - started, 1))
                node.process.wait(120)
                note("head_new_node_ends_s", round(time.monotonic() - started, 1))
            ends = [ended.begun + ended.seconds for ended in streams.long]
            note("head_new_streams_cut_s", round(max(ends) - started, 1))
            assert {ended.how.partition(":")[0] for ended in streams.long} == {CUT}
            assert served.status()["status"] == "NOT_STARTED"
            joined = time.monotonic()
            served.cluster.add_node(2)
            served.deploy()
            served.wait_until_settled()
            served.wait_until(lambda: proxied(served))
            note("head_new_deployed_s", round(time.monotonic() - joined, 1))


def comes_back(served: ServeCluster, note: Note, part: str) -> bool:
    """Starts the head under streams; whether it has stayed."""
    with streams_of(served) as streams:
        served.wait_until(lambda: streams.begun == NUM_STREAMS)
        started = time.monotonic()
        if stays := head_stays(served):
            note(f"head_{part}_answers_s", round(time.monotonic() - started, 1))
            served.wait_until(lambda: runs(served))
            note(f"head_{part}_whole_s", round(time.monotonic() - started, 1))
            assert streams.num_running > 0  # some went through all of it
        served.wait_until(lambda: len(new_ones(streams, started)) > 20)
    assert streams.how() == {DONE: NUM_STREAMS}
    note(f"head_{part}_back_slowest_s", round(assert_served(streams, started), 1))
    return stays


def head_stays(served: ServeCluster) -> bool:
    """Starts the head once, as whoever watches over it does again and again; whether it stays.

    `ray start` gives up where the raylet is not there after 30 s: on a loaded machine its agents
    are late (Ray 2.60).
    """
    try:
        served.cluster.start_head(0)
    except AssertionError:
        served.cluster.nodes[0].kill()
        return False
    return True


def proxied(served: ServeCluster) -> bool:
    """Whether anybody answers at the address."""
    try:
        return httpx.get(f"{served.url}/healthz", timeout=30, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def runs(served: ServeCluster) -> bool:
    """Whether Serve says so, once there is one to ask."""
    try:
        return bool(served.status()["status"] == "RUNNING")
    except (httpx.HTTPError, KeyError):
        return False


def version_of_cats(served: ServeCluster) -> int:
    """The version of the adapter that answers to its bare name."""
    url = f"{served.url}/v1/chat/completions"
    answer = httpx.post(url, json=body("hi", model="demo:cats"), timeout=60, trust_env=False)
    return int(answer.raise_for_status().json()["model"].rpartition("@")[2])
