"""fit(config): everything checked, then Ray Train, then the adapter in the registry.

    summary = fit(TrainConfig.read("train_config.yaml"))

In the order in which a mistake costs least: configuration, storage, base, registry and packages;
then the whole data set; only then is a worker asked for. What the run keeps is below
`<storage>/<name>/`:

    run.json                    what it was begun with; a resumed run must agree
    data/*.arrow                the checked rows
    checkpoint_…/               Ray Train's: adapter/, optimizer.pt, state.json, metrics.jsonl, …
    adapter/, metrics.jsonl, curves.png, summary.json, report.json      at the end
"""

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from xc_ray.config import TrainConfig
from xc_ray.errors import ConfigError
from xc_ray.registry.location import default_url
from xc_ray.registry.store import Missing, ObjectStore
from xc_ray.train.cluster import cluster, on_sigterm, worker_error
from xc_ray.train.curves import plot_curves
from xc_ray.train.loop import (
    ADAPTER,
    METRICS,
    NOT_VALIDATED,
    STATE,
    VALIDATION_ROWS,
    Job,
    train_worker,
)
from xc_ray.train.metrics import read_metrics
from xc_ray.train.prepare import (
    Base,
    Data,
    check_same,
    check_writable,
    open_base,
    read_data,
    record_of,
)
from xc_ray.train.publisher import Progress, Publisher
from xc_ray.train.store import write_rows
from xc_ray.train.trackers import check_trackers
from xc_ray.train.watch import Guard, start_board

logger = logging.getLogger(__name__)

RUN_FILE, SUMMARY_FILE, CURVES_FILE, REPORT_FILE = (
    "run.json",
    "summary.json",
    "curves.png",
    "report.json",
)


@dataclass(frozen=True)
class Summary:
    """What came of a run; losses are per learnt token, None where there was no such thing.

    `stopped`: it was asked to end before its last step, after which `resume` goes on. `promoted`
    tells whether the alias was moved, None if that was not asked for.
    """

    name: str
    folder: str
    stopped: bool
    steps: int
    num_steps: int
    train_loss: float | None
    validation_loss: float | None
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    skipped: tuple[str, ...] = ()
    hung: tuple[str, ...] = ()
    adapter: str | None = None
    promoted: bool | None = None
    answers: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """What the registry keeps with the adapter."""
        values = {
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "steps": self.steps,
            "tokens": self.tokens,
        }
        return {name: float(value) for name, value in values.items() if value is not None}


def fit(config: TrainConfig, *, resume: bool = False, progress: Progress | None = None) -> Summary:
    """Trains, keeps and publishes one adapter.

    With `resume` a run of this name that has begun goes on from its last checkpoint, and one that
    has not begins.

    Raises:
        ConfigError: something is not as it must be; nothing was started.
        DataError: rows that cannot be learnt from.
        RegistryError: the storage or the registry cannot be reached, or refuses.
        XcRayError: the workers failed more often than they may.
    """
    run = Run.prepare(config, resume=resume, progress=progress)
    return run.fit()


class Run:
    """One run, checked and ready to start."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        store: ObjectStore,
        data: Data,
        validation: Data | None,
        publisher: Publisher | None,
        *,
        begun: bool,
    ) -> None:
        self.config, self.base, self.store = config, base, store
        self.data, self.validation, self.publisher = data, validation, publisher
        self.begun = begun
        self.filesystem, root = store.filesystem()
        self.folder = f"{root}/{config.name}" if root else config.name

    @classmethod
    def prepare(
        cls, config: TrainConfig, *, resume: bool = False, progress: Progress | None = None
    ) -> "Run":
        """Checks everything that can be checked without a worker (errors: `fit`)."""
        storage = config.storage or str(Path(default_url().removeprefix("file://")).parent / "runs")
        store = ObjectStore.open(storage)
        registry = config.registry or default_url()
        config = config.model_copy(
            update={"storage": store.url, "registry": ObjectStore.open(registry).url}
        )
        check_writable(store, config.name)
        before = _read_json(store, f"{config.name}/{RUN_FILE}")
        if before is not None and not resume:
            raise ConfigError(
                f"{store.url} has a run {config.name!r} already; give `name` another value, or go "
                "on with that run by --resume",
                param="name",
            )
        check_trackers(config.track)
        base = open_base(config)
        publisher = Publisher.open(config, base.folder, progress) if config.publish else None
        data, validation = read_data(config, base, progress)
        record = record_of(config, base, data, validation)
        if before is not None:
            check_same(before, record, config.name)
        else:
            store.put(f"{config.name}/{RUN_FILE}", _json_bytes(record))
        reports = {"train": data.report, "validation": validation and validation.report}
        told = {name: report.to_dict() for name, report in reports.items() if report}
        store.put(f"{config.name}/{REPORT_FILE}", _json_bytes(told))
        return cls(config, base, store, data, validation, publisher, begun=before is not None)

    def fit(self) -> Summary:
        """Starts the workers, and ends with the summary (errors: `fit` above)."""
        logger.info(
            "%srun of %d conversations from %s%s",
            "going on with the " if self.begun else "",
            len(self.data.rows),
            self.base.name,
            f", {len(self.validation.rows)} to validate on" if self.validation else "",
        )
        train_file = self._write(self.data, "train")
        validation_file = self._write(self.validation, "validation") if self.validation else None
        with cluster() as own:
            workers, use_gpu = self._workers(own)
            most = workers if isinstance(workers, int) else workers[1]
            board = start_board()
            job = Job(
                config=self.config,
                base=self.base.name,
                base_digest=self.base.digest,
                data_digest=self.data.digest,
                folder=self.folder,
                train_file=train_file,
                validation_file=validation_file,
                weights=tuple(f.weight for f in self.config.data.train),
                most_workers=most,
                board=board,
            )
            guard = Guard(board, self.config.workers.hang_timeout_s)
            with guard, on_sigterm(guard.ask_to_stop):
                result = self._train(job, workers, use_gpu)
            return self._finish(result, guard)

    def _workers(self, own: bool) -> tuple[int | tuple[int, int], bool]:
        """How many workers, and whether each has a GPU."""
        options, total = self.config.workers, ray.cluster_resources()
        gpus = int(total.get("GPU", 0))
        use_gpu = gpus > 0 if options.use_gpu == "auto" else options.use_gpu
        workers = options.num if options.num != "auto" else (max(1, gpus) if use_gpu else 1)
        least = workers if isinstance(workers, int) else workers[0]
        wanted = {"CPU": least * options.num_cpus, "GPU": float(least if use_gpu else 0)}
        short = {k: n for k, n in wanted.items() if n > total.get(k, 0)}
        if short:
            needs = ", ".join(f"{n:g} {k}" for k, n in wanted.items() if n)
            has = ", ".join(f"{total.get(k, 0):g} {k}" for k in short)
            text = (
                f"{least} workers need {needs}, and the cluster has {has}; lower workers.num or "
                "workers.num_cpus"
            )
            if own:  # nobody will add a node to it
                raise ConfigError(text, param="workers")
            logger.warning("%s, unless nodes are added: waiting for them", text)
        return workers, use_gpu

    def _train(self, job: Job, workers: int | tuple[int, int], use_gpu: bool) -> Any:
        options = self.config
        by_loss = self.validation is not None
        loop: Any = train_worker  # it gives a value, which Ray's types do not know
        trainer = TorchTrainer(
            loop,
            train_loop_config={"job": job},
            torch_config=TorchConfig(
                timeout_s=round(max(1800, 2 * options.workers.hang_timeout_s))
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,  # type: ignore[arg-type]  # a range, which its stubs lack
                use_gpu=use_gpu,
                resources_per_worker={"CPU": options.workers.num_cpus}
                | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=RunConfig(
                name=options.name,
                storage_filesystem=self.filesystem,
                storage_path=self.folder.rpartition("/")[0],
                failure_config=FailureConfig(max_failures=options.workers.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=options.checkpoints.keep,
                    checkpoint_score_attribute="validation_loss" if by_loss else None,
                    checkpoint_score_order="min",
                ),
            ),
        )
        try:
            return trainer.fit()
        except ray.train.TrainingFailedError as e:
            raise worker_error(e) from e

    def _finish(self, result: Any, guard: Guard) -> Summary:
        told = result.return_value
        if "error" in told:
            raise ConfigError(told["error"])
        with tempfile.TemporaryDirectory(prefix="xc-ray-train-") as scratch:
            last, best = Path(scratch, "last"), Path(scratch, "best")
            result.checkpoint.to_directory(str(last))
            chosen = self._best(result)
            chosen.to_directory(str(best))
            records = read_metrics(last / METRICS)
            summary = self._summary(told, records, best, guard)
            if not summary.stopped:
                if self.publisher is not None:
                    adapter, promoted = self.publisher.publish(
                        best / ADAPTER,
                        metrics=summary.metrics,
                        dataset_digest=self.data.digest,
                        config=self.config.model_dump(mode="json"),
                    )
                    summary = replace(summary, adapter=adapter, promoted=promoted)
                self._keep(best, records, summary)
            return summary

    def _best(self, result: Any) -> Any:
        """The checkpoint of the least validation loss; the last if there is none."""
        scored = [
            (metrics["validation_loss"], checkpoint)
            for checkpoint, metrics in result.best_checkpoints or []
            if metrics.get("validation_loss", NOT_VALIDATED) < NOT_VALIDATED
        ]
        return min(scored, key=lambda pair: pair[0])[1] if scored else result.checkpoint

    def _summary(
        self, told: dict[str, Any], records: list[dict[str, Any]], best: Path, guard: Guard
    ) -> Summary:
        state = json.loads((best / STATE).read_text())
        steps = [r for r in records if r["kind"] == "train"]
        at_best = [r for r in steps if r["step"] == state["step"]]
        answers = [r for r in records if r["kind"] == "generation" and r["step"] == told["step"]]
        reports = [d.report for d in (self.data, self.validation) if d and d.report]
        problems = [problem for report in reports for problem in report.problems]
        return Summary(
            name=self.config.name,
            folder=f"{self.store.url.split('?')[0]}/{self.config.name}",
            stopped=told["stopped"],
            steps=told["step"],
            num_steps=told["num_steps"],
            train_loss=at_best[-1]["loss"] if at_best else None,
            validation_loss=state["validation_loss"],
            tokens=told["tokens"],
            seconds=told["seconds"],
            tokens_per_s=told["tokens"] / told["seconds"] if told["seconds"] else 0.0,
            peak_memory_bytes=told["peak_memory_bytes"],
            skipped=tuple(f"{p.place}: {p.reason}" for p in problems),
            hung=tuple(guard.hung),
            answers=tuple(answers),
        )

    def _keep(self, best: Path, records: list[dict[str, Any]], summary: Summary) -> None:
        """The result beside the checkpoints."""
        for path in sorted((best / ADAPTER).iterdir()):
            self.store.put(f"{self.config.name}/{ADAPTER}/{path.name}", path)
        for name in (STATE, VALIDATION_ROWS):
            if (best / name).exists():
                self.store.put(f"{self.config.name}/{name}", best / name)
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        self.store.put(f"{self.config.name}/{METRICS}", lines.encode())
        if (png := plot_curves(records, self.config.name)) is not None:
            self.store.put(f"{self.config.name}/{CURVES_FILE}", png)
        self.store.put(f"{self.config.name}/{SUMMARY_FILE}", _json_bytes(asdict(summary)))

    def _write(self, data: Data, name: str) -> str:
        """The rows in the run's folder; their file.

        A resumed run writes them again: pictures may lie elsewhere than they did, as those of a
        job's working directory do on another cluster.
        """
        file = f"data/{name}-{data.digest[:16]}.arrow"
        self.filesystem.create_dir(f"{self.folder}/data", recursive=True)
        part = f"{self.folder}/{file}.part"
        write_rows(self.filesystem, part, data.rows)
        self.filesystem.move(part, f"{self.folder}/{file}")
        return file


def _read_json(store: ObjectStore, key: str) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(store.get(key))
    except Missing:
        return None
    return value


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
