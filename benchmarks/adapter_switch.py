"""Alias moved to the first token of the new version, and a cold adapter's first token, over HTTP.

    python benchmarks/adapter_switch.py --work /tmp/xc --moves 10

Makes a checkpoint with random weights of the published sizes (bf16) and random adapters, publishes
them in a registry (a folder; `--registry` for another store), and runs `serve run` with it.

moved     `promote` is called; one client after another asks for the alias, and the first token of
          the first answer by the new version counts. Half of the moves go to a version that is new
          to the server, half to one that it has served before.
cold      the first token of a version that the server has never loaded: one that it knows of, and
          one that was published right before.
warm      the first token of the base, and of an adapter that has a slot.
interval  the longest interval between two messages of `--streams` streams that run on, at rest and
          while the alias is moved.

Without a GPU, or with `--tiny`, the tiny model runs on CPU. Seconds; prints a table, then one JSON
line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from real_scale import make
from safetensors.torch import save_file
from served import serving

from xc_ray.demo.make import tiny_config
from xc_ray.fingerprint import fingerprint
from xc_ray.model.config import FAMILIES, PLORA_LINEARS, XComposerConfig, preset
from xc_ray.registry.manifest import BaseRef
from xc_ray.registry.registry import Registry

NAME = "real"
ADAPTER = "switched"
SETTLE_S = 3.0
LIMIT_S = 120.0


@dataclass
class Bench:
    """The registry, the server, and a client of it."""

    registry: Registry
    base: BaseRef
    config: XComposerConfig
    work: Path
    rank: int
    dtype: torch.dtype
    url: str = ""
    made: int = 0
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=300, trust_env=False))

    def push(self, name: str) -> int:
        """A new version of a random adapter; its number."""
        self.made += 1
        folder = self.work / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_adapter(folder, self.config, self.rank, self.dtype, seed=self.made)
        return self.registry.push(folder, name=name, kind="adapter", base=self.base).version

    def first_token(self, model: str, max_tokens: int = 2) -> tuple[str, float]:
        """Who answered a short request, and when its first token was there."""
        for event in self.events(model, max_tokens):
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                return str(event["model"]), time.monotonic()
        return sys.exit("no token came")

    def events(self, model: str, max_tokens: int) -> Iterator[Any]:
        """The events of a streamed request."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Describe what you see."}],
            "max_tokens": max_tokens,
            "min_tokens": max_tokens,
            "temperature": 1.0,
            "seed": 1,
            "stream": True,
            "ignore_eos": True,
            # Every token is to be seen: half a character would be held back.
            "logprobs": True,
        }
        with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                sys.exit(f"HTTP {response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        sys.exit(f"the stream failed: {event}")
                    yield seen(event)

    def took(self, model: str) -> float:
        """Seconds from asking to the first token."""
        started = time.monotonic()
        return self.first_token(model)[1] - started

    def move(self, version: int) -> tuple[float, float]:
        """Seconds from before `promote` to the new version's first token, and `promote`'s own."""
        expected, started = f"{NAME}:{ADAPTER}@{version}", time.monotonic()
        self.registry.promote(ADAPTER, [(version, 1.0)], "prod")
        promoted = time.monotonic()
        while time.monotonic() - started < LIMIT_S:
            answered, first = self.first_token(f"{NAME}:{ADAPTER}")
            if answered == expected:
                return first - started, promoted - started
        return sys.exit(f"{expected} did not come within {LIMIT_S:.0f} s")


def seen(event: Any) -> Any:
    """The event, with a content where a token came whose text is held back or empty."""
    for choice in event["choices"]:
        if choice.get("logprobs"):
            choice["delta"]["content"] = choice["delta"].get("content") or "?"
    return event


class Streams:
    """Long streams of a loaded version, as long as the block; intervals between their messages."""

    def __init__(self, bench: Bench, model: str, count: int) -> None:
        self._bench = bench
        self._model = model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        self.intervals: list[float] = []

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            last = None
            for _ in self._bench.events(self._model, 400):
                now = time.monotonic()
                if last is not None:
                    self.intervals.append(now - last)
                last = now
                if self._stop.is_set():
                    return


def main() -> None:
    """All figures of one server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variant", choices=list(FAMILIES), default="2.5")
    parser.add_argument("--work", type=Path, default=Path("/tmp/xc_ray_adapter_switch"))
    parser.add_argument("--registry", help="a storage setting (default: a folder in --work)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--cold", type=int, default=5, help="cold adapters of each kind")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--poll-s", type=float, default=5.0, help="adapters.poll_s")
    parser.add_argument("--port", type=int, default=8124)
    parser.add_argument("--tiny", action="store_true", help="the tiny model on CPU")
    args = parser.parse_args()
    gpu = torch.cuda.is_available() and not args.tiny
    config = preset(args.variant) if gpu else tiny_config(args.variant)
    shutil.rmtree(args.work, ignore_errors=True)
    folder = args.work / "model"
    # Nothing of an earlier run: what is called cold has to be.
    os.environ["XDG_CACHE_HOME"] = str(args.work / "cache")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, args.work, ignore_errors=True)
        make(folder, config, gpu)
        registry = Registry.open(args.registry or str(args.work / "registry"))
        base = BaseRef(name=NAME, digest=fingerprint(folder))
        dtype = torch.bfloat16 if gpu else torch.float32
        bench = Bench(registry, base, config, args.work, args.rank, dtype)
        bench.push(ADAPTER)
        registry.promote(ADAPTER, [(1, 1.0)], "prod")
        file = write_serve_file(args, folder, registry.store.url, gpu)
        _, ready_s = stack.enter_context(serving(file, args.port))
        bench.url = f"http://127.0.0.1:{args.port}"
        stack.enter_context(bench.client)
        rows = measure(bench, args)
    report(args, rows, gpu, ready_s)


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by what was measured."""
    alias, poll_s = f"{NAME}:{ADAPTER}", args.poll_s * 1.2 + SETTLE_S
    for _ in range(3):  # kernels, connections, and the adapter's slot
        bench.took(NAME), bench.took(alias)
    rows = {
        "warm, base": repeat(20, lambda: bench.took(NAME)),
        "warm, adapter": repeat(20, lambda: bench.took(alias)),
    }
    known = [bench.push("cold") for _ in range(args.cold)]
    time.sleep(poll_s)
    rows["cold, known"] = [bench.took(f"{NAME}:cold@{version}") for version in known]
    rows["cold, just published"] = repeat(
        args.cold, lambda: bench.took(f"{NAME}:cold@{bench.push('cold')}")
    )
    steady = f"{NAME}:cold@{known[0]}"
    if args.streams:
        with Streams(bench, steady, args.streams) as streams:
            time.sleep(poll_s)
        rows["longest interval at rest"] = [max(streams.intervals)]
    moves: dict[str, list[tuple[float, float]]] = {"new": [], "served before": []}
    with Streams(bench, steady, args.streams) as streams:
        for number in range(args.moves):
            kind = ("new", "served before")[number % 2]
            # The old one is let go when the alias leaves it, and kept on this machine's disk.
            version = bench.push(ADAPTER) if kind == "new" else 1
            time.sleep(args.poll_s * (0.37 * number % 1))  # anywhere between two readings
            moves[kind].append(bench.move(version))
    if args.streams:
        rows["longest interval while moving"] = [max(streams.intervals)]
    for kind, pairs in moves.items():
        rows[f"moved, {kind}"] = [seconds for seconds, _ in pairs]
    rows["promote itself"] = [seconds for pairs in moves.values() for _, seconds in pairs]
    return {name: values for name, values in rows.items() if values}


def repeat(times: int, call: Callable[[], float]) -> list[float]:
    """What a call gives, several times."""
    return [call() for _ in range(times)]


def write_adapter(
    folder: Path, config: XComposerConfig, rank: int, dtype: torch.dtype, seed: int
) -> None:
    """Random A and B on all linears, small enough for sound logits, as peft saves them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.decoder.num_hidden_layers):
        for name in PLORA_LINEARS:
            out, into = config.linear_shapes[name]
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            for part, shape in (("A", (rank, into)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator) * 0.01
                tensors[f"{stem}{part}.weight"] = values.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    settings |= {"target_modules": list(PLORA_LINEARS), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_serve_file(args: argparse.Namespace, folder: Path, registry: str, gpu: bool) -> Path:
    """The repository's serve_config.yaml with this model, registry and port."""
    values = yaml.safe_load(Path(__file__).parents[1].joinpath("serve_config.yaml").read_text())
    values["http_options"]["port"] = args.port
    app_args: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": NAME,
        "registry": registry,
        "adapters": {"poll_s": args.poll_s, "max_rank": max(16, args.rank)},
    }
    if not gpu:
        app_args |= {"encoder": {"num_gpus": 0}, "decoder": {"num_gpus": 0}}
    values["applications"][0]["args"] = app_args
    path = args.work / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def report(
    args: argparse.Namespace, rows: dict[str, list[float]], gpu: bool, ready_s: float
) -> None:
    """The table, then the line."""
    print(f"{'':<30} {'n':>3} {'median':>8} {'least':>8} {'most':>8}  seconds")
    for name, values in rows.items():
        median = statistics.median(values)
        print(f"{name:<30} {len(values):>3} {median:8.3f} {min(values):8.3f} {max(values):8.3f}")
    facts = {
        "figure": "adapter_switch",
        "machine": torch.cuda.get_device_name(0) if gpu else "CPU",
        "dtype": "bfloat16" if gpu else "float32",
        "variant": args.variant if gpu else f"{args.variant}, tiny",
        "rank": args.rank,
        "poll_s": args.poll_s,
        "ready_s": ready_s,
        "streams": args.streams,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "rows": {name: [round(v, 4) for v in values] for name, values in rows.items()},
    }
    print(json.dumps(facts))


def commit() -> str:
    """The commit of this repository, `unknown` outside of one."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
