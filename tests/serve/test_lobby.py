"""A decoder's two gates: what a request takes of each, and when it gives that back."""

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.serve.decoder_metrics import RecordedDecoderMetrics
from xc_ray.config import Limits
from xc_ray.demo.make import demo_config
from xc_ray.engine.config import EngineConfig
from xc_ray.errors import Overloaded
from xc_ray.prompt.tiles import image_grid
from xc_ray.serve.lobby import PROMPT_STEPS, Guest, Lobby
from xc_ray.serve.messages import GenerateRequest, Picture, Sampling, Tokens
from xc_ray.serve.scale import DecoderLoad

STEP = 256  # tokens
SAMPLING = Sampling(100, 0.0, 0, 1.0, 0.0, 0.0, 1.0, 0)
GRID = image_grid(demo_config(), (60, 60), 1)


def lobby(lanes: int = 8, tokens: int = 10_000, **limits: Any) -> Lobby:
    metrics = RecordedDecoderMetrics()
    return Lobby(EngineConfig(1000, tokens, lanes, STEP), Limits(**limits), metrics)


def metrics_of(at: Lobby) -> RecordedDecoderMetrics:
    assert isinstance(at.metrics, RecordedDecoderMetrics)
    return at.metrics


def asks(
    num_tokens: int = 10, *, pictures: int = 0, key: str = "", choices: int = 1, **sampling: Any
) -> GenerateRequest:
    files = tuple(Picture(b"", GRID) for _ in range(pictures))
    ids = array("i", [1] * num_tokens)
    return GenerateRequest("r", ids, replace(SAMPLING, **sampling), files, choices, "", "", key)


@asynccontextmanager
async def enter(at: Lobby, request: GenerateRequest) -> AsyncIterator[Guest]:
    """Asks, and waits to be let in."""
    with at.ask(request) as guest:
        await guest.let_in()
        yield guest


def inside(at: Lobby) -> tuple[float, ...]:
    """Sequences and tokens of the engine's gate, sequences and tiles of the pictures'."""
    return (*at.engine._inside[:2], *at.pictures._inside[:2])


def prompts(at: Lobby) -> tuple[float, float]:
    """Prompt tokens without a first token yet: all, and those with pictures."""
    return at.engine._inside[2], at.pictures._inside[2]


async def test_a_request_takes_its_prompt_and_its_answer() -> None:
    at = lobby()
    async with enter(at, asks(10, choices=2)):
        assert inside(at) == (2, 10 + 2 * 100, 0, 0)
    assert inside(at) == (0, 0, 0, 0)


async def test_who_waits_and_for_how_long_is_told() -> None:
    at = lobby(lanes=8)
    async with AsyncExitStack() as stack:
        for _ in range(9):  # eight lanes, one more that stands by
            await stack.enter_async_context(enter(at, asks()))
        assert max(metrics_of(at).waits) < 0.1
        waiting = asyncio.create_task(stack.enter_async_context(enter(at, asks(choices=2))))
        await asyncio.sleep(0.2)
        assert metrics_of(at).waiting[-1] == 2
        waiting.cancel()
        await asyncio.wait({waiting})
        assert metrics_of(at).waiting[-1] == 0
        assert len(metrics_of(at).waits) == 9  # whoever left was not let in

        async def wait() -> float:
            async with enter(at, asks()) as guest:
                return guest.waited_s

        waits = asyncio.create_task(wait())
        await asyncio.sleep(0.2)
    assert await waits == metrics_of(at).waits[-1] > 0.1


async def test_long_answers_are_taken_for_twice_the_mean_of_those_that_ended() -> None:
    at = lobby()
    for _ in range(1000):
        at.learn(30)
    async with enter(at, asks(10, max_tokens=900)):
        assert at.engine._inside[1] == pytest.approx(10 + 60, abs=0.1)
    async with enter(at, asks(10, max_tokens=20)):
        assert at.engine._inside[1] == 30


async def test_an_answers_length_is_learnt_from_its_last_message() -> None:
    at = lobby()
    before = at._mean_tokens
    async with enter(at, asks()) as guest:
        guest.note([Tokens(0, [5], 1)])
        assert at._mean_tokens == before
        guest.note([Tokens(0, [5], 2, "stop")])
    assert at._mean_tokens < before


async def test_what_of_a_prompt_was_cached_takes_no_room_of_its_own() -> None:
    """It is counted with the request that computed it."""
    at = lobby()
    async with enter(at, asks(300, max_tokens=10)) as guest:
        guest.note([Tokens(0, [5], 1, num_cached=256)])
        assert inside(at) == (1, 300 + 10 - 256, 0, 0)
        guest.note([Tokens(0, [5], 2, num_cached=256)])
        assert inside(at) == (1, 300 + 10 - 256, 0, 0)
    assert inside(at) == (0, 0, 0, 0)


async def test_a_prompt_counts_as_one_that_waits_until_its_first_token() -> None:
    at = lobby()
    async with enter(at, asks(300, pictures=1, choices=2)) as guest:
        assert prompts(at) == (300, 300)
        guest.note([Tokens(1, [5], 1)])
        assert prompts(at) == (0, 300)  # the other choice may still ask for the picture
        guest.note([Tokens(0, [5], 1)])
        assert prompts(at) == (0, 0)
    assert prompts(at) == (0, 0)


async def test_prompts_beyond_some_steps_wait_where_their_wait_is_known() -> None:
    """Lanes and cache have room; the engine has not computed what is inside."""
    at = lobby(tokens=100_000)
    async with AsyncExitStack() as stack:
        half = STEP * PROMPT_STEPS // 2
        first, _ = [await stack.enter_async_context(enter(at, asks(half))) for _ in range(2)]
        third = asyncio.create_task(enter(at, asks(half)).__aenter__())
        await asyncio.sleep(0)
        assert not third.done()
        first.note([Tokens(0, [5], 1)])
        async with asyncio.timeout(1):
            await third


async def test_prompts_with_pictures_leave_half_of_the_steps_to_text() -> None:
    at = lobby(tokens=100_000)
    quarter = STEP * PROMPT_STEPS // 4
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(enter(at, asks(quarter, pictures=1)))
        third = asyncio.create_task(enter(at, asks(quarter, pictures=1)).__aenter__())
        for _ in range(2):
            async with asyncio.timeout(1):
                await stack.enter_async_context(enter(at, asks(quarter)))
        assert not third.done()
        third.cancel()
        await asyncio.wait({third})
    assert prompts(at) == (0, 0)


async def test_each_choice_about_a_picture_counts_as_a_lane() -> None:
    at = lobby(lanes=4)
    async with enter(at, asks(pictures=1, choices=2)):
        other = asyncio.create_task(enter(at, asks(pictures=1)).__aenter__())
        async with asyncio.timeout(1), enter(at, asks()):
            pass
        assert not other.done()
        other.cancel()
        await asyncio.wait({other})


async def test_pictures_count_until_every_choice_has_begun() -> None:
    at = lobby()
    async with enter(at, asks(pictures=3, choices=2)) as guest:
        assert inside(at)[2:] == (2, 3)
        guest.note([Tokens(1, [5], 1)])
        assert inside(at)[2:] == (2, 3)
        guest.note([Tokens(0, [5], 1)])
        assert inside(at)[2:] == (0, 0)
    assert inside(at) == (0, 0, 0, 0)


async def test_pictures_that_wait_for_the_encoder_leave_lanes_to_text() -> None:
    at = lobby(lanes=4)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(enter(at, asks(pictures=1)))
        third = asyncio.create_task(enter(at, asks(pictures=1)).__aenter__())
        for _ in range(2):
            async with asyncio.timeout(1):
                await stack.enter_async_context(enter(at, asks()))
        assert not third.done()
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
    assert inside(at) == (0, 0, 0, 0)


@pytest.mark.parametrize("pictures", [0, 1])
async def test_a_full_lobby_refuses_and_a_refused_request_leaves_nothing(pictures: int) -> None:
    at = lobby(lanes=1, max_waiting=0)
    async with enter(at, asks()), enter(at, asks()):  # one lane, one on standby
        with pytest.raises(Overloaded) as caught:
            await enter(at, asks(pictures=pictures)).__aenter__()
        assert caught.value.retry_after_s == 1
    assert inside(at) == (0, 0, 0, 0)


async def test_a_picture_that_may_wait_for_the_encoder_is_not_refused_by_the_engine() -> None:
    """A refusal comes at once, or never: the engine's line is asked before the encoder's."""
    at = lobby(lanes=1, max_waiting=1)
    async with AsyncExitStack() as stack:
        busy = await stack.enter_async_context(enter(at, asks(pictures=1)))
        waiting = asyncio.create_task(enter(at, asks(pictures=1)).__aenter__())
        await asyncio.sleep(0)
        assert at.pictures.num_waiting == 1
        await stack.enter_async_context(enter(at, asks()))
        text = asyncio.create_task(stack.enter_async_context(enter(at, asks())))
        await asyncio.sleep(0)
        assert at.engine.num_waiting == 1  # the most that may
        with pytest.raises(Overloaded):
            await enter(at, asks(pictures=1)).__aenter__()
        busy.seen()  # the encoder has room, the engine's line is full
        await asyncio.sleep(0.01)
        assert (at.pictures.num_waiting, at.engine.num_waiting) == (0, 2)
        assert not waiting.done()
        for task in (waiting, text):
            task.cancel()
        await asyncio.gather(waiting, text, return_exceptions=True)


async def test_who_goes_before_it_is_let_in_leaves_nothing() -> None:
    at = lobby(lanes=1)
    async with enter(at, asks()), enter(at, asks()):
        with at.ask(asks()) as guest:
            assert guest.waits
            assert at.engine.num_waiting == 1
        assert at.engine.num_waiting == 0
    with at.ask(asks(pictures=1)) as guest:
        assert not guest.waits
    assert inside(at) == (0, 0, 0, 0)


async def test_a_lobby_says_for_whom_it_is_closed() -> None:
    at = lobby(lanes=1, max_waiting=1, max_wait_s=1e9)
    assert at.closed_s(asks()) == at.closed_s(asks(pictures=1)) == 0
    async with enter(at, asks()), enter(at, asks()):
        with at.ask(asks()):
            await asyncio.sleep(0.01)
            at.engine._rate.add(1.0)
            assert at.closed_s(asks()) > 0
            assert at.closed_s(asks(pictures=1)) > 0
            assert at.closed_s(asks(key="other")) == 0  # has a share of the places
        assert at.closed_s(asks()) == 0


async def test_those_who_wait_count_as_load_for_autoscaling() -> None:
    at, engine = lobby(lanes=2), DecoderLoad(0.5, 1.5, 0.0, 7.0, 0.0)
    async with enter(at, asks(100, choices=3)):
        assert at.beside(engine) == engine  # the engine counts those inside itself
        late = asyncio.create_task(enter(at, asks(30, choices=2)).__aenter__())
        await asyncio.sleep(0)
        assert at.beside(engine) == engine._replace(lane_use=2.5, waiting_tokens=37.0)
        late.cancel()
        await asyncio.wait({late})
        assert at.beside(engine) == engine


async def test_who_leaves_while_it_waits_gives_its_pictures_back() -> None:
    at = lobby(lanes=1)
    guests: list[Guest] = []

    async def stay(request: GenerateRequest) -> None:
        async with enter(at, request) as guest:
            guests.append(guest)
            await asyncio.sleep(3600)

    tasks = [asyncio.create_task(stay(asks(pictures=n))) for n in (0, 0, 1)]
    await asyncio.sleep(0.01)
    assert len(guests) == 2
    assert inside(at)[2:] == (1, 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert inside(at) == (0, 0, 0, 0)
