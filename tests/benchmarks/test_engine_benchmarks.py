"""The engine's benchmarks run with `--tiny`, and their arithmetic is that of the design."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import decode_limit_s, prefill_flop
from benchmarks.sse_client import Refused, ask
from xc_ray.model.config import preset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIELDS = {"figure", "machine", "dtype", "commit", "seed", "command", "rows"}


def run(name: str, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--tiny", *options],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert facts.keys() >= FIELDS
    assert facts["figure"] == name
    assert facts["rows"]
    assert "left_out" not in facts
    return facts


def test_decode_steps_are_timed_at_every_batch_size_and_mode():
    *rows, baseline = run("engine_decode", "--kv", "auto", "fp8", "--baseline", "1")["rows"]
    assert {(r["case"], r["batch"]) for r in rows} == {
        (f"{mode}, kv {kv}", batch)
        for mode in ("greedy", "sampled")
        for kv in ("auto", "fp8")
        for batch in (1, 4)
    }
    assert all(r["tokens_per_s"] > 0 for r in rows)
    assert all(abs(r["context"] - 96) <= 4 for r in rows)
    assert baseline["case"].startswith("transformers")
    assert baseline["step_ms"] > 0


def test_prefill_compares_image_rows_with_text_of_the_same_length():
    *rows, baseline = run("engine_prefill", "--baseline")["rows"]
    assert baseline["case"].startswith("transformers")
    assert baseline["ms"] > 0
    assert {r["tokens"] for r in rows} == {256}
    assert [r["image_rows"] for r in rows[:4]] == [0, 128, 128, 0]
    assert [r["vs_text"] for r in rows if r["case"] == "text"] == [1, 1]


def test_throughput_counts_every_token_that_was_asked_for():
    *rows, baseline = run("engine_throughput", "--baseline", "2")["rows"]
    assert [r["tokens_out"] for r in rows if r["case"].startswith("uniform")] == [6 * 8] * 2
    assert len({r["tokens_out"] for r in rows if r["case"].startswith("mixed")}) == 1
    assert baseline["case"].startswith("transformers")
    assert baseline["batch"] == 2


def test_adapters_are_compared_with_the_base_and_their_loads_timed():
    facts = run("engine_adapters", "--load")
    assert [row.get("adapters") for row in facts["rows"][:4]] == [0, 0, 1, 3]
    assert all(row["tokens_per_s"] > 0 and row["ratio"] > 0 for row in facts["rows"][:4])
    assert [row["megabytes"] > 0 for row in facts["rows"][4:]] == [True, True]


def test_a_second_turn_finds_the_image_in_the_cache():
    row, baseline = run("engine_prefix", "--with-encoder", "--baseline")["rows"]
    assert baseline["case"].startswith("transformers")
    assert baseline["second_turn_ms"] > 0
    assert row["cached"] >= 111  # the image's rows
    assert row["first_turn_ms"] > row["encode_ms"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_streams_over_http_give_as_many_tokens_as_asked_for(tmp_path: Path):
    rows = run("engine_http", "--mode", "default", "--port", "0", "--work", str(tmp_path))["rows"]
    assert [(r["case"], r["streams"]) for r in rows] == [
        ("offline", 1),
        ("offline", 4),
        ("default", 1),
        ("default", 4),
    ]
    assert all(r["tokens_per_s"] > 0 for r in rows)


def test_a_run_that_is_out_of_time_says_what_it_left_out():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "engine_decode.py"), "--tiny", "--time-limit", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["left_out"] == ["kv auto: time limit"]


@pytest.mark.parametrize(
    ("batch", "context", "ms"),
    [(1, 2048, 3.49), (8, 2048, 3.92), (32, 2048, 5.42), (128, 2048, 11.4), (256, 1024, 12.8)],
)
def test_the_limit_of_a_decode_step_is_that_of_the_design(batch: int, context: int, ms: float):
    assert decode_limit_s(preset("2.5"), batch, context) * 1e3 == pytest.approx(ms, abs=0.05)


def test_eight_bit_keys_and_values_halve_their_share_of_the_limit():
    wide, narrow = (decode_limit_s(preset("2.5"), 128, 2048, kv_bytes=n) for n in (2, 1))
    assert wide - narrow == pytest.approx(128 * 2048 * 65536 / 4.3e12)


def test_the_products_of_a_prefill_take_114_teraflop_for_8k_tokens_of_text():
    config = preset("2.5")
    assert prefill_flop(config, 8192) / 1e12 == pytest.approx(114.4, abs=0.1)
    assert prefill_flop(config, 8192, 4096) > prefill_flop(config, 8192)


# --- the SSE client -----------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n"
)


def chunked(data: bytes, size: int) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in [*parts, b""])


@asynccontextmanager
async def answering(response: bytes) -> AsyncIterator[str]:
    """A server that answers every request with these bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("size", [1, 50, 10_000])
async def test_the_client_reads_events_however_they_are_cut(size: int):
    async with answering(HEAD + chunked(EVENTS, size)) as url:
        answer = await ask(url, {})
    assert (answer["prompt_tokens"], answer["completion_tokens"], answer["events"]) == (7, 2, 2)
    assert answer["started"] <= answer["first"] <= answer["last"]


async def test_the_client_reads_a_body_that_is_not_chunked():
    async with answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + EVENTS) as url:
        assert (await ask(url, {}))["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b'{"error":"no"}', "400 bad request: .*no"),
        (
            HEAD + chunked(b'data: {"error":{"message":"gone"}}\n\n', 99),
            "the stream failed: .*gone",
        ),
        (HEAD + chunked(EVENTS[:90], 99), "ended without usage"),
    ],
)
async def test_an_answer_that_is_none_fails_the_client(response: bytes, message: str):
    async with answering(response) as url:
        with pytest.raises(Refused, match=message):
            await ask(url, {})
