"""Packs as they come to a step, and pictures that have gone or changed meanwhile."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from xc_ray.errors import DataError, RegistryError
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tiles import image_grid, make_canvas, open_image
from xc_ray.train.feed import AHEAD, Feed
from xc_ray.train.rows import CheckedRow
from xc_ray.train.store import RowStore, write_rows


@pytest.fixture
def moved(tmp_path: Path, checked_rows: list[CheckedRow]) -> list[CheckedRow]:
    """The rows with their pictures in a folder that a test may spoil."""
    rows = []
    for row in checked_rows:
        pictures = []
        for picture in row.pictures:
            source = shutil.copy(picture.source, tmp_path)
            pictures.append(replace(picture, source=str(source)))
        rows.append(replace(row, pictures=tuple(pictures)))
    return rows


def feed_of(rows: list[CheckedRow], tmp_path: Path, model: Path) -> Feed:
    config = Checkpoint.open(model).config
    path = tmp_path / "rows.arrow"
    write_rows(fs.LocalFileSystem(), str(path), rows)
    return Feed(RowStore.open(fs.LocalFileSystem(), str(path), config.decoder.vocab_size), config)


def test_a_pack_is_its_rows_end_to_end(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    rows = (2, 0, 1)  # two pictures, none, one
    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        (pack,) = feed.packs([rows])
    vocab = feed.config.decoder.vocab_size
    examples = [moved[i].example for i in rows]
    assert pack.lengths == tuple(len(e.ids) for e in examples)
    text = [i for e in examples for i in e.ids]
    assert [i if i < vocab else -1 for i in pack.ids.tolist()] == [
        i if i < vocab else -1 for i in text
    ]
    # Picture positions count the rows of all pictures of the pack, in order.
    image_rows = pack.ids[pack.ids >= vocab] - vocab
    assert image_rows.tolist() == list(range(len(image_rows)))
    labels = torch.tensor([label for e in examples for label in e.labels])
    assert pack.targets.tolist() == labels[labels >= 0].tolist()
    assert torch.equal(pack.wanted + 1, (labels >= 0).nonzero().squeeze(1))
    pictures = [p for i in rows for p in moved[i].pictures]
    assert len(pack.canvases) == len(pictures) == 3
    for canvas, picture in zip(pack.canvases, pictures, strict=True):
        image = open_image(Path(picture.source).read_bytes())
        assert canvas.numpy().tobytes() == make_canvas(image, picture.grid, tiled=True).tobytes()


def test_packs_come_in_the_order_that_was_asked_for(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    order = [(i,) for i in (5, 3, 8, 1, 2, 40, 7, 0, 9)]
    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        lengths = [pack.lengths[0] for pack in feed.packs(order)]
    assert lengths == [len(moved[i].example.ids) for (i,) in order]


def test_a_picture_that_has_gone_is_told_with_its_row(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        Path(moved[1].pictures[0].source).unlink()
        with pytest.raises(DataError) as caught:
            list(feed.packs([(0,), (1,)]))
    assert str(moved[1].place) in str(caught.value)
    assert "was there when the data was checked, and is not now" in str(caught.value)


def test_object_storage_that_is_away_says_nothing_about_the_picture(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    (picture,) = moved[1].pictures
    away = "s3://bucket/a.png?endpoint=http://127.0.0.1:9&timeout_s=0.1"
    moved[1] = replace(moved[1], pictures=(replace(picture, source=away),))
    with (
        feed_of(moved, tmp_path, tiny("2.5")) as feed,
        pytest.raises(RegistryError, match=r"127\.0\.0\.1:9"),
    ):
        list(feed.packs([(0,), (1,)]))


def test_a_picture_that_has_changed_is_told_with_its_row(
    moved: list[CheckedRow],
    tmp_path: Path,
    tiny: Callable[..., Path],
    picture: Callable[..., bytes],
) -> None:
    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        Path(moved[1].pictures[0].source).write_bytes(picture(44, 44, "pink"))
        with pytest.raises(DataError) as caught:
            feed.read((1,))
    assert str(moved[1].place) in str(caught.value)
    assert "has changed since the data was checked" in str(caught.value)


def test_the_first_pictures_of_a_row_are_given_by_their_number(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        both, first, none = (feed.canvases(2, count) for count in (None, 1, 0))
    assert (len(both), len(first), len(none)) == (2, 1, 0)
    assert torch.equal(first[0], both[0])


def test_a_family_without_tiles_has_its_pictures_resized_alone(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    config = Checkpoint.open(tiny("2.0")).config
    image = open_image(Path(moved[1].pictures[0].source).read_bytes())
    grid = image_grid(config, image.size, 1)
    moved[1] = replace(moved[1], pictures=(replace(moved[1].pictures[0], grid=grid),))
    with feed_of(moved, tmp_path, tiny("2.0")) as feed:
        (canvas,) = feed.canvases(1)
    plain, tiled = (make_canvas(image, grid, tiled=tiled).tobytes() for tiled in (False, True))
    assert canvas.numpy().tobytes() == plain != tiled


def test_a_picture_that_travels_with_its_row_is_not_looked_for(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    (picture,) = moved[1].pictures
    data = Path(picture.source).read_bytes()
    moved.append(replace(moved[1], pictures=(replace(picture, source="", data=data),)))
    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        (own,), (read,) = feed.canvases(len(moved) - 1), feed.canvases(1)
    assert torch.equal(own, read)


def test_a_few_packs_are_read_ahead_and_no_more(
    moved: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    asked = []

    def rows() -> Iterator[tuple[int]]:
        for index in range(20):
            asked.append(index)
            yield (index,)

    with feed_of(moved, tmp_path, tiny("2.5")) as feed:
        packs = feed.packs(rows())
        for taken in range(3):
            next(packs)
            assert len(asked) == taken + 1 + AHEAD
