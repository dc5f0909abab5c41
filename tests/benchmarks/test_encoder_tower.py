"""The tower's benchmark runs with `--tiny`, and counts what the design counts."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xc_ray.demo.make import tiny_config
from xc_ray.model.config import preset
from xc_ray.model.xcomposer import ImageEncoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # scripts import each other by their bare names
    return importlib.import_module("encoder_tower")


def test_every_form_is_timed_with_every_number_of_squares():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "encoder_tower.py"), "--tiny", "--repeats", "2"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["figure"] == "encoder_tower"
    assert "left_out" not in facts
    cases = {row["case"] for row in facts["rows"]}
    assert {"tower, transformers' layers", "tower, cudnn", "pass, host to host"} <= cases
    assert {(r["case"], r["squares"]) for r in facts["rows"]} == {
        (c, n) for c in cases for n in (1, 3)
    }
    assert all(row["ms"] > 0 for row in facts["rows"])


def test_the_arithmetic_of_25_squares_is_that_of_the_design(script):
    config = preset("2.5")
    assert script.tower_flop(config, 25) == pytest.approx(30.5e12, rel=0.005)
    assert script.projector_flop(config, 25) == pytest.approx(0.67e12, rel=0.01)


def test_torch_counts_as_many(script):
    config = tiny_config("2.5")
    encoder = ImageEncoder(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.vit(torch.randn(3, 3, config.tile, config.tile))
    # What it does not count is attention on CPU, at this size a few percent.
    assert 0.9 < counter.get_total_flops() / script.tower_flop(config, 3) <= 1.0
