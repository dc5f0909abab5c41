"""An engine in a thread and its streams on the event loop: in order, in time, to the last token."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serve.decoder_metrics import RecordedDecoderMetrics
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import FinishReason, Image, SamplingParams, StepOutput, TokenLogprob
from xc_ray.errors import ConfigError, EngineError
from xc_ray.model.weights import Checkpoint
from xc_ray.serve import driver as driver_module
from xc_ray.serve.driver import (
    HAPROXY_PACE,
    HUNG_STEP_S,
    PYTHON_PROXY_PACE,
    UNDELAYED_SEQUENCES,
    EngineDriver,
    Pace,
    TokenStream,
    serve_pace,
)
from xc_ray.serve.scale import DecoderLoad

Tiny = Callable[..., Path]

PROMPT = [1, 300, 301, 302]
LIMITS = EngineConfig(max_model_len=16_384, kv_cache_tokens=65_536, max_num_seqs=4)
# Minutes of work, for those that are to be ended before.
ENDLESS = SamplingParams(max_tokens=16_000, temperature=0.0)
ENDING_S = 5.0
FAILED = "the engine failed; try again later"


def params(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **fields})


def answer_of(engine: Engine, ids: Sequence[int], sampling: SamplingParams) -> list[int]:
    """The ids that such an engine gives, step by step in this thread."""
    engine = Engine(engine.decoder, LIMITS)
    engine.add("alone", ids, sampling)
    made: list[int] = []
    while engine.has_work:
        for output in engine.step():
            made += output.ids
    return made


async def read(stream: TokenStream) -> dict[int, list[int]]:
    """The ids of every choice, to the end."""
    made: dict[int, list[int]] = {}
    while not stream.finished:
        for tokens in await stream.next():
            made.setdefault(tokens.index, []).extend(tokens.ids)
    return made


async def idle(engine: Engine) -> None:
    """Returns once the engine has nothing to do and holds nothing."""
    async with asyncio.timeout(ENDING_S):
        while engine.has_work or engine.num_running or engine.num_waiting:
            await asyncio.sleep(0.01)
    assert engine.kv_usage == 0


class TestTokenStream:
    """Without an engine: what comes when it is put in."""

    def stream(self, interval: float = 0.0, num_choices: int = 1) -> TokenStream:
        return TokenStream([str(i) for i in range(num_choices)], lambda: interval)

    def put(
        self, stream: TokenStream, num_generated: int, index: int = 0, end: bool = False
    ) -> None:
        """One step's output of a choice: its next token."""
        reason = FinishReason.LENGTH if end else None
        logprobs = (TokenLogprob(-0.5),)
        output = StepOutput(str(index), (num_generated,), num_generated, reason, logprobs, 7)
        stream.put(output, index)

    async def test_of_few_sequences_each_step_is_a_message(self) -> None:
        stream = self.stream(PYTHON_PROXY_PACE.interval(UNDELAYED_SEQUENCES))
        for i in range(1, 20):
            self.put(stream, i, end=i == 19)
            (tokens,) = await stream.next()
            assert (tokens.ids, tokens.num_generated, tokens.num_cached) == ([i], i, 7)
        assert stream.finished

    @pytest.mark.parametrize("pace", [PYTHON_PROXY_PACE, HAPROXY_PACE])
    def test_the_more_run_the_longer_the_interval_up_to_a_bound(self, pace: Pace) -> None:
        assert pace.interval(0) == pace.interval(UNDELAYED_SEQUENCES) == 0
        assert pace.interval(UNDELAYED_SEQUENCES + 1) == pace.message_s
        for few, many in ((5, 20), (20, 100), (100, 200)):
            assert pace.interval(few) < pace.interval(many)
        assert pace.interval(100_000) == pace.longest_s

    @pytest.mark.parametrize(
        ("value", "pace"),
        [(None, PYTHON_PROXY_PACE), ("0", PYTHON_PROXY_PACE), ("1", HAPROXY_PACE)],
    )
    def test_the_python_proxy_gets_fewer_messages(
        self, value: str | None, pace: Pace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
        if value is not None:
            monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", value)
        assert serve_pace() == pace
        assert PYTHON_PROXY_PACE.interval(50) > HAPROXY_PACE.interval(50)

    async def test_of_many_the_messages_are_as_many_as_intervals(self) -> None:
        stream = self.stream(interval := 0.05)
        started = time.monotonic()

        async def feed() -> None:
            for i in range(1, 201):
                self.put(stream, i, end=i == 200)
                await asyncio.sleep(0.001)

        feeding = asyncio.create_task(feed())
        messages: list[list[int]] = []
        while not stream.finished:
            (tokens,) = await stream.next()
            assert len(tokens.logprobs) == len(tokens.ids)
            messages.append(tokens.ids)
        await feeding
        assert [i for ids in messages for i in ids] == list(range(1, 201))
        # The first and the last do not wait.
        assert 3 <= len(messages) <= (time.monotonic() - started) / interval + 3

    async def test_the_first_tokens_of_each_choice_leave_at_once(self) -> None:
        stream = self.stream(60, num_choices=3)
        async with asyncio.timeout(ENDING_S):
            for index in (1, 0, 2):
                assert not stream.begun
                self.put(stream, 1, index)
                assert [tokens.index for tokens in await stream.next()] == [index]
        assert stream.begun

    async def test_the_end_of_a_choice_leaves_at_once_with_all_that_waits(self) -> None:
        stream = self.stream(60, num_choices=2)
        self.put(stream, 1, 0)
        self.put(stream, 1, 1)
        await stream.next()
        self.put(stream, 2, 0)
        waiting = asyncio.create_task(stream.next())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        self.put(stream, 2, 1)
        self.put(stream, 3, 0, end=True)
        async with asyncio.timeout(ENDING_S):
            first, second = await waiting
        assert (first.ids, first.finish_reason) == ([2, 3], "length")
        assert (second.ids, second.finish_reason) == ([2], None)
        assert not stream.finished

    async def test_a_token_leaves_when_it_is_due_though_nothing_follows(self) -> None:
        stream = self.stream(0.1)
        self.put(stream, 1)
        await stream.next()
        sent = time.monotonic()
        self.put(stream, 2)
        async with asyncio.timeout(ENDING_S):
            (tokens,) = await stream.next()
        assert tokens.ids == [2]
        assert time.monotonic() - sent >= 0.09

    async def test_a_message_takes_one_timer_however_many_tokens_it_joins(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = self.stream(0.05)
        self.put(stream, 1)
        await stream.next()
        loop, timers = asyncio.get_running_loop(), 0
        call_at = loop.call_at

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal timers
            timers += 1
            return call_at(*args, **kwargs)

        monkeypatch.setattr(loop, "call_at", counted)
        waiting = asyncio.create_task(stream.next())
        for i in range(2, 102):
            self.put(stream, i)
            await asyncio.sleep(0)
        (tokens,) = await waiting
        assert len(tokens.ids) == 100
        assert timers == 1

    async def test_an_error_comes_at_once_and_the_first_one_counts(self) -> None:
        stream = self.stream(60)
        self.put(stream, 1)
        await stream.next()
        self.put(stream, 2)
        waiting = asyncio.create_task(stream.next())
        await asyncio.sleep(0.01)
        stream.fail(EngineError("first"))
        stream.fail(EngineError("second"))
        async with asyncio.timeout(ENDING_S):
            with pytest.raises(EngineError, match="first"):
                await waiting
            with pytest.raises(EngineError, match="first"):
                await stream.next()
        assert not stream.finished


@pytest.fixture
def engine(tiny: Tiny) -> Engine:
    return Engine(Checkpoint.open(tiny()).load_decoder(), LIMITS)


@pytest.fixture
def metrics() -> RecordedDecoderMetrics:
    return RecordedDecoderMetrics()


@pytest.fixture
async def driver(engine: Engine, metrics: RecordedDecoderMetrics) -> EngineDriver:
    return EngineDriver(lambda: engine, metrics, HAPROXY_PACE)


class TestEngineDriver:
    async def test_the_thread_that_steps_makes_the_engine(self, engine: Engine) -> None:
        """Libraries' handles and their memory on the device are a thread's own."""
        made_by: list[str] = []

        def make() -> Engine:
            made_by.append(threading.current_thread().name)
            return engine

        assert EngineDriver(make, RecordedDecoderMetrics(), HAPROXY_PACE).engine is engine
        assert made_by == ["engine"]

    async def test_an_engine_that_cannot_be_made_raises_where_it_was_asked_for(self) -> None:
        def make() -> Engine:
            raise ConfigError("it does not fit")

        with pytest.raises(ConfigError, match="does not fit"):
            EngineDriver(make, RecordedDecoderMetrics(), HAPROXY_PACE)

    async def test_its_load_is_the_engines_and_nothing_once_it_rests(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        assert driver.read_load() == DecoderLoad(0, 0, 0, 0, 0)
        streams = [driver.open(1) for _ in range(2)]
        for stream in streams:
            driver.add(stream.engine_ids[0], PROMPT * 16, ENDLESS, [])
            await stream.next()
        load = driver.read_load()
        assert load.lane_use == 2 / LIMITS.max_num_seqs
        assert 0 < load.kv_use < 0.01
        assert load.waiting_tokens == 0
        assert load.prefill_tokens_per_s > 64
        assert 0 < load.prefill_use < 2
        for stream in streams:
            driver.close(stream)
        await idle(engine)
        driver.read_load()
        await asyncio.sleep(0.01)
        assert driver.read_load() == DecoderLoad(0, 0, 0, 0, load.prefill_tokens_per_s)

    async def test_tokens_are_those_of_the_engine(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(20), [])
        made = await read(stream)
        assert made == {0: answer_of(engine, PROMPT, params(20))}

    async def test_tokens_that_nobody_read_meanwhile_come_joined(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(9, logprobs=2), [])
        await idle(engine)
        await asyncio.sleep(0.01)  # what the thread handed over
        (tokens,) = await stream.next()
        assert (len(tokens.ids), len(tokens.logprobs)) == (9, 9)
        assert (tokens.num_generated, tokens.finish_reason) == (9, "length")
        assert stream.finished

    async def test_of_a_loop_that_is_behind_nothing_is_lost_or_out_of_order(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        sampling = [params(60, temperature=1.0, seed=seed) for seed in (1, 2)]
        streams = [driver.open(1) for _ in sampling]
        for stream, one in zip(streams, sampling, strict=True):
            driver.add(stream.engine_ids[0], PROMPT, one, [])
        deadline = time.monotonic() + ENDING_S
        while engine.has_work and time.monotonic() < deadline:
            time.sleep(0.05)  # the loop does nothing else meanwhile
        for stream, one in zip(streams, sampling, strict=True):
            assert (await read(stream))[0] == answer_of(engine, PROMPT, one)

    async def test_choices_come_apart(self, driver: EngineDriver, engine: Engine) -> None:
        sampling = [params(12, temperature=1.0, seed=seed) for seed in (3, 4, 5)]
        stream = driver.open(3)
        for engine_id, choice in zip(stream.engine_ids, sampling, strict=True):
            driver.add(engine_id, PROMPT, choice, [])
        made = await read(stream)
        expected = [answer_of(engine, PROMPT, choice) for choice in sampling]
        assert [made[i] for i in range(3)] == expected

    async def test_closing_a_stream_ends_its_work_and_no_other(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        left, stays = driver.open(2), driver.open(1)
        for engine_id in left.engine_ids:
            driver.add(engine_id, PROMPT, ENDLESS, [])
        driver.add(stays.engine_ids[0], PROMPT, params(40), [])
        await left.next()
        driver.close(left)
        made = await read(stays)
        assert len(made[0]) == 40
        await idle(engine)

    async def test_closing_one_that_waits_for_room_ends_it(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        streams = [driver.open(1) for _ in range(5)]
        for stream in streams:
            driver.add(stream.engine_ids[0], PROMPT, ENDLESS, [])
        await streams[3].next()
        assert engine.num_waiting == 1
        driver.close(streams[4])
        async with asyncio.timeout(ENDING_S):
            while engine.num_waiting:
                await asyncio.sleep(0.01)
        for stream in streams[:4]:
            driver.close(stream)
        await idle(engine)

    async def test_what_is_added_to_a_closed_stream_is_not_worked_on(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        """A client may leave while a thread still prepares its request."""
        stream = driver.open(1)
        driver.close(stream)
        await idle(engine)
        driver.add(stream.engine_ids[0], PROMPT, ENDLESS, [])
        await idle(engine)

    async def test_closing_after_the_end_is_nothing(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(2), [])
        await read(stream)
        driver.close(stream)
        driver.close(stream)
        await idle(engine)

    async def test_a_watcher_hears_of_the_next_tokens_and_may_leave(
        self, driver: EngineDriver, engine: Engine
    ) -> None:
        left = asyncio.create_task(driver.next_tokens())
        stays = asyncio.create_task(driver.next_tokens())
        await asyncio.sleep(0)
        left.cancel()
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(1), [])
        assert await stays == 1
        assert driver._watchers == set()
        await read(stream)


class TestMetrics:
    async def test_each_step_is_told_with_its_sequences_and_the_prompt_tokens_it_computed(
        self, driver: EngineDriver, metrics: RecordedDecoderMetrics
    ) -> None:
        streams = [driver.open(1) for _ in range(3)]
        for stream in streams:
            driver.add(stream.engine_ids[0], PROMPT, params(20), [])
        await asyncio.gather(*(read(stream) for stream in streams))
        await idle(driver.engine)
        assert sum(prefilled for _, prefilled in metrics.steps) == driver.engine.num_prefilled
        assert max(sequences for sequences, _ in metrics.steps) == 3
        # A step brings each of its sequences a token.
        assert sum(sequences for sequences, _ in metrics.steps) >= 3 * 20
        assert 0 < metrics.seconds < 60

    async def test_the_state_is_told_now_and_then_and_at_rest(
        self, driver: EngineDriver, metrics: RecordedDecoderMetrics
    ) -> None:
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(50), [])
        await read(stream)
        await idle(driver.engine)
        async with asyncio.timeout(ENDING_S):
            while metrics.states[-1] != (0, 0, 0, 0):
                await asyncio.sleep(0.01)
        assert metrics.states[0][0] == pytest.approx(64 / LIMITS.kv_cache_tokens)
        assert metrics.states[0][1:] == (1, 0, 0)
        assert len(metrics.states) < len(metrics.steps) / 4

    async def test_engine_ids_name_the_request_and_never_come_twice(
        self, driver: EngineDriver
    ) -> None:
        ids = [i for _ in range(2) for i in driver.open(2, "asked").engine_ids]
        assert len(set(ids)) == 4
        assert all(i.startswith("asked.") for i in ids)


class TestImages:
    """Virtual ids stand for rows that somebody brings when the engine asks."""

    ROWS = 4

    @pytest.fixture
    def rows(self, engine: Engine) -> torch.Tensor:
        width = engine.decoder.config.decoder.hidden_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.ROWS, width, generator=generator)

    @pytest.fixture
    def prompt(self, engine: Engine) -> list[int]:
        first = engine.vocab_size
        return [1, *range(first, first + 2 * self.ROWS), 300]

    async def test_they_are_asked_for_once_and_the_answer_goes_on(
        self, driver: EngineDriver, engine: Engine, rows: torch.Tensor, prompt: list[int]
    ) -> None:
        stream = driver.open(1)
        asked: list[int] = []
        missing = asyncio.Event()

        def on_missing(engine_id: str, images: tuple[int, ...]) -> None:
            assert engine_id == stream.engine_ids[0]
            asked.extend(images)
            missing.set()

        stream.on_missing = on_missing
        images = [Image(self.ROWS, b"a"), Image(self.ROWS, b"b")]
        driver.add(stream.engine_ids[0], prompt, params(5), images)
        await missing.wait()
        assert asked == [0, 1]
        for index in (1, 0):
            await asyncio.sleep(0.02)
            assert not engine.has_work  # nobody spins while a picture is on its way
            driver.supply(stream.engine_ids[0], index, rows * (1 + index))
        made = await read(stream)
        assert asked == [0, 1]
        whole = Engine(engine.decoder, LIMITS)
        whole.add("alone", prompt, params(5), [rows, rows * 2])
        expected: list[int] = []
        while whole.has_work:
            for output in whole.step():
                expected += output.ids
        assert made == {0: expected}

    async def test_closing_a_stream_that_waits_for_them_leaves_nothing(
        self, driver: EngineDriver, engine: Engine, rows: torch.Tensor, prompt: list[int]
    ) -> None:
        stream = driver.open(1)
        missing = asyncio.Event()
        stream.on_missing = lambda *_: missing.set()
        images = [Image(self.ROWS, b"a"), Image(self.ROWS, b"b")]
        driver.add(stream.engine_ids[0], prompt, ENDLESS, images)
        await missing.wait()
        driver.close(stream)
        driver.supply(stream.engine_ids[0], 0, rows)  # too late
        await idle(engine)


class Trouble:
    """A hook in a model's forward pass, which fails or hangs as it is told."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.error: Exception | None = None
        self.passes = threading.Event()
        self.passes.set()
        self.inside = threading.Event()
        model.register_forward_pre_hook(self._before)

    def _before(self, *_: object) -> None:
        self.inside.set()
        assert self.passes.wait(30)
        if self.error is not None:
            raise self.error


@pytest.fixture
def trouble(engine: Engine) -> Iterator[Trouble]:
    trouble = Trouble(engine.decoder)
    yield trouble
    trouble.passes.set()


class TestStepThatFails:
    """Nobody knows which request it was: all of them hear of it, and the replica is replaced."""

    async def test_everybody_hears_of_it_without_the_inside(
        self,
        driver: EngineDriver,
        trouble: Trouble,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        names = [f"asked-{i}" for i in range(6)]  # four run, two wait for their lanes
        streams = [driver.open(1, name) for name in names]
        for stream in streams:
            driver.add(stream.engine_ids[0], PROMPT, ENDLESS, [])
        await asyncio.gather(*(stream.next() for stream in streams[:4]))
        driver.check()
        trouble.error = RuntimeError("CUDA error at 0x7f00")
        messages = set()
        for stream in streams:
            with pytest.raises(EngineError) as caught:
                async with asyncio.timeout(ENDING_S):
                    await read(stream)
            messages.add(caught.value.message)
        assert messages <= {"the engine failed on this request; try again", FAILED}
        assert "CUDA error at 0x7f00" in caplog.text
        (line,) = (m for m in caplog.messages if m.startswith("a step of 4 sequences failed"))
        assert all(f"{name}." in line for name in names[:4])  # these lines have no request id

    async def test_the_replica_is_unhealthy_from_then_on(
        self, driver: EngineDriver, trouble: Trouble
    ) -> None:
        trouble.error = RuntimeError("no")
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, ENDLESS, [])
        with pytest.raises(EngineError):
            async with asyncio.timeout(ENDING_S):
                await read(stream)
        trouble.error = None
        async with asyncio.timeout(ENDING_S):
            while driver._thread.is_alive():
                await asyncio.sleep(0.01)
        for ask in (driver.check, lambda: driver.open(1)):
            with pytest.raises(EngineError) as caught:
                ask()
            assert caught.value.message == FAILED


class TestEngineThatFails:
    """Beyond use: nobody is left without an answer, and nobody new is taken."""

    @pytest.fixture
    def broken(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> Any:
            raise RuntimeError("CUDA error at 0x7f00")

        monkeypatch.setattr(engine, "step", fail)

    async def test_every_stream_hears_of_it_without_the_inside(
        self, driver: EngineDriver, broken: None
    ) -> None:
        streams = [driver.open(1), driver.open(2)]
        driver.add(streams[0].engine_ids[0], PROMPT, ENDLESS, [])
        for stream in streams:
            with pytest.raises(EngineError) as caught:
                async with asyncio.timeout(ENDING_S):
                    await stream.next()
            assert caught.value.message == FAILED
            driver.close(stream)

    async def test_health_says_so_and_nothing_new_is_taken(
        self, driver: EngineDriver, broken: None
    ) -> None:
        driver.check()
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, ENDLESS, [])
        with pytest.raises(EngineError):
            await stream.next()
        for ask in (driver.check, lambda: driver.open(1)):
            with pytest.raises(EngineError) as caught:
                ask()
            assert caught.value.message == FAILED


class TestStepThatHangs:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """What the driver takes for the time; `now` may be set."""
        clock = SimpleNamespace(now=1000.0)
        clock.monotonic = lambda: clock.now
        monkeypatch.setattr(driver_module, "time", clock)
        return clock

    async def test_it_is_seen_by_its_time_and_every_stream_hears_of_it(
        self, driver: EngineDriver, engine: Engine, trouble: Trouble, clock: SimpleNamespace
    ) -> None:
        trouble.passes.clear()
        streams = [driver.open(1), driver.open(2)]
        driver.add(streams[0].engine_ids[0], PROMPT, params(1), [])
        assert await asyncio.to_thread(trouble.inside.wait, 5)
        clock.now += HUNG_STEP_S
        driver.check()  # a long step is not a hung one
        clock.now += 1
        with pytest.raises(EngineError, match=f"has not ended for {HUNG_STEP_S:.0f} s"):
            driver.check()
        for stream in streams:
            with pytest.raises(EngineError, match="has not ended for"):
                async with asyncio.timeout(ENDING_S):
                    await stream.next()
        with pytest.raises(EngineError, match="has not ended for"):
            driver.open(1)
        for stream in streams:
            driver.close(stream)
        trouble.passes.set()
        await idle(engine)
        driver.check()

    async def test_one_that_ends_after_all_was_only_long(
        self, driver: EngineDriver, engine: Engine, trouble: Trouble, clock: SimpleNamespace
    ) -> None:
        trouble.passes.clear()
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(3), [])
        assert await asyncio.to_thread(trouble.inside.wait, 5)
        clock.now += HUNG_STEP_S - 1
        driver.check()
        trouble.passes.set()
        assert len((await read(stream))[0]) == 3
        driver.check()
