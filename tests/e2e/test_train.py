"""Training as its users start it: the command, Ray Train, two real workers, processes killed."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.train_run import STEPS, Training, base_config, records
from xc_ray.model.adapter import load_adapter
from xc_ray.model.weights import Checkpoint
from xc_ray.publish import import_checkpoint
from xc_ray.registry.registry import Registry

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], lessons: Path
) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = base_config(folder, tiny("2.5"), lessons)
    config["data"]["validation_split"] = 0.2
    with Training(folder, config) as training:
        training.wait()
        return training.run


def test_a_killed_worker_is_replaced_and_the_adapter_is_served_from_the_registry(
    tmp_path: Path, tiny: Callable[..., Path], lessons: Path
) -> None:
    """The one default run: train, kill -9, go on, push, promote."""
    registry = Registry.open(str(tmp_path / "registry"))
    import_checkpoint(tiny("2.5"), registry, "base")
    config = base_config(
        tmp_path,
        "base",
        lessons,
        publish={"adapter": "colours", "promote": {"alias": "prod", "below": 50.0}},
    )
    config["data"]["validation_split"] = 0.2
    with Training(tmp_path, config) as training:
        training.wait_for_checkpoints(2)
        os.kill(training.workers[-1], signal.SIGKILL)
        summary = training.wait()
        assert "going on after step" in training.text
        assert "model.layers.{0–1}.attention.wqkv" in training.text
    assert [r["step"] for r in records(training.run)] == list(range(1, STEPS + 1))
    assert (summary["steps"], summary["stopped"]) == (STEPS, False)
    # What was published is what validated best, and says where it comes from.
    manifest = registry.resolve("colours@prod")
    assert summary["adapter"] == f"colours@{manifest.version}"
    validated = records(training.run, "validation")
    best = min(r["loss"] for r in validated)
    assert manifest.lineage.metrics["validation_loss"] == best == summary["validation_loss"]
    recipe: Any = manifest.lineage.training_config
    assert recipe["lora"]["rank"] == 4
    assert len(manifest.lineage.dataset_digest or "") == 64
    assert manifest.base is not None
    assert manifest.base.name == "base"
    # Beside the checkpoints: the adapter, the curves, the summary, the rows it was validated on.
    config_of = Checkpoint.open(tiny("2.5")).config
    adapter = load_adapter(
        training.run / "adapter",
        config_of,
        digest="",
        dtype=Checkpoint.open(tiny("2.5")).load().decoder.dtype,
    )
    assert adapter.rank == 4
    assert (training.run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((training.run / "summary.json").read_text())["steps"] == STEPS
    assert len((training.run / "validation.jsonl").read_text().splitlines()) == 9
    said = records(training.run, "generation")
    assert {r["step"] for r in said} == {20, 40, 60}
    assert all(r["reference"].startswith("It is") for r in said)
    kept = [p for p in training.run.glob("checkpoint_*") if p.is_dir()]
    assert 1 <= len(kept) <= 3  # the best two, and the newest


@pytest.mark.slow
@pytest.mark.timeout(600)  # five starts of Ray, the unbroken run's among them
def test_the_driver_is_killed_and_the_run_goes_on_to_the_same_losses(
    tmp_path: Path, tiny: Callable[..., Path], lessons: Path, unbroken: Path
) -> None:
    config = base_config(tmp_path, tiny("2.5"), lessons)
    config["data"]["validation_split"] = 0.2
    with Training(tmp_path, config) as training:
        training.wait_for_checkpoints(2)
        os.killpg(training.process.pid, signal.SIGKILL)
        training.process.wait()
    with Training(tmp_path, config) as again:
        again.wait(code=1)
        assert "has a run 'run' already" in again.text
    alone = {**config, "workers": {**config["workers"], "num": 1}}
    with Training(tmp_path, alone, "--resume") as again:
        again.wait(code=1)
        assert "the run's steps had 8 conversations" in again.text
    with Training(tmp_path, config, "--resume") as again:
        again.wait()
        assert "going on after step" in again.text
    for kind in ("train", "validation", "generation"):
        assert records(again.run, kind) == records(unbroken, kind)


@pytest.mark.slow
def test_a_killed_worker_changes_no_loss(
    tmp_path: Path, tiny: Callable[..., Path], lessons: Path, unbroken: Path
) -> None:
    config = base_config(tmp_path, tiny("2.5"), lessons)
    config["data"]["validation_split"] = 0.2
    with Training(tmp_path, config) as training:
        training.wait_for_checkpoints(3)
        os.kill(training.workers[0], signal.SIGKILL)
        training.wait()
    assert records(training.run) == records(unbroken)


@pytest.mark.slow
def test_a_hung_worker_is_named_killed_and_replaced(
    tmp_path: Path, tiny: Callable[..., Path], lessons: Path, unbroken: Path
) -> None:
    config = base_config(tmp_path, tiny("2.5"), lessons)
    config["data"]["validation_split"] = 0.2
    config["workers"]["hang_timeout_s"] = 20
    with Training(tmp_path, config) as training:
        training.wait_for_checkpoints(2)
        hung = training.workers[-1]
        os.kill(hung, signal.SIGSTOP)
        summary = training.wait()
    assert len(summary["hung"]) == 1
    assert f"(pid {hung})" in summary["hung"][0]
    assert records(training.run) == records(unbroken)


@pytest.mark.slow
def test_sigterm_saves_a_last_checkpoint_and_resume_goes_on_from_there(
    tmp_path: Path, tiny: Callable[..., Path], lessons: Path, unbroken: Path
) -> None:
    config = base_config(tmp_path, tiny("2.5"), lessons)
    config["data"]["validation_split"] = 0.2
    config["checkpoints"] = {"every_steps": 1000}
    with Training(tmp_path, config) as training:
        training.wait_until(lambda: f"step 1/{STEPS}" in training.text)
        training.process.send_signal(signal.SIGTERM)
        summary = training.wait(code=3)
    assert summary["stopped"]
    assert 1 <= summary["steps"] < STEPS
    with Training(tmp_path, config, "--resume") as again:
        assert again.wait()["steps"] == STEPS
        assert f"going on after step {summary['steps']}" in again.text
    assert records(again.run) == records(unbroken)
