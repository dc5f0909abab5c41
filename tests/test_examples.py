"""Every example runs as its first lines say, and answers right; those with a server are in e2e."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.manifests import KUBECTL, rendered

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
HERE = Path(__file__)
WITH_SERVER = HERE.parent / "e2e" / "test_examples.py"
DESCRIPTION = "One red circle and one green triangle on a white background."
DESCRIPTION_ZH = "白色背景上有一个红色的圆形和一个绿色的三角形。"
SWITCHED = [
    "-- the base",
    "demo: A red circle.",
    "-- style@1 is promoted",
    "style@prod -> 1",
    "demo:style@1: I see a red circle.",
    "demo:style@1: I see a blue square.",
    "-- style@2 is promoted",
    "style@prod -> 2 (was 1)",
    "demo:style@2: It is a circle. It is red.",
    "demo:style@2: It is a square. It is blue.",
    "-- style@2 is taken back; it still answers by its version",
    "style@prod -> 1 (was 2)",
    "demo:style@1: I see a red circle.",
    "demo:style@2: It is a circle. It is red.",
]


def run(name: str, *args: str, **env: str) -> list[str]:
    """The output's lines, run from the repository as its first lines say."""
    done = start(name, *args, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def start(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What became of it; no Ray of the caller's is seen, and no GPU."""
    tools = Path(sys.executable).parent
    shell = sys.executable if name.endswith(".py") else "bash"
    return subprocess.run(
        [shell, str(EXAMPLES / name), *args],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | {"PATH": f"{tools}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", **env},
    )


def test_the_pipeline_example_answers_a_question_that_needs_the_one_before() -> None:
    assert run("03_pipeline.py") == [
        f"1: {DESCRIPTION}",
        "2: One.",
        f"3: {DESCRIPTION_ZH}",
        "(3 turns)",
    ]


def test_the_example_of_two_pictures_finds_the_one_with_more_wherever_it_stands() -> None:
    assert run("04_two_pictures.py") == [
        "one, five: The second picture.",
        "five, one: The first picture.",
    ]


def test_the_merge_example_asks_a_checkpoint_that_says_what_the_adapter_learnt(
    tmp_path: Path,
) -> None:
    lines = run("07_merge.sh", TMPDIR=str(tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(lines)
    assert "<<< I am the merged model." in lines
    assert not list(tmp_path.iterdir())  # it has tidied up


def test_the_batch_example_scores_every_row() -> None:
    lines = run("08_batch_inference.sh")
    assert "exact match  0.8333 of 6 with a reference" in lines
    assert "ROUGE-L      1.0000 (F1, mean)" in lines
    assert lines[-6:] == [
        "A circle.  [A circle.]  ROUGE-L 1.0",
        "Red.  [Red.]  ROUGE-L 1.0",
        "A red circle.  [a red circle]  ROUGE-L 1.0",
        "12 + 30 = 42  [12 + 30 = 42]  ROUGE-L 1.0",
        "红色的圆形。  [红色的圆形。]  ROUGE-L 1.0",
        "2 + 3 = 5  [2 + 3 = 5]  ROUGE-L 1.0",
    ]


def test_the_transformers_example_describes_the_picture() -> None:
    assert run("09_transformers.py") == [DESCRIPTION]


@pytest.mark.parametrize("name", ["01_curl.sh", "06_fine_tune_and_switch.sh"])
def test_a_script_without_its_server_ends_at_once(name: str, tmp_path: Path) -> None:
    done = start(name, "http://127.0.0.1:9", TMPDIR=str(tmp_path), NO_PROXY="127.0.0.1")
    assert done.returncode == 7
    assert "Failed to connect to 127.0.0.1 port 9" in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_examples_are_numbered_without_gaps() -> None:
    numbers = sorted(p.name[:3] for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh"))
    assert numbers == [f"{i:02}_" for i in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_*")), ids=lambda p: p.name)
def test_every_example_says_how_it_is_run_and_has_a_test(path: Path) -> None:
    command = "bash" if path.suffix == ".sh" else "python"
    text = path.read_text()
    assert f"{command} examples/{path.name}" in text
    if command == "bash":
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text
    assert any(f'run("{path.name}"' in file.read_text() for file in (HERE, WITH_SERVER))


def test_the_readme_shows_what_examples_print() -> None:
    page = (ROOT / "README.md").read_text()
    assert "\n".join(["$ bash examples/06_fine_tune_and_switch.sh", *SWITCHED]) in page
    assert f'"content":"{DESCRIPTION}"' in page


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed, which renders")
def test_the_readme_shows_what_an_overlay_holds() -> None:
    kinds = Counter(d["kind"] for d in rendered("kind-cpu"))
    shown = " ".join(f"{num} kind: {kind}" for kind, num in sorted(kinds.items()))
    assert f"\n{shown}\n" in (ROOT / "README.md").read_text()
