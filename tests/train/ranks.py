"""Steps of real ranks without Ray: processes and gloo, each printing its losses as JSON.

python -m tests.train.ranks RANK WORLD PORT FOLDER CASES.json
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pyarrow import fs

from xc_ray.config import LoraOptions, StepOptions
from xc_ray.model.weights import Checkpoint
from xc_ray.train.feed import Feed
from xc_ray.train.network import Learner, LoraOps, add_lora
from xc_ray.train.plan import PackRows, Plan
from xc_ray.train.step import Ranks, Stepper
from xc_ray.train.store import RowStore

STEPS = 20
ROWS_A_STEP = 8


@dataclass(frozen=True)
class Case:
    """How the rows of a step are divided, and how many of its steps are made.

    `lopsided`: texts go to rank 0, pictures to the others; `idle`: everything goes to rank 0.
    """

    batch_size: int
    accumulation: int = 1
    packing: bool = True
    lopsided: bool = False
    idle: bool = False
    checkpointing: bool = False
    steps: int = STEPS
    dropout: float = 0.0


class Lopsided(Plan):
    """Rows without pictures go to rank 0, those with to the others; or all to rank 0."""

    store: RowStore
    idle = False

    def share(self, rows: Sequence[int], workers: int) -> list[list[PackRows]]:
        if self.idle:
            return [*super().share(rows, 1), *([] for _ in range(workers - 1))]
        texts = [row for row in rows if not self.store[row].spans]
        shares = super().share([row for row in rows if row not in texts], workers - 1)
        return [*super().share(texts, 1), *shares]


def run(folder: Path, rows: Path, case: Case, ranks: Ranks) -> list[list[float]]:
    """Loss and gradient norm of every step."""
    checkpoint = Checkpoint.open(folder)
    whole = checkpoint.load()
    add_lora(whole.decoder, LoraOptions(rank=4, alpha=8, dropout=case.dropout), seed=3)
    store = RowStore.open(fs.LocalFileSystem(), str(rows), checkpoint.config.decoder.vocab_size)
    options = StepOptions(
        max_steps=STEPS,
        batch_size=case.batch_size,
        accumulation=case.accumulation,
        packing=case.packing,
        learning_rate=1e-2,
        seed=5,
    )
    kind = Lopsided if case.lopsided or case.idle else Plan
    plan = kind(store.sizes, (1.0,), options, rows_a_step=ROWS_A_STEP, pack_tokens=2000)
    if isinstance(plan, Lopsided):
        plan.store, plan.idle = store, case.idle
    learner = Learner(whole.decoder, LoraOps(), recompute=case.checkpointing).train()
    stepper = Stepper(learner, whole.vision, plan, store, ranks)
    with Feed(store, checkpoint.config) as feed:
        packs = feed.packs(pack for n in range(case.steps) for pack in stepper.mine(n))
        done = [stepper.step(n, packs) for n in range(case.steps)]
    return [[one.loss, one.grad_norm] for one in done]


def run_ranks(world: int, folder: Path, rows: Path, cases: Sequence[Case]) -> list[Any]:
    """What each rank printed: for each case the steps of `run`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", "tests.train.ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), str(folder), str(rows), text],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        told = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world
    return [json.loads(text.splitlines()[-1]) for text in told]


def main() -> None:
    rank, world, port, folder, rows, cases = sys.argv[1:]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world))
    ranks = Ranks(int(rank), int(world), dist.new_group(backend="gloo"))
    made = [run(Path(folder), Path(rows), Case(**case), ranks) for case in json.loads(cases)]
    sys.stdout.write(json.dumps(made) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
