"""What the engine's benchmarks share: model, limit of the machine, loop over an engine, report.

The model has a published shape and random weights made on the device, in seconds and without
files: speed does not depend on their values, but for sampling (`--logit-std`).
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xc_ray.demo.make import tiny_config
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.sequence import FinishReason, Image, SamplingParams
from xc_ray.errors import XcRayError
from xc_ray.model.config import FAMILIES, XComposerConfig, preset
from xc_ray.model.decoder import Decoder

# What one H200 was measured to give: reading HBM, and a bf16 matrix product of 8192³.
BYTES_PER_S = 4.3e12
FLOP_PER_S = 788e12
BF16_BYTES = 2

# Sampling that is measured, by name. Stop ids are none: an answer has its full length.
SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.8},
}

Module = TypeVar("Module", bound=nn.Module)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU: no figure")
    parser.add_argument("--variant", choices=list(FAMILIES), default="2.5")
    parser.add_argument("--seed", type=int, default=0, help="of weights, ids and lengths")
    parser.add_argument(
        "--logit-std",
        type=float,
        default=1.0,
        help="spread of the logits; 1 is flat over the vocabulary, 8 as peaked as a trained model",
    )
    parser.add_argument(
        "--time-limit", type=float, default=540.0, metavar="S", help="starts nothing new after it"
    )
    parser.add_argument("--commit", help="for the JSON line, where there is no git")
    return parser


class Bench:
    """One run: its model, its clock, and its rows, printed as they come and as JSON at the end.

    Used as a context, it prints the JSON line however the run ends, SIGTERM included.
    """

    def __init__(self, figure: str, args: argparse.Namespace) -> None:
        if not args.tiny and not torch.cuda.is_available():
            sys.exit("there is no GPU; --tiny runs a tiny model on CPU")
        self.figure, self.args = figure, args
        self.tiny: bool = args.tiny
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.config = tiny_config(args.variant) if self.tiny else preset(args.variant)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._started = time.monotonic()
        self._columns: list[str] = []
        self._failed = False

    def __enter__(self) -> "Bench":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        say(f"# {self.figure}: {machine(self.device)}, {self.config.variant}, commit {self.commit}")
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self.left_out:
            say(f"left out: {'; '.join(self.left_out)}")
        facts = {
            "figure": self.figure,
            "machine": machine(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "commit": self.commit,
            "torch": torch.__version__,
            "model": "tiny" if self.tiny else self.args.variant,
            "seed": self.args.seed,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "seconds": round(time.monotonic() - self._started, 1),
            "rows": self.rows,
        }
        if not self.tiny:
            facts["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if self.left_out:
            facts["left_out"] = self.left_out
        say(json.dumps(facts))
        if self._failed and error is None:
            sys.exit(1)

    @property
    def commit(self) -> str:
        """The checkout's commit, `+` behind it if files differ from it."""
        return str(self.args.commit or git_commit())

    def decoder(self) -> Decoder:
        """The language model with random weights."""
        return self.module(Decoder)

    def module(self, make: Callable[[XComposerConfig], Module]) -> Module:
        """A part of the model with random weights on the device."""
        started = time.monotonic()
        module = random_module(make, self.config, self.device, self.dtype, self.args)
        numbers = sum(p.numel() for p in module.parameters())
        sync(self.device)
        say(f"# {make.__name__}: {numbers / 1e9:.2f} G numbers, {time.monotonic() - started:.1f} s")
        return module

    def row(self, **values: Any) -> None:
        """Prints a row of the table, with its head where the columns change, and keeps it."""
        if list(values) != self._columns:
            self._columns = list(values)
            say("  ".join(_cell(n, n) for n in values))
        say("  ".join(_cell(n, v) for n, v in values.items()))
        kept = {n: round(v, 4) if isinstance(v, float) else v for n, v in values.items()}
        self.rows.append(kept)

    def attempt(self, name: str, measure: Callable[[], None]) -> None:
        """Measures unless time is up; a point that fails leaves the others their chance."""
        if time.monotonic() - self._started > self.args.time_limit:
            self.left_out.append(f"{name}: time limit")
            return
        try:
            measure()
        except (RuntimeError, XcRayError, PointFailed) as e:  # torch's errors are RuntimeErrors
            traceback.print_exc()
            self.left_out.append(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
            say(f"failed: {self.left_out[-1]}")
            self._failed = True


class PointFailed(Exception):
    """A point that did not measure what it is meant to."""


def _cell(name: str, value: Any) -> str:
    width = 30 if name == "case" else max(9, len(name))
    if value is None:
        text = "–"
    elif isinstance(value, float):
        text = f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    elif isinstance(value, int):
        text = f"{value:,}"
    else:
        text = str(value)
    return f"{text:<{width}}" if name == "case" else f"{text:>{width}}"


def say(line: str) -> None:
    """Prints at once, so that a run that is cut off leaves what it had."""
    print(line, flush=True)


def machine(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores (tiny model: no figure)"


def git_commit() -> str:
    """The short commit of the checkout, `+` behind it if files differ; `unknown` without git."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sync(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def random_module(
    make: Callable[[XComposerConfig], Module],
    config: XComposerConfig,
    device: torch.device,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> Module:
    """A module of `config` filled on `device`: norms one, biases zero, maps that keep unit size."""
    with torch.device("meta"):
        module = make(config)
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(args.seed)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1)
        else:
            std = 1.0 if "embedding" in name else p.shape[1:].numel() ** -0.5
            if name.split(".")[-2:] == ["output", "weight"]:
                std *= args.logit_std
            p.normal_(0, std, generator=generator)
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name  # the tower's only buffer
        buffer.copy_(torch.arange(buffer.shape[-1], device=device))
    return module.eval().requires_grad_(False)


def make_engine(decoder: Decoder, limits: EngineConfig) -> Engine:
    """An engine, after the memory of those before it that nobody holds any more is given back."""
    release(decoder.device)
    return Engine(decoder, limits)


def release(device: torch.device) -> None:
    """Gives back memory that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- limits -------------------------------------------------------------------------------------


def product_seconds(weights: int, rows: int) -> float:
    """The least time of a bf16 product of `weights` numbers with `rows` rows."""
    return max(BF16_BYTES * weights / BYTES_PER_S, 2 * weights * rows / FLOP_PER_S)


def decode_limit_s(
    config: XComposerConfig, batch: int, context: float, *, kv_bytes: int = BF16_BYTES
) -> float:
    """The least time of a decode step of `batch` sequences with `context` cached tokens each.

    Product by product the larger of bytes and arithmetic, then keys and values read once.
    """
    d = config.decoder
    layer = sum(product_seconds(out * into, batch) for out, into in config.linear_shapes.values())
    head = product_seconds(d.vocab_size * d.hidden_size, batch)
    cache = batch * context * d.kv_numbers_per_token * kv_bytes / BYTES_PER_S
    return d.num_hidden_layers * layer + head + cache


def prefill_flop(config: XComposerConfig, rows: int, image_rows: int = 0) -> float:
    """Arithmetic of the products of a prefill without the head: 114.4 T for 8k rows at 7B."""
    d, shapes = config.decoder, config.linear_shapes
    plain = sum(out * into for out, into in shapes.values())
    low = sum(config.plora[name].rank * (out + into) for name, (out, into) in shapes.items())
    return 2.0 * d.num_hidden_layers * (plain * rows + low * image_rows)


# --- requests and the loop ----------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request for an engine."""

    ids: list[int]
    params: SamplingParams
    images: tuple[Image, ...] = ()
    adapter: PackedAdapter | None = None


@dataclass
class Outcome:
    """What a set of requests took; per request, in order, where it is a list."""

    seconds: float = 0.0
    steps: int = 0
    output_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    interval_s: list[float] = field(default_factory=list)  # mean, between tokens of one answer
    num_cached: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, prefill included."""
        return self.output_tokens / self.seconds


def sampling(mode: str, max_tokens: int, seed: int = 0) -> SamplingParams:
    """`greedy` or `sampled`, without stop ids."""
    return SamplingParams(max_tokens=max_tokens, seed=seed, **SAMPLING[mode])  # type: ignore[arg-type]  # floats by name


def random_ids(config: XComposerConfig, count: int, seed: int) -> list[int]:
    """Ids of text, turn marks and the first few left out."""
    generator = torch.Generator().manual_seed(seed)
    low, high = 10, config.decoder.vocab_size - 10
    ids: list[int] = torch.randint(low, high, (count,), generator=generator).tolist()
    return ids


def random_image(
    config: XComposerConfig, rows: int, seed: int, device: torch.device, dtype: torch.dtype
) -> Image:
    """An image of `rows` rows with random embeddings."""
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (rows, config.decoder.hidden_size)
    embeddings: Tensor = torch.randn(size, generator=generator, device=device, dtype=dtype)
    return Image(rows, f"random {rows} {seed}".encode(), embeddings)


def run(engine: Engine, requests: Sequence[Request]) -> Outcome:
    """All requests at once, until the last has ended.

    Raises:
        PointFailed: a request ended by an error; nothing of the others is left in the engine.
    """
    try:
        return _run(engine, requests)
    except PointFailed:
        drain(engine, map(str, range(len(requests))))
        raise


def _run(engine: Engine, requests: Sequence[Request]) -> Outcome:
    names = {str(i): i for i in range(len(requests))}
    first, last, counts = ([0.0] * len(requests) for _ in range(3))
    outcome = Outcome(num_cached=[0] * len(requests), ids=[[] for _ in requests])
    # Copies, because an engine takes the embeddings out of what it is given.
    images = [tuple(map(replace, r.images)) for r in requests]
    sync(engine.decoder.device)
    started = time.perf_counter()
    for name, i in names.items():
        engine.add(name, requests[i].ids, requests[i].params, images[i], requests[i].adapter)
    while engine.has_work:
        outputs = engine.step()
        outcome.steps += 1
        now = time.perf_counter() - started
        for output in outputs:
            i = names[output.request_id]
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise PointFailed(f"request {i}: {output.error}")
            if output.missing_images:
                raise PointFailed(f"request {i} wants embeddings of {output.missing_images}")
            first[i] = first[i] or now
            last[i], counts[i] = now, output.num_generated
            outcome.ids[i] += output.ids
            outcome.num_cached[i] = max(outcome.num_cached[i], output.num_cached)
    outcome.seconds = time.perf_counter() - started
    outcome.output_tokens = int(sum(counts))
    outcome.first_token_s = first
    spans = zip(first, last, counts, strict=True)
    outcome.interval_s = [(b - a) / (n - 1) for a, b, n in spans if n > 1]
    return outcome


def drain(engine: Engine, names: Iterable[str]) -> None:
    """Ends the named requests, and steps until nothing is left."""
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
