"""Where rows come from: a data set's name -> JSON values, each with its place.

train.jsonl · data/train.json              JSON Lines, or one list, told apart by their content
s3://bucket/prefix/train.jsonl?endpoint=…  the same in object storage (also gs:// and az://)
./folder[:SPLIT]                           SPLIT.jsonl or SPLIT.json in it, else as `datasets` reads
hf:ORG/NAME[:SPLIT] · ORG/NAME[:SPLIT]     a Hugging Face data set   (extra `datasets`)
modelscope:ORG/NAME[:SPLIT]                a ModelScope data set     (and extra `modelscope`)
demo-json[:SPLIT] · coco-en-mini           data sets with a name of their own

A split is `train` unless given. Pictures that a row names by a relative path lie beside its file.
"""

import copy
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from xc_ray.errors import ConfigError, DataError, InvalidRequest
from xc_ray.hub import cache_folder
from xc_ray.registry.location import Location
from xc_ray.registry.store import Missing, ObjectStore

# A value, or why there is none: a line that is no JSON is one bad row, the next are read.
Value: TypeAlias = Any | InvalidRequest
NOT_JSON = "invalid_json"  # the code of such an error
SHOWN_CHARS = 300  # of a library's message
BUCKET_SCHEMES = ("s3", "gs", "az")
_HUB_NAME = re.compile(r"(?:(hf|modelscope):)?([\w.-]+/[\w.-]+?)(?::([^:/]+(?:\[.*\])?))?")
_SPLIT = re.compile(r"(.+?):(\w+(?:\[[^\]]*\])?)")


class Source(Protocol):
    """Rows in order; `home` is the folder or address that their relative paths start from."""

    @property
    def home(self) -> str:
        """Empty if there is none."""

    def rows(self) -> Iterator[tuple[int, Value]]:
        """Each row's number, from 1, and its value."""

    def num_rows(self) -> int:
        """How many rows there are."""


def open_source(name: str) -> Source:
    """The data set that a name means; a missing one is told at the latest when it is read.

    Raises:
        ConfigError: an address that is none.
        DataError: no such data set, or a package that is missing.
        RegistryError: object storage fails.
    """
    head, _, split = name.partition(":")
    if head in _NAMED:
        return _NAMED[head](split)
    scheme = name.partition("://")[0] if "://" in name else ""
    if scheme and scheme != "file":
        return _StoredJson(name)
    path = Location.parse(name).prefix if scheme else os.path.expanduser(name)
    if os.path.isdir(path):
        return _folder(path, None)
    if os.path.exists(path):
        return _JsonFile(path)
    if (parts := _SPLIT.fullmatch(path)) and os.path.isdir(bare := _bare(parts[1])):
        return _folder(bare, parts[2])
    if os.path.isdir(bare := _bare(path)):
        return _folder(bare, None)
    hub = _HUB_NAME.fullmatch(name)
    if hub is None or name.startswith(".") or name.endswith((".json", ".jsonl")):
        raise DataError(
            f"there is no data set {name!r}: neither a file or folder, nor an address in object "
            f"storage, nor hf:ORG/NAME or modelscope:ORG/NAME, nor one of {', '.join(_NAMED)}"
        )
    if hub[1] == "modelscope":
        return _from_modelscope(hub[2], hub[3])
    return _from_hugging_face(hub[2], hub[3])


def _bare(path: str) -> str:
    """A local folder may be written as if it were on a hub."""
    return os.path.expanduser(re.sub(r"^(hf|modelscope):", "", path))


# ---------------------------------------------------------------- JSON


class _Json:
    """Rows of a JSON text: a list, or JSON Lines."""

    home: str

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self) -> BinaryIO:
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[int, Value]]:
        if self._list is not None:
            yield from enumerate(self._list, 1)
            return
        with self.open() as lines:
            for number, line in enumerate(lines, 1):
                line = _without_bom(line, number).strip()
                if line:
                    yield number, _parsed(line, number)

    def num_rows(self) -> int:
        if self._list is not None:
            return len(self._list)
        with self.open() as lines:
            return sum(bool(_without_bom(line, i).strip()) for i, line in enumerate(lines, 1))

    @cached_property
    def _list(self) -> list[Any] | None:
        """The rows of a text that begins as a list; None for JSON Lines."""
        with self.open() as lines:
            texts = (_without_bom(line, i).strip() for i, line in enumerate(lines, 1))
            if not next((text for text in texts if text), b"").startswith(b"["):
                return None
        with self.open() as whole:
            return _parsed_list(whole.read(), self.name)


class _JsonFile(_Json):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.home = os.path.dirname(os.path.abspath(path))

    def open(self) -> BinaryIO:
        try:
            return open(self.name, "rb")
        except OSError as e:
            raise DataError(f"cannot read {self.name}: {e.strerror or e}") from None


class _StoredJson(_Json):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.home = beside(address)

    def open(self) -> BinaryIO:
        return io.BytesIO(self._data)

    @cached_property
    def _data(self) -> bytes:
        store, key = stored(self.name)
        try:
            return store.get(key)
        except Missing as e:
            raise DataError(f"there is no data set {self.name!r}: {e.message}") from None


def _without_bom(line: bytes, number: int) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parsed(line: bytes, number: int) -> Value:
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as e:
        what = f"line {number} is not JSON: {e.msg} at character {e.pos + 1}"
    except UnicodeDecodeError as e:
        what = f"line {number} is not UTF-8: byte {e.start + 1}"
    except RecursionError:
        what = f"line {number} is nested too deeply"
    return InvalidRequest(f"{what}; a line is one row, a JSON object", code=NOT_JSON)


def _parsed_list(data: bytes, name: str) -> list[Any]:
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as e:
        raise DataError(
            f"{name}: line {e.lineno}, column {e.colno}: {e.msg}; it begins as a list of rows, "
            "and is not JSON from there on"
        ) from None
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8: byte {e.start + 1:,}") from None
    except RecursionError:
        raise DataError(f"{name} is nested too deeply") from None
    return rows  # type: ignore[no-any-return]  # what begins with [ is a list


# ---------------------------------------------------------------- addresses


def absolute(picture: str, home: str) -> str:
    """A picture's path, URL or address, relative ones from `home`; URLs are left as they are.

    Raises:
        InvalidRequest: a file:// address of another machine, or a name that is no Unicode.
    """
    try:
        return _absolute(picture, home)
    except (ConfigError, ValueError) as e:  # the second: half a surrogate pair
        raise InvalidRequest(f"the picture {picture!r:.200} is nowhere: {e}") from None


def _absolute(picture: str, home: str) -> str:
    scheme = picture[:8].lower()
    if scheme.startswith(("http://", "https://", "data:")) or is_stored(picture):
        return picture
    if scheme.startswith("file://"):
        return Location.parse(picture).prefix
    path = os.path.expanduser(picture)
    if os.path.isabs(path) or not is_stored(home):
        return os.path.abspath(os.path.join(home, path))
    parts = urlsplit(home)
    key = posixpath.normpath(posixpath.join(unquote(parts.path) or "/", path))
    return urlunsplit(parts._replace(path=quote(key)))


def is_stored(address: str) -> bool:
    """Whether it is an address in object storage."""
    return address.startswith(tuple(f"{scheme}://" for scheme in BUCKET_SCHEMES))


def stored(address: str) -> tuple[ObjectStore, str]:
    """The bucket of an object's address, and the key there.

    Raises:
        ConfigError: an address that is none.
        DataError: it names no object.
    """
    try:
        parts = urlsplit(address)
    except ValueError as e:
        raise ConfigError(f"{address!r:.200} is not an address ({e})") from None
    key = unquote(parts.path).strip("/")
    store = _bucket(urlunsplit(parts._replace(path="")))
    if not key:
        raise DataError(f"{address!r} names a bucket and no file in it; write s3://BUCKET/FILE")
    return store, key


def beside(address: str) -> str:
    """The address of an object's folder, endpoint and all the options in it."""
    store, key = stored(address)
    parts = urlsplit(store.url)
    return urlunsplit(parts._replace(path=quote(posixpath.dirname(f"/{key}"))))


@lru_cache(maxsize=16)  # a client keeps its connections: pictures come from one bucket or a few
def _bucket(url: str) -> ObjectStore:
    return ObjectStore.open(url)


# ---------------------------------------------------------------- tables of `datasets`


@dataclass(frozen=True)
class _Table:
    """A data set of `datasets`."""

    dataset: Any
    home: str = ""

    def rows(self) -> Iterator[tuple[int, Value]]:
        yield from enumerate(self.dataset, 1)

    def num_rows(self) -> int:
        return len(self.dataset)


def _folder(path: str, split: str | None, subset: str | None = None) -> Source:
    for ending in ("jsonl", "json"):
        if os.path.isfile(file := os.path.join(path, f"{split or 'train'}.{ending}")):
            return _JsonFile(file)
    datasets = _datasets(path)
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
            found = datasets.load_from_disk(path)
        else:
            configs = datasets.get_dataset_config_names(path)
            found = datasets.load_dataset(path, subset if subset in configs else None, split=split)
    except Exception as e:  # noqa: BLE001 - `datasets` raises what its readers raise
        raise DataError(f"cannot read the data set in {path}: {_line(e)}") from None
    return _Table(_files_only(datasets, _one_split(found, path, split)), os.path.abspath(path))


_SAVED = ("dataset_dict.json", "state.json")  # of `Dataset.save_to_disk`


def _from_hugging_face(repo: str, split: str | None) -> Source:
    datasets = _datasets(repo)
    try:
        found = datasets.load_dataset(repo, split=split)
    except Exception as e:  # noqa: BLE001 - its own, its HTTP client's, and those of its readers
        raise DataError(
            f"no file or folder {repo!r} here, and Hugging Face does not give the data set: "
            f"{_line(e)}"
        ) from None
    return _Table(_files_only(datasets, _one_split(found, repo, split)))


def _from_modelscope(repo: str, split: str | None, subset: str | None = None) -> Source:
    """Its files are fetched, its loading script, if it has one, is not: no code from there runs."""
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        raise DataError(
            f"the data set {repo!r} is on ModelScope and needs its package: "
            "pip install 'xc-ray[datasets,modelscope]'"
        ) from None
    try:
        folder = dataset_snapshot_download(repo, ignore_patterns=["*.py"])
    except Exception as e:  # noqa: BLE001 - modelscope raises a dozen unrelated types
        raise DataError(f"ModelScope does not give the data set {repo!r}: {_line(e)}") from None
    return _folder(folder, split, subset)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"the data set {name!r} needs the package datasets: pip install 'xc-ray[datasets]'"
        ) from None
    return datasets


def _one_split(found: Any, name: str, split: str | None) -> Any:
    if not isinstance(found, Mapping):
        return found
    wanted = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if wanted not in found:
        raise DataError(
            f"the data set {name!r} has no split {wanted!r}; it has {', '.join(found)}: "
            f"write {name}:{next(iter(found))}"
        )
    return found[wanted]


def _files_only(datasets: Any, dataset: Any) -> Any:
    """The data set with pictures as the files they came from, not as pixels."""
    for name, feature in dataset.features.items():
        plain = copy.deepcopy(feature)
        if _undecode(datasets, plain):
            dataset = dataset.cast_column(name, plain)
    return dataset


def _undecode(datasets: Any, feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        feature.decode = False
        return True
    if isinstance(feature, Mapping):
        inner = list(feature.values())
    elif isinstance(feature, list | tuple):
        inner = list(feature)
    else:
        inner = [feature.feature] if hasattr(feature, "feature") else []
    return any([_undecode(datasets, one) for one in inner])  # noqa: C419 - every one, not up to the first


def _line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words[:SHOWN_CHARS] or type(error).__name__


# ---------------------------------------------------------------- data sets with a name


def _demo_json(split: str) -> Source:
    from xc_ray.demo.lesson import lesson_folder

    file = Path(lesson_folder(cache_folder()), f"{split or 'train'}.jsonl")
    if not file.is_file():
        raise DataError(f"demo-json has no split {split!r}; it has train and validation")
    return _JsonFile(str(file))


def _coco_en_mini(split: str) -> Source:
    """The split that ms-swift's data set of this name is."""
    return _from_modelscope(
        "modelscope/coco_2014_caption", split or "validation", "coco_2014_caption"
    )


_NAMED: Mapping[str, Callable[[str], Source]] = {
    "demo-json": _demo_json,
    "coco-en-mini": _coco_en_mini,
}
