import io
import json
import logging
import shutil
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from xc_ray.config import TrackOptions
from xc_ray.errors import ConfigError
from xc_ray.train import trackers
from xc_ray.train.trackers import Behind, Tracker, check_trackers, open_trackers

CONFIG = {"name": "run-1", "lora": {"rank": 8, "targets": ["attention.wo"]}, "model": "demo"}
RED = Image.new("RGB", (5, 4), "red")


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_some(tracker: Tracker) -> None:
    tracker.log(3, {"train/loss": 1.5, "train/learning_rate": 1e-4})
    tracker.log(3, {"validation/loss": 2.5})
    tracker.text(4, "answer", "<a> 红色的圆形。")
    tracker.text(4, "pictures/seen", "a text of the same name")
    tracker.picture(4, "pictures/seen", png(RED), "a red field")
    tracker.picture(5, "curves", RED, "")


def open_one(options: TrackOptions, folder: Path, **more: Any) -> Tracker:
    (tracker,) = open_trackers(options, folder, "run-1", CONFIG, **more)
    return tracker


# What is installed


def test_nothing_is_opened_unless_asked_for(tmp_path: Path) -> None:
    assert open_trackers(TrackOptions(), tmp_path / "run", "run-1", CONFIG) == []


MISSING = {
    "tensorboard": ("tensorboardX", "needs the package tensorboardX: pip install 'ray[train]'"),
    "mlflow": ("mlflow", "needs the package mlflow-skinny: pip install 'xc-ray[mlflow]'"),
    "wandb": ("wandb", "needs the package wandb: pip install 'xc-ray[wandb]'"),
}


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_package_is_named_before_anything_opens(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, words = MISSING[key]
    monkeypatch.setitem(sys.modules, module, None)
    options = TrackOptions.model_validate({key: True if key == "tensorboard" else "project"})
    for refused in (
        lambda: check_trackers(options),
        lambda: open_trackers(options, tmp_path / "run", "run-1", CONFIG),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert caught.value.message == f"track.{key} {words}, or remove track.{key}"
    assert not (tmp_path / "run").exists()
    check_trackers(TrackOptions())


def test_a_folder_with_a_packages_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # W&B's own, in the working directory of an earlier run
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_trackers(TrackOptions(wandb="shapes"))


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="the environment has no MLFLOW_TRACKING_URI; set it"):
        check_trackers(TrackOptions(mlflow="shapes"))


# TensorBoard


def events(folder: Path) -> Iterator[Any]:
    """Every event of a folder; a file is TFRecord's frames: length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (num_bytes,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + num_bytes])
            data = data[16 + num_bytes :]


def test_tensorboard_gets_numbers_texts_and_pictures(tmp_path: Path) -> None:
    tracker = open_one(TrackOptions(tensorboard=True), tmp_path)
    write_some(tracker)
    tracker.close()
    values = {(e.step, v.tag): v for e in events(tmp_path / "tensorboard") for v in e.summary.value}
    assert values[3, "train/loss"].simple_value == 1.5
    assert values[3, "validation/loss"].simple_value == 2.5
    texts = {key: v.tensor.string_val for key, v in values.items() if v.HasField("tensor")}
    assert [t.decode() for t in texts[4, "answer/text_summary"]] == ["<a> 红色的圆形。"]
    assert texts[4, "pictures/seen/text_summary"] == [b"a text of the same name"]
    assert texts[4, "pictures/seen/caption/text_summary"] == [b"a red field"]
    assert b'"rank": 8' in texts[0, "config/text_summary"][0]
    for key in ((4, "pictures/seen"), (5, "curves")):
        image = Image.open(io.BytesIO(values[key].image.encoded_image_string))
        assert image.convert("RGB").tobytes() == RED.tobytes()


def test_tensorboards_files_hold_what_was_flushed(tmp_path: Path) -> None:
    tracker = open_one(TrackOptions(tensorboard=True), tmp_path)
    tracker.log(3, {"loss": 1.0})
    tracker.flush()
    assert 3 in [e.step for e in events(tmp_path / "tensorboard")]
    tracker.close()


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    options = TrackOptions(tensorboard=True)
    for upto_step, steps in ((0, range(1, 6)), (3, range(4, 6))):
        tracker = open_one(options, tmp_path, upto_step=upto_step)
        for step in steps:
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    read = list(events(tmp_path / "tensorboard"))
    assert [e.step for e in read if e.HasField("session_log")] == [4]
    tags = [v.tag for e in read for v in e.summary.value]
    assert tags.count("config/text_summary") == 1


# MLflow


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    # The small package has no other store of its own; MLflow wants to hear that it is meant.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return store


def mlflow_runs(project: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_mlflow_gets_numbers_texts_and_pictures(mlflow_store: Path, tmp_path: Path) -> None:
    tracker = open_one(TrackOptions(mlflow="shapes"), tmp_path / "run")
    write_some(tracker)
    tracker.close()
    (run,) = mlflow_runs("shapes")
    assert (run.info.run_name, run.info.status) == ("run-1", "FINISHED")
    assert run.data.metrics == {
        "train/loss": 1.5,
        "train/learning_rate": 1e-4,
        "validation/loss": 2.5,
    }
    assert run.data.params == {
        "name": "run-1",
        "lora.rank": "8",
        "lora.targets": "['attention.wo']",
        "model": "demo",
    }
    (artifacts,) = mlflow_store.rglob("artifacts")
    assert json.loads((artifacts / "config.json").read_text()) == CONFIG
    assert (artifacts / "answer/00000004.txt").read_text() == "<a> 红色的圆形。"
    assert (artifacts / "pictures/seen/00000004.txt").read_text() == "a text of the same name"
    assert (artifacts / "pictures/seen/00000004-caption.txt").read_text() == "a red field"
    pictures = sorted((artifacts / "images").glob("*.png"))
    assert [p.name.split("+")[:3] for p in pictures] == [
        ["curves", "step", "5"],
        ["pictures~seen", "step", "4"],
    ]
    for picture in pictures:
        assert Image.open(io.BytesIO(picture.read_bytes())).tobytes() == RED.tobytes()


def test_mlflow_continues_the_same_run_after_a_restart(mlflow_store: Path, tmp_path: Path) -> None:
    options = TrackOptions(mlflow="shapes")
    for step, failed, status in ((1, True, "FAILED"), (2, False, "FINISHED")):
        tracker = open_one(options, tmp_path / "run", upto_step=step - 1)
        tracker.log(step, {"loss": float(step)})
        tracker.flush()
        assert mlflow_runs("shapes")[0].info.status == "RUNNING"
        tracker.close(failed=failed)
        (run,) = mlflow_runs("shapes")
        assert (run.info.status, run.data.metrics) == (status, {"loss": float(step)})
    open_one(options, tmp_path / "another run").close()
    open_one(TrackOptions(mlflow="other"), tmp_path / "run").close()
    assert len(mlflow_runs("shapes")) == 2
    assert len(mlflow_runs("other")) == 1


def test_a_configuration_of_more_values_than_a_call_takes_is_kept_whole(
    mlflow_store: Path, tmp_path: Path
) -> None:
    config = {"data": {f"value-{i}": i for i in range(250)}}
    (tracker,) = open_trackers(TrackOptions(mlflow="shapes"), tmp_path / "run", "run-1", config)
    tracker.close()
    assert len(mlflow_runs("shapes")[0].data.params) == 250


def test_a_new_run_does_not_start_without_a_tracker_that_does_not_open(
    mlflow_store: Path, tmp_path: Path
) -> None:
    mlflow_store.write_text("a file where the store should be")
    with pytest.raises(ConfigError, match=r"track\.mlflow does not open: "):
        open_one(TrackOptions(mlflow="shapes"), tmp_path / "run")


def test_a_run_goes_on_without_a_tracker_that_does_not_open_any_more(
    mlflow_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = TrackOptions(mlflow="shapes", tensorboard=True)
    for tracker in open_trackers(options, tmp_path / "run", "run-1", CONFIG):
        tracker.close()
    shutil.rmtree(mlflow_store)
    for tracker in open_trackers(options, tmp_path / "run", "run-1", CONFIG):
        tracker.log(1, {"loss": 1.0})
        tracker.close()
    (warning,) = warnings(caplog)
    assert warning.startswith("track.mlflow does not open, the run goes on without it: ")
    assert 1 in [e.step for e in events(tmp_path / "run" / "tensorboard")]


def test_a_tracker_that_fails_in_the_middle_is_dropped_with_one_warning(
    mlflow_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = TrackOptions(mlflow="shapes", tensorboard=True)
    opened = open_trackers(options, tmp_path / "run", "run-1", CONFIG)
    shutil.rmtree(mlflow_store)
    for tracker in opened:
        for step in (1, 2):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    (warning,) = warnings(caplog)
    assert warning.startswith("track.mlflow failed, the run goes on without it: ")
    written = [e.step for e in events(tmp_path / "run" / "tensorboard") if e.step]
    assert written == [1, 2]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == trackers.__name__ and r.levelno == logging.WARNING
    ]


# W&B


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / f"wandb-{kind}"))


def wandb_records(folder: Path) -> list[Any]:
    """Every record of a finished run.

    `finish` returns before W&B's own process has closed the file: under load the file held nothing
    in 1 of 6 tries. The record of the exit is the last that matters here.
    """
    (path,) = folder.glob("*.wandb")
    end = time.monotonic() + 60
    while True:
        records = list(wandb_file(path.read_bytes()))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.02)


def wandb_file(data: bytes) -> Iterator[Any]:
    """The whole records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # a block's end that holds no header is padding
            at += left
            continue
        if at + 7 > len(data):
            return
        _, num_bytes, part = struct.unpack_from("<IHB", data, at)
        if at + 7 + num_bytes > len(data):
            return
        whole += data[at + 7 : at + 7 + num_bytes]
        at += 7 + num_bytes
        if part in (1, 4):  # whole, or the last of its parts
            yield Record.FromString(whole)
            whole = b""


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    history: dict[int, dict[str, Any]] = {}
    for record in wandb_records(folder):
        if record.HasField("history"):
            row = {
                "/".join(i.nested_key) or i.key: json.loads(i.value_json)
                for i in record.history.item
            }
            history.setdefault(row["_step"], {}).update(row)
    return history


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_gets_numbers_texts_and_pictures(tmp_path: Path) -> None:
    tracker = open_one(TrackOptions(wandb="shapes"), tmp_path)
    write_some(tracker)
    tracker.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    history = wandb_history(folder)
    assert history[3]["train/loss"] == 1.5
    assert history[3]["validation/loss"] == 2.5
    assert history[4]["pictures/seen/text/_type"] == "html-file"
    text = folder / "files" / history[4]["answer/text/path"]
    assert "<pre>&lt;a&gt; 红色的圆形。</pre>" in text.read_text(encoding="utf-8")
    assert history[4]["pictures/seen/caption"] == "a red field"
    seen = folder / "files" / history[4]["pictures/seen/path"]
    image = Image.open(io.BytesIO(seen.read_bytes()))
    assert image.convert("RGB").tobytes() == RED.tobytes()
    assert history[5]["curves/_type"] == "image-file"
    run = next(r.run for r in wandb_records(folder) if r.HasField("run"))
    assert (run.project, run.display_name) == ("shapes", "run-1")
    config = {i.key: json.loads(i.value_json) for i in run.config.update}
    assert config["lora"] == CONFIG["lora"]


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_continues_the_same_run_after_a_restart(tmp_path: Path) -> None:
    for step, failed in ((1, True), (2, False)):
        tracker = open_one(TrackOptions(wandb="shapes"), tmp_path, upto_step=step - 1)
        tracker.log(step, {"loss": float(step)})
        tracker.close(failed=failed)
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    ids = {next(r.run.run_id for r in wandb_records(f) if r.HasField("run")) for f in folders}
    assert len(ids) == 1
    exits = {r.exit.exit_code for f in folders for r in wandb_records(f) if r.HasField("exit")}
    assert exits == {0, 1}


# A thread behind the training loop


class Stuck:
    """A tracker whose server does not answer until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []
        self.failed: bool | None = None

    def log(self, step: int, values: Any) -> None:
        self.let_go.wait(60)
        self.steps.append(step)
        self.values.append(values)

    def text(self, step: int, name: str, text: str) -> None:
        raise ValueError("no texts\nhere")

    def picture(self, step: int, name: str, picture: Any, caption: str) -> None:
        self.steps.append(step)

    def flush(self) -> None:
        self.let_go.wait(60)

    def close(self, *, failed: bool = False) -> None:
        self.failed = failed


def test_the_loop_does_not_wait_for_a_slow_tracker_but_the_end_does() -> None:
    stuck = Stuck()
    tracker = Behind("stuck", lambda: stuck)
    for step in range(5):
        tracker.log(step, {})
    assert stuck.steps == []
    threading.Timer(0.1, stuck.let_go.set).start()
    tracker.close(failed=True)
    assert (stuck.steps, stuck.failed) == ([0, 1, 2, 3, 4], True)


def test_a_run_that_goes_on_does_not_wait_for_a_tracker_to_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck = Stuck()

    def start(*_: Any) -> Stuck:
        stuck.let_go.wait(60)
        return stuck

    monkeypatch.setattr(trackers, "_TensorBoard", start)
    (tmp_path / "tensorboard").mkdir()
    tracker = open_one(TrackOptions(tensorboard=True), tmp_path)
    tracker.log(1, {})
    assert stuck.steps == []
    stuck.let_go.set()
    tracker.close()
    assert stuck.steps == [1]


def test_a_checkpoint_waits_for_what_was_handed_over_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "FLUSH_S", 0.1)
    stuck = Stuck()
    tracker = Behind("stuck", lambda: stuck)
    tracker.log(1, {})
    tracker.flush()
    assert stuck.steps == []
    stuck.let_go.set()
    monkeypatch.setattr(trackers, "FLUSH_S", 60.0)
    tracker.flush()
    assert stuck.steps == [1]
    tracker.text(2, "answer", "")  # fails: nothing to wait for
    tracker.flush()
    tracker.close()
    assert len(warnings(caplog)) == 1


def test_numbers_are_those_of_the_moment_they_were_logged() -> None:
    stuck = Stuck()
    tracker = Behind("stuck", lambda: stuck)
    values = {"loss": 1.0}
    tracker.log(1, values)
    values["loss"] = 2.0
    stuck.let_go.set()
    tracker.close()
    assert stuck.values == [{"loss": 1.0}]


def test_a_tracker_that_falls_too_far_behind_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    stuck = Stuck()
    tracker = Behind("stuck", lambda: stuck)
    for step in range(20):
        tracker.log(step, {})
    tracker.close()  # at once: nobody waits for it any more
    stuck.let_go.set()
    assert warnings(caplog) == [
        "track.stuck failed, the run goes on without it: it is 3 calls behind"
    ]


def test_the_end_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    stuck = Stuck()
    tracker = Behind("stuck", lambda: stuck)
    tracker.log(1, {})
    tracker.close()
    stuck.let_go.set()
    (warning,) = warnings(caplog)
    assert "it is still busy 0 s after the end" in warning


def test_after_a_failure_nothing_more_is_written(caplog: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()
    stuck.let_go.set()
    tracker = Behind("stuck", lambda: stuck)
    tracker.log(1, {})
    tracker.text(2, "answer", "")
    tracker.log(3, {})
    tracker.close()
    assert (stuck.steps, stuck.failed) == ([1], None)
    assert warnings(caplog) == ["track.stuck failed, the run goes on without it: no texts here"]
