"""Rows from files, folders, buckets and hubs: the same values wherever they lie."""

import builtins
import json
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.s3_server import S3Server
from xc_ray.errors import ConfigError, DataError, InvalidRequest, RegistryError
from xc_ray.registry.store import ObjectStore
from xc_ray.train.sources import NOT_JSON, absolute, open_source

ROWS = [{"query": "one?", "response": "1"}, {"query": "zwei", "response": "二"}]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, for hubs and data sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    datasets.disable_progress_bars()
    return tmp_path


def lines(rows: Iterable[object], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def values(name: str | Path) -> list[Any]:
    return [value for _, value in open_source(str(name)).rows()]


def numbers(name: str | Path) -> list[int]:
    return [number for number, _ in open_source(str(name)).rows()]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows", "rows.txt"])
@pytest.mark.parametrize(
    "data",
    [
        lines(ROWS),
        lines(ROWS, "\r\n"),
        lines(ROWS).rstrip(),
        b"\xef\xbb\xbf" + lines(ROWS),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
        b"\xef\xbb\xbf \r\n" + json.dumps(ROWS, indent=2).encode() + b"\n",
    ],
)
def test_a_list_and_lines_are_told_apart_by_their_content(
    tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path / name) == ROWS
    assert numbers(tmp_path / name) == [1, 2]
    assert open_source(str(tmp_path / name)).num_rows() == 2


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2), max_size=4))
def test_both_forms_of_a_file_hold_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    (folder / "b").write_text(json.dumps(rows))
    assert values(folder / "a") == values(folder / "b") == rows


def test_in_json_lines_a_row_has_the_number_of_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n" + lines(ROWS[:1]) + b"  \r\n\n" + lines(ROWS[1:]))
    assert values(file) == ROWS
    assert numbers(file) == [2, 5]
    assert open_source(str(file)).num_rows() == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"query": "a",', "line 2 is not JSON: Expecting property name .* at character 1[45]"),
        (b"{} {}", "line 2 is not JSON: Extra data at character 4"),
        (b'{"query": "\xff"}', "line 2 is not UTF-8: byte 12"),
        (b"[" * 100_000, "line 2 is nested too deeply"),
    ],
)
def test_a_bad_line_is_one_bad_row_and_the_next_are_read(
    tmp_path: Path, bad: bytes, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(ROWS[:1]) + bad + b"\n" + lines(ROWS[1:]))
    first, broken, last = values(file)
    assert [first, last] == ROWS
    assert isinstance(broken, InvalidRequest)
    assert re.match(message, broken.message)
    assert broken.message.endswith("; a line is one row, a JSON object")
    assert broken.code == NOT_JSON


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1},\n {"a": 2,}\n]', "line 2, column (9|10): .*; it begins as a list of rows"),
        (b'[{"a": 1},\n {"a": 2}', "line 2, column 10: Expecting ',' delimiter"),
        (b'["\xff"]', "is not UTF-8: byte 3"),
    ],
)
def test_a_list_that_is_no_json_is_an_error_with_its_place(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        values(tmp_path / "rows.json")


def test_an_empty_file_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n")
    assert values(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize(
    "name", ["nothing.jsonl", "data/nothing.json", "./a/b", "nothing", "a/b/c"]
)
def test_what_is_not_there_is_told_with_what_would_be(name: str) -> None:
    with pytest.raises(DataError, match=f"there is no data set '{name}': neither a file or folder"):
        open_source(name)


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    assert values(f"file://{tmp_path}/rows.jsonl") == ROWS


# ---------------------------------------------------------------- object storage


def test_rows_in_a_bucket_are_those_of_the_file(server: S3Server) -> None:
    bucket = server.make_bucket()
    ObjectStore.open(server.url(bucket)).put("set/a.jsonl", lines(ROWS))
    name = server.url(bucket, "set/a.jsonl")
    assert values(name) == ROWS
    source = open_source(name)
    assert source.num_rows() == 2
    picture = absolute("images/a 1.png", source.home)
    assert picture.startswith(f"s3://{bucket}/set/images/a%201.png?endpoint=")
    assert absolute("../b.png", source.home).startswith(f"s3://{bucket}/b.png?")


def test_a_missing_object_and_a_bare_bucket_are_told(server: S3Server) -> None:
    bucket = server.make_bucket()
    with pytest.raises(DataError, match=r"there is no data set 's3://.*there is no 'a.jsonl'"):
        values(server.url(bucket, "a.jsonl"))
    with pytest.raises(DataError, match="names a bucket and no file in it"):
        open_source(server.url(bucket))
    with pytest.raises(RegistryError):
        values(server.url("no-such-bucket", "a.jsonl").replace(server.endpoint, "http://[::1]:9"))


@pytest.mark.parametrize(
    "name", ["http://host/rows.jsonl", "ftp://host/rows", "s3://bucket/a?colour=red"]
)
def test_an_address_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="storage"):
        values(name)


# ---------------------------------------------------------------- pictures' places


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        ("a.png", "/data/set/a.png"),
        ("../x/./a.png", "/data/x/a.png"),
        ("/b/a.png", "/b/a.png"),
        ("file:///b/a%20b.png", "/b/a b.png"),
        ("https://host/a.png", "https://host/a.png"),
        ("HTTP://host/a.png", "HTTP://host/a.png"),
        ("data:image/png;base64,AA", "data:image/png;base64,AA"),
        ("s3://bucket/a.png", "s3://bucket/a.png"),
    ],
)
def test_relative_paths_begin_at_the_file(picture: str, found: str) -> None:
    assert absolute(picture, "/data/set") == found


def test_a_picture_that_can_be_nowhere_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"'file://host/a.png' is nowhere: .* names the host"):
        absolute("file://host/a.png", "/data")
    with pytest.raises(InvalidRequest, match=r"is nowhere"):
        absolute("\ud800.png", "s3://bucket/set")


def test_paths_and_addresses_beside_an_object() -> None:
    assert absolute("a?#.png", "gs://bucket/set") == "gs://bucket/set/a%3F%23.png"
    assert absolute("a.png", "az://box?account=me") == "az://box/a.png?account=me"
    assert absolute("/b/a.png", "gs://bucket/set") == "/b/a.png"


# ---------------------------------------------------------------- folders of `datasets`


def with_pictures(picture: bytes) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": picture, "path": None}] * 2,
        "images": [[{"bytes": picture, "path": "a.png"}], []],
        "caption": ["A cat.", "A dog."],
    }
    features = datasets.Features(
        image=datasets.Image(),
        images=datasets.List(datasets.Image()),
        caption=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_data_set_gives_pictures_as_the_files_they_were(
    tmp_path: Path, picture: Any
) -> None:
    file = picture(8, 8, file_format="JPEG")
    made = with_pictures(file)
    made.save_to_disk(tmp_path / "one")
    first, second = values(tmp_path / "one")
    assert first["image"] == {"bytes": file, "path": None}
    assert first["images"][0]["bytes"] == file
    assert (second["images"], second["caption"]) == ([], "A dog.")
    datasets.DatasetDict(train=made, validation=made.select([1])).save_to_disk(tmp_path / "two")
    assert len(values(tmp_path / "two")) == 2
    for prefix in ("", "hf:", "modelscope:"):
        assert numbers(f"{prefix}{tmp_path}/two:validation") == [1]
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation: write"):
        open_source(f"{tmp_path}/two:test")


def test_a_folder_is_read_as_datasets_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("pets")  # `datasets` takes a split's name from any folder's
    with_pictures(b"GIF").to_parquet(folder / "data" / "train-00000.parquet")
    assert [row["caption"] for row in values(folder)] == ["A cat.", "A dog."]
    assert len(values(f"{folder}:train[:1]")) == 1
    with pytest.raises(DataError, match=r"cannot read the data set in .*Unknown split"):
        open_source(f"{folder}:test")


def test_a_folder_with_json_of_the_split_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "validation.json").write_text(json.dumps(ROWS[:1]))
    assert values(tmp_path) == ROWS
    assert values(f"{tmp_path}:validation") == ROWS[:1]
    assert open_source(str(tmp_path)).home == str(tmp_path)


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot read the data set in .*empty"):
        open_source(str(tmp_path / "empty"))


# ---------------------------------------------------------------- hubs


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:org/name", ("org/name", None)),
        ("org/name", ("org/name", None)),
        ("org/name:validation", ("org/name", "validation")),
        ("hf:org/na.me-1:train[:10%]", ("org/na.me-1", "train[:10%]")),
    ],
)
def test_a_hub_name_is_asked_of_hugging_face(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None]
) -> None:
    calls = []

    def load(repo: str, split: str | None) -> Any:
        calls.append((repo, split))
        one = datasets.Dataset.from_list(ROWS)
        return one if split else datasets.DatasetDict(validation=one.select([0]), train=one)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values(name) == ROWS
    assert calls == [asked]


def test_what_hugging_face_says_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(repo: str, split: str | None) -> Any:
        raise OSError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    told = (
        "no file or folder 'org/name' here, and Hugging Face does not give the data set: no route"
    )
    with pytest.raises(DataError, match=told):
        open_source("org/name")


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Its package, at the seam where it would go to the network."""
    module = types.ModuleType("modelscope")
    monkeypatch.setitem(sys.modules, "modelscope", module)
    return module


def test_a_modelscope_data_set_is_fetched_without_its_code(
    modelscope: types.ModuleType, tmp_path: Path
) -> None:
    fetched = []

    def snapshot(repo: str, ignore_patterns: list[str]) -> str:
        fetched.append((repo, ignore_patterns))
        (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
        return str(tmp_path)

    modelscope.dataset_snapshot_download = snapshot  # type: ignore[attr-defined]
    assert values("modelscope:org/name") == ROWS
    assert fetched == [("org/name", ["*.py"])]


def test_coco_en_mini_is_the_validation_split_of_modelscopes(
    modelscope: types.ModuleType, tmp_path: Path
) -> None:
    fetched = []

    def snapshot(repo: str, ignore_patterns: list[str]) -> str:
        fetched.append(repo)
        folder = tmp_path / "coco_2014_caption"
        with_pictures(b"GIF").to_parquet(folder / "train.parquet")
        with_pictures(b"PNG").select([1]).to_parquet(folder / "validation.parquet")
        return str(folder)

    modelscope.dataset_snapshot_download = snapshot  # type: ignore[attr-defined]
    (row,) = values("coco-en-mini")
    assert (row["caption"], row["image"]["bytes"]) == ("A dog.", b"PNG")
    assert len(values("coco-en-mini:train")) == 2
    assert fetched == ["modelscope/coco_2014_caption"] * 2


def test_what_modelscope_says_is_told(modelscope: types.ModuleType) -> None:
    def snapshot(repo: str, ignore_patterns: list[str]) -> str:
        raise ValueError("no such repo")

    modelscope.dataset_snapshot_download = snapshot  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"ModelScope does not give .*'org/name': no such repo"):
        open_source("modelscope:org/name")


@pytest.mark.parametrize(
    ("name", "package", "told"),
    [
        ("org/name", "datasets", r"needs the package datasets: pip install 'xc-ray\[datasets\]'"),
        ("modelscope:org/name", "modelscope", r"pip install 'xc-ray\[datasets,modelscope\]'"),
    ],
)
def test_a_missing_package_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, told: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=told):
        open_source(name)


def test_the_demo_lesson_is_drawn_once_into_the_cache(home: Path) -> None:
    whole = values("demo-json")
    assert whole == values("demo-json:train")
    assert values("demo-json:validation") != whole
    assert open_source("demo-json").home.startswith(str(home / "cache" / "xc_ray"))
    with pytest.raises(DataError, match="no split 'test'; it has train and validation"):
        open_source("demo-json:test")
