"""LoRA steps of the 7B shape: tokens/s and peak memory, on one GPU or several.

    python benchmarks/train_sft.py [--cases packed recomputed …] [--gpus N] [--baseline]

A step takes `--tokens` tokens a GPU in conversations of `--length`, every token but the first
learnt, which is the most that a head can have to do. Ids are random. Steps are timed after
`--warmup`, from the rows' file to the optimizer's end: reading, gradients of all GPUs, AdamW.
`tflops` counts 2 FLOP for each weight of the layers and the head and each token, twice without
recomputing and three times with it (weights are frozen, so that the backward pass has one product
for each of the forward's), for one GPU; LoRA, attention and the tower are not counted.
`--baseline` is a loop of transformers and peft over `xc_ray.model.hf`.

Prints a table, then one JSON line.
"""

import argparse
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from baseline import transformers_model
from PIL import Image
from pyarrow import fs
from shapes import Bench, arguments, release, say, sync

from xc_ray.config import LoraOptions, StepOptions
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.chat import Message
from xc_ray.prompt.sequence import ImageSpan
from xc_ray.prompt.tiles import image_grid
from xc_ray.train.data import IGNORED, Example
from xc_ray.train.feed import Feed
from xc_ray.train.network import Learner, LoraOps, add_lora, ops_for
from xc_ray.train.plan import Plan
from xc_ray.train.rows import CheckedRow, Conversation, Picture, Place
from xc_ray.train.step import Ranks, Stepper
from xc_ray.train.store import RowStore, write_rows

HD_SIZE = (2240, 3360)  # 24 tiles of 560 px
TARGETS = {"packed": 11_000, "recomputed": 7_500}


@dataclass(frozen=True)
class Case:
    """`rows` conversations of a GPU's step, in passes of up to `pack` of them."""

    name: str
    rank: int = 8
    rows: int = 4
    pack: int = 4
    recompute: bool = False
    pictures: bool = False
    plain: bool = False


def cases_of(args: argparse.Namespace) -> dict[str, Case]:
    rows = max(1, args.tokens // args.length)
    made = [
        Case("packed", rows=rows, pack=rows),
        Case("two passes", rows=rows, pack=max(1, rows // 2)),
        Case("unpacked", rows=rows, pack=1),
        Case("recomputed", rows=rows, pack=rows, recompute=True),
        Case("recomputed, batch 1", rows=1, pack=1, recompute=True),
        Case("rank 64", rank=64, rows=rows, pack=rows),
        Case("rank 64, recomputed", rank=64, rows=rows, pack=rows, recompute=True),
        Case("rank 64, recomputed, batch 1", rank=64, rows=1, pack=1, recompute=True),
        Case("one HD picture, recomputed", rows=1, pack=1, recompute=True, pictures=True),
        Case("unfused, two passes", rows=rows, pack=max(1, rows // 2), plain=True),
    ]
    return {case.name: case for case in made}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step on one GPU")
    parser.add_argument("--length", type=int, default=2048, help="of a conversation, in tokens")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--cases", nargs="+", help="names of the table (all)")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--baseline", action="store_true", help="transformers + peft too")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.length, args.steps, args.warmup = 256, 64, 2, 1
    known = cases_of(args)
    if unknown := set(args.cases or ()) - known.keys():
        parser.error(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if args.gpus > 1 and "RANK" not in os.environ:
        sys.exit(launch(args.gpus))
    ranks = join()
    with Bench("train_sft", args) as bench:
        decoder = bench.decoder()
        pictures = any(known[name].pictures for name in args.cases or known)
        encoder = bench.module(ImageEncoder) if pictures else None
        for name in args.cases or known:
            case = known[name]
            bench.attempt(name, lambda c=case: measure(bench, decoder, encoder, c, ranks))
        if args.baseline:
            for recompute in (False, True):
                bench.attempt(
                    f"baseline, recompute {recompute}",
                    lambda r=recompute: baseline(bench, decoder, r),
                )


def launch(gpus: int) -> int:
    """This script again, once for each GPU; only rank 0 prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(gpus)}
    started = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **here, "RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(gpus)
    ]
    return max(abs(process.wait()) for process in started)


def join() -> Ranks:
    """The process groups, if this is one of several ranks."""
    if "RANK" not in os.environ:
        return Ranks()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world)
    return Ranks(rank, world, dist.new_group(backend="gloo"))


def measure(
    bench: Bench, decoder: Decoder, encoder: ImageEncoder | None, case: Case, ranks: Ranks
) -> None:
    """One case: its steps, and a row of the table."""
    args = bench.args
    release(bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = add_lora(decoder, LoraOptions(rank=case.rank, alpha=16, dropout=0.0), seed=0)
    try:
        store = rows_of(bench, case, ranks.world)
        count = args.warmup + args.steps
        options = StepOptions(max_steps=count, batch_size=case.pack, schedule="constant")
        plan = Plan(
            store.sizes,
            (1.0,),
            options,
            rows_a_step=case.rows * ranks.world,
            pack_tokens=1 << 30,
        )
        ops = LoraOps() if case.plain else ops_for(bench.device)
        learner = Learner(decoder, ops, recompute=case.recompute).train()
        stepper = Stepper(learner, encoder, plan, store, ranks)
        with Feed(store, bench.config) as feed:
            packs = feed.packs(pack for n in range(count) for pack in stepper.mine(n))
            first = time.perf_counter()
            for n in range(args.warmup):
                stepper.step(n, packs)
                if n == 0:
                    sync(bench.device)
                    first = time.perf_counter() - first
            sync(bench.device)
            started = time.perf_counter()
            tokens = sum(stepper.step(n, packs).tokens for n in range(args.warmup, count))
            sync(bench.device)
            seconds = time.perf_counter() - started
    finally:
        model.unload()
        for parameter in decoder.parameters():
            parameter.grad = None
    report(bench, case, ranks, tokens / seconds, seconds / args.steps, first)


def report(
    bench: Bench, case: Case, ranks: Ranks, per_s: float, step_s: float, first_s: float
) -> None:
    if ranks.rank:
        return
    memory = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
    flop = step_flop(bench.config, case.recompute)
    bench.row(
        case=case.name,
        gpus=ranks.world,
        rank=case.rank,
        tokens_per_s=per_s,
        per_gpu=per_s / ranks.world,
        step_ms=step_s * 1e3,
        tflops=per_s / ranks.world * flop / 1e12,
        peak_gb=memory / 1e9,
        first_step_s=first_s,
        target=TARGETS.get(case.name),
    )


def step_flop(config: XComposerConfig, recompute: bool) -> float:
    """FLOP of the products with frozen weights, a token."""
    layers = sum(out * into for out, into in config.linear_shapes.values())
    head = config.decoder.hidden_size * config.decoder.vocab_size
    passes = 3 if recompute else 2
    return 2.0 * (passes * layers * config.decoder.num_hidden_layers + 2 * head)


def rows_of(bench: Bench, case: Case, world: int) -> RowStore:
    """Enough rows for an epoch of one step."""
    config, args = bench.config, bench.args
    generator = torch.Generator().manual_seed(args.seed)
    tokens = args.length
    pictures: tuple[Picture, ...] = ()
    spans: tuple[ImageSpan, ...] = ()
    picture_ids: list[int] = []
    if case.pictures:
        size = HD_SIZE if not bench.tiny else (112, 112)
        out = io.BytesIO()
        Image.effect_noise(size, 80).convert("RGB").save(out, "JPEG")
        data = out.getvalue()
        import hashlib

        grid = image_grid(config, size, 24)
        pictures = (Picture("", hashlib.sha256(data).hexdigest(), grid, data),)
        length = config.image_tokens(grid.rows, grid.cols)
        spans = (ImageSpan(0, 1, length),)
        first = config.decoder.vocab_size
        picture_ids = list(range(first, first + length))
    checked = []
    for number in range(case.rows * world):
        text = torch.randint(5, config.decoder.vocab_size, (tokens,), generator=generator).tolist()
        ids = [text[0], *picture_ids, *text[1:]]
        hidden = 1 + len(picture_ids)
        labels = [IGNORED] * (hidden + 1) + ids[hidden + 1 :]
        checked.append(
            CheckedRow(
                Place("random", number + 1),
                0,
                Conversation((Message("user", ("random",)),)),
                Example(ids, labels, spans),
                pictures,
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "rows.arrow"))
        write_rows(fs.LocalFileSystem(), path, checked)
        return RowStore.open(fs.LocalFileSystem(), path, config.decoder.vocab_size)


def baseline(bench: Bench, decoder: Decoder, recompute: bool) -> None:
    """The loop that one would write: transformers' model, peft's LoRA, AdamW, no packing."""
    from peft import LoraConfig, get_peft_model

    args = bench.args
    rows = max(1, args.tokens // args.length)
    for batch in [n for n in (4, 2, 1) if n <= rows]:
        release(bench.device)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            _baseline(bench, decoder, recompute, batch, rows // batch, LoraConfig, get_peft_model)
            return
        except torch.cuda.OutOfMemoryError:
            say(f"# baseline: a batch of {batch} does not fit")


def _baseline(
    bench: Bench,
    decoder: Decoder,
    recompute: bool,
    batch: int,
    times: int,
    make_config: Any,
    get_peft_model: Any,
) -> None:
    args = bench.args
    model = transformers_model(bench, decoder)
    model.requires_grad_(False)
    targets = ["attention.wqkv", "attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3))]
    lora = get_peft_model(
        model, make_config(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    try:
        if recompute:
            lora.gradient_checkpointing_enable({"use_reentrant": False})
        lora.train()
        optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(
            5, bench.config.decoder.vocab_size, (batch, args.length), device=bench.device
        )

        def step() -> None:
            for _ in range(times):
                (lora(input_ids=ids, labels=ids).loss / times).backward()
            torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(args.warmup):
            step()
        sync(bench.device)
        started = time.perf_counter()
        for _ in range(args.steps):
            step()
        sync(bench.device)
        seconds = time.perf_counter() - started
    finally:
        lora.unload()
        model.gradient_checkpointing_disable()
        for parameter in decoder.parameters():
            parameter.grad = None
    tokens = batch * times * args.length * args.steps
    name = f"transformers + peft, batch {batch}{', recomputed' if recompute else ''}"
    case = Case(name, recompute=recompute)
    report(bench, case, Ranks(), tokens / seconds, seconds / args.steps, 0.0)


if __name__ == "__main__":
    main()
