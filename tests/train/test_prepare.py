"""What a run stands on: its base, its rows, and the record that a resumed run must agree with."""

from pathlib import Path
from typing import Any

import pytest

from xc_ray.config import TrainConfig
from xc_ray.errors import CheckpointError, ConfigError
from xc_ray.train.prepare import Data, check_same, open_base, read_data, record_of, split
from xc_ray.train.rows import CheckedRow


def record(values: dict[str, Any]) -> dict[str, Any]:
    config = TrainConfig.model_validate(values)
    base = open_base(config)
    return record_of(config, base, *read_data(config, base))


def refused(before: dict[str, Any], now: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_same(before, now, "run")
    assert caught.value.message.startswith("run 'run' cannot go on: ")
    return caught.value.message


def test_a_base_that_is_nowhere_is_told(values: dict[str, Any]) -> None:
    config = TrainConfig.model_validate({**values, "model": "no-such@prod"})
    with pytest.raises(CheckpointError, match="no-such@prod"):
        open_base(config)


def test_bad_rows_are_left_out_and_listed_where_that_is_asked_for(
    values: dict[str, Any], lessons: Path
) -> None:
    file = lessons.parent / "partly.jsonl"
    file.write_text(lessons.read_text() + "no json\n")
    values["data"] = {"train": str(file), "max_tiles": 2, "on_bad_row": "skip"}
    config = TrainConfig.model_validate(values)
    data, validation = read_data(config, open_base(config))
    assert len(data.rows) == 45
    assert data.report is not None
    assert [p.place.number for p in data.report.problems] == [46]
    assert validation is None


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


def test_the_same_again_is_the_same(values: dict[str, Any]) -> None:
    check_same(record(values), record(values), "run")


def test_other_data_is_refused(values: dict[str, Any], lessons: Path, tmp_path: Path) -> None:
    before = record(values)
    lines = lessons.read_text().splitlines()[3:]
    other = lessons.parent / f"{tmp_path.name}.jsonl"
    other.write_text("\n".join(lines))
    now = record({**values, "data": {"train": str(other), "max_tiles": 2}})
    assert "the training data is another" in refused(before, now)


def test_another_recipe_is_refused_with_its_keys(values: dict[str, Any]) -> None:
    changed = {**values, "lora": {"rank": 8}, "training": {"seed": 1}}
    message = refused(record(values), record(changed))
    assert "lora.rank was 64 and is 8" in message
    assert "training.seed was 0 and is 1" in message


def test_other_weights_are_refused(values: dict[str, Any], lessons: Path) -> None:
    before = record(values)
    values["data"]["train"] = [{"path": str(lessons), "weight": 2.0}]
    assert "the data sets' weights were [1.0], are [2.0]" in refused(before, record(values))
