"""`metrics.jsonl`: what a run measured at its steps, and the answers to validation rows.

The file is the truth: a run that goes on from a checkpoint continues it as if nothing had happened
since.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from xc_ray.errors import XcRayError


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, `{"step": 12, "kind": "train", "loss": 0.7}`.

    A line is a record once its line break is there. Numbers that JSON lacks (NaN, ±∞) are null.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", newline="\n")

    @classmethod
    def open(cls, path: Path, upto_step: int) -> Self:
        """Opens it to append, after what was recorded up to and including a step; 0 is the start.

        Later records and a torn last line are dropped.

        Raises:
            XcRayError: a line before the last is no record.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= upto_step]
            _replace(path, "".join(map(_line_of, kept)))
        return cls(path)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Appends a record; it is in the file when this returns."""
        assert not values.keys() & {"step", "kind"}, f"taken names in {sorted(values)}"
        self._file.write(_line_of({"step": step, "kind": kind, **values}))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a `metrics.jsonl`, in order, also while a run writes it.

    Raises:
        XcRayError: a line before the last is no record.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_record(path, number, line) for number, line in enumerate(lines, 1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise XcRayError(
            f"{path}:{number} is not a record of metrics (found {line!r:.80}); "
            "remove the line or move the file away"
        )
    return record


def _line_of(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(text, encoding="utf-8", newline="\n")
    whole.replace(path)
