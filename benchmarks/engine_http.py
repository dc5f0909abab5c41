"""HTTP streaming through `serve run` against the engine alone, at 1 to 256 streams.

    python benchmarks/engine_http.py [--mode haproxy default] [--model FOLDER | --url URL]

Each level sends that many streams at once: prompts of about 512 tokens of random words, 256 tokens
each (`ignore_eos`, greedy), by SSE. One stream asks four times. Time to first token is from the
connect to the first text; the interval is the mean between tokens of one answer; `tokens_per_s` is
all tokens from the first connect to the last token. Clients are processes of their own (one per 32
streams, at most four); `client_cpu` is the busiest one's share of a core.

`offline` is the engine over the same shape, as many requests of 512 in, 256 out at once, measured
first, in a process that ends before the server starts (engine_throughput.py), or `--offline`, for
the largest level. Without `--model` a checkpoint with random weights is made in `--work`.

`--mode` is how Serve carries tokens: Ray's default, gRPC between replicas, throughput mode, or
throughput mode behind HAProxy.

Prints a table, then one JSON line.
"""

import argparse
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from engine_throughput import throughput, throughput_engine, warm_up
from real_scale import make
from served import MODES, environment, serving
from shapes import Bench, PointFailed, arguments, random_module, say

from xc_ray.hub import resolve_model
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.layout import read_layout

ROOT = Path(__file__).parents[1]
NAME = "bench"
SHARE_TARGET = 0.9  # of offline tokens/s, at 256 streams
ADDED_FIRST_MS, ADDED_INTERVAL_MS = 15.0, 5.0  # at one stream
ROUNDS_OF_ONE = 4
STREAMS_A_CLIENT, MAX_CLIENTS = 32, 4


@dataclass(frozen=True)
class Rate:
    """What one level reached."""

    tokens_per_s: float
    first_token_ms: float
    interval_ms: float


def main() -> None:
    """Offline first, then a server for each mode."""
    parser = arguments(__doc__)
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=["haproxy"])
    parser.add_argument("--levels", type=int, nargs="+", help="streams at once")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--url", help="a server that runs, with --name its model")
    parser.add_argument("--name", default=NAME, help="the served model's name")
    parser.add_argument("--offline", type=float, metavar="TOKENS_PER_S")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--max-prefill-tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, default=Path("/tmp/xc_ray_http"))
    parser.add_argument("--port", type=int, default=8124, help="0: any that is free")
    args = parser.parse_args()
    args.levels = sorted(args.levels or ([1, 4] if args.tiny else [1, 16, 64, 256]))
    if args.tiny:
        args.prompt_tokens, args.output_tokens = min(args.prompt_tokens, 48), 8
    with Bench("engine_http", args) as bench:
        if args.url:
            over_levels(bench, "given", args.url, {})
            return
        folder = model_folder(bench)
        offline: dict[int, Rate] = {}
        if args.offline is None:
            bench.attempt("offline", lambda: offline.update(offline_rates(bench, folder)))
        for mode in args.mode:
            bench.attempt(f"mode {mode}", lambda m=mode: served(bench, folder, m, offline))


def model_folder(bench: Bench) -> Path:
    """The given model, or one made in the work folder, once."""
    args = bench.args
    if args.model:
        return Path(args.model)
    if bench.tiny:
        return resolve_model("demo")
    args.work.mkdir(parents=True, exist_ok=True)
    folder: Path = args.work / f"model-{args.variant}"
    if not (folder / "config.json").exists():
        started = time.monotonic()
        make(folder, bench.config, gpu=True)
        say(f"# {folder} made in {time.monotonic() - started:.1f} s")
    return folder


# --- offline ------------------------------------------------------------------------------------


def offline_rates(bench: Bench, folder: Path) -> dict[int, Rate]:
    """The engine's own rate at each level, in a process whose memory is free again afterwards."""
    started = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(
            engine_rates, read_layout(folder).config, bench.device, bench.dtype, bench.args
        )
        rates = job.result()
    for level, rate in rates.items():
        bench.row(case="offline", streams=level, **asdict(rate))
    say(f"# offline took {time.monotonic() - started:.1f} s")
    return rates


def engine_rates(
    config: XComposerConfig, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> dict[int, Rate]:
    """Requests of the served size, as many at once as each level has streams."""
    lengths = (args.prompt_tokens, args.output_tokens)
    decoder = random_module(Decoder, config, device, dtype, args)
    largest = max(args.levels)
    engine = throughput_engine(
        decoder, [[lengths] * largest], max_prefill_tokens=args.max_prefill_tokens
    )
    warm_up(engine, "greedy", largest)
    throughput(engine, "greedy", [lengths], seed=999)
    rates = {}
    for level in args.levels:
        found = [
            throughput(engine, "greedy", [lengths] * level, seed=i) for i in range(rounds(level))
        ]
        rates[level] = Rate(
            statistics.median(o.tokens_per_s for o in found),
            statistics.median(t for o in found for t in o.first_token_s) * 1e3,
            statistics.mean(t for o in found for t in o.interval_s) * 1e3,
        )
    return rates


def rounds(level: int) -> int:
    """How often each stream of a level asks."""
    return ROUNDS_OF_ONE if level == 1 else 1


# --- served -------------------------------------------------------------------------------------


def served(bench: Bench, folder: Path, mode: str, offline: dict[int, Rate]) -> None:
    """One `serve run` in a mode, and every level against it."""
    port = bench.args.port or free_port()
    # Ray puts sockets below its folder, and the path of a socket may not be longer than 107.
    home = Path(tempfile.mkdtemp(prefix="xc-"))
    settings = {**MODES[mode], "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    if bench.tiny:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    try:
        serve_file = write_serve_file(bench, folder, home / "serve.yaml", port)
        with environment(settings), serving(serve_file, port) as (_, ready_s):
            say(f"# mode {mode}: ready in {ready_s} s")
            over_levels(bench, mode, f"http://127.0.0.1:{port}", offline)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def write_serve_file(bench: Bench, folder: Path, path: Path, port: int) -> Path:
    """The repository's serve_config.yaml with room for every stream at once."""
    args = bench.args
    largest = max(args.levels)
    values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    application = values["applications"][0]
    longest = 2 * (args.prompt_tokens + args.output_tokens)
    decoder: dict[str, Any] = {"max_num_seqs": largest}
    if not bench.tiny:
        decoder["kv_cache_tokens"] = largest * (args.prompt_tokens + args.output_tokens + 128)
        decoder["max_prefill_tokens"] = args.max_prefill_tokens
    application["args"] = {
        "model": str(folder.resolve()),
        "served_model_name": NAME,
        "max_model_len": max(longest, 512),
        "decoder": decoder,
    }
    for deployment in application["deployments"]:
        if deployment["name"] in ("Ingress", "Decoder"):
            deployment["max_ongoing_requests"] = largest + 64
    path.write_text(yaml.safe_dump(values))
    return path


def over_levels(bench: Bench, mode: str, url: str, offline: dict[int, Rate]) -> None:
    """Finds out what a word costs, warms up, then every level."""
    args = bench.args
    asked = (1, max(2, args.prompt_tokens // 8))
    few, many = (
        ask_all(args, url, [[body(args, words, 1, words)]])[0][0]["prompt_tokens"]
        for words in asked
    )
    a_word = (many - few) / (asked[1] - asked[0])
    words = max(1, round(asked[0] + (args.prompt_tokens - few) / a_word))
    say(f"# {a_word:.2f} tokens a word: {words} words a prompt")
    # As engine_throughput warms up: answers that end one after another.
    ask_all(args, url, [[body(args, 8, 2 + i, i)] for i in range(max(args.levels))])
    for level in args.levels:
        bench.attempt(
            f"mode {mode}, {level} streams",
            lambda n=level: one_level(bench, mode, url, n, words, offline.get(n)),
        )


def one_level(
    bench: Bench, mode: str, url: str, level: int, words: int, offline: Rate | None
) -> None:
    """One row: `level` streams at once."""
    args = bench.args
    streams = [
        [
            body(args, words, args.output_tokens, 10_000 * level + 1000 * r + i)
            for r in range(rounds(level))
        ]
        for i in range(level)
    ]
    answers, cpu = ask_all(args, url, streams)
    tokens = [a["completion_tokens"] for a in answers]
    if set(tokens) != {args.output_tokens}:
        raise PointFailed(f"answers of {min(tokens)} to {max(tokens)} tokens")
    seconds = max(a["last"] for a in answers) - min(a["started"] for a in answers)
    first = sorted((a["first"] - a["started"]) * 1e3 for a in answers)
    rate = Rate(
        sum(tokens) / seconds,
        statistics.median(first),
        statistics.mean((a["last"] - a["first"]) * 1e3 / (args.output_tokens - 1) for a in answers),
    )
    known = offline.tokens_per_s if offline else args.offline if level == max(args.levels) else None
    bench.row(
        case=mode,
        streams=level,
        **asdict(rate),
        first_p95_ms=first[int(0.95 * len(first))],
        offline=known,
        share=rate.tokens_per_s / known if known else None,
        share_target=SHARE_TARGET if level == 256 else None,
        added_first_ms=rate.first_token_ms - offline.first_token_ms if offline else None,
        first_target_ms=ADDED_FIRST_MS if level == 1 else None,
        added_interval_ms=rate.interval_ms - offline.interval_ms if offline else None,
        interval_target_ms=ADDED_INTERVAL_MS if level == 1 else None,
        tokens_an_event=sum(tokens) / sum(a["events"] for a in answers),
        prompt_tokens=round(statistics.mean(a["prompt_tokens"] for a in answers)),
        client_cpu=cpu,
    )


def body(args: argparse.Namespace, words: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """A request with a prompt of random words, no two alike."""
    rng = random.Random(seed)
    text = " ".join(
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))
        for _ in range(words)
    )
    return {
        "model": args.name,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask_all(
    args: argparse.Namespace, url: str, streams: list[list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], float]:
    """Every stream at once, from client processes; the answers, and the busiest client's CPU share.

    Raises:
        PointFailed: a client failed, with its last words.
    """
    count = min(MAX_CLIENTS, max(1, len(streams) // STREAMS_A_CLIENT))
    start = time.monotonic() + 0.5 + 0.5 * count  # all have read their job by then
    command = [sys.executable, str(Path(__file__).with_name("sse_client.py"))]
    jobs = [{"url": url, "start": start, "streams": streams[i::count]} for i in range(count)]
    clients = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in jobs
    ]
    try:
        for client, job in zip(clients, jobs, strict=True):
            assert client.stdin is not None
            client.stdin.write(json.dumps(job).encode())
            client.stdin.close()
            client.stdin = None
        outputs = [client.communicate(timeout=args.time_limit) for client in clients]
    finally:
        for client in clients:
            client.kill()
    for client, (_, errors) in zip(clients, outputs, strict=True):
        if client.returncode:
            raise PointFailed(f"a client failed: {errors.decode()[-500:]}")
    found = [json.loads(out) for out, _ in outputs]
    wall = time.monotonic() - start
    answers = [answer for client in found for answer in client["answers"]]
    return answers, max(client["cpu_s"] for client in found) / wall


if __name__ == "__main__":
    main()
