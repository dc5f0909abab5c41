"""The router in Serve's own routing loop, with replicas that are nobody: no cluster, no process."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import FIFOMixin, PendingRequest

from xc_ray.serve import router
from xc_ray.serve.prefixes import Route
from xc_ray.serve.router import DecoderRouter, router_config

DECODER = DeploymentID("Decoder", "xc_ray")


@dataclass(eq=False)
class Nobody:
    """A replica as a router sees it; `ongoing` is what it answers when it is asked."""

    name: str
    ongoing: int = 0
    max_ongoing_requests: int = 4
    routing_stats: dict[str, list[str]] = field(default_factory=dict)
    multiplexed_model_ids: frozenset[str] = frozenset()

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DECODER)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.ongoing


class House:
    """A router and what Serve does around it."""

    def __init__(self, kind: type[DecoderRouter] = DecoderRouter, **options: Any) -> None:
        self.router = kind(
            deployment_id=DECODER,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            initial_backoff_s=0.01,
            max_backoff_s=0.01,
        )
        self.router.initialize_state(**({"load_factor": 1.5, "free_tokens": 10_000} | options))
        self.replicas = [Nobody(name) for name in "abcd"]
        self.update()
        self.number = 0

    def update(self) -> None:
        self.router.update_replicas(self.replicas)  # type: ignore[arg-type]

    def request(self, *keys: int, tokens: int = 100, adapter: str = "") -> PendingRequest:
        self.number += 1
        route = Route(keys, tuple(100 * (i + 1) for i in range(len(keys))), tokens, adapter)
        metadata = RequestMetadata(f"r{self.number}", f"i{self.number}")
        return PendingRequest([], {"route": route}, metadata)

    async def send(self, request: PendingRequest, *, is_retry: bool = False) -> str:
        """Chooses, and the replica accepts."""
        async with asyncio.timeout(5):
            replica = await self.router._choose_replica_for_request(request, is_retry=is_retry)
        self.router.on_send_request(replica.replica_id)
        self.router.on_request_routed(request, replica.replica_id, None)
        return str(replica.replica_id.unique_id)

    def end(self, request: PendingRequest, name: str) -> None:
        replica_id = ReplicaID(name, DECODER)
        self.router.decrement_queue_len_cache(replica_id)
        self.router.on_request_completed(replica_id, request.metadata.internal_request_id)

    @property
    def under_way(self) -> int:
        return self.router._affinity.outstanding.total

    async def home(self, *keys: int, **more: Any) -> str:
        request = self.request(*keys, **more)
        name = await self.send(request)
        self.end(request, name)
        return name


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    await asyncio.sleep(0.01)  # the replicas are asked for their queues
    yield made
    for task in made.router._routing_tasks:
        task.cancel()


async def test_turns_of_a_conversation_go_to_one_replica(house: House) -> None:
    names = {await house.home(7, *range(100, 100 + turn)) for turn in range(6)}
    assert len(names) == 1


async def test_requests_at_the_same_time_each_go_to_their_own(house: House) -> None:
    homes = [await house.home(key) for key in range(12)]
    assert set(homes) == set("abcd")
    requests = [house.request(key) for key in range(12)]
    assert await asyncio.gather(*map(house.send, requests)) == homes


class First(FIFOMixin, DecoderRouter):
    """As a router is often written; see `serve/router.py`."""


async def test_first_come_first_served_would_mix_them_up() -> None:
    house = House(First)
    await asyncio.sleep(0.01)
    # The first needs a moment, because its replica's queue is not known; the second does not wait.
    homes = [await house.home(key) for key in range(12)]
    other = next(i for i, name in enumerate(homes) if name != homes[0])
    house.router.replica_queue_len_cache.invalidate_key(ReplicaID(homes[0], DECODER))
    sent = asyncio.gather(house.send(house.request(0)), house.send(house.request(other)))
    first, second = await sent
    assert first == homes[other]
    assert second not in (homes[0], homes[other])  # it took the next of its ranks


async def test_when_the_preferred_replica_is_full_the_next_rank_is_tried(house: House) -> None:
    home = await house.home(7)
    ranks = await house.router.choose_replicas(house.router._replicas_list, house.request(7))
    assert [len(rank) for rank in ranks] == [1, 1, 1, 1]
    full = next(r for r in house.replicas if r.name == home)
    full.ongoing = full.max_ongoing_requests
    house.router.replica_queue_len_cache.update(full.replica_id, full.ongoing)
    assert await house.send(house.request(7)) == ranks[1][0].replica_id.unique_id


async def test_one_that_refuses_is_asked_no_more_and_its_tokens_are_given_back(
    house: House,
) -> None:
    home, request = await house.home(7), house.request(7)
    replica = await house.router._choose_replica_for_request(request)
    assert replica.replica_id.unique_id == home
    house.router.on_send_request(replica.replica_id)
    house.router.on_new_queue_len_info(replica.replica_id, 4)  # it was full after all
    next(r for r in house.replicas if r.name == home).ongoing = 4
    house.router.on_request_completed(replica.replica_id, request.metadata.internal_request_id)
    name = await house.send(request, is_retry=True)
    assert name != home
    assert house.under_way == 100
    house.end(request, name)
    assert house.under_way == 0


async def test_while_all_are_full_a_request_waits(house: House) -> None:
    for replica in house.replicas:
        replica.ongoing = 4
        house.router.replica_queue_len_cache.update(replica.replica_id, 4)
    sent = asyncio.ensure_future(house.send(house.request(7)))
    await asyncio.sleep(0.1)
    assert not sent.done()
    house.replicas[2].ongoing = 3
    assert await sent == "c"


async def test_who_leaves_while_waiting_leaves_nothing_behind(house: House) -> None:
    for replica in house.replicas:
        replica.ongoing = 4
        house.router.replica_queue_len_cache.update(replica.replica_id, 4)
    sent = asyncio.ensure_future(house.send(house.request(7)))
    await asyncio.sleep(0.05)
    assert house.under_way == 100
    sent.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sent
    await asyncio.sleep(0)
    assert house.under_way == 0


async def test_a_busy_replica_is_passed_over(house: House) -> None:
    home = await house.home(7)
    requests = [house.request(7, tokens=6_000) for _ in range(3)]
    names = [await house.send(request) for request in requests]
    assert names[:2] == [home, home]  # 6,000 tokens are not much yet
    assert names[2] != home
    for request, name in zip(requests, names, strict=True):
        house.end(request, name)
    assert house.under_way == 0


async def test_those_chosen_for_at_the_same_time_see_one_another(house: House) -> None:
    requests = [house.request(7, tokens=20_000) for _ in range(3)]
    assert len(set(await asyncio.gather(*map(house.send, requests)))) == 3


async def test_a_dead_replica_costs_its_own_conversations_alone(house: House) -> None:
    homes = {key: await house.home(key) for key in range(40)}
    dead = homes[0]
    await house.send(house.request(0))
    house.router.on_replica_actor_died(ReplicaID(dead, DECODER))
    assert house.under_way == 0
    for key, name in homes.items():
        now = await house.home(key)
        assert (now == name) == (name != dead)


async def test_an_adapter_draws_its_requests(house: House) -> None:
    house.replicas[1].routing_stats = {"device": ["cats@3"], "host": []}
    house.update()
    homes = {await house.home(key, adapter="cats@prod") for key in range(10)}
    assert homes == {"b"}


async def test_a_call_without_a_route_goes_to_the_shorter_of_two_queues(house: House) -> None:
    for replica in house.replicas[:3]:
        house.router.replica_queue_len_cache.update(replica.replica_id, 3)
    house.router.replica_queue_len_cache.update(house.replicas[3].replica_id, 0)
    found = set()
    for number in range(40):
        request = PendingRequest([], {}, RequestMetadata(f"r{number}", f"i{number}"))
        ranks = await house.router.choose_replicas(house.router._replicas_list, request)
        assert [len(rank) for rank in ranks] == [2, 2]
        found.add(await house.send(request))
        house.router.replica_queue_len_cache.update(house.replicas[3].replica_id, 0)
    assert "d" in found
    assert house.under_way == 0


def test_serve_takes_the_router_by_its_name() -> None:
    config = router_config(2.0, 100)
    assert config.request_router_class in (DecoderRouter, "xc_ray.serve.router.DecoderRouter")
    assert config.request_router_kwargs == {"load_factor": 2.0, "free_tokens": 100}


def test_the_router_as_serve_brings_it_tells_this_process_of_its_decoders() -> None:
    """Serve pickles a router's module by value: what is a global there is a copy."""
    cloudpickle.register_pickle_by_value(router)
    try:
        brought = cloudpickle.dumps(DecoderRouter)
    finally:
        cloudpickle.unregister_pickle_by_value(router)
    code = (
        "import sys; from ray import cloudpickle; from xc_ray.serve.door import DOOR\n"
        "router = cloudpickle.loads(sys.stdin.buffer.read())\n"
        "assert router._forget_the_others.__globals__['door'].DOOR is DOOR"
    )
    subprocess.run([sys.executable, "-c", code], input=brought, check=True, timeout=60)
