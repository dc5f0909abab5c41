"""Every metric of observe.py: in the table of docs/operations.md, and on the Grafana board."""

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from xc_ray.serve import observe
from xc_ray.serve.observe import STATE_S, DecoderMetrics, join_logs

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "grafana" / "xc_ray.json"
# What Ray's exporter appends to a name, by kind (tests/e2e/test_metrics.py reads it from one).
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def metrics() -> dict[str, str]:
    """The kind of each metric, by name."""
    assert observe.__file__ is not None
    tree = ast.parse(Path(observe.__file__).read_text(encoding="utf-8"))
    return {
        str(call.args[0].value): call.func.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in SUFFIXES
        and isinstance(call.args[0], ast.Constant)
    }


def board() -> dict[str, Any]:
    found = json.loads(BOARD.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_page_has_a_row_for_each_with_its_kind() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(xc_ray_\w+)` \| (\w+) \|", page, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert dict(rows) == {name: kind.lower() for name, kind in metrics().items()}


def test_the_board_asks_for_what_the_exporter_has_and_leaves_nothing_out() -> None:
    known = {f"ray_{n}{s}": n for n, kind in metrics().items() for s in SUFFIXES[kind]}
    asked = re.findall(r"\bray_\w+", BOARD.read_text(encoding="utf-8"))
    assert set(asked) <= set(known)
    assert {known[name] for name in asked} == set(metrics())


def test_the_boards_panels_stand_apart_and_ask_something() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        places = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not places & taken
        taken |= places
        assert panel["type"] == "row" or all(t["expr"] for t in panel["targets"])
    assert max(x for x, _ in taken) < 24


def test_the_engines_state_is_due_once_a_second() -> None:
    now = 0.0
    told = DecoderMetrics(lambda: now)
    assert told.is_due()
    told.state(0.5, 1, 0, 0)
    now = STATE_S / 2
    assert not told.is_due()
    now = STATE_S
    assert told.is_due()


def test_what_the_package_logs_elsewhere_goes_where_serves_lines_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = logging.getLogger("xc_ray")
    monkeypatch.setattr(package, "parent", logging.getLogger())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    try:
        logging.getLogger("xc_ray.engine.engine").error("one")
        join_logs()
        logging.getLogger("xc_ray.engine.engine").error("two")
    finally:
        logger.removeHandler(handler)
    assert lines == ["two"]
