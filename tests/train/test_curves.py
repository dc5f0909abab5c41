import io
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from xc_ray.train.curves import MAX_PLAIN_POINTS, _curve, _running_mean, plot_curves
from xc_ray.train.metrics import MetricsFile, read_metrics

BLUE, ORANGE, GRAY = (31, 119, 180), (255, 127, 14), (127, 127, 127)  # matplotlib's tab: colours


def train(num: int) -> list[dict[str, Any]]:
    return [
        {"step": i, "kind": "train", "loss": 2 / i, "learning_rate": 1e-4 / i}
        for i in range(1, num + 1)
    ]


def colours(png: bytes | None) -> dict[Any, int]:
    assert png is not None
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.size) == ("PNG", (800, 550))
    return {colour: n for n, colour in image.convert("RGB").getcolors(1 << 20) or []}


VALIDATION = [{"step": 5, "kind": "validation", "loss": 1.0}]


def test_the_picture_shows_both_losses_and_the_rate() -> None:
    shown = colours(plot_curves(train(10) + VALIDATION, "a run"))
    assert {BLUE, ORANGE, GRAY} <= shown.keys()


@pytest.mark.parametrize(
    ("records", "absent"), [(train(10), ORANGE), (VALIDATION, BLUE)], ids=["train", "validation"]
)
def test_one_loss_alone_is_drawn(records: list[dict[str, Any]], absent: tuple[int, ...]) -> None:
    shown = colours(plot_curves(records, "a run"))
    assert absent not in shown
    assert len({BLUE, ORANGE} & shown.keys()) == 1


def test_one_step_is_seen() -> None:
    assert colours(plot_curves(train(1), "a run"))[BLUE] > 20


def test_many_points_get_a_running_mean() -> None:
    pale = (188, 214, 232)  # blue at 0.3 on white
    few = colours(plot_curves(train(MAX_PLAIN_POINTS), "a run"))
    many = colours(plot_curves(train(MAX_PLAIN_POINTS + 1), "a run"))
    near = [sum(n for c, n in s.items() if math.dist(c, pale) < 3) for s in (few, many)]
    assert near[1] > 2 * near[0]
    assert BLUE in many


def test_a_title_is_no_formula_and_records_of_other_kinds_are_no_curves() -> None:
    other = [{"step": 1, "kind": "generation", "text": "hello", "loss": 5e9}]
    plain = plot_curves(train(3), "cost of $x_1")
    assert plain is not None
    assert plot_curves(train(3) + other, "cost of $x_1") == plain


def test_nothing_to_draw_is_no_picture() -> None:
    assert plot_curves([], "a run") is None
    assert plot_curves([{"step": 1, "kind": "train", "loss": None}], "a run") is None


def test_what_is_missing_or_not_finite_is_left_out() -> None:
    records = [
        {"step": 1, "kind": "train", "loss": 1.0},
        {"step": 2, "kind": "train", "loss": None},
        {"step": 3, "kind": "train", "loss": math.nan},
        {"step": 4, "kind": "train", "learning_rate": 1e-4},
        {"step": 5, "kind": "train", "loss": 2},
    ]
    assert _curve(records, "train", "loss") == ([1, 5], [1.0, 2])
    assert plot_curves(records, "a run") is not None


def test_the_running_mean_is_that_of_the_last_values() -> None:
    assert _running_mean([1.0, 2.0, 3.0, 8.0], 2) == [1.0, 1.5, 2.5, 5.5]


def test_curves_are_drawn_from_a_metrics_file(tmp_path: Path) -> None:
    with MetricsFile.open(tmp_path / "metrics.jsonl", 0) as metrics:
        metrics.write(1, "train", {"loss": 2.0, "learning_rate": 1e-4})
        metrics.write(2, "train", {"loss": math.nan, "learning_rate": 5e-5})
        metrics.write(2, "validation", {"loss": 1.0})
    assert {BLUE, ORANGE} <= colours(
        plot_curves(read_metrics(tmp_path / "metrics.jsonl"), "")
    ).keys()


def test_without_matplotlib_there_is_a_line_in_the_log_and_no_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO, "xc_ray"):
        assert plot_curves(train(3), "a run") is None
    assert caplog.messages == [
        "no curves are drawn, matplotlib is not installed: pip install matplotlib"
    ]


def test_the_process_keeps_its_own_pyplot_state() -> None:
    plot_curves(train(3), "a run")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
