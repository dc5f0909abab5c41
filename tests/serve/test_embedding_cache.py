"""Embeddings that are kept: a limit in bytes, one encoding for all who ask, no errors."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.encoder_metrics import RecordedEncoderMetrics
from xc_ray.errors import MediaError
from xc_ray.serve.embedding_cache import EmbeddingCache, Embeddings

BYTES = 100  # of one row
unhurried = settings(deadline=None)


@dataclass
class Encoder:
    """Makes as many rows as a picture's name has bytes; waits for the gate."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    encoded: list[bytes] = field(default_factory=list)
    cancelled: int = 0
    metrics: RecordedEncoderMetrics = field(default_factory=RecordedEncoderMetrics)

    def __post_init__(self) -> None:
        self.gate.set()

    def cache(self, room_for: int = 100) -> EmbeddingCache:
        return EmbeddingCache(room_for * BYTES, self.metrics)

    async def ask(self, cache: EmbeddingCache, name: bytes) -> Embeddings:
        async def encode() -> Embeddings:
            self.encoded.append(name)
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if self.error is not None:
                raise self.error
            return np.full((len(name), BYTES), name[0], np.uint8)

        return await cache.get(name, encode)


async def under_way(calls: list[asyncio.Task[Embeddings]]) -> None:
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(call.done() for call in calls)


async def test_who_asks_again_gets_the_very_array() -> None:
    encoder = Encoder()
    cache = encoder.cache()
    first, second = [await encoder.ask(cache, b"cat") for _ in range(2)]
    assert first is second
    assert not first.flags.writeable
    assert encoder.encoded == [b"cat"]
    assert encoder.metrics.pictures == {"miss": 1, "hit": 1}
    assert encoder.metrics.num_bytes == cache.num_bytes == 3 * BYTES


async def test_of_those_that_were_used_the_longest_ago_the_first_goes() -> None:
    encoder = Encoder()
    cache = encoder.cache(room_for=4)
    for name in (b"a", b"b", b"a", b"ccc"):
        await encoder.ask(cache, name)
    assert cache.num_bytes == 4 * BYTES
    assert encoder.metrics.evictions == 1
    await encoder.ask(cache, b"a")
    assert encoder.encoded == [b"a", b"b", b"ccc"]


@pytest.mark.parametrize("room_for", [0, 2])
async def test_what_alone_is_larger_than_the_limit_is_not_kept(room_for: int) -> None:
    encoder = Encoder()
    cache = encoder.cache(room_for)
    for _ in range(2):
        assert len(await encoder.ask(cache, b"large")) == 5
    assert encoder.encoded == [b"large", b"large"]
    assert cache.num_bytes == 0


async def test_all_who_ask_at_once_share_one_encoding_also_without_room() -> None:
    encoder = Encoder()
    cache = encoder.cache(room_for=0)
    arrays = await asyncio.gather(*(encoder.ask(cache, b"cat") for _ in range(20)))
    assert encoder.encoded == [b"cat"]
    assert len({id(array) for array in arrays}) == 1
    assert encoder.metrics.pictures == {"miss": 1, "joined": 19}


async def test_who_leaves_first_does_not_take_the_encoding_along() -> None:
    encoder = Encoder()
    cache = encoder.cache()
    encoder.gate.clear()
    calls = [asyncio.create_task(encoder.ask(cache, b"cat")) for _ in range(3)]
    await under_way(calls)
    calls[0].cancel()
    await asyncio.wait([calls[0]])
    encoder.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] is results[2]
    assert encoder.encoded == [b"cat"]


async def test_when_all_have_left_the_encoding_ends_and_the_next_begins_anew() -> None:
    encoder = Encoder()
    cache = encoder.cache()
    encoder.gate.clear()
    calls = [asyncio.create_task(encoder.ask(cache, b"cat")) for _ in range(3)]
    await under_way(calls)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls[-1:])
    again = asyncio.create_task(encoder.ask(cache, b"cat"))  # before the first has wound up
    encoder.gate.set()
    assert len(await again) == 3
    assert all(call.cancelled() for call in calls)
    assert encoder.cancelled == 1
    assert encoder.encoded == [b"cat", b"cat"]


async def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    encoder = Encoder(error=MediaError("damaged"))
    cache = encoder.cache()
    results = await asyncio.gather(
        *(encoder.ask(cache, b"cat") for _ in range(3)), return_exceptions=True
    )
    assert [str(r) for r in results] == ["damaged"] * 3
    encoder.error = None
    assert len(await encoder.ask(cache, b"cat")) == 3
    assert encoder.encoded == [b"cat", b"cat"]


@unhurried
@given(st.lists(st.integers(1, 6), max_size=40), st.integers(0, 12))
def test_it_keeps_what_a_list_by_last_use_keeps(sizes: list[int], room_for: int) -> None:
    async def compare() -> None:
        encoder = Encoder()
        cache = encoder.cache(room_for)
        model: OrderedDict[bytes, int] = OrderedDict()
        expected: list[bytes] = []
        for size in sizes:
            name = b"x" * size
            array = await encoder.ask(cache, name)
            assert array.shape == (size, BYTES)
            if name in model:
                model.move_to_end(name)
                continue
            expected.append(name)
            if size <= room_for:
                model[name] = size
            while sum(model.values()) > room_for:
                model.popitem(last=False)
            assert cache.num_bytes == sum(model.values()) * BYTES <= room_for * BYTES
        assert encoder.encoded == expected

    asyncio.run(compare())


@unhurried
@given(
    st.lists(st.tuples(st.sampled_from(["ask", "cancel", "go"]), st.integers(0, 3)), max_size=30)
)
def test_whoever_stays_gets_the_embeddings_whoever_else_leaves(
    events: list[tuple[str, int]],
) -> None:
    async def play() -> None:
        encoder = Encoder()
        cache = encoder.cache(room_for=3)
        encoder.gate.clear()
        calls: list[tuple[bytes, asyncio.Task[Embeddings]]] = []
        left: set[asyncio.Task[Embeddings]] = set()
        for event, number in events:
            if event == "ask":
                name = bytes([65 + number]) * (number + 1)
                calls.append((name, asyncio.create_task(encoder.ask(cache, name))))
            elif event == "cancel" and calls:
                _, call = calls[number % len(calls)]
                if call.cancel():
                    left.add(call)
            elif event == "go":
                encoder.gate.set()
                for _ in range(number):
                    await asyncio.sleep(0)
                encoder.gate.clear()
            await asyncio.sleep(0)
        encoder.gate.set()
        await asyncio.gather(*(call for _, call in calls), return_exceptions=True)
        for name, call in calls:
            if call in left:
                continue
            assert (call.result() == name[0]).all()
            assert len(call.result()) == len(name)
        assert cache.num_bytes <= 3 * BYTES
        assert not cache._flights

    asyncio.run(play())
