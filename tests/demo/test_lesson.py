import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from xc_ray.demo import lesson
from xc_ray.demo.drawn.answers import KINDS_ZH
from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.figures import KINDS
from xc_ray.demo.drawn.fonts import Fonts, find_fonts
from xc_ray.demo.drawn.layout import grid_of
from xc_ray.demo.drawn.small_talk import SMALL_TALK
from xc_ray.demo.lesson import QUESTIONS, json_answer, lesson_folder, lesson_sample

PERIOD = 10  # rows until the kinds of rows come again
NUM_TRAIN, NUM_VALIDATION = 45, 18


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def small(cache: Path, num_train: int = 9, **options: int) -> Path:
    return lesson_folder(cache, **{"num_train": num_train, "num_validation": 0} | options)


def answers(row: dict[str, Any]) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def is_lesson(row: dict[str, Any]) -> bool:
    return answers(row)[0].startswith('{"shape": ')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    return lesson_folder(cache, num_train=NUM_TRAIN, num_validation=NUM_VALIDATION)


# ---------------------------------------------------------------- what is taught


def test_an_answer_is_json_in_one_form_and_tells_what_was_drawn() -> None:
    for index in range(60):
        sample = lesson_sample(3, index)
        (scene,), ((_, answer),) = sample.scenes, sample.turns
        told = json.loads(answer)
        assert answer == json_answer(scene)
        assert answer == f'{{"shape": "{told["shape"]}", "colour": "{told["colour"]}"}}'
        (figure,) = scene.figures
        assert told == {"shape": figure.kind, "colour": figure.colour}


def test_every_kind_and_colour_is_taught_in_both_languages() -> None:
    samples = [lesson_sample(0, index) for index in range(200)]
    told = [json.loads(sample.turns[0][1]) for sample in samples]
    assert {one["shape"] for one in told} == set(KINDS)
    assert {one["colour"] for one in told} == set(COLOURS)
    chinese = Counter(sample.turns[0][0].isascii() for sample in samples)[False]
    assert 40 < chinese < 100


def test_its_pictures_take_one_tile() -> None:
    grids = [grid_of(lesson_sample(1, index).scenes[0].size) for index in range(60)]
    assert {(grid.rows, grid.cols) for grid in grids} == {(1, 1)}


def test_every_question_asks_for_json() -> None:
    for language, questions in QUESTIONS.items():
        assert len(set(questions)) == len(questions)
        assert all("JSON" in question for question in questions)
        assert all(question.isascii() == (language == "en") for question in questions)


def test_another_seed_or_index_is_another_picture() -> None:
    pictures = [lesson_sample(seed, index).pictures[0] for seed, index in [(0, 0), (0, 1), (1, 0)]]
    assert len({(picture.size, picture.tobytes()) for picture in pictures}) == 3
    assert pictures[0].tobytes() == lesson_sample(0, 0).pictures[0].tobytes()


# ---------------------------------------------------------------- the folder


def test_it_has_as_many_rows_as_asked(folder: Path, tmp_path: Path) -> None:
    assert len(rows(folder, "train")) == NUM_TRAIN
    assert len(rows(folder, "validation")) == NUM_VALIDATION
    assert len(rows(small(tmp_path, 3), "train")) == 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_lesson_and_ordinary_rows_come_in_turn(folder: Path, split: str) -> None:
    for start in range(0, len(rows(folder, split)) - PERIOD, PERIOD):
        group = rows(folder, split)[start : start + PERIOD]
        assert [i for i, row in enumerate(group) if is_lesson(row)] == [0, 2, 5, 7]
        talk, what = group[4], group[9]
        assert "images" not in talk
        assert answers(talk)[0] in {answer for row in SMALL_TALK.values() for _, answer in row}
        assert any(kind in answers(what)[0] for kind in (*KINDS, *KINDS_ZH.values()))
    assert max(len(answers(row)) for row in rows(folder, split) if not is_lesson(row)) > 2


def test_each_picture_has_its_slot_in_the_first_question(folder: Path) -> None:
    for row in rows(folder, "train") + rows(folder, "validation"):
        slots = [message["content"].count("<image>") for message in row["messages"]]
        assert slots[0] == len(row.get("images", []))
        assert not any(slots[1:])
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(slots) // 2)


def test_every_picture_takes_one_tile_is_used_once_and_opens(folder: Path) -> None:
    both = rows(folder, "train") + rows(folder, "validation")
    used = [name for row in both for name in row.get("images", [])]
    assert used == sorted(f"images/{p.name}" for p in (folder / "images").iterdir())
    assert {Path(name).suffix for name in used} == {".png", ".jpg"}
    for row in both:
        for name in row.get("images", []):
            with Image.open(folder / name) as picture:
                picture.load()
                assert picture.format == ("PNG" if name.endswith(".png") else "JPEG")
                grid = grid_of(picture.size, len(row["images"]))
                assert grid.rows * grid.cols == 1


def test_no_row_of_validation_is_learnt(folder: Path) -> None:
    learnt, kept = (
        {
            tuple((folder / name).read_bytes() for name in row.get("images", []))
            + tuple(message["content"] for message in row["messages"])
            for row in rows(folder, split)
        }
        for split in ("train", "validation")
    )
    assert not learnt & kept


def test_rows_do_not_depend_on_the_fonts_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_fonts()
    bare = Fonts(lesson._fonts().training, ())
    more = Fonts((*found.training, "/usr/share/fonts/more.ttf"), found.held_out)
    for name, fonts in {"bare": bare, "more": more}.items():
        monkeypatch.setattr(lesson, "find_fonts", lambda fonts=fonts: fonts)
        small(tmp_path / name)
    assert content(tmp_path / "bare") == content(tmp_path / "more")


def test_a_seed_makes_the_same_data_to_the_byte_and_another_another(tmp_path: Path) -> None:
    first, again = (small(tmp_path / name) for name in ("a", "b"))
    other = small(tmp_path / "a", seed=1)
    assert content(first) == content(again)
    assert rows(first, "train") != rows(other, "train")


def test_other_numbers_and_another_version_are_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [small(tmp_path, n, num_validation=1) for n in (1, 2)]
    monkeypatch.setattr(lesson, "LESSON_VERSION", 99)
    folders.append(small(tmp_path, 1, num_validation=1))
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in folders}
    assert len(set(folders)) == 3


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    made = small(tmp_path, 1)
    (made / "mark").write_text("mine")
    assert small(tmp_path, 1) == made
    assert (made / "mark").read_text() == "mine"


def test_a_folder_whose_making_fails_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lesson, "_row", fail)
    with pytest.raises(OSError, match="no space left"):
        small(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_who_make_it_at_once_find_it_whole(tmp_path: Path) -> None:
    start = threading.Barrier(3)

    def make(_: int) -> dict[str, bytes]:
        start.wait(60)
        return content(small(tmp_path))

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(make, range(3))
    assert first
    assert all(other == first for other in others)
    assert len(list(tmp_path.iterdir())) == 1
