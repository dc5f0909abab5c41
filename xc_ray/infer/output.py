"""The output of an inference: a line a row, kept whatever ends it, and continued by the same run.

    out.jsonl           rows as they end; in the order of the data set once all have
    out.summary.json    {"settings": what made it, "summary": its figures, null until all are done}

A line that is there is kept if its `key` fits: the digest of the settings and of its row. Rows that
ended in an error are tried again, and half a line at the end is dropped.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Self

from xc_ray.errors import ConfigError
from xc_ray.infer.rows import Row
from xc_ray.registry.lock import Lock

Settings = Mapping[str, Any]
KEY_CHARS = 32
# How something was called does not count: what it is does, by a digest beside it or the rows' keys.
NAMES = frozenset({"model", "adapter", "dataset"})
_HINT = "name another --output, or begin anew with --overwrite"


@dataclass(frozen=True)
class Line:
    """A line on the disk: of which row, and where, in bytes."""

    index: int
    key: str
    failed: bool
    start: int
    size: int


class Output:
    """One output file, held against other processes while it is open."""

    def __init__(self, path: Path, settings: Settings, lock: Lock) -> None:
        self.path = path
        self.settings = dict(settings)
        self._lock = lock
        self._lines: dict[int, Line] = {}
        self._file: IO[bytes] | None = None

    @classmethod
    def open(cls, path: Path, settings: Settings, *, overwrite: bool = False) -> "Output":
        """Looks at what is there; nothing is changed before `start`.

        Raises:
            ConfigError: another process writes it, it was made with other settings, or it is no
                output of an inference.
            OSError: it cannot be read, or there is no such folder.
        """
        lock = Lock.try_take(path.parent / f".{path.name}.lock")
        if lock is None:
            raise ConfigError(f"another process writes {path} now; wait for it")
        output = cls(path, settings, lock)
        try:
            if not overwrite and path.exists() and path.stat().st_size:
                output._compare()
                output._lines = {line.index: line for line in _lines(path) if not line.failed}
        except BaseException:
            lock.remove()
            raise
        return output

    @property
    def summary_path(self) -> Path:
        """The file beside it."""
        return self.path.with_suffix(".summary.json")

    @property
    def num_kept(self) -> int:
        """Rows that have a line."""
        return len(self._lines)

    def keeps(self, row: Row) -> bool:
        """Whether a row has a line already.

        Raises:
            ConfigError: the line is of another row.
        """
        line = self._lines.get(row.index)
        if line is not None and line.key != self.key(row):
            raise ConfigError(
                f"{self.path} was made of another data set: row {row.index} is not the one of "
                f"{row.place}; {_HINT}"
            )
        return line is not None

    def check_rows(self, num_rows: int) -> None:
        """Refuses lines behind the last row.

        Raises:
            ConfigError: there are some.
        """
        last = max(self._lines, default=-1)
        if last >= num_rows:
            raise ConfigError(
                f"{self.path} holds row {last}, and of this data set {num_rows} rows (0 to "
                f"{num_rows - 1}) are asked for; raise --max-samples, {_HINT}"
            )

    def key(self, row: Row) -> str:
        """What the line of a row depends on."""
        counted = {k: v for k, v in self.settings.items() if k not in NAMES}
        question = row.question
        told = [question.as_json(), question.reference, question.unmarked] if question else None
        text = json.dumps([counted, row.index, told], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_CHARS]

    def start(self) -> None:
        """Writes down the settings, and drops the lines that are not kept."""
        kept = sorted(self._lines.values(), key=lambda line: line.start)
        if not kept:
            # In this order: lines never stand beside the settings of others.
            self.path.unlink(missing_ok=True)
        self._write_summary(None)
        if kept and self.path.stat().st_size != sum(line.size for line in kept):
            self._rewrite(kept)
        self._file = self.path.open("ab")

    def write(self, row: Row, line: Mapping[str, Any]) -> None:
        """Adds the line of a row; it is with the system when this returns."""
        assert self._file is not None
        failed, key = "error" in line, self.key(row)
        text = json.dumps({"index": row.index, **line, "key": key}, ensure_ascii=False)
        # Half a surrogate pair is no UTF-8; JSON can spell it out.
        data = text.encode(errors="backslashreplace") + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(data)
        self._file.flush()
        self._lines[row.index] = Line(row.index, key, failed, start, len(data))

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines in the order of the data set."""
        with self.path.open("rb") as f:
            for _, line in sorted(self._lines.items()):
                f.seek(line.start)
                yield json.loads(f.read(line.size))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Puts the lines into the order of the data set, and the figures beside them."""
        ordered = [line for _, line in sorted(self._lines.items())]
        if any(a.start > b.start for a, b in pairwise(ordered)):
            self._rewrite(ordered)
        self._write_summary(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.remove()

    def _compare(self) -> None:
        """Refuses what was made with other settings."""
        try:
            made = json.loads(self.summary_path.read_text(encoding="utf-8"))["settings"]
            differences = [
                _difference(key, made, self.settings)
                for key in sorted({*made, *self.settings} - NAMES)
                if made.get(key) != self.settings.get(key)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{self.path} exists, and {self.summary_path}, which says how it was made, cannot "
                f"be read; {_HINT}"
            ) from None
        if differences:
            raise ConfigError(f"{self.path} was made with {'; '.join(differences)}; {_HINT}")

    def _rewrite(self, lines: list[Line]) -> None:
        """The file with these lines in this order, replaced in one go."""
        moved, start = {}, 0
        with self.path.open("rb") as f, _replacing(self.path) as new:
            for line in lines:
                f.seek(line.start)
                new.write(f.read(line.size))
                moved[line.index] = Line(line.index, line.key, line.failed, start, line.size)
                start += line.size
        self._lines = moved

    def _write_summary(self, summary: Mapping[str, Any] | None) -> None:
        content = {"settings": self.settings, "summary": summary}
        with _replacing(self.summary_path) as f:
            f.write(json.dumps(content, indent=2).encode() + b"\n")


def _difference(key: str, made: Settings, now: Settings) -> str:
    """`another temperature (0.5, now 0.0)`; for a digest, what it is the digest of."""
    name = key.removesuffix("_digest")
    return f"another {name} ({_told(name, key, made)}, now {_told(name, key, now)})"


def _told(name: str, key: str, settings: Settings) -> str:
    value = settings.get(key)
    if key == name or value is None:
        return f"{value!r:.60}"
    return f"{settings.get(name)}, {value!s:.19}…"


def _lines(path: Path) -> Iterator[Line]:
    """The lines of a file but for a torn one at its end."""
    start, size = 0, path.stat().st_size
    with path.open("rb") as f:
        for number, data in enumerate(f, 1):
            end = start + len(data)
            try:
                line = json.loads(data)
                if data.endswith(b"\n"):
                    index, key = line["index"], line["key"]
                    yield Line(int(index), str(key), "error" in line, start, len(data))
            except (ValueError, KeyError, TypeError):
                if end < size:
                    raise ConfigError(
                        f"line {number} of {path} is not one of an inference; {_HINT}"
                    ) from None
            start = end


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of another when it is whole."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)
