"""What train_config.yaml teaches the demo model, and what it forgets: exact answers over HTTP.

    python benchmarks/demo_lesson.py --num 100

Runs `xc-ray train` with `--config` as it stands, in a home of its own with nothing in it, and times
it: seconds on the clock, and seconds of CPU of all its processes. Then `serve run` with
serve_config.yaml and the registry that the training filled. One request a sample, greedy, is sent
to the base (before) and to the adapter that was promoted (after): pictures of the lesson
(`json`) that are none of its rows, and held-out samples of old tasks, as demo_accuracy.py draws
them. An answer counts if it is the reference to the letter. Prints a table, then one JSON line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml
from demo_accuracy import Asked, exact_share
from served import serving

from xc_ray.config import TrainConfig
from xc_ray.demo.drawn.fonts import find_fonts
from xc_ray.demo.drawn.tasks import HELD_OUT, Sample, held_out_sample
from xc_ray.demo.lesson import lesson_sample

ROOT = Path(__file__).parents[1]
LESSON = "json"
TASKS = (
    "count",
    "what",
    "colour",
    "shape",
    "read",
    "two_turn",
    "add_text_2_digits",
    "small_talk",
)
CPU_EVERY_S = 0.5  # how often the processes' times are read: what ends in between is not counted


def main() -> None:
    """Trains, serves, asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "train_config.yaml")
    parser.add_argument("--num", type=int, default=100, help="samples of each task (100)")
    parser.add_argument("--seed", type=int, default=7, help="of the samples; not the data set's, 0")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), choices=list(HELD_OUT), metavar="TASK"
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--port", type=int, default=8127)
    args = parser.parse_args()
    config = TrainConfig.read(args.config)
    if config.publish is None or config.publish.promote is None:
        sys.exit(f"{args.config} publishes and promotes nothing that could be asked")
    if config.registry is not None:
        sys.exit(f"{args.config} names a registry; this script fills one of its own")
    name = f"{config.publish.adapter}@{config.publish.promote.alias}"
    # Ray's sockets lie below, and the path of one may not be longer than 107 characters.
    with tempfile.TemporaryDirectory(prefix="xc-", dir="/tmp") as folder:
        home = Path(folder)
        trained = train(args.config, home)
        file = serve_file(home, args.port)
        with serving(file, args.port):
            url = f"http://127.0.0.1:{args.port}"
            exact = asyncio.run(examine(url, name, args))
    show(trained, exact, name, args)


def train(config: Path, home: Path) -> dict[str, Any]:
    """The command in an empty home, with a Ray of its own: how long it took, and its summary."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_DATA_HOME": str(home / "data"),
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(home),
    }
    load, started = os.getloadavg()[0], time.monotonic()
    with (home / "train.log").open("w") as log, (home / "train.out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "xc_ray", "train", str(config.resolve())],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        used = CpuTime(process.pid)
        code = process.wait()
        seconds = time.monotonic() - started
        cpu_s = used.stop()
    if code:
        sys.exit(f"the training failed:\n{(home / 'train.log').read_text()[-6000:]}")
    summary: dict[str, Any] = json.loads((home / "train.out").read_text().splitlines()[-1])
    if not summary["promoted"]:
        sys.exit(f"the adapter was not promoted: validation loss {summary['validation_loss']}")
    facts = ("steps", "train_loss", "validation_loss", "adapter")
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "steps_s": round(summary["seconds"], 1),
        "load_before": round(load, 1),
    } | {key: summary[key] for key in facts}


class CpuTime:
    """Seconds of CPU of all processes of a session, read again and again while it lives."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.seconds: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """The sum, those that have ended included."""
        self._over.set()
        self._thread.join()
        return sum(self.seconds.values())

    def _watch(self) -> None:
        while not self._over.wait(CPU_EVERY_S):
            self.read()

    def read(self) -> None:
        """Notes what each process has used so far."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    session, seconds = times((entry / "stat").read_text())
                    if session == self.session:
                        self.seconds[int(entry.name)] = seconds


def times(stat: str) -> tuple[int, float]:
    """Session, and seconds of CPU in user and system mode, of the text of /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve_file(home: Path, port: int) -> Path:
    """serve_config.yaml with the registry of the training."""
    values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    values["applications"][0]["args"]["registry"] = str(home / "data" / "xc_ray" / "registry")
    path = home / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


async def examine(url: str, name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The share of exact answers by task, before and after."""
    fonts = find_fonts()
    draws: dict[str, Callable[[int], Sample]] = {LESSON: partial(lesson_sample, args.seed)}
    for task in args.tasks:
        draws[task] = partial(held_out_sample, task, args.seed, fonts=fonts)
    gate = asyncio.Semaphore(args.concurrency)
    exact: dict[str, dict[str, float]] = {}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        base = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        models = {"before": base, "after": f"{base}:{name}"}
        for task, draw in draws.items():
            exact[task] = {
                when: await exact_share(Asked(client, model, gate), draw, args.num)
                for when, model in models.items()
            }
    return exact


def show(
    trained: dict[str, Any],
    exact: dict[str, dict[str, float]],
    name: str,
    args: argparse.Namespace,
) -> None:
    """The table and the JSON line."""
    print(
        f"trained {name} in {trained['seconds']} s, {trained['cpu_s']} s of CPU "
        f"({trained['steps']} steps in {trained['steps_s']} s; load before: "
        f"{trained['load_before']})"
    )
    print(f"{'task':<26}{'before':>12}{'after':>12}")
    for task, row in exact.items():
        print(f"{task:<26}{row['before']:>12.1%}{row['after']:>12.1%}")
    figures = {
        "benchmark": "demo_lesson",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "config": args.config.name,
        "num": args.num,
        "seed": args.seed,
        "trained": trained,
        "exact": exact,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
