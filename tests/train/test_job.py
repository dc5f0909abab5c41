"""What is refused before a worker is asked for; runs themselves are in tests/e2e/test_train.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xc_ray.config import TrainConfig
from xc_ray.errors import CheckpointError, ConfigError, DataError, InvalidRequest
from xc_ray.publish import import_checkpoint
from xc_ray.registry.registry import Registry
from xc_ray.train.job import Data, Run, split
from xc_ray.train.rows import CheckedRow


@pytest.fixture
def values(tmp_path: Path, tiny: Callable[..., Path], lessons: Path) -> dict[str, Any]:
    """A sound configuration, to be broken."""
    return {
        "model": str(tiny("2.5")),
        "name": "run",
        "storage": str(tmp_path / "runs"),
        "registry": str(tmp_path / "registry"),
        "data": {"train": str(lessons), "max_tiles": 2},
    }


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


def test_resume_with_another_base_is_refused(
    values: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    prepare(values)
    message = refused({**values, "model": str(tiny("2.0"))}, resume=True)
    assert "run 'run' cannot go on: the base is another" in message
    assert str(tiny("2.0")) in message
    assert message.count("sha256:") == 2


def test_resume_with_other_data_is_refused(
    values: dict[str, Any], lessons: Path, tmp_path: Path
) -> None:
    prepare(values)
    lines = lessons.read_text().splitlines()[3:]
    other = lessons.parent / f"{tmp_path.name}.jsonl"
    other.write_text("\n".join(lines))
    message = refused({**values, "data": {"train": str(other), "max_tiles": 2}}, resume=True)
    assert "the training data is another" in message


def test_resume_with_another_recipe_names_the_keys(values: dict[str, Any]) -> None:
    prepare(values)
    changed = {**values, "lora": {"rank": 8}, "training": {"seed": 1}}
    message = refused(changed, resume=True)
    assert "lora.rank was 64 and is 8" in message
    assert "training.seed was 0 and is 1" in message


def test_resume_with_other_weights_is_refused(values: dict[str, Any], lessons: Path) -> None:
    prepare(values)
    values["data"]["train"] = [{"path": str(lessons), "weight": 2.0}]
    assert "the data sets' weights were [1.0], are [2.0]" in refused(values, resume=True)


def test_storage_that_cannot_be_written_is_told(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refused({**values, "storage": str(tmp_path / "file")})
    assert "the run's storage cannot be written" in message
    assert str(tmp_path / "file") in message
    assert "memory://" in refused({**values, "storage": "memory://"})


def test_a_base_that_is_nowhere_is_told(values: dict[str, Any]) -> None:
    message = refused({**values, "model": "no-such@prod"}, kind=CheckpointError)
    assert "no-such@prod" in message


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


def test_bad_rows_are_left_out_and_listed_where_that_is_asked_for(
    values: dict[str, Any], lessons: Path
) -> None:
    file = lessons.parent / "partly.jsonl"
    file.write_text(lessons.read_text() + "no json\n")
    values["data"] = {"train": str(file), "max_tiles": 2, "on_bad_row": "skip"}
    run = prepare(values)
    assert len(run.data.rows) == 45
    assert run.data.report is not None
    assert [p.place.number for p in run.data.report.problems] == [46]


def test_a_split_is_drawn_by_the_seed_and_leaves_nothing_out(
    checked_rows: list[CheckedRow],
) -> None:
    data = Data(checked_rows, "digest", None)
    train, validation = split(data, 0.2, seed=1)
    again = split(data, 0.2, seed=1)
    other = split(data, 0.2, seed=2)
    assert (len(train.rows), len(validation.rows)) == (36, 9)
    places = {row.place for row in train.rows} | {row.place for row in validation.rows}
    assert places == {row.place for row in checked_rows}
    assert (train, validation) == again
    assert validation.rows != other[1].rows
    assert len({train.digest, validation.digest, other[0].digest, "digest"}) == 4
    with pytest.raises(ConfigError, match="there is 1 row to divide"):
        split(Data(checked_rows[:1], "digest", None), 0.2, seed=1)


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
