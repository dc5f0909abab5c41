"""Adapters in host memory: one load for all, a limit, and what is in use stays."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from tests.registry.published import manifest_of
from tests.serve.adapter_kit import RecordedMetrics
from xc_ray.engine.lora import PackedAdapter
from xc_ray.errors import InvalidRequest, RegistryError
from xc_ray.registry.manifest import Manifest
from xc_ray.serve.host_cache import HostCache

SIZE = 400  # bytes of each


def version(number: int) -> Manifest:
    return manifest_of({"file": str(number).encode()}, "cats", number)


@dataclass
class Loader:
    """Loads at once, unless the gate is closed or it is told to fail."""

    gate: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    loads: list[int] = field(default_factory=list)
    now: float = 0.0
    metrics: RecordedMetrics = field(default_factory=RecordedMetrics)

    def __post_init__(self) -> None:
        self.gate.set()

    def load(self, manifest: Manifest) -> PackedAdapter:
        self.loads.append(manifest.version)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return PackedAdapter(manifest.digest, 16, torch.zeros(SIZE // 4), torch.zeros(1))

    def cache(self, room_for: int = 100) -> HostCache:
        return HostCache(
            self.load,
            room_for * SIZE,
            threads=ThreadPoolExecutor(4),
            metrics=self.metrics,
            clock=lambda: self.now,
        )


@pytest.fixture
def loader() -> Loader:
    return Loader()


def held(cache: HostCache) -> list[int]:
    return [n for n in range(1, 10) if cache.has(version(n).digest)]


async def test_many_who_ask_at_once_share_one_load(loader: Loader) -> None:
    cache = loader.cache()
    holds = await asyncio.gather(*(cache.take(version(1)) for _ in range(20)))
    assert loader.loads == [1]
    assert len({id(hold.packed) for hold in holds}) == 1


async def test_of_those_that_nobody_holds_the_longest_unused_goes(loader: Loader) -> None:
    cache = loader.cache(room_for=2)
    for number in (1, 2, 1, 3):
        (await cache.take(version(number))).release()
    assert held(cache) == [1, 3]
    assert loader.metrics.count("host_eviction") == 1
    assert cache.num_bytes == 2 * SIZE


async def test_what_is_held_stays_past_the_limit_and_goes_after_it(loader: Loader) -> None:
    cache = loader.cache(room_for=1)
    holds = [await cache.take(version(number)) for number in (1, 2, 3)]
    assert held(cache) == [1, 2, 3]
    for hold in holds:
        hold.release()
        hold.release()  # a second time does nothing
    assert held(cache) == [3]


async def test_without_room_each_request_loads_its_own(loader: Loader) -> None:
    cache = loader.cache(room_for=0)
    for _ in range(2):
        hold = await cache.take(version(1))
        assert cache.has(hold.packed.digest)
        hold.release()
    assert loader.loads == [1, 1]
    assert held(cache) == []


async def test_who_leaves_does_not_end_the_load_of_the_others(loader: Loader) -> None:
    cache = loader.cache()
    loader.gate.clear()
    asks = [asyncio.create_task(cache.take(version(1))) for _ in range(3)]
    await asyncio.sleep(0.02)
    asks[0].cancel()
    loader.gate.set()
    assert (await asks[1]).packed is (await asks[2]).packed
    assert loader.loads == [1]


async def test_a_load_that_all_have_left_is_kept_and_its_failure_is_no_noise(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    cache = loader.cache()
    for error in (None, RegistryError("away")):
        loader.error = error
        loader.gate.clear()
        number = 1 if error is None else 2
        ask = asyncio.create_task(cache.take(version(number)))
        await asyncio.sleep(0.02)
        ask.cancel()
        loader.gate.set()
        await asyncio.sleep(0.05)
    assert held(cache) == [1]
    assert "never retrieved" not in caplog.text


async def test_one_that_is_retired_goes_with_its_last_request(loader: Loader) -> None:
    cache = loader.cache()
    first, second = await cache.take(version(1)), await cache.take(version(1))
    cache.retire(first.packed.digest)
    first.release()
    assert held(cache) == [1]
    second.release()
    assert held(cache) == []
    cache.retire(first.packed.digest)  # what is not there is left alone


async def test_one_that_is_asked_for_again_is_no_longer_retired(loader: Loader) -> None:
    cache = loader.cache()
    first = await cache.take(version(1))
    cache.retire(first.packed.digest)
    again = await cache.take(version(1))
    first.release()
    again.release()
    assert held(cache) == [1]


async def test_a_failure_is_told_again_without_a_try_until_its_pause_is_over(
    loader: Loader,
) -> None:
    cache = loader.cache()
    loader.error = RegistryError("http://10.0.0.7/bucket: 503")
    manifest = version(1)
    for now, tries in [(0.0, 1), (0.5, 1), (1.0, 2), (2.9, 2), (3.0, 3), (6.9, 3), (7.0, 4)]:
        loader.now = now
        with pytest.raises(RegistryError) as caught:
            await cache.take(manifest)
        assert len(loader.loads) == tries
        assert "10.0.0.7" not in caught.value.message
        assert caught.value.code == "adapter_unavailable"
    assert cache.failure(manifest.digest) == caught.value.message
    assert loader.metrics.count("load", False) == 4
    loader.error, loader.now = None, 15.0
    (await cache.take(manifest)).release()
    assert cache.failure(manifest.digest) == ""


async def test_the_pause_has_an_end(loader: Loader) -> None:
    cache = loader.cache()
    loader.error = RegistryError("away")
    for _ in range(20):
        loader.now += 60
        with pytest.raises(RegistryError):
            await cache.take(version(1))
    assert len(loader.loads) == 20


async def test_what_does_not_fit_is_the_callers_to_know(loader: Loader) -> None:
    loader.error = InvalidRequest("3 of another shape: x")
    with pytest.raises(InvalidRequest, match="adapter 'cats@1': 3 of another shape: x") as caught:
        await loader.cache().take(version(1))
    assert (caught.value.param, caught.value.code) == ("model", "adapter_unusable")


async def test_a_bug_in_a_load_is_told_without_its_inside(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    loader.error = RuntimeError("CUDA error at 0x7f00")
    with pytest.raises(RegistryError) as caught:
        await loader.cache().take(version(1))
    assert "CUDA" not in caught.value.message
    assert "CUDA error" in caplog.text
