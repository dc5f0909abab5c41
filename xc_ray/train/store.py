"""The checked rows of a data set as one file in the run's storage, which every worker reads.

An Arrow file (https://arrow.apache.org/docs/format/Columnar.html): a folder's is mapped into
memory, one in object storage is copied to the worker's disk first. Picture positions are not
written out: their ids follow from the spans.
"""

import base64
import json
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xc_ray.prompt.chat import ImageSlot
from xc_ray.prompt.sequence import ImageSpan
from xc_ray.prompt.tiles import Grid
from xc_ray.train.data import IGNORED
from xc_ray.train.plan import Sizes
from xc_ray.train.rows import CheckedRow, Conversation, Picture, Place

COPY_BYTES = 8 << 20
_PAIR = pa.list_(pa.int32(), 2)
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("number", pa.int64()),
        ("part", pa.int32()),
        ("tokens", pa.int64()),
        ("learnt", pa.int64()),
        ("ids", pa.list_(pa.int32())),  # of text alone, in order
        ("labels", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.list_(pa.int32(), 3))),  # image, start, length
        (
            "pictures",
            pa.list_(
                pa.struct(
                    [
                        ("source", pa.string()),
                        ("digest", pa.string()),
                        ("tiles", _PAIR),
                        ("content", _PAIR),
                        ("offset", _PAIR),
                        ("canvas", _PAIR),
                        ("data", pa.binary()),
                    ]
                )
            ),
        ),
        ("conversation", pa.string()),
    ]
)


class StoredRow:
    """One row as a worker reads it."""

    def __init__(self, values: dict[str, Any], vocab_size: int) -> None:
        self.place = Place(values["source"], values["number"])
        self.spans = tuple(ImageSpan(*span) for span in values["spans"])
        self.pictures = tuple(_picture(p) for p in values["pictures"])
        self.conversation: dict[str, Any] = json.loads(values["conversation"])
        self._text = np.asarray(values["ids"], np.int64)
        self._labels = np.asarray(values["labels"], np.int64)
        self._tokens, self._vocab = values["tokens"], vocab_size

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """(T,), picture positions as virtual ids `vocab_size + row`."""
        ids, text = self._whole(0)
        ids[text] = self._text
        ids[~text] = self._vocab + np.arange(len(ids) - len(self._text))
        return ids

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(T,), `IGNORED` where nothing is learnt."""
        labels, text = self._whole(IGNORED)
        labels[text] = self._labels
        return labels

    def _whole(self, fill: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        text = np.ones(self._tokens, bool)
        for span in self.spans:
            text[span.start : span.start + span.length] = False
        return np.full(self._tokens, fill, np.int64), text


class RowStore:
    """Rows by their index, read as they are asked for."""

    def __init__(self, table: pa.Table, vocab_size: int) -> None:
        self._table, self._vocab = table, vocab_size

    @classmethod
    def open(cls, filesystem: Any, path: str, vocab_size: int) -> "RowStore":
        """The rows of a file; `filesystem` is pyarrow's."""
        if filesystem.type_name == "local":
            return cls(pa.ipc.open_file(pa.memory_map(path)).read_all(), vocab_size)
        # A file without a name: it is gone when its last reader is.
        with tempfile.TemporaryFile() as copy, filesystem.open_input_stream(path) as source:
            while chunk := source.read(COPY_BYTES):
                copy.write(chunk)
            copy.flush()
            mapped = pa.memory_map(f"/proc/self/fd/{copy.fileno()}")
            return cls(pa.ipc.open_file(mapped).read_all(), vocab_size)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> StoredRow:
        return StoredRow(self._table.slice(index, 1).to_pylist()[0], self._vocab)

    @property
    def sizes(self) -> Sizes:
        """What a plan needs of the rows."""
        tokens, learnt, part = (
            self._table.column(name).to_numpy().astype(np.int64)
            for name in ("tokens", "learnt", "part")
        )
        return Sizes(tokens, learnt, part)

    def place(self, index: int) -> Place:
        """Where a row came from."""
        row = self._table.select(["source", "number"]).slice(index, 1).to_pylist()[0]
        return Place(row["source"], row["number"])

    def conversations(self) -> Iterable[dict[str, Any]]:
        """Every row as `conversation_json` gives it."""
        for text in self._table.column("conversation"):
            yield json.loads(text.as_py())


def write_rows(filesystem: Any, path: str, rows: Sequence[CheckedRow]) -> None:
    """Writes the file; `filesystem` is pyarrow's."""
    with (
        filesystem.open_output_stream(path) as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for start in range(0, len(rows), 1000):
            values = [_values(row) for row in rows[start : start + 1000]]
            writer.write_batch(pa.RecordBatch.from_pylist(values, _SCHEMA))


def conversation_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation in content parts, which `formats.parse_row` reads back as it was."""
    marked = any(isinstance(p, ImageSlot) for m in conversation.messages for p in m.parts)
    pictures = [_address(picture) for picture in conversation.pictures]

    def part(one: str | ImageSlot) -> dict[str, Any]:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        return {"type": "image", "image": pictures[one.index]}

    messages = [
        {"role": message.role, "content": [part(one) for one in message.parts]}
        for message in conversation.messages
    ]
    if pictures and not marked:  # the one whose place the family decides
        return {"messages": messages, "images": pictures}
    return {"messages": messages}


def _address(source: str | bytes) -> str:
    if isinstance(source, str):
        return source
    return f"data:application/octet-stream;base64,{base64.b64encode(source).decode()}"


def _values(row: CheckedRow) -> dict[str, Any]:
    ids, labels = np.asarray(row.example.ids), np.asarray(row.example.labels)
    text = np.ones(len(ids), bool)
    for span in row.example.spans:
        text[span.start : span.start + span.length] = False
    return {
        "source": row.place.source,
        "number": row.place.number,
        "part": row.part,
        "tokens": len(ids),
        "learnt": row.example.num_supervised,
        "ids": ids[text].tolist(),
        "labels": labels[text].tolist(),
        "spans": [[s.image, s.start, s.length] for s in row.example.spans],
        "pictures": [_picture_values(p) for p in row.pictures],
        "conversation": json.dumps(conversation_json(row.conversation), ensure_ascii=False),
    }


def _picture_values(picture: Picture) -> dict[str, Any]:
    grid = picture.grid
    return {
        "source": picture.source,
        "digest": picture.digest,
        "tiles": [grid.rows, grid.cols],
        "content": list(grid.content),
        "offset": list(grid.offset),
        "canvas": list(grid.canvas),
        "data": picture.data,
    }


def _picture(values: dict[str, Any]) -> Picture:
    content, offset, canvas = (
        (int(values[key][0]), int(values[key][1])) for key in ("content", "offset", "canvas")
    )
    rows, cols = values["tiles"]
    grid = Grid(rows, cols, content=content, offset=offset, canvas=canvas)
    return Picture(values["source"], values["digest"], grid, values["data"])
