"""`ray job submit` of a LoRA training: seconds to the first step, and the steps that follow.

    python benchmarks/train_start.py [--gpus N] [--steps 12]

A fresh `ray start --head` with its dashboard, a checkpoint of the 7B shape with random weights on
the disk (written just before, so that it is in the page cache), and texts of about `--length`
tokens. The clock starts when `ray job submit` does; the lines of the job's log say when it checked
its data, when the workers had the model, and when the first step was done. tokens/s are those of
`metrics.jsonl` without the first two steps.

Prints a table, then one JSON line.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from shapes import git_commit, machine, say

from xc_ray.demo.make import make_model, padded_tokenizer, save_random
from xc_ray.model.config import preset
from xc_ray.prompt.tokenizer import TOKENIZER_FILE, Tokenizer

MARKS = {
    "driver": "run of",
    "workers have the model": "LoRA on",
    "first step": "step 1/",
    "job ended": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU: no figure")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="conversations of a worker's step")
    parser.add_argument("--length", type=int, default=2048, help="of a conversation, in tokens")
    parser.add_argument("--folder", help="where the checkpoint is made (a temporary folder)")
    parser.add_argument("--commit", help="for the JSON line, where there is no git")
    args = parser.parse_args()
    if args.tiny:
        args.length = 200
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="xc-ray-start-") as name:
        folder = Path(name)
        model = make(folder, args)
        work = folder / "work"
        work.mkdir()
        texts(work / "train.jsonl", model, args)
        (work / "train_config.yaml").write_text(yaml.safe_dump(config(folder, model, args)))
        with cluster(folder, args) as address:
            seen = submit(address, work)
        records = [json.loads(line) for line in (folder / "runs/start/metrics.jsonl").open()]
    steps = [r for r in records if r["kind"] == "train"][2:]
    rate = statistics.median(r["tokens_per_s"] for r in steps) if steps else None
    for what, seconds in seen.items():
        say(f"{what:<24}{seconds:>8.1f} s")
    say(f"{'tokens/s':<24}{rate or 0:>8,.0f}")
    device = torch.device("cpu" if args.tiny else "cuda")
    facts = {
        "figure": "train_start",
        "machine": machine(device),
        "gpus": 0 if args.tiny else args.gpus,
        "commit": args.commit or git_commit(),
        "model": "tiny" if args.tiny else "2.5",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seconds": {what: round(seconds, 1) for what, seconds in seen.items()},
        "tokens_per_s": rate,
        "peak_gb": round(max(r["peak_memory_bytes"] for r in steps) / 1e9, 2) if steps else None,
        "loss": [round(r["loss"], 4) for r in (*steps[:1], *steps[-1:])],
    }
    say(json.dumps(facts))


def make(folder: Path, args: argparse.Namespace) -> Path:
    """The checkpoint."""
    if args.tiny:
        return make_model(folder / "model")
    shape = preset("2.5")
    started = time.monotonic()
    save_random(folder / "model", shape, dtype=torch.bfloat16, device="cuda")
    tokenizer = padded_tokenizer(shape.decoder.vocab_size, shape.tokens)
    (folder / "model" / TOKENIZER_FILE).write_bytes(tokenizer)
    torch.cuda.empty_cache()
    say(f"# wrote the checkpoint in {time.monotonic() - started:.0f} s")
    return folder / "model"


def texts(file: Path, model: Path, args: argparse.Namespace) -> None:
    """Conversations of random words, one step's on every worker."""
    tokenizer = Tokenizer(model / TOKENIZER_FILE)
    draw = random.Random(0)
    words = ("red", "green", "blue", "circle", "square", "star", "one", "two", "left", "of", "and")
    with file.open("w") as out:
        for _ in range(args.rows * (2 if args.tiny else args.gpus) * 4):
            answer = " ".join(draw.choice(words) for _ in range(args.length))
            while len(tokenizer.encode_untrusted(answer)) > args.length - 40:
                answer = answer[: int(len(answer) * 0.97)]
            turns = [
                {"role": "user", "content": "Go on."},
                {"role": "assistant", "content": answer},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def config(folder: Path, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    workers = {"num": 2, "num_cpus": 0.5, "use_gpu": False}
    if not args.tiny:
        workers = {"num": args.gpus, "num_cpus": 1, "use_gpu": True}
    return {
        "model": str(model),
        "name": "start",
        "storage": str(folder / "runs"),
        "registry": str(folder / "registry"),
        "data": {"train": "train.jsonl"},
        "lora": {"rank": 8, "alpha": 16},
        "training": {
            "max_steps": args.steps,
            "batch_size": args.rows,
            "gradient_checkpointing": False,
        },
        "checkpoints": {"every_steps": 10_000},
        "workers": workers,
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ray() -> list[str]:
    """The command, whether or not it is installed beside this Python."""
    return [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; main()"]


@contextlib.contextmanager
def cluster(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """A head node with its dashboard, which ends with us."""
    import ray as package

    # Where the web parts are not installed the dashboard waits for this folder for ever.
    static = Path(package.__file__).parent / "dashboard/client/build/static"
    with contextlib.suppress(OSError):
        static.mkdir(parents=True, exist_ok=True)
    port, dashboard = free_port(), free_port()
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    options = [
        "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--num-cpus={8 if args.tiny else 16}", "--object-store-memory=500000000",
        f"--temp-dir={temporary}", "--disable-usage-stats", "--block",
        f"--num-gpus={0 if args.tiny else args.gpus}",
    ]  # fmt: skip
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(
            [*ray(), "start", *options], env=env, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, head)
        yield address
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, 9)


def wait_for(address: str, head: "subprocess.Popen[bytes]") -> None:
    import httpx

    end = time.monotonic() + 120
    while time.monotonic() < end and head.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/api/jobs/", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"the cluster did not come up at {address}")


def submit(address: str, work: Path) -> dict[str, float]:
    """Seconds from the submission to each mark of the job's log."""
    command = [
        *ray(), "job", "submit", f"--address={address}", f"--working-dir={work}", "--",
        sys.executable, "-m", "xc_ray", "train", "train_config.yaml",
    ]  # fmt: skip
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    seen: dict[str, float] = {}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        lines = []
        for line in job.stdout:
            lines.append(line)
            for what, mark in MARKS.items():
                if mark and mark in line:
                    seen.setdefault(what, time.monotonic() - started)
    seen["job ended"] = time.monotonic() - started
    if job.returncode:
        sys.exit("".join(lines[-60:]))
    return seen


if __name__ == "__main__":
    main()
