"""A run's curves as one picture: losses and the learning rate over steps."""

import io
import logging
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

logger = logging.getLogger(__name__)

Curve: TypeAlias = tuple[list[int], list[float]]  # steps and values

# A line through more points than this is drawn pale, its running mean over 1/50 of them on top.
MAX_PLAIN_POINTS = 100
_MEAN_SHARE = 50


def plot_curves(records: Sequence[dict[str, Any]], title: str) -> bytes | None:
    """A PNG of `loss` and `learning_rate` (kind `train`) and `loss` (kind `validation`) by step.

    Values that are missing or not finite are left out. None if no loss is left, and without
    matplotlib, which a host that trains may lack.
    """
    train, validation = _curve(records, "train", "loss"), _curve(records, "validation", "loss")
    rate = _curve(records, "train", "learning_rate")
    if not train[0] and not validation[0]:
        return None
    try:
        from matplotlib.figure import Figure  # not pyplot, whose figures are the whole process's
    except ImportError:
        logger.info("no curves are drawn, matplotlib is not installed: pip install matplotlib")
        return None
    figure = Figure(figsize=(8, 5.5), dpi=100, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses.set_title(title, parse_math=False)
    many = len(train[0]) > MAX_PLAIN_POINTS
    if train[0]:
        losses.plot(
            *train,
            color="tab:blue",
            linewidth=1.0 if many else 1.5,
            alpha=0.3 if many else 1.0,
            marker="" if many else ".",  # one step alone is no line
            label=None if many else "training loss",
        )
    if many:
        mean = _running_mean(train[1], len(train[1]) // _MEAN_SHARE)
        losses.plot(train[0], mean, color="tab:blue", label="training loss (running mean)")
    if validation[0]:
        losses.plot(*validation, color="tab:orange", marker="o", label="validation loss")
    losses.set_ylabel("loss")
    losses.legend()
    rates.plot(*rate, color="tab:gray")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png")  # drawn by Agg, whatever the process's own backend is
    return out.getvalue()


def _curve(records: Sequence[dict[str, Any]], kind: str, name: str) -> Curve:
    points = [(r["step"], r.get(name)) for r in records if r["kind"] == kind]
    known = [(s, v) for s, v in points if isinstance(v, int | float) and math.isfinite(v)]
    return [s for s, _ in known], [v for _, v in known]


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width` - 1 before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
