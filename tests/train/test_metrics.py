import json
import math
from pathlib import Path

import pytest

from xc_ray.errors import XcRayError
from xc_ray.train.metrics import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_a_record_is_a_line_as_soon_as_it_is_written(path: Path) -> None:
    with MetricsFile.open(path, 0) as metrics:
        metrics.write(1, "train", {"loss": 0.5, "tokens": 12})
        assert path.read_text() == '{"step": 1, "kind": "train", "loss": 0.5, "tokens": 12}\n'
        metrics.write(1, "generation", {"answer": "红色\u2028", "scores": [1.0, 2]})
    assert read_metrics(path) == [
        {"step": 1, "kind": "train", "loss": 0.5, "tokens": 12},
        {"step": 1, "kind": "generation", "answer": "红色\u2028", "scores": [1.0, 2]},
    ]


def test_what_json_lacks_is_null(path: Path) -> None:
    with MetricsFile.open(path, 0) as metrics:
        metrics.write(1, "train", {"loss": math.nan, "norm": math.inf, "all": [1.0, -math.inf]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "kind": "train", "loss": None, "norm": None, "all": [1.0, None]}


@pytest.mark.parametrize("upto_step", [0, 1, 2, 9])
def test_a_run_that_goes_on_keeps_what_its_checkpoint_knew(path: Path, upto_step: int) -> None:
    written = [(1, "train"), (2, "train"), (2, "validation"), (3, "train")]
    with MetricsFile.open(path, 0) as metrics:
        for step, kind in written:
            metrics.write(step, kind, {"loss": 1.0})
    with MetricsFile.open(path, upto_step) as metrics:
        metrics.write(upto_step + 1, "train", {"loss": 9.0})
    kept = [(step, kind) for step, kind in written if step <= upto_step]
    assert [(r["step"], r["kind"]) for r in read_metrics(path)] == [
        *kept,
        (upto_step + 1, "train"),
    ]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_no_record_and_goes(path: Path) -> None:
    path.parent.mkdir()
    # Cut within a character, and at a place where the rest would still be JSON.
    for torn in ('{"step": 2, "kind": "红'.encode()[:-1], b'{"step": 2, "kind": "train"}'):
        path.write_bytes(b'{"step": 1, "kind": "train"}\n' + torn)
        assert read_metrics(path) == [{"step": 1, "kind": "train"}]
        with MetricsFile.open(path, 5) as metrics:
            metrics.write(2, "train", {})
        assert [r["step"] for r in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", [b"nonsense", b"\xff", b"[1]", b'{"kind": "train"}', b""])
def test_a_damaged_line_before_the_last_is_named(path: Path, line: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + line + b'\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(XcRayError, match=r"metrics\.jsonl:2 is not a record of metrics"):
        MetricsFile.open(path, 5)
    assert path.read_bytes() == before


def test_records_are_whole_if_the_run_ends_while_later_ones_are_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    before = b'{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n'
    path.write_bytes(before)

    def ended(self: Path, target: Path) -> None:
        assert path.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", ended)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile.open(path, 1)
    assert path.read_bytes() == before
