"""What a chat server does under load that does not wait for it.

    python benchmarks/load.py --rates 1 2 4 --seconds 60 --images 0:0.5 1:0.4 4:0.1
    python benchmarks/load.py --url http://HOST:8000 --trace day.jsonl

Open loop: arrivals are independent of each other at `--rates` requests a second (Poisson), one row
of the table for each, or stand in `--trace`, JSON Lines of `at` (seconds) and, where the mix is not
to decide, `input_tokens`, `output_tokens`, `images`, `adapter`, `key`. A request is sent when it is
due, whatever has been answered. Everything is drawn from `--seed` before the clock starts; pictures
that are not `--repeated` are new to a server unless it has seen this seed before.

Without `--url`, `serve run` is started with serve_config.yaml and `--model`.

Each request has a connection of its own, and times count from its opening. Of those answered whole:
  first token  to the first text of a stream
  interval     from token to token: last text − first text over the tokens of usage less one
  largest gap  between two events with text (JSON line)
  latency      to the end
Per row, over the time to the last answer (so let --seconds be long against one answer):
  offered/s    requests due, over --seconds
  done/s       answered whole: a stream ended with [DONE]
  good/s       of these, those within --ttft and, on average, --interval; an answer in one piece has
               ttft + interval × (tokens − 1)
  tokens/s     of answers, as usage counts; of those that broke off, events with text
  429          refused; p99 of how long that took, and how many said Retry-After
  errors       other statuses, error events in a stream, timeouts, no connection: by status and code
  cut          ended with neither an answer nor an error: the gravest
A heartbeat (an SSE comment) is counted, and is neither text nor an error. Fairness is Jain's index
over the tokens of each API key. If the generator itself sent later than due, by more than 50 ms at
p99, the row is invalid, and says so.

Prints a table, then one JSON line.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
from load_client import PATH, Run, Target, drive
from load_mix import Arrival, Drawer, Length, Mix, Weighted, poisson, read_trace
from load_report import Level, figures, remarks, table
from served import serving_args

ROOT = Path(__file__).parents[1]
SECONDS = 30.0
CALIBRATION_WORDS = (1, 65)

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """All rows against one server."""
    args = parse(argv)
    with server(args) as url:
        keys = api_keys(args)
        rows = measure(url, keys, args)
    print(table(rows))
    for row in rows:
        for remark in remarks(row):
            print(f"{row['rate']}: {remark}")
    facts = {
        "benchmark": "load",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "arguments": vars(args),
        "valid": all(row["valid"] for row in rows),
        "rows": rows,
    }
    print(json.dumps(facts, default=str))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="one that runs, like http://127.0.0.1:8000")
    server.add_argument("--model", default="demo", help="what `serve run` loads (demo)")
    server.add_argument("--port", type=int, default=8128, help="of `serve run` (8128)")
    server.add_argument(
        "--args", type=an_object, default={}, help="JSON, on top of `args` of serve_config.yaml"
    )
    when = parser.add_argument_group("arrivals")
    when.add_argument(
        "--rates", "--rate", type=positive, nargs="+", default=[1.0], help="requests a second (1)"
    )
    when.add_argument("--trace", type=Path, help="instead of --rates")
    when.add_argument(
        "--seconds", type=positive, help=f"of arrivals ({SECONDS:.0f}; all of a trace)"
    )
    when.add_argument("--warmup", type=count, default=4, help="requests before, not counted (4)")
    when.add_argument("--timeout", type=positive, default=300.0, help="seconds an answer (300)")
    when.add_argument("--processes", type=at_least_one, default=1, help="that send (1)")
    when.add_argument("--seed", type=int, default=0)
    mix = parser.add_argument_group("mix", "values with their shares; lengths in tokens")
    mix.add_argument("--names", nargs="+", metavar="NAME[=W]", help="asked for (first served)")
    mix.add_argument(
        "--keys", nargs="+", metavar="VARIABLE[=W]", help="environment variables with API keys"
    )
    mix.add_argument("--images", nargs="+", default=["0"], metavar="N[:W]", help="a request (0)")
    mix.add_argument("--sizes", nargs="+", default=["560x560"], metavar="WIDTHxHEIGHT[:W]")
    mix.add_argument(
        "--repeated", type=share, default=0.0, help="share of pictures of the pool (0)"
    )
    mix.add_argument("--pool", type=at_least_one, default=8, help="pictures of each size (8)")
    mix.add_argument("--detail", choices=["auto", "low", "high"], default="auto")
    length = "N or lognormal:MEAN[:SIGMA]"
    mix.add_argument("--input", type=a_length, default="128", help=f"user's text, {length} (128)")
    mix.add_argument("--output", type=a_length, default="64", help=f"max_tokens, {length} (64)")
    mix.add_argument("--ignore-eos", action="store_true", help="answers as long as --output")
    mix.add_argument("--system-prompts", type=count, default=0, help="how many share one each (0)")
    mix.add_argument("--system-tokens", type=at_least_one, default=64, help="of each (64)")
    mix.add_argument("--streamed", type=share, default=1.0, help="share of streams (1)")
    mix.add_argument(
        "--tokens-per-word", type=positive, help="of random words (the server is asked)"
    )
    level = parser.add_argument_group("service level")
    level.add_argument("--ttft", type=positive, default=2.0, help="seconds to the first token (2)")
    level.add_argument("--interval", type=positive, default=0.05, help="seconds a token (0.05)")
    return parser.parse_args(argv)


def positive(text: str) -> float:
    """A number above zero."""
    if (number := float(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def an_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def a_length(text: str) -> Length:
    """`200`, `lognormal:200` or `lognormal:200:0.8`."""
    kind, *numbers = text.split(":")
    if kind == "lognormal" and len(numbers) in (1, 2):
        mean, sigma = map(positive, [*numbers, "0.5"][:2])
        return Length(mean, sigma)
    if numbers:
        raise argparse.ArgumentTypeError(f"{text}: expected N or lognormal:MEAN[:SIGMA]")
    return Length(positive(kind))


def weighted(texts: Sequence[str], mark: str, read: Callable[[str], T]) -> Weighted[T]:
    """Values with their weights behind `mark`, 1 where none is given."""
    pairs = [text.rpartition(mark) if mark in text else (text, mark, "1") for text in texts]
    try:
        weights = tuple(positive(weight) for _, _, weight in pairs)
        return Weighted(tuple(read(value) for value, _, _ in pairs), weights)
    except (ValueError, argparse.ArgumentTypeError) as e:
        raise SystemExit(f"{' '.join(texts)}: {e}") from None


def a_size(text: str) -> tuple[int, int]:
    """`560x420`: width and height."""
    width, height = text.split("x")
    return int(width), int(height)


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of the given server, or of one that runs meanwhile."""
    if args.url:
        yield args.url
        return
    with serving_args(args.port, **{"model": args.model} | args.args) as url:
        yield url


def api_keys(args: argparse.Namespace) -> dict[str, str]:
    """The keys of `--keys`, by the name of their environment variable."""
    names = weighted(args.keys or [], "=", str).values
    if missing := [name for name in names if not os.environ.get(name)]:
        raise SystemExit(f"--keys: not in the environment: {', '.join(missing)}")
    return {name: os.environ[name] for name in names}


def measure(url: str, keys: dict[str, str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each rate, or one for the trace."""
    header = {"Authorization": f"Bearer {next(iter(keys.values()))}"} if keys else {}
    with httpx.Client(base_url=url, headers=header, timeout=args.timeout) as client:
        models = weighted(args.names or [first_model(client)], "=", str)
        tokens_a_word = args.tokens_per_word or ask_tokens_a_word(client, models.values[0])
    drawer = Drawer.of(a_mix(args, models), tokens_a_word)
    target = Target.of(url, keys)
    if args.warmup:
        warm_up(target, drawer, args)
    level = Level(args.ttft, args.interval)
    rows = []
    for number, (name, arrivals, seconds) in enumerate(schedules(args)):
        if unknown := {a.key for a in arrivals if a.key} - keys.keys():
            raise SystemExit(f"{args.trace}: keys that --keys lacks: {', '.join(sorted(unknown))}")
        requests = drawer.requests(arrivals, number)
        run = drive(target, requests, args.timeout, args.processes)
        rows.append({"rate": name, **figures(run, seconds, level)})
    return rows


def schedules(args: argparse.Namespace) -> Iterator[tuple[str, list[Arrival], float]]:
    """Name, arrivals and seconds of each row."""
    seconds = args.seconds or SECONDS
    if args.trace:
        arrivals = read_trace(args.trace, args.seconds)
        if not arrivals:
            raise SystemExit(f"{args.trace} has no arrivals")
        yield "trace", arrivals, args.seconds or arrivals[-1].at or 1.0
        return
    for number, rate in enumerate(args.rates):
        if not (arrivals := poisson(rate, seconds, args.seed, number)):
            raise SystemExit(f"no arrival within {seconds:g} s at {rate:g}/s; raise --seconds")
        yield f"{rate:g}", arrivals, seconds


def a_mix(args: argparse.Namespace, models: Weighted[str]) -> Mix:
    """What the options say of requests."""
    return Mix(
        models=models,
        keys=weighted(args.keys, "=", str) if args.keys else None,
        images=weighted(args.images, ":", int),
        sizes=weighted(args.sizes, ":", a_size),
        repeated=args.repeated,
        pool=args.pool,
        detail=args.detail,
        input=args.input,
        output=args.output,
        system_prompts=args.system_prompts,
        system_tokens=args.system_tokens,
        ignore_eos=args.ignore_eos,
        streamed=args.streamed,
        seed=args.seed,
    )


def first_model(client: httpx.Client) -> str:
    """The first that the server names."""
    response = client.get("/v1/models")
    if response.status_code != 200:
        raise SystemExit(f"GET /v1/models: HTTP {response.status_code}: {response.text[:300]}")
    return str(response.json()["data"][0]["id"])


def ask_tokens_a_word(client: httpx.Client, model: str) -> float:
    """Prompt tokens for each random word, from two short prompts of these."""
    mix = Mix(Weighted((model,), (1.0,)), output=Length(1), streamed=0.0, pool=0)
    drawer = Drawer.of(mix, 1.0)
    counts = []
    for words in CALIBRATION_WORDS:
        (request,) = drawer.requests([Arrival(0.0, input_tokens=words)], -2)
        response = client.post(PATH, content=b"".join(request.body))
        if response.status_code != 200:
            raise SystemExit(
                f"to count tokens: HTTP {response.status_code}: {response.text[:300]}; "
                "--tokens-per-word does without"
            )
        counts.append(response.json()["usage"]["prompt_tokens"])
    return float(counts[1] - counts[0]) / (CALIBRATION_WORDS[1] - CALIBRATION_WORDS[0])


def warm_up(target: Target, drawer: Drawer, args: argparse.Namespace) -> None:
    """A few requests at once, of which one at least has to be answered."""
    run: Run = drive(target, drawer.requests([Arrival(0.0)] * args.warmup, -1), args.timeout)
    if not any(answer.outcome == "ok" for answer in run.answers):
        found = run.answers[0]
        raise SystemExit(
            f"no warm-up request was answered: {found.ended}, status {found.status}, {found.code}"
        )


def commit() -> str:
    """This repository's commit, `+` behind it if files differ; `unknown` outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
