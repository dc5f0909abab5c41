"""The decoder: tokens of its engine, pictures when the engine asks, and whoever leaves or fails."""

import asyncio
import logging
import threading
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from tests.adapters import write_adapter
from tests.serve.handles import LocalHandle
from xc_ray.config import AdapterOptions, DecoderOptions, Limits, ServeConfig
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import SamplingParams
from xc_ray.errors import (
    EngineError,
    InvalidRequest,
    MediaError,
    NotFound,
    Overloaded,
    PromptTooLong,
)
from xc_ray.model.adapter import load_adapter, merge_adapter
from xc_ray.model.weights import Checkpoint
from xc_ray.pipeline import Pipeline
from xc_ray.prompt.chat import ImageSlot, Message, render
from xc_ray.prompt.sequence import build_prompt, picture_grids
from xc_ray.prompt.tiles import Grid, read_header
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore
from xc_ray.serve.decoder import Decoder, PictureSupply
from xc_ray.serve.driver import TokenStream
from xc_ray.serve.embedding_cache import Embeddings
from xc_ray.serve.encoder import VisionEncoder
from xc_ray.serve.messages import (
    DecoderState,
    GenerateRequest,
    Notice,
    Picture,
    Sampling,
    Tokens,
)
from xc_ray.serve.scale import DecoderLoad

Draw = Callable[..., bytes]
Tiny = Callable[..., Path]

GREEDY = Sampling(4, 0.0, 0, 1.0, 0.0, 0.0, 1.0, 0)
LONG_TEXT = "Look at all of it with care. " * 12  # more than a block of the cache
# Minutes of work, for those that are to be ended before.
LONG: dict[str, Any] = {"max_tokens": 16_000, "ignore_eos": True}
ENDING_S = 5.0


async def idle(engine: Engine) -> None:
    """Returns once the engine has nothing to do and holds nothing."""
    async with asyncio.timeout(ENDING_S):
        while engine.has_work or engine.num_running or engine.num_waiting:
            await asyncio.sleep(0.01)
    assert engine.kv_usage == 0


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.load(tiny(), device="cpu")


@dataclass
class Answer:
    """What came of one request: ids and reasons by choice, and what of the prompt was cached."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    num_cached: int = 0

    def take(self, tokens: Tokens) -> None:
        self.ids.setdefault(tokens.index, []).extend(tokens.ids)
        self.reasons[tokens.index] = tokens.finish_reason
        self.num_cached = max(self.num_cached, tokens.num_cached)


async def tokens_of(
    decoder: Decoder, request: GenerateRequest
) -> AsyncGenerator[list[Tokens], None]:
    """What comes but for notices; an error that comes as one is raised."""
    async with aclosing(cast("AsyncGenerator[Any, None]", decoder.generate(request))) as messages:
        async for message in messages:
            if not isinstance(message, Notice):
                yield message
            elif message.error is not None:
                raise message.error


async def answer_to(decoder: Decoder, request: GenerateRequest) -> Answer:
    answer = Answer()
    async with asyncio.timeout(ENDING_S):
        async for batch in tokens_of(decoder, request):
            for tokens in batch:
                answer.take(tokens)
    return answer


class House:
    """A decoder with the real encoder behind it, in one process."""

    def __init__(
        self,
        folder: Path,
        registry: str | None = None,
        adapters: AdapterOptions | None = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> None:
        config = ServeConfig(
            model=str(folder),
            registry=registry,
            limits=limits or Limits(),
            adapters=adapters or AdapterOptions(),
            decoder=DecoderOptions(**options),
        ).resolve(0)
        self.vision = VisionEncoder(config)
        self.encoder = LocalHandle(self.vision)
        self.decoder = Decoder(config, self.encoder)  # type: ignore[arg-type]
        self.engine = self.decoder._driver._engine

    @property
    def encoded(self) -> list[tuple[bytes, Grid]]:
        """The pictures that the encoder was asked for, in order."""
        return [args[:2] for args, _ in self.encoder.encode.made]


class Requests:
    """Makes requests for the tiny model."""

    @pytest.fixture(autouse=True)
    def model(self, tiny: Tiny) -> None:
        self.folder = tiny()

    def request_for(
        self,
        pipe: Pipeline,
        *pictures: bytes,
        text: str = "What?",
        num_choices: int = 1,
        max_tiles: int = 2,
        **sampling: Any,
    ) -> GenerateRequest:
        sizes = [(h.width, h.height) for h in map(read_header, pictures)]
        grids = picture_grids(pipe.config, sizes, [max_tiles] * len(sizes))
        slots = [ImageSlot(i) for i in range(len(pictures))]
        segments = render(pipe.config, [Message("user", (*slots, text))])
        ids = build_prompt(pipe.config, pipe.tokenizer, segments, grids).ids
        chosen = replace(GREEDY, **{"max_tokens": 8, "seed": 7, **sampling})
        files = tuple(Picture(p, g) for p, g in zip(pictures, grids, strict=True))
        return GenerateRequest("r", array("i", ids), chosen, files, num_choices)


class TestDecoder(Requests):
    @pytest.fixture
    async def house(self, tiny: Tiny) -> House:
        return House(tiny())

    @pytest.fixture
    def decoder(self, house: House) -> Decoder:
        return house.decoder

    async def test_it_is_ready_with_a_token(self, decoder: Decoder) -> None:
        assert await decoder.ready() == 1
        await decoder.check_health()

    async def test_it_reports_its_load_to_serve(self, decoder: Decoder) -> None:
        await decoder.ready()
        stats = decoder.record_autoscaling_stats()
        assert list(stats) == list(DecoderLoad._fields)
        assert stats["kv_use"] == stats["waiting_tokens"] == 0
        assert all(type(value) is float for value in stats.values())

    async def test_it_is_ready_while_it_works_for_as_many_as_it_can(
        self, tiny: Tiny, pipe: Pipeline
    ) -> None:
        """Whoever is waited for, a token of theirs is as good a proof."""
        decoder = House(tiny(), max_num_seqs=1).decoder
        answer = tokens_of(decoder, self.request_for(pipe, **LONG))
        await anext(answer)
        async with asyncio.timeout(ENDING_S):
            assert await decoder.ready() >= 1
        await answer.aclose()
        await idle(decoder._driver._engine)

    async def test_it_answers_as_the_pipeline_does(
        self, decoder: Decoder, pipe: Pipeline, picture: Draw
    ) -> None:
        pictures = [picture(100, 60), picture(60, 100, "blue")]
        request = self.request_for(pipe, *pictures)
        ids = (await answer_to(decoder, request)).ids[0]
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
            return (await answer_to(decoder, request)).ids

        both = await choices(7, 2)
        assert both == {0: (await choices(7, 1))[0], 1: (await choices(8, 1))[0]}
        assert both[0] != both[1]

    async def test_a_damaged_picture_is_refused_by_its_place(
        self,
        decoder: Decoder,
        pipe: Pipeline,
        picture: Draw,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        good = picture(400, 300)
        request = self.request_for(pipe, good, good[: len(good) // 2])
        logger = logging.getLogger("ray.serve")
        with caplog.at_level("INFO", "ray.serve"):
            logger.addHandler(caplog.handler)
            try:
                with pytest.raises(MediaError, match="damaged or cut short"):
                    await anext(tokens_of(decoder, request))
            finally:
                logger.removeHandler(caplog.handler)
        assert f"{request.request_id} ends with MediaError: " in caplog.text
        assert "Traceback" not in caplog.text
        assert await decoder.ready() == 1

    async def test_sampling_fields_reach_the_engine(self, decoder: Decoder, pipe: Pipeline) -> None:
        (end,) = pipe.config.stop_token_ids & {pipe.config.tokens.eos}

        async def say(**sampling: Any) -> tuple[list[int], str | None]:
            answer = await answer_to(decoder, self.request_for(pipe, **sampling))
            return answer.ids[0], answer.reasons[0]

        assert await say(logit_bias=((77, 100.0),)) == ([77] * 8, "length")
        ends = {"logit_bias": ((end, 100.0), (77, 50.0))}
        assert await say(**ends) == ([], "stop")
        assert await say(**ends, min_tokens=3) == ([77] * 3, "stop")
        assert await say(**ends, ignore_eos=True) == ([end] * 8, "length")
        greedy = await say()
        assert (await say(temperature=2.0, min_p=1.0))[0] == greedy[0]
        assert (await say(temperature=2.0))[0] != greedy[0]

    async def test_a_prompt_past_the_limit_is_refused_and_the_next_one_served(
        self, decoder: Decoder, pipe: Pipeline
    ) -> None:
        with pytest.raises(PromptTooLong):
            await anext(tokens_of(decoder, self.request_for(pipe, max_tokens=16_384)))
        with pytest.raises(InvalidRequest, match="image positions"):
            await anext(tokens_of(decoder, GenerateRequest("r", array("i", [1024]), GREEDY)))
        assert await decoder.ready() == 1
        await idle(decoder._driver._engine)

    async def test_more_than_may_wait_is_refused_and_those_inside_go_on(
        self, tiny: Tiny, pipe: Pipeline
    ) -> None:
        decoder = House(tiny(), limits=Limits(max_waiting=1), max_num_seqs=1).decoder
        requests = [self.request_for(pipe, max_tokens=40, ignore_eos=True) for _ in range(5)]
        answers = [asyncio.create_task(answer_to(decoder, request)) for request in requests]
        done = await asyncio.gather(*answers, return_exceptions=True)
        # One is worked on, one stands by, one waits.
        assert [len(a.ids[0]) for a in done if isinstance(a, Answer)] == [40] * 3
        refused = [a for a in done if isinstance(a, Overloaded)]
        assert len(refused) == 2
        assert all(a.retry_after_s for a in refused)
        assert await decoder.ready() == 1
        await idle(decoder._driver._engine)

    async def test_a_full_decoder_is_ready(self, tiny: Tiny, pipe: Pipeline) -> None:
        decoder = House(tiny(), limits=Limits(max_waiting=0), max_num_seqs=1).decoder
        long = [tokens_of(decoder, self.request_for(pipe, **LONG)) for _ in range(2)]
        first = [asyncio.ensure_future(anext(answer)) for answer in long]
        await first[0]
        with pytest.raises(Overloaded):
            await answer_to(decoder, self.request_for(pipe))
        async with asyncio.timeout(ENDING_S):
            assert await decoder.ready() >= 1
        first[1].cancel()
        await asyncio.wait(first)
        for answer in long:
            await answer.aclose()
        await idle(decoder._driver._engine)

    async def test_leaving_ends_the_work(self, decoder: Decoder, pipe: Pipeline) -> None:
        answer = tokens_of(decoder, self.request_for(pipe, num_choices=2, **LONG))
        await anext(answer)
        await answer.aclose()
        await idle(decoder._driver._engine)

    async def test_leaving_ends_the_work_within_two_steps(
        self, house: House, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one that runs, and the one that was launched behind it."""
        step, num_steps = house.engine.step, 0

        def counted() -> Any:
            nonlocal num_steps
            num_steps += 1
            return step()

        monkeypatch.setattr(house.engine, "step", counted)
        for _ in range(5):
            answer = tokens_of(house.decoder, self.request_for(pipe, **LONG))
            await anext(answer)
            await answer.aclose()
            left_at = num_steps
            await idle(house.engine)
            assert num_steps - left_at <= 2

    async def test_being_cancelled_ends_the_work(self, decoder: Decoder, pipe: Pipeline) -> None:
        async def listen() -> None:
            request = self.request_for(pipe, **LONG)
            async for _ in tokens_of(decoder, request):
                heard.set()

        heard = asyncio.Event()
        listener = asyncio.create_task(listen())
        await heard.wait()
        listener.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listener
        await idle(decoder._driver._engine)


class TestPictures(Requests):
    """None is encoded before the engine asks for it, and none twice."""

    @pytest.fixture
    async def house(self, tiny: Tiny) -> House:
        return House(tiny())

    @pytest.fixture
    def held(self, house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        """The encoder's passes wait for this event."""
        go, launch = threading.Event(), house.vision._runner.launch

        def wait_and_launch(parts: Any) -> Any:
            assert go.wait(30)
            return launch(parts)

        monkeypatch.setattr(house.vision._runner, "launch", wait_and_launch)
        yield go
        go.set()

    async def test_of_a_second_turn_the_picture_is_not_encoded_again(
        self, house: House, pipe: Pipeline, picture: Draw
    ) -> None:
        data = picture(300, 200)
        first = self.request_for(pipe, data, text=f"{LONG_TEXT}What?", max_tiles=24)
        before = await answer_to(house.decoder, first)
        assert (before.num_cached, len(house.encoded)) == (0, 1)
        again = await answer_to(house.decoder, first)
        second = self.request_for(pipe, data, text=f"{LONG_TEXT}Where is it?", max_tiles=24)
        other = await answer_to(house.decoder, second)
        assert again.ids == before.ids
        rows = sum(i >= house.engine.vocab_size for i in first.ids)
        size = house.engine.config.block_size
        for answer in (again, other):
            assert rows < answer.num_cached < len(first.ids)
            assert len(first.ids) - answer.num_cached <= size + 10
        assert len(house.encoded) == 1

    async def test_what_only_looks_alike_is_another_picture(
        self, house: House, pipe: Pipeline, picture: Draw
    ) -> None:
        """Of the same size, or the same file on another grid: the ids are the same, or begin so."""
        red = self.request_for(pipe, picture(300, 200), max_tiles=24)
        blue = self.request_for(pipe, picture(300, 200, "blue"), max_tiles=24)
        coarse = self.request_for(pipe, picture(300, 200), max_tiles=20)
        assert red.ids == blue.ids
        assert coarse.ids[:70] == red.ids[:70]
        grids = {request.pictures[0].grid for request in (red, blue, coarse)}
        assert len(grids) == 2
        fresh = [await answer_to(House(self.folder).decoder, r) for r in (red, blue, coarse)]
        for request, expected in zip((red, blue, coarse), fresh, strict=True):
            answer = await answer_to(house.decoder, request)
            assert answer.ids == expected.ids
            assert answer.num_cached == 0
        assert len(house.encoded) == 3

    async def test_requests_of_different_salts_share_neither_rows_nor_embeddings(
        self, pipe: Pipeline, picture: Draw
    ) -> None:
        house = House(self.folder)
        plain = self.request_for(pipe, picture(400, 300), text="What is it? " * 30)
        answers = []
        for salt in ("", "one", "two", "one"):
            files = tuple(replace(p, salt=salt) for p in plain.pictures)
            request = replace(plain, pictures=files, salt=salt)
            answers.append(await answer_to(house.decoder, request))
        assert [bool(a.num_cached) for a in answers] == [False, False, False, True]
        assert len({tuple(a.ids[0]) for a in answers}) == 1
        assert len(house.vision._cache._entries) == 3

    async def test_of_several_those_that_the_cache_covers_are_not_encoded(
        self, house: House, pipe: Pipeline, picture: Draw
    ) -> None:
        red, blue, green = (picture(300, 200, colour) for colour in ("red", "blue", "green"))
        await answer_to(house.decoder, self.request_for(pipe, red, blue, max_tiles=24))
        three = self.request_for(pipe, red, blue, green, max_tiles=24)
        answer = await answer_to(house.decoder, three)
        # Of the second the last rows fill no block, so that nobody else may have them.
        assert {data for data, _ in house.encoded[2:]} == {blue, green}
        assert answer.num_cached > 0
        assert answer.ids == (await answer_to(House(self.folder).decoder, three)).ids

    async def test_without_a_prefix_cache_each_request_has_its_own(
        self, pipe: Pipeline, picture: Draw
    ) -> None:
        house = House(self.folder, prefix_cache=False)
        request = self.request_for(pipe, picture())
        first, second = [await answer_to(house.decoder, request) for _ in range(2)]
        assert first == second
        assert (first.num_cached, len(house.encoded)) == (0, 2)

    @pytest.mark.parametrize("prefix_cache", [True, False])
    async def test_several_choices_share_one(
        self, pipe: Pipeline, picture: Draw, prefix_cache: bool
    ) -> None:
        house = House(self.folder, prefix_cache=prefix_cache)
        pictures = [picture(), picture(60, 90, "blue")]
        request = self.request_for(pipe, *pictures, num_choices=3, temperature=1.0, ignore_eos=True)
        answer = await answer_to(house.decoder, request)
        assert sorted(data for data, _ in house.encoded) == sorted(pictures)
        for index in range(3):
            alone = replace(
                request,
                num_choices=1,
                sampling=replace(request.sampling, seed=request.sampling.seed + index),
            )
            assert (await answer_to(house.decoder, alone)).ids[0] == answer.ids[index]

    async def test_a_text_is_answered_while_a_picture_is_encoded(
        self, house: House, pipe: Pipeline, picture: Draw, held: threading.Event
    ) -> None:
        waiting = asyncio.create_task(answer_to(house.decoder, self.request_for(pipe, picture())))
        while not house.encoded:
            await asyncio.sleep(0.01)
        assert len((await answer_to(house.decoder, self.request_for(pipe))).ids[0]) == 8
        assert not waiting.done()
        held.set()
        assert len((await waiting).ids[0]) == 8

    async def test_a_client_that_leaves_meanwhile_takes_all_of_it_along(
        self, house: House, pipe: Pipeline, picture: Draw, held: threading.Event
    ) -> None:
        request = self.request_for(pipe, picture(), picture(60, 90), num_choices=2, **LONG)
        waiting = asyncio.create_task(answer_to(house.decoder, request))
        while len(house.encoded) < 2:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert all(call.cancelled() for _, call in house.encoder.encode.made)
        await idle(house.engine)
        assert house.decoder._driver._streams == {}

    async def test_a_damaged_one_is_refused_by_its_place_and_the_others_are_let_go(
        self, house: House, pipe: Pipeline, picture: Draw, held: threading.Event
    ) -> None:
        good = picture(400, 300)
        cut = good[: len(good) // 2]
        request = self.request_for(pipe, good, cut, num_choices=2)
        bad = replace(request.pictures[1], where="messages[0].content[1]")
        request = replace(request, pictures=(request.pictures[0], bad))
        with pytest.raises(MediaError, match="damaged or cut short") as caught:
            await answer_to(house.decoder, request)
        assert caught.value.param == "messages[0].content[1]"
        assert caught.value.message.startswith("messages[0].content[1]: ")
        await asyncio.sleep(0)
        states = {args[0]: call.cancelled() for args, call in house.encoder.encode.made}
        assert states == {good: True, cut: False}
        await idle(house.engine)
        assert await house.decoder.ready() == 1

    async def test_an_encoder_that_fails_ends_the_request_alone(
        self, house: House, pipe: Pipeline, picture: Draw, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(parts: Any) -> Any:
            raise RuntimeError("out of memory")

        request = self.request_for(pipe, picture())
        with monkeypatch.context() as patch:
            patch.setattr(house.vision._runner, "launch", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                await answer_to(house.decoder, request)
        await idle(house.engine)
        assert len((await answer_to(house.decoder, request)).ids[0]) == 8

    @pytest.mark.parametrize(("num_lost", "answered"), [(2, True), (3, False)])
    async def test_an_encoder_that_is_lost_costs_only_time_up_to_the_third(
        self,
        house: House,
        pipe: Pipeline,
        picture: Draw,
        monkeypatch: pytest.MonkeyPatch,
        num_lost: int,
        answered: bool,
    ) -> None:
        encode, lost = house.vision.encode, iter(range(num_lost))

        async def lost_at_first(data: bytes, grid: Grid, salt: str) -> Any:
            if next(lost, None) is not None:
                raise ActorDiedError
            return await encode(data, grid)

        request = self.request_for(pipe, picture())
        monkeypatch.setattr(house.encoder.encode, "_method", lost_at_first)
        if answered:
            assert len((await answer_to(house.decoder, request)).ids[0]) == 8
            assert len(house.encoded) == 3
        else:
            with pytest.raises(ActorDiedError):
                await answer_to(house.decoder, request)
        await idle(house.engine)

    async def test_embeddings_of_another_size_are_no_fault_of_the_client(
        self, house: House, pipe: Pipeline, picture: Draw, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode = house.vision.encode

        async def one_row_less(data: bytes, grid: Grid, salt: str) -> Embeddings:
            return (await encode(data, grid))[1:]

        monkeypatch.setattr(house.encoder.encode, "_method", one_row_less)
        with pytest.raises(EngineError, match="embeddings do not fit"):
            await answer_to(house.decoder, self.request_for(pipe, picture()))
        await idle(house.engine)

    async def test_embeddings_that_are_no_numbers_end_their_request_alone(
        self, house: House, pipe: Pipeline, picture: Draw, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode = house.vision.encode

        async def no_numbers(data: bytes, grid: Grid, salt: str) -> Embeddings:
            return np.full_like(await encode(data, grid), np.nan)

        request = self.request_for(pipe, picture())
        text = asyncio.create_task(
            answer_to(house.decoder, self.request_for(pipe, max_tokens=200, ignore_eos=True))
        )
        with monkeypatch.context() as patch:
            patch.setattr(house.encoder.encode, "_method", no_numbers)
            with pytest.raises(EngineError, match="the engine failed on this request; try again"):
                await answer_to(house.decoder, request)
        assert len((await text).ids[0]) == 200
        await idle(house.engine)
        answer = await answer_to(house.decoder, request)
        assert (len(answer.ids[0]), answer.num_cached) == (8, 0)  # nobody shares what was spoilt


class TestPictureSupply:
    """What a request's pictures go through between the engine's asking and its having them."""

    async def test_one_encoding_serves_all_until_it_is_let_go(self) -> None:
        encoded: list[str] = []
        supplied: list[tuple[str, int]] = []
        go = asyncio.Event()

        async def encode(picture: Picture) -> torch.Tensor:
            encoded.append(picture.where)
            await go.wait()
            return torch.zeros(1, 1)

        def supply(engine_id: str, index: int, embeddings: torch.Tensor) -> None:
            supplied.append((engine_id, index))

        grid = Grid(1, 1, (56, 37), (0, 0), (56, 56))
        pictures = [Picture(b"", grid, where) for where in ("a", "b")]
        driver: Any = SimpleNamespace(supply=supply)
        stream = TokenStream(["1.0", "1.1"], lambda: 0.0)
        brought = PictureSupply(pictures, encode, driver, stream)
        ask = stream.on_missing
        assert ask is not None
        ask("1.0", (1,))
        ask("1.1", (1,))
        await asyncio.sleep(0)
        brought.release()  # what is on its way stays
        go.set()
        await asyncio.sleep(0.01)
        assert supplied == [("1.0", 1), ("1.1", 1)]
        ask("1.0", (1,))  # it may have been preempted
        await asyncio.sleep(0.01)
        assert (encoded, supplied[2:]) == (["b"], [("1.0", 1)])
        brought.release()
        ask("1.0", (1, 0))
        await asyncio.sleep(0.01)
        assert (encoded, supplied[3:]) == (["b", "b", "a"], [("1.0", 1), ("1.0", 0)])
        brought.close()

    async def test_the_encoder_is_called_as_of_the_request_whoever_asks(self) -> None:
        """The engine's thread knows of no request; without one Serve makes up another id."""
        request, called = ContextVar("request", default=""), asyncio.Queue[str]()

        async def encode(picture: Picture) -> torch.Tensor:
            await called.put(request.get())
            return torch.zeros(1, 1)

        def make() -> TokenStream:
            request.set("of a client")
            stream = TokenStream(["1.0"], lambda: 0.0)
            picture = Picture(b"", Grid(1, 1, (56, 37), (0, 0), (56, 56)))
            driver: Any = SimpleNamespace(supply=lambda *_: None)
            PictureSupply([picture, picture], encode, driver, stream)
            return stream

        stream = copy_context().run(make)
        assert stream.on_missing is not None
        stream.on_missing("1.0", (0, 1))
        async with asyncio.timeout(ENDING_S):
            assert [await called.get() for _ in range(2)] == ["of a client"] * 2


class TestAdapters(Requests):
    @pytest.fixture
    def registry(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
        """The tiny base, and two versions of an adapter `cats` on it."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        registry = Registry.open(str(tmp_path / "registry"))
        import_checkpoint(tiny(), registry, "base")
        for seed in (1, 2):
            folder = tmp_path / f"adapter-{seed}"
            write_adapter(folder, Checkpoint.open(tiny()).config, seed=seed, scale=2.0)
            push_adapter(folder, registry, "cats", "base")
        return registry

    def house(self, registry: Registry, **adapters: Any) -> House:
        url = registry.store.url
        return House(self.folder, registry=url, adapters=AdapterOptions(**adapters))

    def with_adapter(self, request: GenerateRequest, adapter: str) -> GenerateRequest:
        return replace(request, adapter=adapter, sticky="user")

    async def test_each_request_has_the_tokens_of_its_adapter(
        self, registry: Registry, pipe: Pipeline, tmp_path: Path
    ) -> None:
        decoder = self.house(registry).decoder
        request = self.request_for(pipe, ignore_eos=True)
        names = ["", "cats@1", "cats@2"]
        answers = await asyncio.gather(
            *(answer_to(decoder, self.with_adapter(request, name)) for name in names)
        )
        for number, answer in enumerate(answers):
            model = Checkpoint.open(self.folder).load_decoder()
            if number:
                folder = tmp_path / f"adapter-{number}"
                adapter = load_adapter(folder, model.config, digest="", dtype=torch.float32)
                merge_adapter(model, adapter)
            engine = Engine(model, EngineConfig(2048, 2048))
            engine.add("r", request.ids, SamplingParams(max_tokens=8, temperature=0))
            expected: list[int] = []
            while engine.has_work:
                expected += [i for output in engine.step() for i in output.ids]
            assert answer.ids[0] == expected
        assert len({tuple(answer.ids[0]) for answer in answers}) == 3

    async def test_the_first_message_names_the_version_and_no_other_does(
        self, registry: Registry, pipe: Pipeline
    ) -> None:
        decoder = self.house(registry).decoder
        request = self.request_for(pipe, max_tokens=40, ignore_eos=True)
        named = [
            [tokens.adapter for tokens in batch]
            async for batch in tokens_of(decoder, self.with_adapter(request, "cats"))
        ]
        assert named[0] == ["cats@2"]
        assert {name for batch in named[1:] for name in batch} == {""}
        async for batch in tokens_of(decoder, request):
            assert [tokens.adapter for tokens in batch] == [""]

    async def test_the_state_tells_what_is_loaded_where(
        self, registry: Registry, pipe: Pipeline
    ) -> None:
        decoder = self.house(registry, slots=1).decoder
        for name in ("cats@1", "cats@2"):
            await answer_to(decoder, self.with_adapter(self.request_for(pipe), name))
        state = await decoder.adapters()
        assert state.base == registry.manifest("base", 1).digest
        assert [v.where for v in sorted(state.versions, key=lambda v: v.version)] == [
            "host",
            "device",
        ]

    async def test_who_leaves_lets_go_of_the_adapter(
        self, registry: Registry, pipe: Pipeline
    ) -> None:
        house = self.house(registry, host_cache_gb=0)
        request = self.with_adapter(self.request_for(pipe, **LONG), "cats@1")
        answer = tokens_of(house.decoder, request)
        await anext(answer)
        assert house.decoder._adapters is not None
        host = house.decoder._adapters._host
        assert host.num_bytes > 0
        await answer.aclose()
        await idle(house.engine)
        assert host.num_bytes == 0

    async def test_an_engine_that_refuses_lets_go_of_it_too(
        self, registry: Registry, pipe: Pipeline
    ) -> None:
        house = self.house(registry, host_cache_gb=0)
        request = self.with_adapter(self.request_for(pipe, max_tokens=10**6), "cats@1")
        with pytest.raises(PromptTooLong):
            await answer_to(house.decoder, request)
        assert house.decoder._adapters is not None
        assert house.decoder._adapters._host.num_bytes == 0

    async def test_without_slots_there_are_no_adapters(
        self, registry: Registry, pipe: Pipeline
    ) -> None:
        decoder = self.house(registry, slots=0).decoder
        with pytest.raises(NotFound, match=r"adapters are off here \(adapters\.slots is 0"):
            await answer_to(decoder, self.with_adapter(self.request_for(pipe), "cats"))
        assert await decoder.adapters() == DecoderState("decoder")

    async def test_a_store_that_hangs_holds_up_nobody_else(
        self, registry: Registry, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hanging = threading.Event()
        monkeypatch.setattr(ObjectStore, "list", lambda *_, **__: hanging.wait(30))
        decoder = self.house(registry).decoder
        waiting = [
            asyncio.create_task(
                answer_to(decoder, self.with_adapter(self.request_for(pipe), "cats"))
            )
            for _ in range(20)
        ]
        await asyncio.sleep(0.1)
        answer = await answer_to(decoder, self.request_for(pipe))
        assert answer.ids[0]
        hanging.set()
        for task in waiting:
            task.cancel()


class TestHealth(Requests):
    """A replica whose engine is beyond use says so, and leaves nobody without an answer."""

    @pytest.fixture
    async def house(self, tiny: Tiny) -> House:
        return House(tiny())

    async def test_everybody_hears_of_an_engine_that_failed(
        self, house: House, pipe: Pipeline, picture: Draw, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await house.decoder.check_health()
        request = self.request_for(pipe, picture(), num_choices=2, **LONG)
        waiting = [asyncio.create_task(answer_to(house.decoder, request)) for _ in range(3)]
        readiness = asyncio.create_task(house.decoder.ready())
        await readiness
        monkeypatch.setattr(house.engine, "step", lambda: 1 / 0)
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, EngineError)
            assert answer.message == "the engine failed; try again later"
        with pytest.raises(EngineError, match="the engine failed"):
            await house.decoder.check_health()
        with pytest.raises(EngineError, match="the engine failed"):
            await anext(tokens_of(house.decoder, self.request_for(pipe)))
        with pytest.raises(EngineError, match="the engine failed"):
            await house.decoder.ready()
        assert house.decoder._driver._streams == {}
        await asyncio.sleep(0.01)  # those of `ready` that were cancelled
        assert house.decoder._driver._watchers == set()
