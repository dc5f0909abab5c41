"""Every example runs as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chat_example_answers_three_times():
    lines = run("01_chat.py").split("\n")
    assert [line[:2] for line in lines if line[:2] in ("1:", "2:", "3:")] == ["1:", "2:", "3:"]
    assert "(3 turns)" in lines


def test_the_transformers_example_prints_an_answer():
    assert run("02_transformers.py").strip()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_numbered_and_has_a_test(path: Path):
    assert path.name[:2].isdigit()
    assert path.name in Path(__file__).read_text()
