"""The simulation of waits ends every picture, and prints what it found."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("encoder_wait")


def test_all_requests_end_at_every_load_and_wait(script, monkeypatch, capsys):
    options = ["--requests", "60", "--loads", "0.5", "0.9", "--waits-ms", "0", "20"]
    monkeypatch.setattr(sys, "argv", ["encoder_wait.py", *options])
    runs = []
    run = script.Simulation.run

    def noted(self, pictures):
        run(self, pictures)
        runs.append((self, pictures))

    monkeypatch.setattr(script.Simulation, "run", noted)
    script.main()
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["load"], r["wait_ms"]) for r in facts["rows"]] == [
        (0.5, 0.0), (0.5, 20.0), (0.9, 0.0), (0.9, 20.0)
    ]  # fmt: skip
    for simulation, pictures in runs:
        assert simulation.ends.keys() == set(range(60))
        assert sum(simulation.passes) == sum(tiles + 1 for _, _, tiles in pictures)
    assert facts["rows"][0]["passes"] > facts["rows"][1]["passes"]
