"""The load generator against servers whose answers are written here."""

import asyncio
import base64
import dataclasses
import importlib
import io
import itertools
import json
import math
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.local_http import Asked, CutOff, Reply, Served, json_reply, serving
from xc_ray.serve.protocol import ImagePart, TextPart, parse_chat_request

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAUSE_S = 0.15
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules as one: scripts import each other by their bare names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("load", "load_client", "load_mix", "load_report", "served")
    return SimpleNamespace(**{n: importlib.import_module(n) for n in names})


# --- the server ---------------------------------------------------------------------------------


def chunk(text: str | None = None, **fields: Any) -> bytes:
    """An event of a stream; the first that a server sends has no text but a role."""
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]
    return f"data: {json.dumps({'id': 'a', 'choices': choices, **fields})}\n\n".encode()


def usage(completion: int, prompt: int = 10, cached: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"usage": {**counts, "prompt_tokens_details": details}}


def last(completion: int, **more: int) -> bytes:
    """The event that counts the tokens."""
    return f"data: {json.dumps({'choices': [], **usage(completion, **more)})}\n\n".encode()


def event_stream(chunks: Iterable[bytes], **headers: str) -> Reply:
    return Reply(chunks, headers={"content-type": "text/event-stream", **headers})


def error(code: str) -> dict[str, Any]:
    return {"error": {"message": "no", "type": "a_type", "param": None, "code": code}}


def normal() -> Reply:
    return event_stream([chunk(), chunk("a"), chunk("b"), last(5, prompt=20, cached=15), DONE])


def heartbeats() -> Iterator[bytes]:
    """Two before the text; an event in two pieces, and one whose text looks like fields."""
    yield b": still here\n\n"
    time.sleep(PAUSE_S)
    yield b":\n\n" + chunk()
    yield chunk('"error": "content":"x", "completion_tokens"')
    time.sleep(2 * PAUSE_S)
    event = chunk("b")
    yield event[:20]
    yield event[20:]
    yield last(3) + DONE


def cut_off() -> Iterator[bytes]:
    yield chunk() + chunk("a")
    raise CutOff


def answers(asked: Asked) -> Reply:
    """An answer by the name of the model, and the names of the models."""
    if asked.path == "/v1/models":
        return json_reply({"data": [{"id": "normal"}, {"id": "other"}]})
    body = asked.json
    if not body.get("stream"):
        words = len(body["messages"][-1]["content"][-1]["text"].split())
        choices = [{"message": {"content": "a"}}]
        return json_reply({"choices": choices, **usage(4, prompt=7 + 2 * words)})
    match body["model"]:
        case "heartbeats":
            return event_stream(heartbeats())
        case "busy":
            refused = json_reply(error("overloaded"), 429)
            return dataclasses.replace(refused, headers={**refused.headers, "retry-after": "3"})
        case "busy, silent":
            return json_reply(error("overloaded"), 429)
        case "failing":
            failed = f"data: {json.dumps(error('engine_error'))}\n\n".encode()
            return event_stream([chunk(), chunk("a"), failed])
        case "cut off":
            return event_stream(cut_off())
        case "without end":
            return event_stream([chunk(), chunk("a"), last(1)])
        case "closing":  # before a status
            raise ConnectionResetError
        case "down":
            return Reply(b"<html>", 503)
        case "slow":
            time.sleep(2 * PAUSE_S)
        case "no text":
            return event_stream([chunk(), last(1), DONE])
        case "uncounted":
            return event_stream([chunk(), *map(chunk, "abc"), DONE])
    return normal()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(answers) as server:
        yield server


def ask(script: Any, url: str, model: str, *, stream: bool = True, timeout_s: float = 10) -> Any:
    drawer = drawer_of(script, [model], streamed=float(stream))
    requests = drawer.requests([script.load_mix.Arrival(0.0)], 0)
    target = script.load_client.Target.of(url, {})
    (answer,) = script.load_client.drive(target, requests, timeout_s).answers
    return answer


def row(script: Any, url: str, models: list[str]) -> dict[str, Any]:
    """The figures of one request to each."""
    found = [ask(script, url, model) for model in models]
    for answer in found:
        answer.due = answer.sent  # punctual, however busy this machine is
    run = script.load_client.Run(found, 0.1)
    level = script.load_report.Level(5.0, 5.0)
    figures: dict[str, Any] = script.load_report.figures(run, 10.0, level)
    return figures


def drawer_of(script: Any, models: list[str], **options: Any) -> Any:
    equal = script.load_mix.Weighted(tuple(models), (1.0,) * len(models))
    return script.load_mix.Drawer.of(script.load_mix.Mix(equal, **{"pool": 0, **options}), 1.0)


# --- what one answer tells ------------------------------------------------------------------------


def test_a_stream_is_counted_by_its_usage(script, served):
    answer = ask(script, served.url, "normal")
    assert (answer.outcome, answer.ended, answer.status) == ("ok", "done", 200)
    assert (answer.tokens, answer.events, answer.comments) == (5, 2, 0)
    assert (answer.prompt_tokens, answer.cached_tokens) == (20, 15)
    assert answer.sent <= answer.headers <= answer.first <= answer.last <= answer.finished
    assert answer.interval_s == (answer.last - answer.first) / 4


def test_a_heartbeat_is_neither_text_nor_an_error(script, served):
    answer = ask(script, served.url, "heartbeats")
    assert (answer.outcome, answer.comments, answer.events, answer.tokens) == ("ok", 2, 2, 3)
    assert answer.first_token_s >= PAUSE_S
    assert answer.latency >= 2 * PAUSE_S


async def test_times_are_those_of_the_bytes(script, monkeypatch):
    def framed(data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data)

    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    third = framed(chunk("c"))
    received = [
        (100.5, head + framed(chunk())),
        (101.0, framed(chunk("a"))),
        (101.25, framed(chunk("b"))),
        (102.0, framed(b": still here\n\n") + third[:30]),
        (103.0, third[30:]),
        (103.5, framed(last(9)) + framed(DONE)),
        (104.0, b"0\r\n\r\n"),
    ]
    answer = script.load_client.Answer(0.25, 0.25, "m", None, stream=True)
    exchange = script.load_client.Exchange(b"", answer, 100.0)
    for now, data in received:
        monkeypatch.setattr(script.load_client.time, "monotonic", lambda now=now: now)
        exchange.data_received(data)
        assert exchange.done.done() == (now == 104.0)
    assert (answer.headers, answer.first, answer.last, answer.finished) == (0.5, 1.0, 3.0, 4.0)
    assert (answer.first_token_s, answer.interval_s) == (0.75, 0.25)
    assert (answer.largest_gap, answer.latency) == (1.75, 3.75)


def test_tokens_of_a_stream_without_usage_are_its_events(script, served):
    assert ask(script, served.url, "uncounted").tokens == 3


def test_a_stream_without_text_has_its_end_as_its_first_token(script, served):
    answer = ask(script, served.url, "no text")
    assert answer.outcome == "ok"
    assert (answer.first_token_s, answer.interval_s) == (answer.latency, None)


def test_an_answer_in_one_piece_has_no_first_token(script, served):
    answer = ask(script, served.url, "normal", stream=False)
    assert (answer.outcome, answer.tokens) == ("ok", 4)
    assert (answer.first_token_s, answer.interval_s) == (None, None)
    assert "stream" not in served.asked[-1].json


@pytest.mark.parametrize(
    ("model", "outcome", "status", "code"),
    [
        ("busy", "refused", 429, "overloaded"),
        ("failing", "error", 200, "engine_error"),
        ("down", "error", 503, "unnamed"),
        ("cut off", "cut", 200, None),
        ("without end", "cut", 200, None),
        ("closing", "cut", None, None),
    ],
)
def test_how_an_answer_ended_is_told_apart(script, served, model, outcome, status, code):
    answer = ask(script, served.url, model)
    assert (answer.outcome, answer.status, answer.code) == (outcome, status, code)
    assert answer.retry_after == ("3" if model == "busy" else None)


def test_who_waits_too_long_gives_up(script, served):
    answer = ask(script, served.url, "slow", timeout_s=PAUSE_S)
    assert (answer.outcome, answer.code) == ("error", "timeout")
    assert answer.latency >= PAUSE_S


def test_a_server_that_is_not_there_is_an_error(script, served):
    with serving(answers) as gone:
        url = gone.url
    answer = ask(script, url, "normal")
    assert (answer.outcome, answer.code) == ("error", "ConnectionRefusedError")


def test_a_body_may_end_with_the_connection(script):
    body = json.dumps({"choices": [{}], **usage(2)}).encode()
    with one_answer(b"HTTP/1.1 200 OK\r\n\r\n" + body) as url:
        assert ask(script, url, "any", stream=False).tokens == 2
    with one_answer(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n" + body) as url:
        assert ask(script, url, "any", stream=False).outcome == "cut"
    with one_answer(b"SSH-2.0-OpenSSH\r\n") as url:
        assert ask(script, url, "any").code.startswith("not HTTP")


@contextmanager
def one_answer(raw: bytes) -> Iterator[str]:
    """A server whose every answer is these bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
        writer.write(raw)
        await writer.drain()
        writer.close()

    with asyncio_server(answer) as url:
        yield url


@contextmanager
def asyncio_server(answer: Any) -> Iterator[str]:
    """Hundreds of connections at once, in a thread."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0, backlog=512))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# --- a row ----------------------------------------------------------------------------------------


def test_a_row_counts_every_outcome_once(script, served):
    models = ["normal", "busy", "busy, silent", "failing", "down", "cut off", "closing"]
    found = row(script, served.url, models)
    assert (found["requests"], found["completed"]) == (7, 1)
    assert (found["elapsed_s"], found["offered_per_s"]) == (10.0, 0.7)
    assert found["completed_per_s"] == found["goodput_per_s"] == 0.1
    assert found["output_tokens_per_s"] == 0.7  # 5, and an event each of the two that broke off
    assert (found["prompt_tokens_per_s"], found["cached_share"]) == (2.0, 0.75)
    refused = found["refused"]
    assert (refused["count"], refused["with_retry_after"]) == (2, 1)
    assert 0 < refused["latency_p99_s"] < 5
    assert found["errors"] == {"200 engine_error": 1, "503 unnamed": 1}
    assert found["cut"] == {"count": 2, "before_headers": 1}
    assert found["by_model"]["normal"] == {"asked": 1, "answered": 1, "tokens": 5, "share": 0.7143}
    assert found["valid"]
    said = "\n".join(script.load_report.remarks(found))
    assert "CUT: 2 ended without a word, 1 of them before headers" in said
    assert "1 failed: 503 unnamed" in said
    assert "2 refused, 1 with Retry-After" in said
    assert "INVALID" not in said


def test_goodput_asks_for_both_first_token_and_interval(script):
    level = script.load_report.Level(2.0, 0.05)
    times = [(1.9, 2.3, "done"), (2.1, 2.5, "done"), (1.9, 2.5, "done"), (1.9, 2.3, "cut")]
    found = []
    for first, end, ended in times:
        answer = script.load_client.Answer(0, 0, "m", None, True, status=200, ended=ended)
        answer.first, answer.last, answer.finished = first, end, end
        answer.completion_tokens = 11
        found.append(answer)
    assert [level.met(answer) for answer in found] == [True, False, False, False]
    figures = script.load_report.figures(script.load_client.Run(found, 0.1), 2.0, level)
    assert (figures["offered_per_s"], figures["elapsed_s"]) == (2.0, 2.5)
    assert (figures["completed_per_s"], figures["goodput_per_s"]) == (1.2, 0.4)
    assert figures["ttft_s"] == {"p50": 1.9, "p90": 2.1, "p99": 2.1}
    assert figures["interval_s"] == {"p50": 0.04, "p90": 0.06, "p99": 0.06}


def test_an_answer_in_one_piece_has_as_long_as_a_stream_of_its_tokens(script):
    answer = script.load_client.Answer(0, 0, "m", None, stream=False, status=200, ended="done")
    answer.completion_tokens = 11
    level = script.load_report.Level(2.0, 0.05)
    answer.finished = 2.4
    assert level.met(answer)
    answer.finished = 2.6
    assert not level.met(answer)


def test_a_percentile_is_a_value_that_occurred(script):
    values = random.Random(0).sample(range(1, 101), 100)
    assert [script.load_report.percentile(values, p) for p in (0, 50, 90, 99, 100)] == [
        1,
        50,
        90,
        99,
        100,
    ]
    assert script.load_report.percentile([3.0, 7.0], 50) == 3.0
    assert script.load_report.percentile([], 50) is None
    assert script.load_report.percentiles([None]) == {"p50": None, "p90": None, "p99": None}


def test_jains_index_goes_from_a_share_for_one_to_one_for_all(script):
    jain = script.load_report.jain
    assert jain([5, 5, 5]) == 1
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain([1, 3]) == pytest.approx(0.8)
    assert jain([]) is None
    assert jain([0, 0]) is None


def test_requests_under_way_are_counted(script):
    times = [(0, 2), (1, 3), (2, 4), (2.5, 2.75)]
    found = [script.load_client.Answer(a, a, "m", None, True, finished=float(b)) for a, b in times]
    assert script.load_report.most_at_once(found) == 3


def test_a_late_generator_makes_the_row_invalid(script, served):
    requests = drawer_of(script, ["normal"]).requests([script.load_mix.Arrival(0.2)] * 3, 0)
    client = script.load_client
    target = client.Target.of(served.url, {})
    began_long_ago = time.monotonic() - 60
    found = asyncio.run(client.send_all(target, requests, began_long_ago, 10))
    figures = script.load_report.figures(
        client.Run(found, 0.1), 1.0, script.load_report.Level(9, 9)
    )
    assert not figures["valid"]
    assert 59 < figures["late_s"]["p99"] <= figures["late_s"]["most"]
    assert figures["completed"] == 3
    assert max(a.latency for a in found) < 30  # not the server's fault
    assert script.load_report.remarks(figures)[0].startswith("INVALID: the generator was late")


def test_two_hundred_streams_at_once_are_little_work(script):
    """Each sends 10 events in 2 s. The clients are processes of their own, whose CPU is counted."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for data in [*([chunk("a")] * 10), last(10) + DONE]:
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await asyncio.sleep(0.2)
        writer.write(b"0\r\n\r\n")
        writer.close()

    arrivals = [script.load_mix.Arrival(i / 200) for i in range(250)]
    requests = drawer_of(script, ["any"], input=script.load_mix.Length(8)).requests(arrivals, 0)
    with asyncio_server(answer) as url:
        target = script.load_client.Target.of(url, {})
        run = script.load_client.drive(target, requests, 30, processes=2)
    assert Counter(a.outcome for a in run.answers) == {"ok": 250}
    assert [a.due for a in run.answers] == [a.at for a in arrivals]
    assert script.load_report.most_at_once(run.answers) >= 200
    assert {a.events for a in run.answers} == {10}
    assert run.client_cpu < 0.4


# --- arrivals and the mix -------------------------------------------------------------------------


def test_arrivals_are_poisson_and_follow_from_the_seed(script):
    poisson = script.load_mix.poisson
    times = [a.at for a in poisson(50, 200, 1, 0)]
    assert times == [a.at for a in poisson(50, 200, 1, 0)]
    assert times != [a.at for a in poisson(50, 200, 2, 0)]
    assert times != [a.at for a in poisson(50, 200, 1, 1)]
    assert times == sorted(times)
    assert times[-1] < 200
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.04)  # its deviation is 1 %
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.06)
    each_second = Counter(int(t) for t in times)
    counts = [each_second[s] for s in range(200)]
    assert statistics.variance(counts) == pytest.approx(50, rel=0.35)  # its deviation is 10 %


def test_a_trace_says_when_and_what(script, tmp_path):
    path = tmp_path / "trace.jsonl"
    lines: list[dict[str, Any]] = [
        {"at": 2.5, "input_tokens": 30, "output_tokens": 7, "images": 2},
        {"at": 0.5, "adapter": "json@3", "key": "B"},
        {"at": 9},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    arrivals = script.load_mix.read_trace(path, None)
    assert [a.at for a in arrivals] == [0.5, 2.5, 9]
    assert [a.at for a in script.load_mix.read_trace(path, 9)] == [0.5, 2.5]
    keys = script.load_mix.Weighted(("A",), (1.0,))
    drawer = drawer_of(script, ["demo:other"], keys=keys, pool=1, input=script.load_mix.Length(3))
    adapter, sized, plain = drawer.requests(arrivals, 0)
    assert (adapter.model, adapter.key, adapter.at) == ("demo:json@3", "B", 0.5)
    assert json.loads(b"".join(adapter.body))["model"] == "demo:json@3"
    body = parse_chat_request(b"".join(sized.body))
    assert (len(body.images), body.max_tokens, num_words(body)) == (2, 7, 30)
    assert (plain.model, plain.key) == ("demo:other", "A")
    assert num_words(parse_chat_request(b"".join(plain.body))) == 3


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"input_tokens": 3}',
        '{"at": -1}',
        '{"at": 1, "images": 1.5}',
        '{"at": 1, "x": 1}',
    ],
)
def test_a_trace_that_is_not_understood_is_refused_by_line(script, tmp_path, line):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 0}\n' + line)
    with pytest.raises(SystemExit, match=r"trace\.jsonl, line 2"):
        script.load_mix.read_trace(path, None)


def num_words(body: Any) -> int:
    (text,) = [p.text for p in body.messages[-1].content if isinstance(p, TextPart)]
    return len(text.split())


def test_requests_follow_from_the_seed_and_are_no_two_alike(script):
    arrivals = [script.load_mix.Arrival(float(i)) for i in range(20)]
    images = script.load_mix.Weighted((0, 1), (1.0, 1.0))

    def bodies(seed: int, number: int) -> list[bytes]:
        drawer = drawer_of(script, ["demo"], images=images, pool=1, seed=seed)
        return [b"".join(r.body) for r in drawer.requests(arrivals, number)]

    assert bodies(1, 0) == bodies(1, 0)
    everything = [*bodies(1, 0), *bodies(1, 1), *bodies(2, 0)]
    assert len(set(everything)) == 60


def test_shares_are_those_of_the_mix(script):
    weighted = script.load_mix.Weighted
    drawer = script.load_mix.Drawer.of(
        script.load_mix.Mix(
            weighted(("demo", "demo:json"), (3.0, 1.0)),
            keys=weighted(("A", "B"), (1.0, 4.0)),
            images=weighted((0, 1, 4), (0.5, 0.4, 0.1)),
            sizes=weighted(((64, 32), (32, 64)), (0.7, 0.3)),
            pool=2,
            input=script.load_mix.Length(200, 0.5),
            output=script.load_mix.Length(50, 0.5),
            system_prompts=3,
            streamed=0.8,
        ),
        2.0,
    )
    found = drawer.requests([script.load_mix.Arrival(0.0)] * 3000, 0)
    parsed = [parse_chat_request(b"".join(r.body)) for r in found]

    def part(condition: Iterable[bool]) -> Any:
        return pytest.approx(statistics.mean(condition), abs=0.04)

    assert part(r.model == "demo" for r in found) == 0.75
    assert part(r.key == "A" for r in found) == 0.2
    assert part(r.stream for r in found) == 0.8
    assert [part(len(p.images) == n for p in parsed) for n in (0, 1, 4)] == [0.5, 0.4, 0.1]
    wide = [opened(url).size == (64, 32) for p in parsed[:600] for _, url in p.images]
    assert statistics.mean(wide) == pytest.approx(0.7, abs=0.08)
    assert statistics.mean(map(num_words, parsed)) == pytest.approx(100, rel=0.05)
    limits = [p.max_tokens or 0 for p in parsed]
    assert statistics.mean(limits) == pytest.approx(50, rel=0.05)
    assert statistics.stdev(math.log(n) for n in limits) == pytest.approx(0.5, rel=0.06)
    prefixes = {p.messages[0].content[0].text for p in parsed}  # type: ignore[union-attr]
    assert len(prefixes) == 3
    assert {len(text.split()) for text in prefixes} == {32}


def opened(url: Any) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(url.url.split(",")[1])))
    image.load()
    return image


def test_only_pictures_of_the_pool_repeat(script):
    images = script.load_mix.Weighted((3,), (1.0,))

    def urls(repeated: float) -> list[Any]:
        drawer = drawer_of(script, ["demo"], images=images, pool=4, repeated=repeated, detail="low")
        requests = drawer.requests([script.load_mix.Arrival(0.0)] * 40, 0)
        found = [parse_chat_request(b"".join(r.body)) for r in requests]
        parts = [part for p in found for part in p.messages[-1].content]
        return [part.image_url for part in parts if isinstance(part, ImagePart)]

    always, never = urls(1.0), urls(0.0)
    assert (len({u.url for u in always}), len({u.url for u in never})) == (4, 120)
    assert len({u.url for u in urls(0.5)} - {u.url for u in always}) == pytest.approx(60, abs=20)
    assert {opened(u).tobytes() for u in never} == {opened(u).tobytes() for u in always}
    assert {u.detail for u in never} == {"low"}
    assert opened(never[0]).size == (560, 560)


def test_answers_are_as_long_as_told_only_with_ignore_eos(script):
    arrivals = [script.load_mix.Arrival(0.0, output_tokens=9)]
    for ignore in (False, True):
        drawer = drawer_of(script, ["demo"], ignore_eos=ignore)
        body = parse_chat_request(b"".join(drawer.requests(arrivals, 0)[0].body))
        assert (body.max_tokens, body.ignore_eos) == (9, ignore)
        assert body.min_tokens == (9 if ignore else None)
        assert (body.stream, body.include_usage, body.temperature) == (True, True, 0)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_a_line_without_keys(script, served, monkeypatch, capsys):
    monkeypatch.setenv("ALICE", "secret-a")
    monkeypatch.setenv("BOB", "secret-b")
    options = "--rates 20 40 --seconds 1 --keys ALICE=3 BOB=1 --input lognormal:40:0.3 --seed 5"
    script.load.main(["--url", served.url, *options.split()])
    said = capsys.readouterr().out
    assert "secret" not in said
    header, first, second, *_, line = said.splitlines()
    assert header.split()[:4] == ["rate", "offered/s", "done/s", "good/s"]
    facts = json.loads(line)
    assert facts["benchmark"] == "load"
    assert facts.keys() >= {"machine", "commit", "valid"}
    assert facts["arguments"]["input"] == "lognormal:40:0.3"
    for text, number, rate in ((first, 0, 20), (second, 1, 40)):
        found, due = facts["rows"][number], script.load_mix.poisson(rate, 1.0, 5, number)
        assert text.split()[0] == found["rate"] == str(rate)
        assert found["requests"] == found["completed"] == found["offered_per_s"] == len(due)
        tokens = {name: share["tokens"] for name, share in found["by_key"].items()}
        assert sum(tokens.values()) == 5 * len(due)
        assert tokens["ALICE"] > tokens["BOB"]
        assert found["jain"] == pytest.approx(script.load_report.jain([*tokens.values()]), abs=1e-4)
        assert set(found["ttft_s"]) == {"p50", "p90", "p99"}
    listed, short, long, *asked = served.asked
    assert listed.path == "/v1/models"
    assert [len(a.json["messages"][0]["content"][0]["text"].split()) for a in (short, long)] == [
        1,
        65,
    ]
    assert len(asked) == 4 + sum(r["requests"] for r in facts["rows"])  # four to warm up
    assert {a.headers["authorization"] for a in asked} == {"Bearer secret-a", "Bearer secret-b"}
    lengths = [len(a.json["messages"][0]["content"][0]["text"].split()) for a in asked]
    assert statistics.mean(lengths) == pytest.approx(20, rel=0.1)  # a word is two tokens here


def test_the_command_follows_a_trace(script, served, tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps({"at": at / 10}) for at in range(6)))
    options = "--names normal=1 busy=1 --tokens-per-word 1.5 --warmup 0 --trace"
    script.load.main(["--url", served.url, *options.split(), str(path)])
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (found["rate"], found["requests"], found["offered_per_s"]) == ("trace", 6, 12)
    assert found["completed"] + found["refused"]["count"] == len(served.asked) == 6
    assert found["elapsed_s"] >= 0.5


def test_without_a_url_a_server_of_its_own_is_asked(script, served, monkeypatch, capsys):
    started: list[Any] = []

    @contextmanager
    def serve_run(path: Path, port: int) -> Iterator[None]:
        values = yaml.safe_load(path.read_text())
        started.append((values["applications"][0]["args"]["model"], values["http_options"], port))
        yield

    monkeypatch.setattr(script.served, "serving", serve_run)
    port = int(served.url.rpartition(":")[2])
    options = f"--model some/folder --port {port} --rate 30 --seconds 0.3 --tokens-per-word 1"
    script.load.main(options.split())
    assert started == [("some/folder", {"host": "127.0.0.1", "port": port}, port)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["completed"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keys NOT_SET_ANYWHERE", "not in the environment: NOT_SET_ANYWHERE"),
        ("--names down --tokens-per-word 1", "no warm-up request was answered.*503"),
        ("--images many", "many: invalid literal"),
        ("--rates 0.001 --seconds 0.1", "no arrival within 0.1 s"),
    ],
)
def test_what_cannot_be_run_is_said(script, served, options, message):
    with pytest.raises(SystemExit, match=message):
        script.load.main(["--url", served.url, *options.split()])


@pytest.mark.parametrize(
    "options", ["--rate 0", "--repeated 1.5", "--input log:3", "--pool 0", "--warmup -1"]
)
def test_options_out_of_range_are_refused(script, options, capsys):
    with pytest.raises(SystemExit):
        script.load.main(options.split())
    assert options.split()[0] in capsys.readouterr().err
