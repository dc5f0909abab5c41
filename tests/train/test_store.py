"""Checked rows through the file that workers read."""

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pyarrow import fs

from tests.s3_server import S3Server
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.chat import ImageSlot, Message
from xc_ray.registry.store import ObjectStore
from xc_ray.train.formats import parse_row
from xc_ray.train.rows import CheckedRow, Conversation, Place
from xc_ray.train.store import RowStore, conversation_json, write_rows


def same(store: RowStore, rows: list[CheckedRow]) -> None:
    assert len(store) == len(rows)
    for index, row in enumerate(rows):
        read = store[index]
        assert read.ids.tolist() == row.example.ids
        assert read.labels.tolist() == row.example.labels
        assert (read.spans, read.pictures) == (row.example.spans, row.pictures)
        assert read.place == store.place(index) == row.place
        assert parse_row(read.conversation) == row.conversation
    sizes = store.sizes
    assert sizes.tokens.tolist() == [len(row.example.ids) for row in rows]
    assert sizes.learnt.tolist() == [row.example.num_supervised for row in rows]
    assert sizes.part.tolist() == [row.part for row in rows]


def test_rows_come_back_as_they_were_checked(
    checked_rows: list[CheckedRow], stored: Path, tiny: Callable[..., Path]
) -> None:
    vocab = Checkpoint.open(tiny("2.5")).config.decoder.vocab_size
    same(RowStore.open(fs.LocalFileSystem(), str(stored), vocab), checked_rows)


def test_rows_come_back_from_object_storage(
    checked_rows: list[CheckedRow], server: S3Server, tiny: Callable[..., Path]
) -> None:
    vocab = Checkpoint.open(tiny("2.5")).config.decoder.vocab_size
    filesystem, path = ObjectStore.open(server.url(server.make_bucket(), "runs")).filesystem()
    write_rows(filesystem, f"{path}/rows.arrow", checked_rows)
    same(RowStore.open(filesystem, f"{path}/rows.arrow", vocab), checked_rows)


def test_the_file_does_not_grow_with_the_pictures_tokens(
    checked_rows: list[CheckedRow], tmp_path: Path
) -> None:
    row = next(row for row in checked_rows if row.pictures)
    sizes = []
    for factor in (1, 50):
        span = row.example.spans[0]
        longer = replace(span, length=span.length * factor)
        more = longer.length - span.length
        at = span.start + span.length
        ids, labels = list(row.example.ids), list(row.example.labels)
        ids[at:at] = [2000] * more
        labels[at:at] = [-100] * more
        spans = (longer, *(replace(s, start=s.start + more) for s in row.example.spans[1:]))
        example = replace(row.example, ids=ids, labels=labels, spans=spans)
        path = tmp_path / f"{factor}.arrow"
        write_rows(fs.LocalFileSystem(), str(path), [replace(row, example=example)] * 100)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]


def test_bytes_travel_in_the_file(checked_rows: list[CheckedRow], tmp_path: Path) -> None:
    row = next(row for row in checked_rows if row.pictures)
    data = np.arange(256, dtype=np.uint8).tobytes()
    picture = replace(row.pictures[0], source="", data=data)
    row = replace(row, pictures=(picture, *row.pictures[1:]))
    write_rows(fs.LocalFileSystem(), str(tmp_path / "x"), [row])
    assert RowStore.open(fs.LocalFileSystem(), str(tmp_path / "x"), 9)[0].pictures == row.pictures


def test_a_conversation_is_written_so_that_it_is_read_as_it_was() -> None:
    """Marks that somebody typed stay text; bytes become a data URL."""
    talk = Conversation(
        (
            Message("system", ("Be <image> kind.",)),
            Message("user", ("One: ", ImageSlot(0), " two: ", ImageSlot(1), "<ImageHere>?")),
            Message("assistant", ("They differ.",)),
        ),
        ("/somewhere/a.png", b"bytes"),
    )
    read = parse_row(conversation_json(talk))
    assert read.messages == talk.messages
    first, second = read.pictures
    assert first == "/somewhere/a.png"
    assert isinstance(second, str)
    assert base64.b64decode(second.partition(",")[2]) == b"bytes"
    plain = Conversation((Message("user", ("What?",)), Message("assistant", ("It.",))), ("a.png",))
    assert parse_row(conversation_json(plain)) == plain


def test_data_set_number_and_grid_come_back_whatever_they_are(
    checked_rows: list[CheckedRow], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    row = next(row for row in checked_rows if row.pictures)
    grid = replace(row.pictures[0].grid, content=(44, 33), offset=(5, 7), canvas=(56, 47))
    picture = replace(row.pictures[0], grid=grid)
    row = replace(
        row, part=3, place=Place("another.jsonl", 712), pictures=(picture, *row.pictures[1:])
    )
    write_rows(fs.LocalFileSystem(), str(tmp_path / "x"), [row])
    vocab = Checkpoint.open(tiny("2.5")).config.decoder.vocab_size
    same(RowStore.open(fs.LocalFileSystem(), str(tmp_path / "x"), vocab), [row])
