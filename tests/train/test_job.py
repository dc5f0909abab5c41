"""What is refused before a worker is asked for; runs themselves are in tests/e2e/test_train.py."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xc_ray.config import TrainConfig
from xc_ray.errors import ConfigError, DataError, InvalidRequest
from xc_ray.publish import import_checkpoint
from xc_ray.registry.registry import Registry
from xc_ray.train import job
from xc_ray.train.job import Run


def prepare(values: dict[str, Any], *, resume: bool = False) -> Run:
    return Run.prepare(TrainConfig.model_validate(values), resume=resume)


def refused(
    values: dict[str, Any], *, resume: bool = False, kind: type[Exception] = ConfigError
) -> str:
    with pytest.raises(kind) as caught:
        prepare(values, resume=resume)
    return str(caught.value)


def test_a_sound_run_is_recorded_before_it_starts(values: dict[str, Any], tmp_path: Path) -> None:
    run = prepare(values)
    assert not run.begun
    record = json.loads((tmp_path / "runs/run/run.json").read_text())
    assert record["data_digest"] == run.data.digest
    assert record["base_digest"].startswith("sha256:")
    report = json.loads((tmp_path / "runs/run/report.json").read_text())
    assert report["train"]["num_rows"] == 45


def test_a_run_of_that_name_is_not_begun_twice(values: dict[str, Any]) -> None:
    prepare(values)
    assert "has a run 'run' already" in refused(values)
    assert prepare(values, resume=True).begun


def test_resume_begins_what_has_not_begun(values: dict[str, Any]) -> None:
    assert not prepare(values, resume=True).begun


@pytest.mark.parametrize(
    ("resume", "told"),
    [
        (False, "run of 45 conversations from "),
        (True, "going on with the run of 45 conversations from "),
    ],
)
def test_the_log_tells_whether_a_run_begins(
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    resume: bool,
    told: str,
) -> None:
    def no_cluster() -> None:
        raise ConnectionError("no Ray here")

    monkeypatch.setattr(job, "cluster", no_cluster)
    run = prepare(values)
    if resume:
        run = prepare(values, resume=True)
    with caplog.at_level(logging.INFO, job.__name__), pytest.raises(ConnectionError):
        run.fit()
    assert caplog.messages == [told + values["model"]]


def test_resume_with_another_base_is_refused(
    values: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    prepare(values)
    message = refused({**values, "model": str(tiny("2.0"))}, resume=True)
    assert "run 'run' cannot go on: the base is another" in message
    assert str(tiny("2.0")) in message
    assert message.count("sha256:") == 2


def test_storage_that_cannot_be_written_is_told(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refused({**values, "storage": str(tmp_path / "file")})
    assert "the run's storage cannot be written" in message
    assert str(tmp_path / "file") in message
    assert "memory://" in refused({**values, "storage": "memory://"})


def test_a_base_that_is_not_in_the_registry_cannot_be_published_for(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["publish"] = {"adapter": "cats"}
    message = refused(values)
    assert "is not in the registry" in message
    assert "xc-ray registry import" in message
    values["publish"]["import_base"] = True
    owner = prepare(values).publisher
    assert owner is not None
    assert Registry.open(str(tmp_path / "registry")).names() == [owner.owner.name]


def test_names_are_checked_before_the_data(values: dict[str, Any]) -> None:
    values["data"]["train"] = "no/such/file.jsonl"
    values["publish"] = {"adapter": "not a name"}
    assert "not a name" in refused(values, kind=InvalidRequest)
    values["publish"] = {"adapter": "cats", "promote": {"alias": "1", "below": 1.0}}
    assert "'1'" in refused(values, kind=InvalidRequest)


def test_an_adapter_cannot_have_the_name_of_a_base(
    values: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    import_checkpoint(tiny("2.5"), Registry.open(str(tmp_path / "registry")), "mine")
    values["publish"] = {"adapter": "mine"}
    assert "'mine' is a base in the registry" in refused(values)


def test_bad_rows_end_it_with_their_places(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"not": json\n')
    values["data"] = {"train": str(file)}
    message = refused(values, kind=DataError)
    assert f"{file}:1" in message
    assert f"{file}:2" in message
    assert not (tmp_path / "runs/run/run.json").exists()


def test_the_file_at_the_top_is_sound() -> None:
    config = TrainConfig.read(Path(__file__).parents[2] / "train_config.yaml")
    assert config.model == "demo"
    assert config.workers.num == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora": {"rnak": 8}}, "unknown key 'rnak'; did you mean 'rank'?"),
        ({"lora": {"targets": ["feed_forward.Plora_A"]}}, "lora.targets.0"),
        ({"workers": {"num": [4, 2]}}, "num is auto, a number of at least 1, or [least, most]"),
        ({"name": "../up"}, "name"),
        ({"data": {"train": "a", "validation": "b", "validation_split": 0.1}}, "one of the two"),
    ],
)
def test_a_wrong_key_or_value_is_named(
    values: dict[str, Any], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(json.dumps({**values, **change}))  # JSON is YAML
    with pytest.raises(ConfigError) as caught:
        TrainConfig.read(file)
    assert told in str(caught.value)
