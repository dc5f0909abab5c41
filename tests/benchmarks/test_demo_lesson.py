"""The parts of the lesson's benchmark that need neither a training nor a server."""

import importlib
import os
import time
from pathlib import Path

import pytest
import yaml

from xc_ray.registry.location import default_url

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # scripts import each other by their bare names
    return importlib.import_module("demo_lesson")


def test_the_session_and_the_seconds_of_a_process_are_read(script):
    stat = "41 (ray::Worker (x) y) S 1 40 7 0 -1 0 0 0 0 0 300 200 0 0 20 0 1 0 9 0 0"
    assert script.times(stat) == (7, 500 / os.sysconf("SC_CLK_TCK"))


def test_seconds_of_this_session_are_counted(script):
    used = script.CpuTime(os.getsid(0))
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    used.read()
    assert used.stop() >= 0.2


def test_the_server_reads_the_registry_that_the_training_fills(script, tmp_path, monkeypatch):
    path = script.serve_file(tmp_path, 8127)
    values = yaml.safe_load(path.read_text())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (application,) = values["applications"]
    assert default_url() == f"file://{application['args']['registry']}"
    assert values["http_options"]["port"] == 8127
