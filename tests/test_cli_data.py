"""`xc-ray data check`: its options, what it prints, and its exit code."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xc_ray.cli_data import add_data
from xc_ray.errors import ConfigError, DataError, XcRayError
from xc_ray.model.config import Variant

Run = Callable[..., tuple[str, str]]
GOOD = {"query": "What is red?", "response": "A colour."}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A command in this process, in a folder and with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> tuple[str, str]:
        parser = argparse.ArgumentParser(prog="xc-ray")
        add_data(parser.add_subparsers(required=True))
        args = parser.parse_args(["data", *argv])
        assert args.run(args) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def model(tiny: Callable[[Variant], Path]) -> str:
    return str(tiny("2.5"))


def write(name: str, *rows: Any) -> str:
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(name).write_text("".join(f"{text}\n" for text in texts))
    return name


def test_a_data_set_without_bad_rows_ends_with_0(run: Run, model: str) -> None:
    out, err = run("check", write("rows.jsonl", GOOD, GOOD), "--model", model)
    assert out.splitlines()[0].split() == ["rows", "2"]
    assert out.endswith("warnings:\n  rows.jsonl:2: it is the same as rows.jsonl:1\n")
    assert err == ""


def test_a_bad_row_is_listed_and_ends_with_1(run: Run, model: str) -> None:
    out, _ = run("check", write("rows.jsonl", GOOD, "{"), "--model", model, code=1)
    assert "bad rows:\n  rows.jsonl:2: line 2 is not JSON: " in out
    out, err = run("check", write("rows.jsonl"), "--model", model, code=1)
    assert err == "train: there is no row that can be learnt from\n"


def test_the_demo_model_and_its_lesson_are_there_for_everybody(run: Run) -> None:
    out, _ = run("check", "demo-json", "demo-json:validation")
    assert out.splitlines()[0].split() == ["rows", "1,680"]


def test_options_of_training_change_what_is_bad(run: Run, model: str) -> None:
    long = {
        "messages": [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b"}]
    }
    name = write("rows.jsonl", GOOD, long)
    options = ("check", name, "--model", model)
    run(*options)
    out, _ = run(*options, "--max-length", "40", code=1)
    assert "max_length is 40; shorten it" in out
    out, _ = run(*options, "--max-length", "40", "--on-long", "skip")
    assert "left out" in out


def test_tiles_and_their_transform_change_what_is_counted(
    run: Run, model: str, picture: Callable[..., bytes]
) -> None:
    Path("a.png").write_bytes(picture(90, 30))
    name = write("rows.jsonl", {**GOOD, "images": ["a.png"]})
    counts = [
        json.loads(run("check", name, "--model", model, "--json", *options)[0])["train"][
            "num_tiles"
        ]
        for options in ((), ("--max-tiles", "1"), ("--image-transform", "family"))
    ]
    assert counts[1] == 1
    assert len(set(counts)) == 3


def test_json_is_one_document_and_the_same_as_the_report_file(run: Run, model: str) -> None:
    name = write("rows.jsonl", GOOD, "{")
    out, _ = run("check", name, "--model", model, "--json", "--report", "found.json", code=1)
    found = json.loads(out)
    assert found == json.loads(Path("found.json").read_text())
    assert found["train"]["num_good"] == 1
    assert found["train"]["problems"][0]["row"] == 2
    assert len(found["train"]["digest"]) == 64
    with pytest.raises(XcRayError, match=r"cannot write no/found.json: No such file"):
        run("check", name, "--model", model, "--report", "no/found.json")


def test_a_train_config_names_the_sets_and_the_options(run: Run, model: str) -> None:
    write("train.jsonl", GOOD, {"query": "a" * 60, "response": "b"})
    write("validation.jsonl", GOOD)
    Path("config.yaml").write_text(
        f"name: a\nmodel: {model}\n"
        "data: {train: train.jsonl, validation: validation.jsonl, max_length: 40, on_long: skip}\n"
    )
    out, _ = run("check", "--config", "config.yaml")
    train, validation = out.split("validation:\n", 1)
    assert train.startswith("train:\nrows")
    assert "left out" in train
    told = "validation.jsonl:1: it is for validation and the same as train.jsonl:1"
    assert told in validation


def test_what_cannot_be_read_is_an_error(run: Run, model: str) -> None:
    with pytest.raises(DataError, match=r"there is no data set 'nothing.jsonl'"):
        run("check", "nothing.jsonl", "--model", model)
    with pytest.raises(ConfigError, match=r"cannot read no.yaml"):
        run("check", "--config", "no.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check"], "name a data set, or give the --config of a training"),
        (["check", "a", "--config", "c"], "--config says the data sets already; change it in c"),
        (["check", "--config", "c", "--max-tiles", "2"], "--config says --max-tiles already"),
        (["check", "a", "--max-length", "3"], "'3' is not a whole number of at least 16"),
        (["check", "a", "--on-long", "cry"], "invalid choice: 'cry'"),
    ],
)
def test_wrong_usage_is_told(
    run: Run, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*argv)
    assert message in capsys.readouterr().err


def test_the_options_import_nothing_heavy() -> None:
    code = (
        "import sys, xc_ray.cli_data; "
        "print(sorted({'numpy', 'PIL', 'pydantic', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
