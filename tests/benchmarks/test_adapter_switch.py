"""The benchmark of alias moves runs with `--tiny`, and finds what it looks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "adapter_switch.py"


@pytest.mark.ray
@pytest.mark.slow  # a server of its own
def test_moves_and_cold_adapters_are_timed(tmp_path: Path) -> None:
    options = ["--moves", "2", "--cold", "1", "--streams", "1", "--poll-s", "0.2"]
    place = ["--work", str(tmp_path / "work"), "--port", "8129"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", *options, *place],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["figure"] == "adapter_switch"
    rows = facts["rows"]
    assert {name: len(values) for name, values in rows.items()} == {
        "warm, base": 20,
        "warm, adapter": 20,
        "cold, known": 1,
        "cold, just published": 1,
        "longest interval at rest": 1,
        "longest interval while moving": 1,
        "moved, new": 1,
        "moved, served before": 1,
        "promote itself": 2,
    }
    assert all(0 < value < 60 for values in rows.values() for value in values)
