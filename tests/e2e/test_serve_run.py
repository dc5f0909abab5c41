"""`serve run serve_config.yaml` from first answer to end, by the unmodified openai client."""

import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.serve_run import (
    ENDLESS,
    RED_CIRCLE,
    ServeRun,
    ask,
    assert_right,
    assistant,
    body,
    cpu_s,
    data_url,
    image,
    post,
    text_of,
    until,
    user,
)
from tests.pictures import printed, shapes
from xc_ray.config import ServeFile
from xc_ray.fingerprint import fingerprint
from xc_ray.hub import resolve_model
from xc_ray.pipeline import Pipeline

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

Draw = Callable[..., bytes]
FIRST_ANSWER_S = 45
NUM_LANES = 4
ARGS = {"decoder": {"max_num_seqs": NUM_LANES}}  # so that a few clients can take all there are
# Longer than two blocks of the cache: it ends well behind the picture before it.
QUESTION = "What is it? " * 24
WHO = "I am xc_ray's demo model, a very small XComposer that was trained on drawn pictures."
# To `Thanks`, from the whole vocabulary and far beyond the end of the answer: no two are alike.
HOT: dict[str, Any] = {
    "temperature": 2,
    "top_p": 1,
    "max_tokens": 32,
    "extra_body": {"top_k": 0, "ignore_eos": True},
}
SIXTEEN = [  # requests, no two alike, and what the right answers are
    (body(image(shapes("red circle")), "What is it?"), "A red circle."),
    (body(image(shapes("blue square", size=(300, 200))), "What is this?"), "A blue square."),
    (body(image(shapes("green triangle", size=(120, 90))), "What colour is it?"), "Green."),
    (body(image(shapes("orange star", size=(400, 300))), "What shape is it?"), "A star."),
    (body(image(shapes("yellow star", "yellow star")), "How many stars are there?"), "Two."),
    (body(image(shapes("blue square")), "这是什么？"), "蓝色的正方形。"),
    (
        body(
            image(shapes("red circle", size=(200, 200))),
            image(shapes(*["red circle"] * 4, size=(200, 200))),
            "Which picture has more circles?",
        ),
        "The second picture.",
    ),
    (body(image(printed("42")), "What number is it?"), "42"),
    (body(image(printed("2024", em=48)), "What does it say?"), "2024"),
    (body(image(printed("BOX", em=48)), "What does it say?"), "BOX"),
    (body(image(printed("WOLF")), "Read the text."), "WOLF"),
    (body(image(printed("20 + 15 =")), "What is the sum?", max_tokens=20), "20 + 15 = 35"),
    (body("12 + 30 = ", max_tokens=20), "12 + 30 = 42"),
    (body("What is 58 + 67?", max_tokens=20), "58 + 67 = 125"),
    (body("Who are you?", max_tokens=60), WHO),
    (body("Are you a human?", max_tokens=40), "No, I am a small neural network."),
]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def client(server: ServeRun) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The model of the server, in this process."""
    return Pipeline.load("demo", device="cpu")


def chat(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    request: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(**request, messages=messages)


def joined(chunks: Any, index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
    return "".join(c.delta.content or "" for c in choices)


def test_the_file_that_is_served_is_valid(server: ServeRun) -> None:
    ServeFile.read(server.log.with_name("serve_config.yaml"))


def test_it_answers_soon_after_the_start(
    server: ServeRun, record_testsuite_property: Callable[[str, object], None]
) -> None:
    record_testsuite_property("serve_run_first_answer_s", round(server.first_answer_s, 1))
    if server.load_before < 1.5:  # the aim is for two cores with nothing else to do
        assert server.first_answer_s < FIRST_ANSWER_S


class TestRoutes:
    def test_models_are_listed_and_found_by_name(self, client: openai.OpenAI) -> None:
        (listed,) = client.models.list().data
        assert (listed.id, listed.owned_by) == ("demo", "xc_ray")
        assert client.models.retrieve("demo") == listed
        digest = fingerprint(resolve_model("demo"))
        assert listed.model_extra == {"max_model_len": 16_384, "digest": digest}

    @pytest.mark.parametrize(("path", "status"), [("/healthz", "ok"), ("/readyz", "ready")])
    def test_health_and_readiness(self, server: ServeRun, path: str, status: str) -> None:
        response = httpx.get(server.url + path, timeout=30)
        assert (response.status_code, response.json()) == (200, {"status": status})


class TestChat:
    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
    def test_a_picture_file_is_answered_rightly_and_as_by_the_pipeline(
        self, client: openai.OpenAI, pipe: Pipeline, tmp_path: Path, kind: str
    ) -> None:
        file = tmp_path / f"picture.{kind}"
        file.write_bytes(shapes("red circle", size=(300, 200), file_format=kind.upper()))
        part = image(data_url(file.read_bytes(), kind))
        (choice,) = chat(client, user(part, "What is it?")).choices
        expected, _ = pipe.chat(f"<img>{file}</img>What is it?", temperature=0, max_tokens=12)
        assert choice.message.content == expected == "A red circle."
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")

    def test_text_alone_is_answered_rightly_and_as_by_the_pipeline(
        self, client: openai.OpenAI, pipe: Pipeline
    ) -> None:
        answer = chat(client, user("Who are you?"), max_tokens=60)
        expected, _ = pipe.chat("Who are you?", temperature=0, max_tokens=60)
        assert answer.choices[0].message.content == expected == WHO

    def test_several_turns_with_pictures_in_each(
        self, client: openai.OpenAI, pipe: Pipeline, tmp_path: Path
    ) -> None:
        number, circle = tmp_path / "number.png", tmp_path / "circle.png"
        number.write_bytes(printed("42"))
        circle.write_bytes(shapes("purple circle"))
        queries = [
            f"<img>{number}</img>What number is it?",
            f"<img>{circle}</img>What is it?",
            "How many circles are there?",
        ]
        history: Any = []
        for query in queries:
            _, history = pipe.chat(query, history, system="", temperature=0, max_tokens=12)
        expected = [answer for _, answer in history]
        talk: list[dict[str, Any]] = [{"role": "system", "content": ""}]
        said = []
        for message in (
            user(image(number.read_bytes()), "What number is it?"),
            user(image(circle.read_bytes()), "What is it?"),
            user("How many circles are there?"),
        ):
            talk.append(message)
            said.append(chat(client, *talk).choices[0].message.content)
            talk.append(assistant(said[-1]))
        assert said == expected == ["42", "A purple circle.", "One."]

    def test_the_system_message_counts(self, client: openai.OpenAI, pipe: Pipeline) -> None:
        tokens = []
        for text in ("", "Be short.", "You answer in French, always."):
            messages = {"role": "system", "content": text}, user(image(RED_CIRCLE), "What is it?")
            answer = chat(client, *messages)
            query = "<ImageHere>What is it?"
            expected, _ = pipe.chat(query, images=RED_CIRCLE, system=text, temperature=0)
            assert answer.choices[0].message.content == expected == "A red circle."
            tokens.append(answer.usage.prompt_tokens)
        assert tokens[0] < tokens[1] < tokens[2]

    # (rows·cols + 1)·64 + (rows + 1)·8 + 1 for tiles of 224 px with 8 × 8 tokens each.
    @pytest.mark.parametrize(
        ("options", "image_tokens"),
        [
            ({"detail": "low"}, 2 * 64 + 2 * 8 + 1),
            ({"max_tiles": 1}, 2 * 64 + 2 * 8 + 1),
            ({"max_tiles": 3}, 4 * 64 + 2 * 8 + 1),
            ({"detail": "low", "max_tiles": 3}, 4 * 64 + 2 * 8 + 1),
            ({"detail": "high"}, 13 * 64 + 3 * 8 + 1),
            ({}, 13 * 64 + 3 * 8 + 1),
        ],
    )
    def test_detail_and_max_tiles_set_the_price_of_a_picture(
        self, client: openai.OpenAI, picture: Draw, options: dict[str, Any], image_tokens: int
    ) -> None:
        usage = chat(client, user(image(picture(1344, 448), **options), "?"), max_tokens=1).usage
        assert usage.prompt_tokens_details.image_tokens == image_tokens
        text = chat(client, user("?"), max_tokens=1).usage.prompt_tokens
        assert usage.prompt_tokens == text + image_tokens

    async def test_the_async_client(self, server: ServeRun) -> None:
        request = body(image(shapes("red circle")), "What is it?")
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            whole = await client.chat.completions.create(**request)
            stream = await client.chat.completions.create(**request, stream=True)
            streamed = joined([chunk async for chunk in stream])
        assert streamed == whole.choices[0].message.content == "A red circle."


class TestStream:
    def test_it_says_the_same_as_the_whole_answer(self, client: openai.OpenAI) -> None:
        messages = [user(image(shapes("red circle")), "Describe the picture.")]
        whole = chat(client, *messages, max_tokens=40)
        *chunks, last = chat(
            client, *messages, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
        sentence = "One red circle on a white background."
        assert joined(chunks) == whole.choices[0].message.content == sentence
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks][-2:] == [None, "stop"]
        assert last.choices == []
        assert last.usage == whole.usage
        assert {c.usage for c in chunks} == {None}
        assert len({c.id for c in [*chunks, last]}) == 1

    def test_it_comes_token_by_token(self, client: openai.OpenAI) -> None:
        arrived = [time.monotonic() for _ in chat(client, user("hi"), stream=True, **endless(200))]
        assert arrived[-1] - arrived[0] > (arrived[-1] - arrived[-2]) * 2
        assert len(arrived) > 20

    def test_its_last_event_is_done(self, server: ServeRun) -> None:
        response = ask(server, "hi", stream=True)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert all("usage" not in chunk for chunk in chunks)

    def test_several_choices_share_it(self, client: openai.OpenAI) -> None:
        whole = chat(client, user("Thanks"), **HOT, seed=5, n=3)
        chunks = list(chat(client, user("Thanks"), stream=True, **HOT, seed=5, n=3))
        assert len({choice.message.content for choice in whole.choices}) == 3
        for choice in whole.choices:
            assert joined(chunks, choice.index) == choice.message.content


class TestSampling:
    def test_a_seed_gives_the_same_answer_again(self, client: openai.OpenAI) -> None:
        def answer(**seed: int) -> str:
            made = chat(client, user("Thanks"), **HOT, **seed)
            return str(made.choices[0].message.content)

        assert answer(seed=7) == answer(seed=7)
        assert len({answer(seed=7), answer(seed=8), answer(), answer()}) == 4

    def test_each_of_n_choices_is_its_own_draw(self, client: openai.OpenAI) -> None:
        alone = chat(client, user("Thanks"), **HOT, seed=7)
        three = chat(client, user("Thanks"), **HOT, seed=7, n=3)
        texts = [choice.message.content for choice in three.choices]
        assert len(set(texts)) == 3
        assert texts[0] == alone.choices[0].message.content
        assert [choice.index for choice in three.choices] == [0, 1, 2]
        assert three.usage.completion_tokens == 3 * HOT["max_tokens"]
        assert three.usage.prompt_tokens == alone.usage.prompt_tokens

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_the_answer_ends_at_the_limit(self, client: openai.OpenAI, name: str) -> None:
        limit = {"max_tokens": openai.omit, name: 9}
        answer = chat(client, user("Who are you?"), **limit)
        assert answer.usage.completion_tokens == 9
        assert answer.choices[0].finish_reason == "length"
        assert WHO.startswith(answer.choices[0].message.content)

    def test_the_answer_ends_where_the_model_ends_it(self, client: openai.OpenAI) -> None:
        answer = chat(client, user("Who are you?"), max_tokens=2000)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == WHO
        assert 9 < answer.usage.completion_tokens < len(WHO)

    def test_with_ignore_eos_the_answer_runs_to_the_limit(self, client: openai.OpenAI) -> None:
        def answer(**extra: Any) -> Any:
            return chat(client, user("Who are you?"), max_tokens=300, extra_body=extra)

        short, whole = answer(), answer(ignore_eos=True)
        assert short.choices[0].finish_reason == "stop"
        at_least = short.usage.completion_tokens + 5
        assert answer(min_tokens=at_least).usage.completion_tokens >= at_least
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 300
        assert whole.choices[0].message.content.startswith(WHO)

    def test_a_bias_draws_to_a_token_or_away_from_it(
        self, client: openai.OpenAI, pipe: Pipeline
    ) -> None:
        (drawn,) = pipe.tokenizer.encode("tree")[-1:]
        told = chat(client, user("hi"), logit_bias={str(drawn): 100}, logprobs=True)
        token = pipe.tokenizer.decode([drawn])
        assert {t.token for t in told.choices[0].logprobs.content} == {token}
        free = chat(client, user("hi"), logprobs=True).choices[0].logprobs.content
        first = pipe.tokenizer.encode("".join(t.token for t in free[:1]))[-1:]
        away = chat(client, user("hi"), logit_bias={str(first[0]): -100}, logprobs=True)
        assert free[0].token not in {t.token for t in away.choices[0].logprobs.content[:1]}

    def test_min_p_of_one_leaves_the_likeliest(self, client: openai.OpenAI) -> None:
        def answer(**more: Any) -> str:
            options = HOT | {"extra_body": HOT["extra_body"] | more}
            return str(chat(client, user("Thanks"), **options).choices[0].message.content)

        greedy = answer(temperature=0)
        assert greedy.startswith("You are welcome!")
        assert answer(min_p=1) == greedy != answer()

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string_ends_the_answer_before_itself(
        self, client: openai.OpenAI, stream: bool
    ) -> None:
        options: dict[str, Any] = {"max_tokens": 60, "stop": ["never said", "mall XC"]}
        made = chat(client, user("Who are you?"), **options, stream=stream)
        if stream:
            chunks = list(made)
            said, reason = joined(chunks), chunks[-1].choices[0].finish_reason
        else:
            said, reason = made.choices[0].message.content, made.choices[0].finish_reason
        assert said == WHO[: WHO.index("mall XC")]
        assert reason == "stop"

    def test_logprobs_tell_of_every_token(self, client: openai.OpenAI) -> None:
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
        answer = chat(client, user("hi"), **options)
        tokens = answer.choices[0].logprobs.content
        assert len(tokens) == answer.usage.completion_tokens == 12
        for token in tokens:
            best = token.top_logprobs[0]
            assert (token.token, token.logprob) == (best.token, best.logprob)  # greedy
            probabilities = [top.logprob for top in token.top_logprobs]
            assert len(probabilities) == 3
            assert 0 >= probabilities[0] >= probabilities[1] >= probabilities[2]
        said = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
        assert said == answer.choices[0].message.content
        chunks = chat(client, user("hi"), **options, stream=True)
        streamed = [c.choices[0].logprobs for c in chunks]
        assert [t.token for logs in streamed if logs for t in logs.content] == [
            t.token for t in tokens
        ]

    def test_penalties_change_what_is_said(self, client: openai.OpenAI) -> None:
        def num_tokens(repetition_penalty: float, **options: Any) -> int:
            extra = {"ignore_eos": True, "repetition_penalty": repetition_penalty}
            options |= {"max_tokens": 120, "logprobs": True, "extra_body": extra}
            (choice,) = chat(client, user("Who are you?"), **options).choices
            return len({token.token for token in choice.logprobs.content})

        drawn = num_tokens(0.01)  # to what was said already
        plain = num_tokens(1)
        assert drawn < 12 < plain < num_tokens(1, frequency_penalty=2, presence_penalty=2)


class TestManyAtOnce:
    def test_sixteen_that_come_together_get_their_own_right_answers(self, server: ServeRun) -> None:
        with ThreadPoolExecutor(len(SIXTEEN)) as pool:
            said = list(pool.map(lambda right: text_of(post(server, json=right[0])), SIXTEEN))
        assert said == [answer for _, answer in SIXTEEN]


class TestLargePictures:
    """Serve's gRPC carries 4 MiB at most."""

    @pytest.mark.parametrize("num", [1, 3])
    def test_pictures_of_many_megabytes_are_answered(self, server: ServeRun, num: int) -> None:
        small = shapes("blue square", size=(1500, 1000))
        large = bitmap(small)
        assert len(large) > 4 << 20
        said, expected = (
            text_of(ask(server, *[image(picture, max_tiles=1)] * num, "What is it?"))
            for picture in (large, small)
        )
        assert said == expected
        assert num > 1 or said == "A blue square."


def test_a_private_address_is_not_fetched_from(server: ServeRun, picture: Draw) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        response = ask(server, image(f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"), "?")
        with pytest.raises(TimeoutError):
            listener.accept()
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "forbidden_image_url"
    assert "not a public address" in response.json()["error"]["message"]
    assert_right(server)


class TestPrefixCache:
    """What an earlier request computed is not computed again, pictures included."""

    def test_a_second_turn_over_a_picture_needs_no_encoder(self, server: ServeRun) -> None:
        talk = [user(image(shapes("orange circle", size=(1300, 430))), QUESTION)]
        first = post(server, json=body() | {"messages": talk})
        assert text_of(first) == "An orange circle."
        assert cached_tokens(first) == 0
        talk += [assistant("An orange circle."), user("What colour is it?")]
        request = body() | {"messages": talk}
        with standing_still(server.replica("VisionEncoder")):
            second = post(server, json=request)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            *_, last, done, _ = post(server, json=request | options).text.split("\n\n")
        assert text_of(second) == "Orange."
        usage = second.json()["usage"]
        image_tokens = usage["prompt_tokens_details"]["image_tokens"]
        assert image_tokens < cached_tokens(second) < usage["prompt_tokens"]
        assert done == "data: [DONE]"
        streamed = json.loads(last.removeprefix("data: "))["usage"]
        assert streamed["prompt_tokens_details"]["cached_tokens"] >= cached_tokens(second)

    def test_another_picture_or_another_grid_of_it_is_not_taken_for_it(
        self, server: ServeRun
    ) -> None:
        red, orange = (shapes(f"{c} circle", size=(1340, 440)) for c in ("red", "orange"))
        for part, answer, cached in (
            (image(red), "A red circle.", False),
            (image(orange), "An orange circle.", False),
            (image(red, max_tiles=3), "A red circle.", False),
            (image(red), "A red circle.", True),
        ):
            response = ask(server, part, "What is it?")
            assert text_of(response) == answer
            assert (cached_tokens(response) > 0) == cached

    def test_while_the_encoder_stands_still_a_new_picture_waits_and_a_text_does_not(
        self, server: ServeRun
    ) -> None:
        request = body(image(shapes("green square", size=(70, 70))), "What is it?")
        url = f"{server.url}/v1/chat/completions"
        with standing_still(server.replica("VisionEncoder")):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=request, timeout=1, trust_env=False)
            assert text_of(ask(server, "12 + 30 = ", max_tokens=20)) == "12 + 30 = 42"
        assert_idle(server)
        assert text_of(post(server, json=request)) == "A green square."


class TestClientsThatLeave:
    """The decoder works at four requests; a fifth waits until one has ended."""

    def test_a_cut_stream_makes_room_for_the_next(self, server: ServeRun) -> None:
        with ExitStack() as stack:
            streams = [stack.enter_context(open_stream(server)) for _ in range(NUM_LANES)]
            assert all(text_in(stream) for stream in streams)
            with pytest.raises(httpx.ReadTimeout), open_stream(server, timeout=1) as fifth:
                text_in(fifth)
        started = time.monotonic()
        with open_stream(server) as stream:
            assert text_in(stream)
        assert time.monotonic() - started < 5  # the four had more than a minute to go
        assert_right(server)
        assert_idle(server)

    def test_those_who_stay_get_their_right_answers(self, server: ServeRun) -> None:
        with ThreadPoolExecutor(NUM_LANES) as pool:
            with ExitStack() as stack:
                for _ in range(NUM_LANES - 1):
                    assert text_in(stack.enter_context(open_stream(server)))
                staying = [pool.submit(post, server, json=request) for request, _ in SIXTEEN]
                next(as_completed(staying))
            assert not all(future.done() for future in staying)
        assert [text_of(f.result()) for f in staying] == [answer for _, answer in SIXTEEN]
        assert_idle(server)

    def test_nobody_works_for_a_client_that_does_not_wait(self, server: ServeRun) -> None:
        request = body("hi", **ENDLESS)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=1)
        assert_idle(server)
        assert_right(server)


class TestReplicasThatDie:
    def test_of_the_decoder_open_streams_hear_and_whole_answers_come_from_the_next(
        self, server: ServeRun
    ) -> None:
        assert_right(server)
        decoder = server.replica("Decoder")
        work = cpu_s(decoder)
        long = body("Who are you?", max_tokens=300, ignore_eos=True)
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(post, server, json=long)
            until(lambda: cpu_s(decoder) > work + 0.3, 60, server)  # it is being worked on
            with open_stream(server) as stream:
                assert text_in(stream)
                os.kill(decoder, signal.SIGKILL)
                late = pool.submit(post, server, json=SIXTEEN[0][0])
                *_, last = stream
            assert last["error"]["code"] == "replica_lost"
            assert "safe to send it again" in last["error"]["message"]
            assert text_of(whole.result()).startswith(WHO)
            assert whole.result().json()["usage"]["completion_tokens"] == 300
            assert text_of(late.result()) == SIXTEEN[0][1]
        assert_right(server)

    def test_of_the_encoder_nobody_hears(self, server: ServeRun, picture: Draw) -> None:
        assert_right(server)
        encoder = server.replica("VisionEncoder")
        work = cpu_s(encoder)
        pictures = [image(picture(2000, 2000), detail="high") for _ in range(8)]
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, server, *pictures, stream=s) for s in (False, True)]
            until(lambda: cpu_s(encoder) > work + 0.5, 60, server)  # both are being worked on
            os.kill(encoder, signal.SIGKILL)
            for future in waiting:
                assert future.result().status_code == 200
                assert "finish_reason" in future.result().text
                assert "error" not in future.result().text
        assert_right(server)
        new = image(shapes("blue triangle", size=(80, 80)))  # no cache has it
        assert text_of(ask(server, new, "What is it?")) == "A blue triangle."


def test_sigterm_ends_it_with_every_process(server: ServeRun) -> None:
    """The last test of this module: nothing answers after it."""
    assert len(server.processes()) > 5
    server.stop()
    assert server.processes() == {}
    with socket.socket() as s:
        s.bind(("127.0.0.1", server.port))  # fails while anybody listens


def endless(max_tokens: int) -> dict[str, Any]:
    """For the openai client: an answer that does not end before `max_tokens`."""
    return {"max_tokens": max_tokens, "extra_body": {"ignore_eos": True}}


@contextmanager
def open_stream(server: ServeRun, timeout: float = 60) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of an answer that does not end; leaving the block cuts the connection."""
    url = f"{server.url}/v1/chat/completions"
    request = body("hi", **ENDLESS, stream=True)
    with httpx.stream("POST", url, json=request, timeout=timeout, trust_env=False) as response:
        lines = response.iter_lines()  # held here: httpx cuts the connection with its iterator
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line)


def text_in(stream: Iterator[dict[str, Any]]) -> str:
    """The first text that comes."""
    texts = (event["choices"][0]["delta"].get("content") for event in stream)
    return str(next(filter(None, texts)))


def cached_tokens(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A process does nothing inside the block, as if it did not exist; be quick about it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def assert_idle(server: ServeRun) -> None:
    """The decoder has nothing to do, soon."""
    decoder = server.replica("Decoder")

    def idle() -> bool:
        before = cpu_s(decoder)
        time.sleep(0.5)
        return cpu_s(decoder) - before < 0.1

    until(idle, 10, server)


def bitmap(png: bytes) -> bytes:
    """The same picture without compression."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).save(file, "BMP")
    return file.getvalue()
