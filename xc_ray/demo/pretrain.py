"""Trains the demo model from nothing: `python -m xc_ray.demo.pretrain OUT --fonts DIR`.

All parameters, on samples that are drawn as they are needed and never repeated. A step follows from
the recipe and its number alone; several GPUs (`torchrun --nproc-per-node N -m
xc_ray.demo.pretrain …`) share its parts. A run that was ended, by `--minutes` too, goes on from
OUT/state when the same command is given again; OUT/model is the model so far.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from xc_ray.demo.batches import Batch, Batches
from xc_ray.demo.drawn.fonts import Fonts, find_fonts
from xc_ray.demo.drawn.tasks import HELD_OUT, Sample, training_sample
from xc_ray.demo.exam import Exam, exact_answers
from xc_ray.demo.make import demo_config
from xc_ray.demo.network import Student, initialise
from xc_ray.demo.optimizer import Masters
from xc_ray.demo.vocabulary import make_tokenizer
from xc_ray.errors import ConfigError
from xc_ray.logs import log_to
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.weights import save_checkpoint
from xc_ray.prompt.tokenizer import TOKENIZER_FILE, Tokenizer
from xc_ray.train.network import ops_for

logger = logging.getLogger("xc_ray.demo.pretrain")  # run by -m, the module is `__main__`

MINUTE_S = 60
STATE_FILE = "state.json"
SHARD_BYTES = 14_000_000  # of the state's files: small ones travel anywhere


@dataclass(frozen=True)
class Recipe:
    """What a run is made of: the rate warms up, stays, and falls linearly over the last share."""

    seed: int = 1
    num_steps: int = 12_500
    batch_tokens: int = 49_152  # of a part
    parts: int = 4  # of a step, once there have been `few_steps` of one part each
    few_steps: int = 4_270  # small ones are enough at first
    learning_rate: float = 1.5e-3
    warmup_steps: int = 500
    decay_share: float = 0.3
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    hints: float = 0.5  # weight of their loss beside that of a learnt token
    easy_steps: int = 2_500  # over which samples become as hard as they are going to be
    late_step: int = 5_620  # from here on there are samples of `drawn.tasks.LATE_TASKS`, too

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = (self.num_steps - step) / (self.decay_share * self.num_steps)
        return self.learning_rate * min(warm, left, 1.0)

    def parts_of(self, step: int) -> int:
        """Into how many parts a step's samples are divided; GPUs share them."""
        return self.parts if step >= self.few_steps else 1

    def stage(self, step: int) -> float:
        """How hard samples are, 0 to 1."""
        return min(1.0, step / self.easy_steps)


@dataclass(frozen=True)
class Draw:
    """Samples of a recipe; goes to the processes that draw."""

    recipe: Recipe
    fonts: Fonts

    def __call__(self, step: int, index: int) -> Sample:
        """The sample at `index`, as hard as `step` is."""
        recipe = self.recipe
        late = step >= recipe.late_step
        return training_sample(recipe.seed, index, self.fonts, recipe.stage(step), late=late)


class Run:
    """One run in a folder."""

    def __init__(self, folder: Path, recipe: Recipe, fonts: Fonts, device: torch.device) -> None:
        self.folder, self.recipe, self.fonts, self.device = folder, recipe, fonts, device
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.config = demo_config()
        self.tokenizer = Tokenizer(make_tokenizer())
        assert len(self.tokenizer) == self.config.decoder.vocab_size
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(recipe.seed)
        self.student = Student(self.config)
        self.model = self.student.model
        initialise(self.model, recipe.seed)
        self.student.to(device)
        self.masters = Masters(self.student, weight_decay=recipe.weight_decay)
        self.student.to(dtype)  # in place: the masters keep what was not rounded
        self.ops: Ops = ops_for(device) if device.type == "cuda" else PLAIN
        self.step = 0
        if (folder / "state" / STATE_FILE).exists():
            self._resume()

    def _resume(self) -> None:
        state = json.loads((self.folder / "state" / STATE_FILE).read_text())
        begun = Recipe(**(asdict(self.recipe) | state["recipe"]))
        # Until the rate falls, how many steps there will be has changed nothing.
        longer = replace(begun, num_steps=self.recipe.num_steps)
        same = begun.rate(state["step"]) == longer.rate(state["step"])
        if self.recipe != (longer if same else begun):
            raise SystemExit(
                f"{self.folder} was begun with another recipe, {begun}; take another folder"
            )
        tensors: dict[str, Tensor] = {}
        for path in sorted((self.folder / "state").glob("*.safetensors")):
            tensors |= load_file(path)
        self.step = state["step"]
        self.masters.load(tensors, self.step)

    def train(self, *, minutes: float, processes: int, upto: int | None = None) -> None:
        """Steps until the recipe's last, `upto`, or the time is over; then saves."""
        end = time.monotonic() + minutes * MINUTE_S
        last = self.recipe.num_steps if upto is None else min(upto, self.recipe.num_steps)
        shown, began = self.step, time.monotonic()
        total = torch.zeros(3, device=self.device)
        batches = self._batches(processes, last)
        first = self.step
        while self.step < last and not ((self.step - first) % 20 == 0 and self._over(end)):
            total += self._step([next(batches) for _ in self._mine(self.step)])
            if self.step % 100 == 0 and self.rank == 0:
                loss, hints, norm = (total / (self.step - shown)).tolist()
                seconds = (time.monotonic() - began) / (self.step - shown)
                logger.info(
                    "step %d/%d  loss %.4f  hints %.4f  norm %.2f  %.0f ms a step",
                    self.step,
                    self.recipe.num_steps,
                    loss,
                    hints,
                    norm,
                    seconds * 1000,
                )
                shown, began, total = self.step, time.monotonic(), torch.zeros_like(total)
        if self.rank == 0:
            self.save()

    def _mine(self, step: int) -> range:
        return range(self.rank, self.recipe.parts_of(step), self.world)

    def _over(self, end: float) -> bool:
        """Whether the time is: rank 0 says so to all."""
        over = torch.tensor(float(time.monotonic() > end), device=self.device)
        if self.world > 1:
            dist.broadcast(over, 0)
        return bool(over)

    def _batches(self, processes: int, last: int) -> Iterator[Batch]:
        data = Batches(
            self.config,
            self.tokenizer,
            Draw(self.recipe, self.fonts),
            batch_tokens=self.recipe.batch_tokens,
        )
        keys = [(step, part) for step in range(self.step, last) for part in self._mine(step)]
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=keys,
            num_workers=processes,
            prefetch_factor=4 if processes else None,
            pin_memory=self.device.type == "cuda",
        )
        yield from loader

    def _step(self, batches: Sequence[Batch]) -> Tensor:
        """One step; its loss per learnt token, that of its hints, and the gradients' norm."""
        learnt = torch.tensor(
            float(sum(len(batch.pack.targets) for batch in batches)), device=self.device
        )
        if self.world > 1:
            dist.all_reduce(learnt)
        told = torch.zeros(2, device=self.device)
        for batch in batches:
            loss, hints = self.student(batch.to(self.device), self.ops)
            both = torch.stack((loss / learnt, hints / self.recipe.parts_of(self.step)))
            (both[0] + self.recipe.hints * both[1]).backward()
            told += both.detach()
        if self.world > 1:
            dist.all_reduce(told)
        norm = self.masters.step(self.recipe.rate(self.step), self.recipe.max_grad_norm)
        self.step += 1
        return torch.cat((told, norm[None]))

    def examine(self, *, num: int, processes: int) -> dict[str, float]:
        """The share of exact answers to `num` samples of each held-out task, in new fonts."""
        exam = Exam(
            self.config, self.tokenizer, self.fonts, list(HELD_OUT), num=num, seed=self.recipe.seed
        )
        right: dict[str, list[bool]] = {}
        for sheet in DataLoader(exam, batch_size=None, num_workers=processes):
            batch = sheet.batch.to(self.device)
            right.setdefault(sheet.task, []).extend(exact_answers(self.model, batch, self.ops))
        return {task: sum(answers) / len(answers) for task, answers in right.items()}

    def save(self) -> None:
        """The model so far, and what a run goes on from."""
        state, model = self.folder / "state", self.folder / "model"
        state.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(self.masters.state(), state, max_shard_size=SHARD_BYTES)
        told = {"step": self.step, "recipe": asdict(self.recipe)}
        (state / STATE_FILE).write_text(json.dumps(told))
        save_checkpoint(model, self.config, self.masters.published())
        (model / TOKENIZER_FILE).write_bytes(self.tokenizer.to_bytes())
        logger.info("step %d/%d  saved %s", self.step, self.recipe.num_steps, self.folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--fonts", type=Path, action="append", default=[], help="more font folders")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and save after so long")
    parser.add_argument("--steps", type=int, help="stop and save after this step")
    parser.add_argument("--exam", type=int, default=100, help="samples of each test, 0: none (100)")
    parser.add_argument("--processes", type=int, default=15, help="that draw samples (15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for key, value in asdict(Recipe()).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args())
    recipe = Recipe(**{key: args[key] for key in asdict(Recipe())})
    try:
        fonts = find_fonts(args["fonts"], require_all=True)
    except ConfigError as e:
        parser.error(e.message)
    log_to(sys.stdout)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if args["device"] == "cuda" else "gloo")
        if args["device"] == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run = Run(args["out"], recipe, fonts, torch.device(args["device"]))
    run.train(minutes=args["minutes"], processes=args["processes"], upto=args["steps"])
    if args["exam"] and run.rank == 0:
        shares = run.examine(num=args["exam"], processes=args["processes"])
        logger.info("  ".join(f"{task} {share:.3f}" for task, share in shares.items()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
