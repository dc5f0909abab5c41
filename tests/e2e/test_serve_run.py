"""`serve run serve_config.yaml` from first answer to end, by the unmodified openai client."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.serve_run import (
    ENDLESS,
    ServeRun,
    ask,
    body,
    cpu_s,
    data_url,
    image,
    post,
    text_of,
    until,
    user,
)
from xc_ray.config import ServeFile
from xc_ray.fingerprint import fingerprint
from xc_ray.pipeline import Pipeline

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

Draw = Callable[..., bytes]
FIRST_ANSWER_S = 45
NUM_LANES = 4
ARGS = {"decoder": {"max_num_seqs": NUM_LANES}}  # so that a few clients can take all there are
# As long as two blocks of the cache: it ends well behind the picture before it.
QUESTION = "Look at all of it with care, then say what it is and what stands beside it. " * 4


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def client(server: ServeRun) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipe(server: ServeRun) -> Pipeline:
    """The model of the server, in this process."""
    return Pipeline.load(demo(server), device="cpu")


def demo(server: ServeRun) -> Path:
    """The folder of its model."""
    (folder,) = (server.cache / "xc_ray").glob("demo-*/")
    return folder


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
    def test_models_are_listed_and_found_by_name(
        self, client: openai.OpenAI, server: ServeRun
    ) -> None:
        (listed,) = client.models.list().data
        assert (listed.id, listed.owned_by) == ("demo", "xc_ray")
        assert client.models.retrieve("demo") == listed
        assert listed.model_extra == {"max_model_len": 16_384, "digest": fingerprint(demo(server))}

    @pytest.mark.parametrize(("path", "status"), [("/healthz", "ok"), ("/readyz", "ready")])
    def test_health_and_readiness(self, server: ServeRun, path: str, status: str) -> None:
        response = httpx.get(server.url + path, timeout=30)
        assert (response.status_code, response.json()) == (200, {"status": status})


class TestChat:
    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
    def test_a_picture_file_is_answered_as_by_the_pipeline(
        self, client: openai.OpenAI, pipe: Pipeline, picture: Draw, tmp_path: Path, kind: str
    ) -> None:
        file = tmp_path / f"picture.{kind}"
        file.write_bytes(picture(300, 200, file_format=kind.upper()))
        part = image(data_url(file.read_bytes(), kind))
        answer = chat(client, user(part, "What is this?"), max_tokens=16)
        expected, _ = pipe.chat(f"<img>{file}</img>What is this?", temperature=0, max_tokens=16)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].message.role == "assistant"

    def test_text_alone_is_answered_as_by_the_pipeline(
        self, client: openai.OpenAI, pipe: Pipeline
    ) -> None:
        answer = chat(client, {"role": "user", "content": "Who are you?"}, max_tokens=24)
        expected, _ = pipe.chat("Who are you?", temperature=0, max_tokens=24)
        assert answer.choices[0].message.content == expected

    def test_several_turns_with_pictures_in_each(
        self, client: openai.OpenAI, pipe: Pipeline, picture: Draw, tmp_path: Path
    ) -> None:
        files = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
        for file in files:
            file.write_bytes(picture(colour=file.stem))
        red, green, blue = (image(file.read_bytes()) for file in files)
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
        first, history = pipe.chat(
            f"<img>{files[0]}</img> and <img>{files[1]}</img>?", system="Be short.", **options
        )
        second, _ = pipe.chat(
            f"And this: <img>{files[2]}</img>", history, system="Be short.", **options
        )
        talk: list[dict[str, Any]] = [
            {"role": "system", "content": "Be short."},
            user(red, " and ", green, "?"),
        ]
        answer = chat(client, *talk, **options)
        assert answer.choices[0].message.content == first
        talk += [{"role": "assistant", "content": first}, user("And this: ", blue)]
        assert chat(client, *talk, **options).choices[0].message.content == second

    def test_the_system_message_counts(self, client: openai.OpenAI) -> None:
        question = user("hi")
        tokens = [
            chat(client, *system, question, max_tokens=1).usage.prompt_tokens
            for system in (
                [{"role": "system", "content": ""}],
                [{"role": "system", "content": "You answer in French, always."}],
            )
        ]
        assert tokens[0] < tokens[1]

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

    async def test_the_async_client(self, server: ServeRun, picture: Draw) -> None:
        request = body(image(picture()), "What?", max_tokens=10)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            whole = await client.chat.completions.create(**request)
            stream = await client.chat.completions.create(**request, stream=True)
            streamed = joined([chunk async for chunk in stream])
        assert streamed == whole.choices[0].message.content


class TestStream:
    def test_it_says_the_same_as_the_whole_answer(
        self, client: openai.OpenAI, picture: Draw
    ) -> None:
        messages = [user(image(picture()), "Tell me more.")]
        whole = chat(client, *messages, max_tokens=40)
        *chunks, last = chat(
            client, *messages, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
        assert joined(chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks][-2:] == [None, "length"]
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
        options: dict[str, Any] = {"temperature": 1, "seed": 5, "n": 3}
        whole = chat(client, user("hi"), **options)
        chunks = list(chat(client, user("hi"), stream=True, **options))
        for choice in whole.choices:
            assert joined(chunks, choice.index) == choice.message.content


class TestSampling:
    def test_a_seed_gives_the_same_answer_again(self, client: openai.OpenAI) -> None:
        def answer(**seed: int) -> str:
            made = chat(client, user("Tell me a story."), temperature=1, max_tokens=24, **seed)
            return str(made.choices[0].message.content)

        assert answer(seed=7) == answer(seed=7)
        assert len({answer(seed=7), answer(seed=8), answer(), answer()}) == 4

    def test_each_of_n_choices_is_its_own_draw(self, client: openai.OpenAI) -> None:
        options: dict[str, Any] = {"temperature": 1, "seed": 7}
        alone = chat(client, user("hi"), **options)
        three = chat(client, user("hi"), n=3, **options)
        texts = [choice.message.content for choice in three.choices]
        assert len(set(texts)) == 3
        assert texts[0] == alone.choices[0].message.content
        assert [choice.index for choice in three.choices] == [0, 1, 2]
        assert three.usage.completion_tokens == 36
        assert three.usage.prompt_tokens == alone.usage.prompt_tokens

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_the_answer_ends_at_the_limit(self, client: openai.OpenAI, name: str) -> None:
        limit = {"max_tokens": openai.omit, name: 9}
        answer = chat(client, user("hi"), **endless(9) | limit)
        assert answer.usage.completion_tokens == 9
        assert answer.choices[0].finish_reason == "length"

    def test_the_answer_ends_where_the_model_ends_it(self, client: openai.OpenAI) -> None:
        answer = chat(client, user("hi"), max_tokens=2000, temperature=1, seed=1)
        assert answer.choices[0].finish_reason == "stop"
        assert 1 < answer.usage.completion_tokens < 2000

    def test_with_ignore_eos_the_answer_runs_to_the_limit(self, client: openai.OpenAI) -> None:
        options: dict[str, Any] = {"temperature": 1, "seed": 4, "max_tokens": 300}
        short = chat(client, user("hi"), **options)
        assert short.choices[0].finish_reason == "stop"
        at_least = {"min_tokens": short.usage.completion_tokens + 5}
        longer = chat(client, user("hi"), **options, extra_body=at_least)
        assert longer.usage.completion_tokens >= at_least["min_tokens"]
        whole = chat(client, user("hi"), **options, extra_body={"ignore_eos": True})
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 300

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
        hot: dict[str, Any] = {"temperature": 2, "seed": 4, "top_p": 1}
        narrow = chat(client, user("hi"), **hot, extra_body={"min_p": 1, "repetition_penalty": 1})
        wide = chat(client, user("hi"), **hot, extra_body={"repetition_penalty": 1})
        greedy = chat(client, user("hi"), extra_body={"repetition_penalty": 1})
        assert narrow.choices[0].message.content == greedy.choices[0].message.content
        assert wide.choices[0].message.content != greedy.choices[0].message.content

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string_ends_the_answer_before_itself(
        self, client: openai.OpenAI, stream: bool
    ) -> None:
        question = user("Tell me a story.")
        options: dict[str, Any] = {"temperature": 1, "seed": 3, "max_tokens": 40}
        text = chat(client, question, **options).choices[0].message.content
        stop = text[len(text) // 2 :][:3]
        made = chat(client, question, **options, stop=["never said", stop], stream=stream)
        if stream:
            chunks = list(made)
            said, reason = joined(chunks), chunks[-1].choices[0].finish_reason
        else:
            said, reason = made.choices[0].message.content, made.choices[0].finish_reason
            assert made.usage.completion_tokens < 40
        assert said == text[: text.index(stop)]
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
        repeated = chat(client, user("hi"), **endless(30)).choices[0].message.content
        options = {"temperature": 0, "max_tokens": 30, "extra_body": {"repetition_penalty": 1.0}}
        held = chat(client, user("hi"), **options, frequency_penalty=2.0, presence_penalty=2.0)
        assert len(set(repeated)) < 10 < len(set(held.choices[0].message.content))


class TestManyAtOnce:
    def test_sixteen_answers_are_those_of_each_alone(self, server: ServeRun, picture: Draw) -> None:
        colours = ("red", "green", "blue", "black")
        requests = [body(f"Say {word}.", max_tokens=20) for word in colours]
        requests += [body(image(picture(colour=c)), "What?", max_tokens=12) for c in colours]
        requests += [
            body(image(picture(400 + i, 300), detail="high"), f"Number {i}", max_tokens=4 + i)
            for i in range(4)
        ]
        requests += [
            body("One", image(picture(60, 90)), "two", image(picture(90, 60, c)), max_tokens=8)
            for c in colours
        ]
        alone = [text_of(post(server, json=request)) for request in requests]
        with ThreadPoolExecutor(len(requests)) as pool:
            together = list(pool.map(lambda r: text_of(post(server, json=r)), requests))
        assert together == alone


def test_a_private_address_is_not_fetched_from(server: ServeRun, picture: Draw) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        response = ask(server, image(f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"), "?")
        with pytest.raises(TimeoutError):
            listener.accept()
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "forbidden_image_url"
    assert "not a public address" in response.json()["error"]["message"]


class TestPrefixCache:
    """What an earlier request computed is not computed again, pictures included."""

    def test_a_second_turn_over_a_picture_needs_no_encoder(
        self, server: ServeRun, pipe: Pipeline, picture: Draw, tmp_path: Path
    ) -> None:
        file = tmp_path / "picture.png"
        file.write_bytes(picture(1300, 430, "orange"))
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
        said, history = pipe.chat(f"<img>{file}</img>{QUESTION}", **options)
        expected, _ = pipe.chat("And?", history, **options)
        talk = [user(image(file.read_bytes()), QUESTION)]
        first = post(server, json=body(**options) | {"messages": talk})
        assert text_of(first) == said
        assert cached_tokens(first) == 0
        talk += [{"role": "assistant", "content": said}, user("And?")]
        request = body(**options) | {"messages": talk}
        with standing_still(server.replica("VisionEncoder")):
            second = post(server, json=request)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            *_, last, done, _ = post(server, json=request | options).text.split("\n\n")
        assert text_of(second) == expected
        usage = second.json()["usage"]
        image_tokens = usage["prompt_tokens_details"]["image_tokens"]
        assert image_tokens < cached_tokens(second) < usage["prompt_tokens"]
        assert done == "data: [DONE]"
        streamed = json.loads(last.removeprefix("data: "))["usage"]
        assert streamed["prompt_tokens_details"]["cached_tokens"] >= cached_tokens(second)

    def test_another_picture_or_another_grid_of_it_is_not_taken_for_it(
        self, server: ServeRun, picture: Draw
    ) -> None:
        first, other = picture(1340, 440, "red"), picture(1340, 440, "blue")
        assert cached_tokens(ask(server, image(first), QUESTION)) == 0
        assert cached_tokens(ask(server, image(other), QUESTION)) == 0
        assert cached_tokens(ask(server, image(first, max_tiles=3), QUESTION)) == 0
        assert cached_tokens(ask(server, image(first), QUESTION)) > 0

    def test_while_the_encoder_stands_still_a_new_picture_waits_and_a_text_does_not(
        self, server: ServeRun, picture: Draw
    ) -> None:
        request = body(image(picture(50, 70, "green")), "?")
        url = f"{server.url}/v1/chat/completions"
        with standing_still(server.replica("VisionEncoder")):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=request, timeout=1, trust_env=False)
            assert text_of(ask(server, "hi"))
        assert_idle(server)
        assert text_of(post(server, json=request))


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
        assert text_of(ask(server, "hi"))
        assert_idle(server)

    def test_nobody_works_for_a_client_that_does_not_wait(self, server: ServeRun) -> None:
        request = body("hi", **ENDLESS)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=1)
        assert_idle(server)


class TestReplicasThatDie:
    def test_of_the_decoder_every_open_answer_hears(self, server: ServeRun) -> None:
        before = text_of(ask(server, "Who are you?"))
        with ThreadPoolExecutor(1) as pool, open_stream(server) as stream:
            whole = pool.submit(ask, server, "hi", **ENDLESS)
            together = time.monotonic() + 1
            while time.monotonic() < together:
                assert "error" not in next(stream)
            os.kill(server.replica("Decoder"), signal.SIGKILL)
            *_, last = stream
            assert_failed(last)
            assert whole.result().status_code == 500
            assert_failed(whole.result().json())
        server.wait_until_ready()
        assert text_of(ask(server, "Who are you?")) == before

    def test_of_the_encoder_every_open_answer_hears(self, server: ServeRun, picture: Draw) -> None:
        before = text_of(ask(server, image(picture()), "?"))
        encoder = server.replica("VisionEncoder")
        work = cpu_s(encoder)
        pictures = [image(picture(2000, 2000), detail="high") for _ in range(8)]
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, server, *pictures, stream=s) for s in (False, True)]
            until(lambda: cpu_s(encoder) > work + 0.5, 60, server)  # both are being worked on
            os.kill(encoder, signal.SIGKILL)
            for future in waiting:
                response = future.result()
                # A call that had not reached the replica goes to the next one.
                if response.status_code == 200:
                    assert "finish_reason" in response.text
                else:
                    assert response.status_code == 500
                    assert_failed(response.json())
        assert text_of(ask(server, "Still there?"))
        assert text_of(ask(server, image(picture()), "?")) == before


def test_sigterm_ends_it_with_every_process(server: ServeRun) -> None:
    """The last test of this module: nothing answers after it."""
    assert len(server.processes()) > 5
    server.stop()
    assert server.processes() == {}
    with socket.socket() as s:
        s.bind(("127.0.0.1", server.port))  # fails while anybody listens


def endless(max_tokens: int) -> dict[str, Any]:
    """For the openai client: a greedy answer that does not end before `max_tokens`."""
    penalty = {"repetition_penalty": ENDLESS["repetition_penalty"]}
    return {"temperature": 0, "max_tokens": max_tokens, "extra_body": penalty}


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


def assert_failed(answer: dict[str, Any]) -> None:
    assert answer["error"]["type"] == "server_error"
    assert answer["error"]["message"] == (
        "a replica failed while it worked on this request; try again"
    )
