"""The simulation behind `benchmarks/routing.py`: it counts what it says, and the router helps."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def sim() -> Iterator[Any]:
    """The script's module; scripts import their neighbours by bare name."""
    place = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, place)
    try:
        yield importlib.import_module("routing_sim")
    finally:
        sys.path.remove(place)


def run(sim: Any, router: Any, *, num: int = 1, **more: Any) -> Any:
    return sim.simulate(sim.talks(60, 5.0), [router(i) for i in range(num)], **more)


def test_one_decoder_with_room_for_all_hits_whatever_can_be_hit(sim: Any) -> None:
    found = run(sim, sim.PowerOfTwo, num_decoders=1, num_blocks=100_000, max_num_seqs=1000)
    assert found.hit_rate == 1
    assert found.balance == 1
    assert found.moved == 0


def test_every_turn_is_answered_though_a_decoder_is_lost(sim: Any) -> None:
    wanted = sum(len(talk.turns) for talk in sim.talks(60, 5.0))
    for router in (sim.PowerOfTwo, sim.ByAffinity):
        assert len(run(sim, router, num=2, lose_at_s=6.0).calls) == wanted


def test_affinity_hits_more_than_chance(sim: Any) -> None:
    def ours(seed: int) -> Any:
        return sim.ByAffinity(seed, load_factor=1.5, free_tokens=16_384)

    chance = run(sim, sim.PowerOfTwo).hit_rate
    assert run(sim, ours).hit_rate > chance + 0.2
    assert run(sim, ours, num=4).hit_rate > chance + 0.2
