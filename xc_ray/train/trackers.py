"""TensorBoard, MLflow and W&B, where they are asked for.

Trackers are for watching; the truth is in `metrics.jsonl` (`metrics.py`). Each is written by a
thread of its own, so that a slow server holds no step up, and the first failure in the middle of a
run ends that tracker with a warning.
"""

import html
import importlib.util
import io
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from xc_ray.config import TrackOptions
from xc_ray.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # calls that a tracker may be behind before it is given up
CLOSE_S = 60.0  # how long the end of a run waits for a tracker
FLUSH_S = 10.0  # how long a checkpoint does
WATCH_EVERY_S = 10.0  # how old a file may be that TensorBoard reads
SHOWN_CHARS = 300  # of a tracker's own message
RUNS_FILE = "trackers.json"  # {"mlflow PROJECT": its run id, …}
_PARAMS_A_CALL = 100  # MLflow's limit


class Tracker(Protocol):
    """Something to watch a run with.

    Steps never go back, except from one process to the next; pictures of one step have names of
    their own.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step by their names, like `train/loss`."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text, like an answer that the model gave."""

    def picture(self, step: int, name: str, picture: bytes | Image.Image, caption: str) -> None:
        """A picture, as the bytes of a file or as Pillow has it."""

    def flush(self) -> None:
        """Brings what was written so far into the files, where the tracker lets one ask for it."""

    def close(self, *, failed: bool = False) -> None:
        """Writes what waits and ends the run there, as a failed one if `failed`."""


def check_trackers(options: TrackOptions) -> None:
    """Whether what is asked for can be opened here; nothing is imported or opened.

    Raises:
        ConfigError: a package or setting is missing; says which.
    """
    wanted = {
        "tensorboard": (options.tensorboard, "tensorboardX", "tensorboardX", "ray[train]"),
        "mlflow": (options.mlflow, "mlflow", "mlflow-skinny", "xc-ray[mlflow]"),
        "wandb": (options.wandb, "wandb", "wandb", "xc-ray[wandb]"),
    }
    for key, (asked, module, package, install) in wanted.items():
        if asked and not _is_installed(module):
            raise ConfigError(
                f"track.{key} needs the package {package}: pip install '{install}', "
                f"or remove track.{key}"
            )
    # Its default is a folder where the process runs; for a worker that is nowhere.
    if options.mlflow and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            f"track.mlflow is {options.mlflow!r}, but the environment has no MLFLOW_TRACKING_URI; "
            "set it to your server, like http://HOST:5000"
        )


def open_trackers(
    options: TrackOptions,
    folder: Path,
    run_name: str,
    config: dict[str, Any],
    *,
    upto_step: int = 0,
) -> list[Tracker]:
    """The trackers asked for; `folder` keeps TensorBoard's and W&B's files and the ids of runs.

    With the same folder again a run goes on: TensorBoard hides what came after `upto_step`, W&B
    keeps what it has and takes only later steps, MLflow shows steps that are repeated twice. It
    goes on at once, and also without a tracker that does not open any more; a new run waits for
    each and does not start without.

    Raises:
        ConfigError: a package is missing, or a new run cannot be opened.
    """
    check_trackers(options)
    folder.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = []
    if options.tensorboard:
        known = (folder / "tensorboard").is_dir()
        start = partial(_TensorBoard, folder / "tensorboard", config, upto_step if known else None)
        trackers.append(_open("tensorboard", start, known))
    if options.mlflow:
        key = f"mlflow {options.mlflow}"
        run = _runs(folder).get(key)
        keep = partial(_keep_run, folder, key)
        start_mlflow = partial(_MLflow, options.mlflow, run_name, config, run, keep)
        trackers.append(_open("mlflow", start_mlflow, run is not None))
    if options.wandb:
        key = f"wandb {options.wandb}"
        run = _runs(folder).get(key)
        keep = partial(_keep_run, folder, key)
        start_wandb = partial(_WandB, options.wandb, folder, run_name, config, run, keep)
        trackers.append(_open("wandb", start_wandb, run is not None))
    return trackers


def _is_installed(module: str) -> bool:
    # A mere folder of that name, like W&B's own `wandb/` in the working directory, has no origin.
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _open(name: str, start: Callable[[], Tracker], known: bool) -> Tracker:
    behind = Behind(name, start)
    if known:
        behind.opened.add_done_callback(partial(_warn_unless_open, name))
        return behind
    try:
        behind.opened.result()
    except Exception as e:  # each has its own errors, and those of its connection
        raise ConfigError(f"track.{name} does not open: {_line(e)}") from e
    return behind


def _warn_unless_open(name: str, opened: Future[None]) -> None:
    if (error := opened.exception()) is not None:
        why = _line(error)
        logger.warning("track.%s does not open, the run goes on without it: %s", name, why)


def _runs(folder: Path) -> dict[str, str]:
    path = folder / RUNS_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _keep_run(folder: Path, key: str, run_id: str) -> None:
    whole = folder / f"{RUNS_FILE}.new"
    whole.write_text(json.dumps({**_runs(folder), key: run_id}), encoding="utf-8")
    whole.replace(folder / RUNS_FILE)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:SHOWN_CHARS] or type(error).__name__


class Behind:
    """One tracker, opened and written by a thread that runs behind the training loop.

    A server that is away makes a call last minutes; the loop would look hung meanwhile.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._start = start
        self.opened: Future[None] = Future()  # holds what opening raised
        self._given_up = threading.Event()
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_WAITING)
        # A daemon: whatever it waits for does not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hands numbers over."""
        values = dict(values)
        self._put(lambda tracker: tracker.log(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Hands a text over."""
        self._put(lambda tracker: tracker.text(step, name, text))

    def picture(self, step: int, name: str, picture: bytes | Image.Image, caption: str) -> None:
        """Hands a picture over."""
        self._put(lambda tracker: tracker.picture(step, name, picture, caption))

    def flush(self) -> None:
        """Waits until what was handed over is written, but not for a slow tracker."""
        done = threading.Event()

        def flush(tracker: Tracker) -> None:
            tracker.flush()
            done.set()

        self._put(flush)
        end = time.monotonic() + FLUSH_S
        while not self._given_up.is_set() and time.monotonic() < end and not done.wait(0.05):
            pass

    def close(self, *, failed: bool = False) -> None:
        """Ends the run when all was written, and waits for that, but not for ever."""
        self._put(lambda tracker: tracker.close(failed=failed))
        self._put(None)
        if not self._given_up.is_set():
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._give_up(f"it is still busy {CLOSE_S:.0f} s after the end")

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if self._given_up.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"it is {MAX_WAITING} calls behind")

    def _work(self) -> None:
        try:
            tracker = self._start()
        except Exception as e:  # noqa: BLE001 - whoever asks `opened` gets it
            self.opened.set_exception(e)
            self._given_up.set()
            return
        self.opened.set_result(None)
        while not self._given_up.is_set() and (call := self._calls.get()) is not None:
            try:
                call(tracker)
            except Exception as e:  # noqa: BLE001 - whatever it is, training goes on
                self._give_up(_line(e))

    def _give_up(self, why: str) -> None:
        self._given_up.set()
        logger.warning("track.%s failed, the run goes on without it: %s", self._name, why)


class _TensorBoard:
    """By the writer of events alone: a SummaryWriter's flush does not wait for its own thread."""

    def __init__(self, folder: Path, config: dict[str, Any], upto_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # Its file is named by host and second, and cut to nothing if it is there.
        self._file = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        self._flushed_at = 0.0
        if upto_step is None:
            text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
            self.text(0, "config", f"```json\n{text}\n```")
        else:  # TensorBoard hides what older files have from this step on
            self._write(upto_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX import summary

        self._write(step, summary=summary.text(name, text))

    def picture(self, step: int, name: str, picture: bytes | Image.Image, caption: str) -> None:
        import numpy as np
        from tensorboardX.summary import image

        pixels = np.asarray(_image(picture))
        self._write(step, summary=image(name, pixels, dataformats="HWC"))
        if caption:
            self.text(step, f"{name}/caption", caption)

    def flush(self) -> None:
        self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self, *, failed: bool = False) -> None:
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
        if time.monotonic() - self._flushed_at > WATCH_EVERY_S:
            self.flush()


class _MLflow:
    """By the client, not by `mlflow.start_run`, whose active run is the whole process's."""

    def __init__(
        self,
        project: str,
        run_name: str,
        config: dict[str, Any],
        run: str | None,
        keep: Callable[[str], None],
    ) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if run is not None:
            self._client.update_run(run, status="RUNNING")
            self._run = run
            return
        experiment = self._experiment(project)
        self._run = self._client.create_run(experiment, run_name=run_name).info.run_id
        self._client.log_dict(self._run, config, "config.json")
        self._log_params(config)
        keep(self._run)

    def _experiment(self, project: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(project)
        if found is None:
            try:
                return str(self._client.create_experiment(project))
            except MlflowException:  # another run made it since
                found = self._client.get_experiment_by_name(project)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log_params(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)) for key, value in _flat(config).items()]
        for start in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self._run, params=params[start : start + _PARAMS_A_CALL])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run, text, f"{name}/{step:08d}.txt")

    def picture(self, step: int, name: str, picture: bytes | Image.Image, caption: str) -> None:
        self._client.log_image(self._run, _image(picture), key=name, step=step)
        if caption:
            self._client.log_text(self._run, caption, f"{name}/{step:08d}-caption.txt")

    def flush(self) -> None:
        """Every call is a request of its own."""

    def close(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class _WandB:
    """Mode, key and entity are those of its own environment (WANDB_MODE, WANDB_API_KEY, …).

    Its files are written by a process of W&B's, which says neither when nor that it has done so:
    seconds behind while the run goes on (seen in 0.31: 20 s), a moment after `finish` at its end.
    """

    def __init__(
        self,
        project: str,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        run: str | None,
        keep: Callable[[str], None],
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=run_name,
            config=config,
            dir=str(folder),
            id=run or uuid.uuid4().hex[:12],
            resume="allow" if run else None,
            reinit="create_new",  # a run of its own, whatever else this process has open
            settings=wandb.Settings(console="off"),  # leaves stdout and stderr as they are
        )
        if run is None:
            keep(self._run.id)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        # Steps only grow in W&B: what it has from before a restart stays.
        if step >= self._run.starting_step:
            self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        # A step has one value of a name, and a picture may have the same.
        self.log(step, {f"{name}/text": wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def picture(self, step: int, name: str, picture: bytes | Image.Image, caption: str) -> None:
        import wandb

        self.log(step, {name: wandb.Image(_image(picture), caption=caption or None)})

    def flush(self) -> None:
        """W&B has no such call."""

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _image(picture: bytes | Image.Image) -> Image.Image:
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    return image.convert("RGB")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"rank": 64}}` -> `{"lora.rank": 64}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
