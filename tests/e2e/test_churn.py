"""Replicas and adapters come and go while many long streams run: none is cut, no request fails."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.adapters import write_adapter
from tests.e2e.serve_cluster import ServeCluster, replica_pids, serve_cluster
from tests.e2e.serve_run import body, haproxy
from tests.e2e.streams import DONE, Streams, how, in_turn
from xc_ray.hub import resolve_model
from xc_ray.model.weights import Checkpoint
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_STREAMS = 200
NUM_OF_ADAPTER = 40  # of them
NUM_LATER = 40  # more, which begin when all replicas are new
NUM_TOKENS = 700
LEAST_S = 60.0
ADAPTER = "demo:cats"  # its alias prod
SHORT: dict[str, Any] = {"ignore_eos": True, "max_tokens": 12}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The demo model as `base`, and two versions of `cats`, each unlike the other."""
    home, demo = tmp_path_factory.mktemp("registry"), resolve_model("demo")
    registry = Registry.open(str(home / "registry"))
    import_checkpoint(demo, registry, "base")
    for seed in (1, 2):
        folder = write_adapter(home / str(seed), Checkpoint.open(demo).config, seed=seed)
        push_adapter(folder, registry, "cats", "base")
    return registry


@pytest.fixture(scope="module", params=["python", "haproxy"])
def served(
    request: pytest.FixtureRequest, registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeCluster]:
    proxy = haproxy(tmp_path_factory.mktemp("proxy")) if request.param == "haproxy" else {}
    registry.promote("cats", [(1, 1.0)], "prod")
    args = {
        "model": "base",
        "served_model_name": "demo",
        "registry": registry.store.url,
        "adapters": {"poll_s": 0.5},
        # Room for all streams in one decoder.
        "decoder": {"max_num_seqs": NUM_STREAMS, "kv_cache_tokens": NUM_STREAMS * 1000},
    }
    # While they are replaced there are twice as many.
    with serve_cluster(args, num_cpus=8, decoders=2, **proxy) as running:
        yield running


def test_updates_scaling_and_changed_settings_and_adapters_cut_nothing(
    served: ServeCluster, registry: Registry
) -> None:
    before = replica_pids(served)
    said = {f"{ADAPTER}@{v}": said_by(served, f"{ADAPTER}@{v}") for v in (1, 2)}
    assert len(set(said.values())) == 2
    requests = [long() for _ in range(NUM_STREAMS - NUM_OF_ADAPTER)]
    requests += [long(model=ADAPTER) for _ in range(NUM_OF_ADAPTER)]
    shorts = [body("12 + 30 = ", max_tokens=20), body("What?", model=ADAPTER, **SHORT)]
    # Beginnings of their own, longer than a block, spread them over the decoders.
    more = [long(f"{i}. " + "Who are you? " * 24) for i in range(NUM_LATER)]
    with Streams(served.url, requests, in_turn(*shorts)) as streams:
        served.wait_until(lambda: streams.num_running == NUM_STREAMS)

        def bounds(config: dict[str, Any]) -> None:
            served.deployment("Ingress")["max_ongoing_requests"] = 2000

        served.deploy(bounds)  # in place

        registry.promote("cats", [(2, 1.0)], "prod")
        served.wait_until(lambda: serving_everywhere(served) == {2})
        num_before_move = len(streams.short) + 1  # one may be under way

        def new_args(config: dict[str, Any]) -> None:
            config["applications"][0]["args"]["limits"] = {"heartbeat_s": 5}

        served.deploy(new_args)
        served.wait_until(lambda: are_new(served, before))
        assert streams.num_running > NUM_STREAMS / 2  # most went through all of it

        with Streams(served.url, more) as later:
            served.wait_until(lambda: later.num_running == NUM_LATER)

            def one_decoder(config: dict[str, Any]) -> None:
                served.deployment("Decoder")["num_replicas"] = 1

            served.deploy(one_decoder)
            served.wait_until(lambda: len(served.running("Decoder")) == 1)
            assert len(served.replicas("Decoder") - before["Decoder"]) == 2  # one still streams
    served.wait_until_settled()
    assert streams.how() == {DONE: NUM_STREAMS}
    assert later.how() == {DONE: NUM_LATER}
    assert min(ended.seconds for ended in streams.long) >= LEAST_S
    of_adapter = [ended.models for ended in streams.long if ended.models != {"demo"}]
    assert of_adapter == [{f"{ADAPTER}@1"}] * NUM_OF_ADAPTER
    assert how(streams.short) == {DONE: len(streams.short)}
    for ended in streams.short:
        (model,) = ended.models
        assert ended.text == ("12 + 30 = 42" if model == "demo" else said[model])
    after = set().union(*(ended.models for ended in streams.short[num_before_move:]))
    assert after == {"demo", f"{ADAPTER}@2"}
    assert all(served.replicas(name).isdisjoint(pids) for name, pids in before.items())


def long(text: str = "Who are you?", **fields: Any) -> dict[str, Any]:
    return body(text, max_tokens=NUM_TOKENS, ignore_eos=True, **fields)


def said_by(served: ServeCluster, version: str) -> str:
    """What a version of the adapter says to the short request."""
    url, request = f"{served.url}/v1/chat/completions", body("What?", model=version, **SHORT)
    answer = httpx.post(url, json=request, timeout=120, trust_env=False).raise_for_status().json()
    assert answer["model"] == version
    return str(answer["choices"][0]["message"]["content"])


def serving_everywhere(served: ServeCluster) -> set[int]:
    """The versions that the alias means at the decoders that have it in use."""
    url = f"{served.url}/v1/models/{ADAPTER}@prod"
    card = httpx.get(url, timeout=30, trust_env=False).raise_for_status().json()
    return {target["version"] for targets in card.get("serving", {}).values() for target in targets}


def are_new(served: ServeCluster, before: dict[str, set[int]]) -> bool:
    """Whether only replicas run that took the place of those before."""
    running = {name: served.running(name) for name in before}
    return all(
        len(running[name]) == len(pids) and running[name].isdisjoint(pids)
        for name, pids in before.items()
    )
