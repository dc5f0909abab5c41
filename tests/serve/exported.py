"""The metrics of observe.py, and what Ray's exporter calls them."""

import ast
from pathlib import Path

from xc_ray.serve import observe

SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def metrics() -> dict[str, str]:
    """The kind of each metric, by name."""
    tree = ast.parse(Path(observe.__file__).read_text(encoding="utf-8"))
    return {
        str(call.args[0].value): call.func.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in SUFFIXES
        and isinstance(call.args[0], ast.Constant)
    }


def exported() -> dict[str, str]:
    """The metric behind each name that the exporter may print."""
    return {f"ray_{n}{s}": n for n, kind in metrics().items() for s in SUFFIXES[kind]}
