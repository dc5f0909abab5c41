"""The decoder: an engine in a thread, its tokens on the event loop, and whoever leaves or fails."""

import asyncio
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serve.handles import LocalHandle
from xc_ray.config import DecoderOptions, ServeConfig
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import SamplingParams
from xc_ray.errors import ConfigError, EngineError, InvalidRequest, MediaError, PromptTooLong
from xc_ray.model.config import XComposerConfig
from xc_ray.model.weights import Checkpoint
from xc_ray.pipeline import Pipeline
from xc_ray.plan import decoder_plan
from xc_ray.prompt.chat import ImageSlot, Message, render
from xc_ray.prompt.sequence import build_prompt, picture_grids
from xc_ray.prompt.tiles import read_header
from xc_ray.serve import decoder as decoder_module
from xc_ray.serve.decoder import HUNG_STEP_S, Decoder, EngineDriver, TokenStream, engine_config
from xc_ray.serve.device import Device
from xc_ray.serve.encoder import VisionEncoder
from xc_ray.serve.messages import GenerateRequest, Picture, Sampling

Draw = Callable[..., bytes]
Tiny = Callable[..., Path]

PROMPT = [1, 300, 301, 302]
LIMITS = EngineConfig(max_model_len=16_384, kv_cache_tokens=65_536, max_num_seqs=4)
GREEDY = Sampling(4, 0.0, 0, 1.0, 0.0, 0.0, 1.0, 0)
# Minutes of work, for those that are to be ended before.
ENDLESS = SamplingParams(max_tokens=16_000, temperature=0.0)
# The same where stop tokens count: greedy, and drawn to what it has said already.
LONG: dict[str, Any] = {"max_tokens": 16_000, "repetition_penalty": 0.01}
ENDING_S = 5.0


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
    """Returns once the engine has nothing to do, and its cache is free."""
    async with asyncio.timeout(ENDING_S):
        while engine.has_work:
            await asyncio.sleep(0.01)
    assert engine.kv_usage == 0


@pytest.fixture
def engine(tiny: Tiny) -> Engine:
    return Engine(Checkpoint.open(tiny()).load_decoder(), LIMITS)


@pytest.fixture
async def driver(engine: Engine) -> EngineDriver:
    return EngineDriver(engine)


class TestEngineDriver:
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
        await asyncio.sleep(0)  # what the thread handed over
        (tokens,) = await stream.next()
        assert (len(tokens.ids), len(tokens.logprobs)) == (9, 9)
        assert (tokens.num_generated, tokens.finish_reason) == (9, "length")
        assert stream.finished

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


class TestEngineThatFails:
    async def test_every_stream_hears_of_it_without_the_inside(
        self, driver: EngineDriver, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> Any:
            raise RuntimeError("CUDA error at 0x7f00")

        monkeypatch.setattr(engine, "step", fail)
        streams = [driver.open(1), driver.open(2)]
        driver.add(streams[0].engine_ids[0], PROMPT, ENDLESS, [])
        for stream in streams:
            with pytest.raises(EngineError) as caught:
                async with asyncio.timeout(ENDING_S):
                    await stream.next()
            assert caught.value.message == "the engine failed: RuntimeError"
            driver.close(stream)

    async def test_health_says_so_and_nothing_new_is_taken(
        self, driver: EngineDriver, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver.check()
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, ENDLESS, [])
        with pytest.raises(EngineError):
            await stream.next()
        with pytest.raises(EngineError, match="the engine stopped: division by zero"):
            driver.check()
        with pytest.raises(EngineError, match="the engine stopped"):
            driver.open(1)

    async def test_a_step_that_hangs_is_seen_by_its_time(
        self, driver: EngineDriver, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: now)
        monkeypatch.setattr(decoder_module, "time", clock)
        inside, go, step = threading.Event(), threading.Event(), engine.step

        def hang() -> Any:
            inside.set()
            assert go.wait(30)
            return step()

        monkeypatch.setattr(engine, "step", hang)
        stream = driver.open(1)
        driver.add(stream.engine_ids[0], PROMPT, params(1), [])
        assert await asyncio.to_thread(inside.wait, 5)
        now += HUNG_STEP_S
        driver.check()  # a long step is not a hung one
        now += 1
        with pytest.raises(EngineError, match=f"has not ended for {HUNG_STEP_S:.0f} s"):
            driver.check()
        go.set()
        assert len((await read(stream))[0]) == 1
        driver.check()


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.load(tiny(), device="cpu")


class TestDecoder:
    """With the real encoder behind it, in one process."""

    @pytest.fixture
    async def decoder(self, tiny: Tiny) -> Decoder:
        config = ServeConfig(model=str(tiny())).resolve(0)
        return Decoder(config, LocalHandle(VisionEncoder(config)))  # type: ignore[arg-type]

    def request_for(
        self,
        pipe: Pipeline,
        *pictures: bytes,
        text: str = "What?",
        num_choices: int = 1,
        **sampling: Any,
    ) -> GenerateRequest:
        sizes = [(h.width, h.height) for h in map(read_header, pictures)]
        grids = picture_grids(pipe.config, sizes, [2] * len(sizes))
        slots = [ImageSlot(i) for i in range(len(pictures))]
        segments = render(pipe.config, [Message("user", (*slots, text))])
        ids = build_prompt(pipe.config, pipe.tokenizer, segments, grids).ids
        chosen = replace(GREEDY, **{"max_tokens": 8, "seed": 7, **sampling})
        files = tuple(Picture(p, g) for p, g in zip(pictures, grids, strict=True))
        return GenerateRequest("r", array("i", ids), chosen, files, num_choices)

    async def test_it_is_ready_with_a_token(self, decoder: Decoder) -> None:
        assert await decoder.ready() == 1
        decoder.check_health()

    async def test_it_is_ready_while_it_works_for_as_many_as_it_can(
        self, tiny: Tiny, pipe: Pipeline
    ) -> None:
        """Whoever is waited for, a token of theirs is as good a proof."""
        options = DecoderOptions(max_num_seqs=1)
        config = ServeConfig(model=str(tiny()), decoder=options).resolve(0)
        decoder = Decoder(config, LocalHandle(VisionEncoder(config)))  # type: ignore[arg-type]
        answer = decoder.generate(self.request_for(pipe, **LONG))
        await anext(answer)
        async with asyncio.timeout(ENDING_S):
            assert await decoder.ready() >= 1
        await answer.aclose()  # type: ignore[attr-defined]
        await idle(decoder._driver._engine)

    async def test_it_answers_as_the_pipeline_does(
        self, decoder: Decoder, pipe: Pipeline, picture: Draw
    ) -> None:
        pictures = [picture(100, 60), picture(60, 100, "blue")]
        request = self.request_for(pipe, *pictures)
        ids = [
            i async for batch in decoder.generate(request) for tokens in batch for i in tokens.ids
        ]
        options: dict[str, Any] = {
            "max_tiles": 2,
            "temperature": 0.0,
            "max_tokens": 8,
            "repetition_penalty": 1.0,
        }
        expected, _ = pipe.chat("<ImageHere><ImageHere>What?", images=pictures, **options)
        assert pipe.tokenizer.decode(ids) == expected

    async def test_each_choice_has_the_next_seed(self, decoder: Decoder, pipe: Pipeline) -> None:
        async def choices(seed: int, num: int) -> dict[int, list[int]]:
            request = self.request_for(pipe, temperature=1.0, seed=seed, num_choices=num)
            made: dict[int, list[int]] = {}
            async for batch in decoder.generate(request):
                for tokens in batch:
                    made.setdefault(tokens.index, []).extend(tokens.ids)
            return made

        both = await choices(7, 2)
        assert both == {0: (await choices(7, 1))[0], 1: (await choices(8, 1))[0]}
        assert both[0] != both[1]

    async def test_a_damaged_picture_is_refused_by_its_place(
        self, decoder: Decoder, pipe: Pipeline, picture: Draw
    ) -> None:
        good = picture(400, 300)
        request = self.request_for(pipe, good, good[: len(good) // 2])
        with pytest.raises(MediaError, match="damaged or cut short"):
            await anext(decoder.generate(request))
        assert await decoder.ready() == 1

    async def test_a_prompt_past_the_limit_is_refused_and_the_next_one_served(
        self, decoder: Decoder, pipe: Pipeline
    ) -> None:
        with pytest.raises(PromptTooLong):
            await anext(decoder.generate(self.request_for(pipe, max_tokens=16_384)))
        with pytest.raises(InvalidRequest, match="image positions"):
            await anext(decoder.generate(GenerateRequest("r", array("i", [1024]), GREEDY)))
        assert await decoder.ready() == 1
        await idle(decoder._driver._engine)

    async def test_leaving_ends_the_work(self, decoder: Decoder, pipe: Pipeline) -> None:
        answer = decoder.generate(self.request_for(pipe, num_choices=2, **LONG))
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        await idle(decoder._driver._engine)

    async def test_being_cancelled_ends_the_work(self, decoder: Decoder, pipe: Pipeline) -> None:
        async def listen() -> None:
            request = self.request_for(pipe, **LONG)
            async for _ in decoder.generate(request):
                heard.set()

        heard = asyncio.Event()
        listener = asyncio.create_task(listen())
        await heard.wait()
        listener.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listener
        await idle(decoder._driver._engine)


class TestLimits:
    CPU = Device("cpu", torch.float32)

    @pytest.fixture
    def model(self, tiny: Tiny) -> XComposerConfig:
        return Checkpoint.open(tiny()).config

    @pytest.fixture(autouse=True)
    def no_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Device, "enforce", lambda self: None)

    def test_on_cpu_the_cache_holds_four_of_the_longest(self, model: XComposerConfig) -> None:
        assert engine_config(ServeConfig(), model, self.CPU) == EngineConfig(
            16_384, 65_536, 32, 4096
        )

    def test_what_the_file_says_counts(self, model: XComposerConfig) -> None:
        options = DecoderOptions(max_num_seqs=2, max_prefill_tokens=64, kv_cache_tokens=999)
        config = ServeConfig(max_model_len=500, decoder=options)
        assert engine_config(config, model, self.CPU) == EngineConfig(500, 999, 2, 64)

    def test_a_cache_smaller_than_a_request_is_refused(self, model: XComposerConfig) -> None:
        config = ServeConfig(decoder=DecoderOptions(kv_cache_tokens=1000))
        with pytest.raises(ConfigError, match=r"holds 1,000 tokens and max_model_len is 16,384"):
            engine_config(config, model, self.CPU)

    def test_on_a_gpu_the_cache_is_the_rest_of_the_share(self, model: XComposerConfig) -> None:
        device = Device("cuda", torch.bfloat16, 2_000_000_000)
        plan = decoder_plan(model, device.budget, max_num_seqs=4096, max_prefill_tokens=4096)
        config = ServeConfig(decoder=DecoderOptions(max_num_seqs=4096))
        assert plan.kv_tokens > 16_384
        assert engine_config(config, model, device).kv_cache_tokens == plan.kv_tokens

    def test_a_share_without_room_is_refused(self, model: XComposerConfig) -> None:
        device = Device("cuda", torch.bfloat16, 500_000_000)
        with pytest.raises(ConfigError, match=r"its share is 0\.50 GB; raise its num_gpus"):
            engine_config(ServeConfig(), model, device)
