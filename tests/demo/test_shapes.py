import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from xc_ray.demo import shapes
from xc_ray.demo.shapes import shapes_folder

FORMS = 8  # rows until the forms come again


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("cache"))


def test_it_has_as_many_rows_as_asked(folder: Path, tmp_path: Path) -> None:
    assert (len(rows(folder, "train")), len(rows(folder, "validation"))) == (64, 16)
    small = shapes_folder(tmp_path, num_train=3, num_validation=0)
    assert (len(rows(small, "train")), len(rows(small, "validation"))) == (3, 0)


def test_each_picture_has_its_slot_in_the_first_question(folder: Path) -> None:
    for row in rows(folder, "train") + rows(folder, "validation"):
        slots = [message["content"].count("<image>") for message in row["messages"]]
        assert slots[0] == len(row.get("images", []))
        assert not any(slots[1:])
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(slots) // 2)


def test_every_picture_is_small_used_once_and_opens(folder: Path) -> None:
    both = rows(folder, "train") + rows(folder, "validation")
    used = [name for row in both for name in row.get("images", [])]
    assert used == sorted(f"images/{p.name}" for p in (folder / "images").iterdir())
    for name in used:
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert 64 <= min(picture.size) <= max(picture.size) <= 128
            assert len(picture.getcolors() or []) == 2  # a shape's and the background's


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_have_every_form(folder: Path, split: str) -> None:
    first = rows(folder, split)[:FORMS]
    assert {len(row.get("images", [])) for row in first} == {0, 1, 2}
    assert {len(row["messages"]) for row in first} == {2, 4}
    answers = [m["content"] for row in first for m in row["messages"] if m["role"] == "assistant"]
    assert any(a.isascii() for a in answers)
    assert any(not a.isascii() for a in answers)
    assert max(map(len, answers)) < 25


def test_an_answer_tells_the_colour_that_was_drawn(folder: Path) -> None:
    asked = [
        row
        for row in rows(folder, "train")
        if row["messages"][0]["content"] == "<image>What shape is it, and which colour?"
    ]
    assert len(asked) > 10
    for row in asked:
        _, colour, _kind = row["messages"][1]["content"].rstrip(".").split()
        rgb = shapes._COLOURS[colour][1]
        with Image.open(folder / row["images"][0]) as picture:
            assert rgb in {c for _, c in picture.getcolors() or []}


def test_a_seed_makes_the_same_data_to_the_byte_and_another_another(tmp_path: Path) -> None:
    first, again = (shapes_folder(tmp_path / name, num_train=8) for name in ("a", "b"))
    other = shapes_folder(tmp_path / "a", num_train=8, seed=1)
    assert content(first) == content(again)
    assert content(first)["images/0001.png"] != content(other)["images/0001.png"]


def test_other_numbers_and_another_version_are_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [shapes_folder(tmp_path, num_train=n, num_validation=1) for n in (1, 2)]
    monkeypatch.setattr(shapes, "SHAPES_VERSION", 99)
    folders.append(shapes_folder(tmp_path, num_train=1, num_validation=1))
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in folders}
    assert len(set(folders)) == 3


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    made = shapes_folder(tmp_path, num_train=1)
    (made / "mark").write_text("mine")
    assert shapes_folder(tmp_path, num_train=1) == made
    assert (made / "mark").read_text() == "mine"


def test_a_folder_whose_making_fails_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shapes, "_json", fail)
    with pytest.raises(OSError, match="no space left"):
        shapes_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_who_make_it_at_once_find_it_whole(tmp_path: Path) -> None:
    start = threading.Barrier(3)

    def make(_: int) -> dict[str, bytes]:
        start.wait(60)
        return content(shapes_folder(tmp_path, num_train=16))

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(make, range(3))
    assert first
    assert all(other == first for other in others)
    assert len(list(tmp_path.iterdir())) == 1
