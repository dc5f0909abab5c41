"""`xc-ray infer`: its own process where it is killed, else in this one, which is quicker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import write_adapter
from xc_ray import cli
from xc_ray.cli_infer import table
from xc_ray.demo.make import tiny_config
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import StepOutput
from xc_ray.infer.job import Summary

ROOT = Path(__file__).parents[1]
Argv = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path: Path) -> None:
    """A user's folders of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def argv(tiny, tmp_path: Path) -> Argv:
    """A function that writes a data set of `num` rows, and gives the command over it."""

    def make(*options: str, num: int = 3, dataset: bool = True) -> list[str]:
        path = tmp_path / "rows.jsonl"
        rows = [{"query": "Once " * (n + 1), "response": "upon a time"} for n in range(num)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        given = ["--dataset", str(path)] if dataset else []
        model = ["--model", str(tiny("2.5")), "--device", "cpu"]
        return ["infer", *model, *given, "--output", str(tmp_path / "out.jsonl"), *options]

    return make


def fails(capsys, argv: list[str]) -> tuple[int, str]:
    """Exit code and the last line on standard error of a command that prints nothing else."""
    try:
        code = cli.main(argv)
    except SystemExit as e:  # argparse
        code = int(e.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err.splitlines()[-1]


# ---------------------------------------------------------------- what is printed


def test_a_data_set_is_answered_and_its_figures_are_printed(argv, capsys, tmp_path):
    assert cli.main(argv("--max-new-tokens", "5")) == 0
    captured = capsys.readouterr()
    *lines, figures = captured.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "rows",
        "exact match",
        "ROUGE-L",
        "tokens/s",
    ]
    assert lines[0].endswith("3, 3 answered")
    told = json.loads(figures)
    assert told["rows"] == told["compared"] == 3
    assert told["new_tokens"] == 15
    assert told["output"] == str(tmp_path / "out.jsonl")
    assert captured.err == ""


def test_rows_with_an_error_are_named_and_the_exit_code_is_1(argv, capsys, tmp_path):
    command = argv("--max-new-tokens", "2")
    with (tmp_path / "rows.jsonl").open("a") as f:
        f.write("no JSON\n" * 12)
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    warnings = captured.err.splitlines()
    assert warnings[0].startswith(f"xc-ray: warning: {tmp_path}/rows.jsonl:4: line 4 is not JSON")
    assert warnings[-1] == "xc-ray: warning: 2 more in the output"
    assert len(warnings) == 11
    assert captured.out.startswith("rows         15, 3 answered, 12 with an error\n")


def test_the_table_leaves_out_what_there_is_not():
    assert table(Summary(2, 2, 0, 0, None, None, ())) == "rows         2, 2 answered"
    full = Summary(1200, 1190, 10, 5, 0.2, 0.25, (), 1000, 64_000, 32.0, 2000.0)
    assert table(full).splitlines() == [
        "rows         1,200, 1,190 answered, 10 with an error",
        "exact match  0.2000 of 5 with a reference",
        "ROUGE-L      0.2500 (F1, mean)",
        "tokens/s     2,000.0 (64,000 tokens of 1,000 rows in 32.0 s)",
    ]


# ---------------------------------------------------------------- options


def test_options_reach_the_run(argv, tmp_path, capsys):
    options = ("--temperature", "0.5", "--top-p", "0.9", "--seed", "4", "--system", "")
    tiles = ("--max-tiles", "2", "--max-new-tokens", "3", "--max-samples", "2", "--batch-size", "1")
    assert cli.main(argv(*options, *tiles)) == 0
    settings = json.loads((tmp_path / "out.summary.json").read_text())["settings"]
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 4, "system": "", "max_tiles": 2}
    assert settings.items() >= {**wanted, "max_tokens": 3}.items()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 2
    code, message = fails(capsys, argv())
    assert code == 1
    assert "another temperature (0.5, now 0.0)" in message
    assert cli.main(argv("--overwrite", "--max-new-tokens", "1")) == 0


@pytest.mark.parametrize(
    ("checkpoint", "load"),
    [
        (("--checkpoint",), ("--load-dataset-config",)),
        (("--ckpt-dir",), ("--load-dataset-config", "true")),
        (("--ckpt_dir",), ("--load_dataset_config", "True")),
    ],
)
def test_a_checkpoint_is_named_as_in_swift(checkpoint, load, argv, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    write_adapter(folder / "adapter", tiny_config("2.5"))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    command = argv(*checkpoint, str(folder), *load, "--max-new-tokens", "3", dataset=False)
    assert cli.main(command) == 0
    settings = json.loads((tmp_path / "out.summary.json").read_text())["settings"]
    assert settings["adapter"] == str(folder)
    assert settings["dataset"] == str(folder / "validation.jsonl")
    # `false` is as if it were not there.
    again = argv("--checkpoint", str(folder), "--load-dataset-config", "false", "--overwrite")
    assert cli.main([*again, "--max-new-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--load-dataset-config",), "takes the rows of a checkpoint; give a --checkpoint"),
        (("--checkpoint", "x", "--load-dataset-config"), "give a --dataset, or --load-dataset-con"),
        (("--checkpoint", "x", "--adapter", "y"), "not allowed with argument --checkpoint"),
        (("--temperature", "-1"), "temperature is -1.0, expected a number of at least 0"),
        (("--max-new-tokens", "0"), "max_tokens is 0, expected at least 1"),
        (("--seed", "x"), "invalid int value: 'x'"),
        (("--batch-size", "0"), "'0' is not a whole number of at least 1"),
        (("--load-dataset-config", "maybe"), "'maybe' is neither true nor false"),
    ],
)
def test_bad_usage_is_told_before_anything_loads(options, message, argv, capsys):
    code, said = fails(capsys, argv(*options))
    assert code == 2
    assert message in said


def test_neither_data_set_nor_checkpoint_is_bad_usage(argv, capsys):
    assert fails(capsys, argv(dataset=False))[0] == 2


def test_errors_are_one_line(argv, capsys, tmp_path):
    for options, message in (
        (("--device", "cuda:77"), "--device cuda:77 cannot be used: "),
        (("--adapter", "cats"), "no registry at file://"),
        (("--output", str(tmp_path / "no" / "out.jsonl")), "No such file or directory"),
        (("--dataset", str(tmp_path / "none.jsonl")), "none.jsonl"),
    ):
        code, said = fails(capsys, argv(*options))
        assert code == 1
        assert said.startswith("xc-ray: ")
        assert message in said


# ---------------------------------------------------------------- what is killed goes on


def killed(command: list[str], output: Path, after: int) -> None:
    """Starts the command in a process, and kills it once it has written so many rows."""
    process = subprocess.Popen([sys.executable, "-m", "xc_ray", *command], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < after:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_killed_and_interrupted_and_continued_is_as_if_unbroken(
    argv, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out.jsonl"
    command = argv("--max-new-tokens", "80", "--batch-size", "2", num=16)
    killed(command, output, after=2)
    with output.open("ab") as f:
        f.write(b'{"index": 15, "pla')  # as a kill in the middle of a write leaves it
    first = len(output.read_bytes().splitlines()) - 1
    step, steps = Engine.step, iter(range(10_000))

    def interrupting(engine: Engine) -> list[StepOutput]:
        if next(steps) == 120:  # of some 80 for two rows
            os.kill(os.getpid(), signal.SIGINT)
        return step(engine)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", interrupting)
        assert cli.main(command) == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "interrupted; run the same command again to go on"
    kept = len(output.read_bytes().splitlines())
    assert 2 <= first < kept < 16
    assert json.loads((tmp_path / "out.summary.json").read_text())["summary"] is None
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["rows"], told["new_rows"]) == (16, 16 - kept)
    data = output.read_bytes()
    assert cli.main([*command, "--overwrite"]) == 0
    assert output.read_bytes() == data
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
