"""Conversations of a data set, with pictures that can be read from anywhere."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.local_http import Reply, serving
from tests.s3_server import S3Server
from xc_ray.errors import DataError, InvalidRequest, MediaError, RegistryError
from xc_ray.prompt.chat import ImageSlot, Message
from xc_ray.registry.store import ObjectStore
from xc_ray.train.reading import DataSet, read_picture
from xc_ray.train.rows import Conversation, Place


def write(file: Path, *rows: Any) -> str:
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(file)


def test_rows_become_conversations_or_the_reason_why_not(tmp_path: Path) -> None:
    name = write(
        tmp_path / "rows.jsonl",
        {"query": "<img>a.png</img>What?", "response": "This."},
        "{",
        {"question": "What?"},
        {"query": "Open?"},
    )
    rows = list(DataSet(name))
    assert [place for place, _ in rows] == [Place(name, i) for i in (1, 2, 3, 4)]
    first, broken, unknown, last = (said for _, said in rows)
    assert first == Conversation(
        (Message("user", (ImageSlot(0), "What?")), Message("assistant", ("This.",))),
        (str(tmp_path / "a.png"),),
    )
    assert isinstance(broken, InvalidRequest)
    assert isinstance(unknown, InvalidRequest)
    assert last == Conversation((Message("user", ("Open?",)),))


def test_a_data_set_may_be_read_again_and_knows_its_length(tmp_path: Path) -> None:
    rows = DataSet(write(tmp_path / "rows.jsonl", {"query": "a"}, "{"))
    assert len(rows) == 2
    assert [place for place, _ in rows] == [place for place, _ in rows]


def test_a_place_names_the_data_set_as_its_owner_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", {"query": "a"}, {"query": "b"})
    monkeypatch.chdir(tmp_path)
    places = [str(place) for place, _ in DataSet("rows.jsonl")]
    assert places == ["rows.jsonl:1", "rows.jsonl:2"]


def test_an_unknown_data_set_is_told_when_it_is_read() -> None:
    with pytest.raises(DataError, match=r"there is no data set 'nothing.jsonl'"):
        next(iter(DataSet("nothing.jsonl")))


def test_pictures_beside_a_file_and_in_it(tmp_path: Path, picture: Any) -> None:
    data = picture()
    (tmp_path / "a b.png").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    sources = ["a b.png", str(tmp_path / "a b.png"), f"file://{tmp_path}/a%20b.png", url]
    coded = [{"bytes": base64.b64encode(data).decode()}]
    name = write(tmp_path / "rows.jsonl", {"query": "What?", "images": sources + coded})
    ((_, said),) = DataSet(name)
    assert isinstance(said, Conversation)
    assert [read_picture(source) for source in said.pictures] == [data] * 5
    assert all(os.path.isabs(path) for path in said.pictures[:3] if isinstance(path, str))


def test_pictures_beside_an_object_are_in_its_bucket(server: S3Server, picture: Any) -> None:
    data, bucket = picture(), server.make_bucket()
    store = ObjectStore.open(server.url(bucket))
    row = {"query": "What?", "images": ["images/a.png", f"s3://{bucket}/b.png", "images/no.png"]}
    store.put("set/train.jsonl", json.dumps(row).encode())
    store.put("set/images/a.png", data)
    store.put("b.png", data)
    ((_, said),) = DataSet(server.url(bucket, "set/train.jsonl"))
    assert isinstance(said, Conversation)
    assert read_picture(said.pictures[0]) == data
    with pytest.raises(MediaError, match=r"cannot read the picture 's3://.*no 'set/images/no.png'"):
        read_picture(said.pictures[2])


def test_a_store_that_fails_says_nothing_about_the_picture() -> None:
    with pytest.raises(RegistryError):
        read_picture("s3://bucket/a.png?endpoint=http://127.0.0.1:9&timeout_s=0.1")


def test_pictures_from_an_address(picture: Any) -> None:
    with serving(lambda asked: Reply(picture())) as server:
        assert read_picture(f"{server.url}/a.png") == picture()


@pytest.mark.parametrize(
    "source", ["s3://bucket/a.png?colour=red", "s3://bucket", "s3://[bucket/a.png", "s3://b/a.png"]
)
def test_an_address_that_is_none_is_a_picture_that_cannot_be_read(source: str) -> None:
    with pytest.raises(MediaError, match=r"cannot read the picture 's3://"):
        read_picture(source)


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(MediaError, match=r"cannot read the picture '/no/a.png': No such file"):
        read_picture("/no/a.png")


def test_reading_and_checking_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, xc_ray.train.preflight, xc_ray.train.reading; "
        "print(sorted({'torch', 'ray', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
