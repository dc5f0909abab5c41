"""What each worker does: load, step, validate, save, and go on from what was saved.

Every rank makes the same collective calls: those of the steps (see `step.py`), one of the loss and
one of the answers for each validation, and Ray Train's report for each checkpoint.
"""

import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from pyarrow import fs as arrow_fs
from safetensors.torch import load_file

from xc_ray.config import TrainConfig
from xc_ray.errors import ConfigError
from xc_ray.hub import resolve_model
from xc_ray.logs import log_to
from xc_ray.model.adapter import ADAPTER_FILE
from xc_ray.model.weights import Checkpoint, default_dtype
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.tokenizer import Tokenizer, load_tokenizer
from xc_ray.registry.store import ObjectStore
from xc_ray.train.feed import Feed
from xc_ray.train.metrics import MetricsFile
from xc_ray.train.network import (
    Learner,
    Pack,
    add_lora,
    embed_pictures,
    name_linears,
    ops_for,
    save_adapter,
    wrapped_linears,
)
from xc_ray.train.plan import Plan, divide
from xc_ray.train.step import Ranks, Stepper, peak_memory
from xc_ray.train.store import RowStore
from xc_ray.train.trackers import Tracker, open_trackers
from xc_ray.train.validation import Generation, generation
from xc_ray.train.watch import Reporter

logger = logging.getLogger(__name__)

# Files of a checkpoint.
ADAPTER = "adapter"
STATE = "state.json"
OPTIMIZER = "optimizer.pt"
METRICS = "metrics.jsonl"
# Of the run's folder, beside the checkpoints.
TRACKERS = "trackers"
VALIDATION_ROWS = "validation.jsonl"
LOG_EVERY_S = 2.0
# The score of a checkpoint that was not validated. Ray Train writes its scores as JSON and reads
# them when a run goes on; infinity comes back as null, at which it fails.
NOT_VALIDATED = sys.float_info.max


@dataclass(frozen=True)
class Job:
    """What a worker has to know: the run, its base by a name that every node resolves, its data.

    `folder` is the run's in the storage's pyarrow filesystem; `train_file` and `validation_file`
    are in it. `board` is the actor of `watch.py`.
    """

    config: TrainConfig
    base: str
    base_digest: str
    data_digest: str
    folder: str
    train_file: str
    validation_file: str | None
    weights: tuple[float, ...]
    most_workers: int
    board: Any

    @property
    def filesystem(self) -> Any:
        """pyarrow's filesystem of the storage."""
        assert self.config.storage is not None  # `Run.prepare` filled it in
        return ObjectStore.open(self.config.storage).filesystem()[0]


@dataclass
class Progress:
    """What a checkpoint says of the run so far; `step` counts finished steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation_loss: float | None = None


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's `train_loop_per_worker`; gives what the summary tells (the same on every rank).

    Or an `error`, if the run cannot go on as it is configured.

    Raises:
        DataError: a picture has gone or changed, or a loss is no number; names the rows.
        RegistryError: object storage that pictures lie in cannot be reached.
    """
    log_to(sys.stderr)
    job: Job = settings["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Losses and wishes travel between the hosts' memories; the device's group is for gradients.
    control = dist.new_group(backend="gloo")
    ping_s = min(5.0, job.config.workers.hang_timeout_s / 10)
    reporter = Reporter(job.board, _start(rank, control), rank, ping_s)
    reporter.doing("loading the model", 0)
    with reporter, tempfile.TemporaryDirectory(prefix="xc-ray-train-") as scratch:
        try:
            worker = Worker(job, rank, world, control, reporter, Path(scratch))
        except ConfigError as e:  # every rank has it, and the next start would have it again
            return {"error": e.message}
        try:
            told = worker.run()
        except BaseException:
            worker.close(failed=True)
            raise
        worker.close()
        return told


class Worker:
    """One rank of a run."""

    def __init__(
        self, job: Job, rank: int, world: int, control: Any, reporter: Reporter, scratch: Path
    ) -> None:
        self.job, self.options = job, job.config.training
        self.rank, self.world, self.control = rank, world, control
        self.reporter, self.scratch = reporter, scratch
        self.device: torch.device = ray.train.torch.get_device()
        given = job.config.dtype
        dtype = default_dtype(self.device) if given == "auto" else getattr(torch, given)
        checkpoint = Checkpoint.open(resolve_model(job.base, job.config.registry))
        self.model = checkpoint.config
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint.folder, self.model.decoder.vocab_size)
        decoder = checkpoint.load_decoder(device=self.device, dtype=dtype)
        self.encoder: ImageEncoder = checkpoint.load_vision(device=self.device, dtype=dtype)
        self.peft: PeftModel = add_lora(decoder, job.config.lora, self.options.seed)
        if rank == 0:
            names = wrapped_linears(decoder)
            logger.info("LoRA on %d linears: %s", len(names), name_linears(names))
        self.learner = Learner(
            decoder, ops_for(self.device), recompute=self.options.gradient_checkpointing
        ).train()
        self.filesystem = job.filesystem
        self.store = self._open(job.train_file)
        self.pack_tokens = (
            self.options.pack_tokens or job.config.data.max_length or self.model.decoder.max_length
        )
        self.plan = Plan(
            self.store.sizes,
            job.weights,
            self.options,
            rows_a_step=job.most_workers * self.options.batch_size * self.options.accumulation,
            pack_tokens=self.pack_tokens,
        )
        self.stepper = Stepper(
            self.learner,
            self.encoder,
            self.plan,
            self.store,
            Ranks(rank, world, control),
            reporter.doing,
        )
        self.progress = Progress()
        self._resume()
        self.feed = Feed(self.store, self.model)
        self.validation = self._open(job.validation_file) if job.validation_file else None
        self.metrics: MetricsFile | None = None
        self.trackers: list[Tracker] = []
        if rank == 0:
            self.metrics = MetricsFile.open(scratch / METRICS, self.progress.step)
            folder = scratch / TRACKERS
            folder.mkdir(exist_ok=True)
            self.trackers = open_trackers(
                job.config.track,
                folder,
                job.config.name,
                job.config.model_dump(mode="json"),
                upto_step=self.progress.step,
            )
        self._shown = 0.0

    def close(self, *, failed: bool = False) -> None:
        """Ends the record and the trackers, and keeps the trackers' files."""
        if self.metrics is not None:
            self.metrics.close()
        if not failed:
            self._keep_trackers()
        for tracker in self.trackers:
            tracker.close(failed=failed)
        if not failed:
            self._copy_trackers()

    # ------------------------------------------------------------ steps

    def run(self) -> dict[str, Any]:
        """Every step that is left, or those until somebody asks to stop."""
        last = self.plan.num_steps
        with self.feed:
            packs = self.feed.packs(
                pack for step in range(self.progress.step, last) for pack in self.stepper.mine(step)
            )
            while self.progress.step < last:
                stop = self._step(packs)
                done, step = self.progress.step == last, self.progress.step
                due = step % self.job.config.validation.every_steps == 0
                if self.validation is not None and (due or done):
                    self._validate(self.validation)
                if done or stop or step % self.job.config.checkpoints.every_steps == 0:
                    self._save()
                if stop:
                    break
        return {
            "stopped": self.progress.step < last,
            "step": self.progress.step,
            "num_steps": last,
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _step(self, packs: Iterator[Pack]) -> bool:
        """One step; gives whether to stop after it."""
        began = time.perf_counter()
        # Only rank 0 asks; the step tells everybody.
        wish = self.rank == 0 and self.reporter.stopping
        done = self.stepper.step(self.progress.step, packs, stop=wish)
        seconds = time.perf_counter() - began
        self.progress.step += 1
        self.progress.tokens += done.tokens
        self.progress.seconds += seconds
        if self.metrics is not None:
            record = {
                "loss": done.loss,
                "learning_rate": done.learning_rate,
                "grad_norm": done.grad_norm,
                "epoch": self.progress.step / self.plan.steps_an_epoch,
                "conversations": done.conversations,
                "tokens": done.tokens,
                "learnt_tokens": done.learnt,
                "tokens_per_s": done.tokens / seconds,
                "samples_per_s": done.conversations / seconds,
                "step_s": seconds,
                "peak_memory_bytes": peak_memory(self.device),
            }
            self._log("train", record)
            self._show(record)
        return done.stop

    # ------------------------------------------------------------ validation

    def _validate(self, rows: RowStore) -> None:
        """Loss over the validation rows, shared among the ranks, and a few answers."""
        step = self.progress.step
        self.reporter.doing("validating", step)
        self.learner.eval()
        sizes = rows.sizes
        mine = divide(
            sizes.tokens,
            range(len(rows)),
            self.world,
            max_rows=max(self.options.batch_size, 8),
            max_tokens=self.pack_tokens,
        )[self.rank]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad(), Feed(rows, self.model) as feed:
            for number, pack in enumerate(feed.packs(mine)):
                self.reporter.doing(f"validating pass {number + 1} of {len(mine)}", step)
                pack = pack.to(self.device)
                total += self.learner(pack, embed_pictures(self.encoder, pack))
            answers = self._answers(rows, feed)
        self.learner.train()
        self.reporter.doing("exchanging results", step)
        total = total.cpu()
        dist.all_reduce(total, group=self.control)
        every: list[list[Generation]] = [[] for _ in range(self.world)]
        dist.all_gather_object(every, answers, group=self.control)
        loss = total.item() / int(sizes.learnt.sum())
        self.reporter.doing("logging", step)
        self.progress.validation_loss = loss
        if self.metrics is not None:
            self._log("validation", {"loss": loss})
            logger.info("step %d/%d  validation loss %.4f", step, self.plan.num_steps, loss)
            for one in sorted(itertools.chain(*every), key=lambda g: g.row):
                self._tell(one, rows)

    def _answers(self, rows: RowStore, feed: Feed) -> list[Generation]:
        options = self.job.config.validation
        wanted = range(min(options.generate, len(rows)))[self.rank :: self.world]
        made = []
        for row in wanted:
            self.reporter.doing(f"answering validation row {row + 1}", self.progress.step)
            answer = generation(
                self.learner.decoder,
                self.learner.ops,
                self.encoder,
                self.tokenizer,
                rows[row],
                row,
                partial(feed.canvases, row),
                max_tokens=options.max_tokens,
            )
            made.append(answer)
        return made

    def _tell(self, one: Generation, rows: RowStore) -> None:
        assert self.metrics is not None
        step, stored = self.progress.step, rows[one.row]
        self.metrics.write(step, "generation", one.to_dict())
        logger.info("  %s  %r  (reference %r)", one.place, one.answer, one.reference)
        text = f"{one.prompt}\n\n→ {one.answer}\n\nreference: {one.reference}"
        for tracker in self.trackers:
            tracker.text(step, f"validation {one.row + 1}", text)
        with Feed(rows, self.model) as feed:
            canvases = feed.canvases(one.row) if self.trackers and stored.pictures else []
        for number, canvas in enumerate(canvases, 1):
            name = f"validation {one.row + 1}, picture {number}"
            for tracker in self.trackers:
                tracker.picture(step, name, Image.fromarray(canvas.numpy()), one.answer)

    # ------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """A checkpoint through Ray Train; every rank calls it."""
        self.reporter.doing("writing a checkpoint", self.progress.step)
        told: dict[str, float] = {"step": self.progress.step}
        if self.validation is not None:  # by which Ray Train keeps the best; it wants a number
            loss = self.progress.validation_loss
            told["validation_loss"] = NOT_VALIDATED if loss is None else loss
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            checkpoint = None
            if self.rank == 0:
                self._write(Path(name))
                checkpoint = ray.train.Checkpoint.from_directory(name)
            self.reporter.doing("saving a checkpoint", self.progress.step)
            ray.train.report(told, checkpoint=checkpoint)
        if self.rank == 0:
            logger.info("step %d/%d  saved a checkpoint", self.progress.step, self.plan.num_steps)
        self.progress.validation_loss = None  # a later checkpoint has another
        self.reporter.doing("going on", self.progress.step)

    def _write(self, folder: Path) -> None:
        save_adapter(self.peft, folder / ADAPTER)
        torch.save(self.stepper.optimizer.state_dict(), folder / OPTIMIZER)
        state = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "validation_loss": self.progress.validation_loss,
            "num_steps": self.plan.num_steps,
            "rows_a_step": self.plan.rows_a_step,
            "base": self.job.base,
            "base_digest": self.job.base_digest,
            "data_digest": self.job.data_digest,
        }
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
        shutil.copyfile(self.scratch / METRICS, folder / METRICS)
        if self.validation is not None:
            with (folder / VALIDATION_ROWS).open("w", encoding="utf-8") as out:
                for row in self.validation.conversations():
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._keep_trackers()

    def _keep_trackers(self) -> None:
        """Their files into the run's folder."""
        for tracker in self.trackers:
            tracker.flush()
        self._copy_trackers()

    def _copy_trackers(self) -> None:
        if self.trackers:
            arrow_fs.copy_files(
                str(self.scratch / TRACKERS),
                f"{self.job.folder}/{TRACKERS}",
                arrow_fs.LocalFileSystem(),
                self.filesystem,
            )

    def _resume(self) -> None:
        """Goes on from the last checkpoint if there is one."""
        before = ray.train.get_checkpoint()
        if before is None:
            return
        with before.as_directory() as name:
            folder = Path(name)
            state = json.loads((folder / STATE).read_text())
            if state["rows_a_step"] != self.plan.rows_a_step:
                raise ConfigError(
                    f"the run's steps had {state['rows_a_step']} conversations (most workers × "
                    f"batch_size × accumulation) and would have {self.plan.rows_a_step}; set "
                    "workers.num to what it was, or to a range that ends there",
                    param="workers.num",
                )
            weights = load_file(folder / ADAPTER / ADAPTER_FILE)
            known = get_peft_model_state_dict(self.peft).keys()
            assert known == weights.keys(), "the checkpoint is of another LoRA"
            set_peft_model_state_dict(self.peft, weights)
            self.stepper.optimizer.load_state_dict(
                torch.load(folder / OPTIMIZER, map_location=self.device, weights_only=True)
            )
            if self.rank == 0:
                shutil.copyfile(folder / METRICS, self.scratch / METRICS)
                self._fetch_trackers()
        self.progress = Progress(state["step"], state["tokens"], state["seconds"])
        if self.rank == 0:
            logger.info("going on after step %d", self.progress.step)

    def _fetch_trackers(self) -> None:
        there = f"{self.job.folder}/{TRACKERS}"
        if self.filesystem.get_file_info(there).type == arrow_fs.FileType.Directory:
            arrow_fs.copy_files(
                there,
                str(self.scratch / TRACKERS),
                self.filesystem,
                arrow_fs.LocalFileSystem(),
            )

    # ------------------------------------------------------------ telling

    def _open(self, name: str) -> RowStore:
        return RowStore.open(
            self.filesystem, f"{self.job.folder}/{name}", self.model.decoder.vocab_size
        )

    def _log(self, kind: str, record: dict[str, float]) -> None:
        assert self.metrics is not None
        self.metrics.write(self.progress.step, kind, record)
        for tracker in self.trackers:
            tracker.log(self.progress.step, {f"{kind}/{k}": v for k, v in record.items()})

    def _show(self, record: dict[str, float]) -> None:
        now, last = time.monotonic(), self.plan.num_steps
        if now - self._shown < LOG_EVERY_S and self.progress.step not in (1, last):
            return
        self._shown = now
        left = (last - self.progress.step) * self.progress.seconds / self.progress.step
        logger.info(
            "step %d/%d  loss %.4f  lr %.2e  %s tokens/s  %.1f samples/s  %s left  peak %.1f GB",
            self.progress.step,
            last,
            record["loss"],
            record["learning_rate"],
            f"{record['tokens_per_s']:,.0f}",
            record["samples_per_s"],
            _span(left),
            record["peak_memory_bytes"] / 1e9,
        )


def _start(rank: int, control: Any) -> str:
    """A name that this start of the workers has to itself."""
    names = [uuid.uuid4().hex if rank == 0 else None]
    dist.broadcast_object_list(names, 0, group=control)
    return str(names[0])


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
