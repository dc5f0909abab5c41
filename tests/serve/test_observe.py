"""Every metric of observe.py: in the table of docs/operations.md, and on the Grafana board."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.exported import exported, metrics
from xc_ray.serve import observe
from xc_ray.serve.observe import STATE_S, DecoderMetrics, join_logs

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "grafana" / "xc_ray.json"


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
    known = exported()
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
    join_logs()  # not in a replica
    assert package.parent is logging.getLogger()
    monkeypatch.setattr(observe, "_get_internal_replica_context", lambda: "a replica's")
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
