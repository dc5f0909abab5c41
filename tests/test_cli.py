import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.local_http import Asked, Reply, json_reply, serving
from tests.pictures import shapes
from xc_ray import cli
from xc_ray.errors import XcRayError
from xc_ray.terminal import RULE

ROOT = Path(__file__).parents[1]
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
Chat = Callable[..., str]


@pytest.fixture
def chat(tiny, monkeypatch, capsys) -> Chat:
    """`xc-ray chat` on the tiny model in this process; gives the answers to the lines typed."""

    def run(
        *options: str, lines: tuple[str, ...] = ("Describe it",), model: bool = True, told: str = ""
    ) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        source = ("--model", str(tiny("2.5")), "--device", "cpu") if model else ()
        assert cli.main(["chat", *source, *options]) == 0
        captured = capsys.readouterr()
        assert captured.err == told
        out: str = captured.out
        assert out.startswith("<<< ")
        assert out.endswith(f"\n{RULE}\n<<< \n")
        return out[4 : -len(f"\n{RULE}\n<<< \n")]

    return run


def fails(capsys, *argv: str) -> tuple[int, str]:
    """Exit code and standard error of a command that prints nothing else."""
    try:
        code = cli.main(argv)
    except SystemExit as e:  # argparse
        code = int(e.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def python(*args: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    settings = {"cwd": ROOT, "text": True, "capture_output": True, "timeout": 120, **options}
    return subprocess.run([sys.executable, *args], check=False, **settings)


# ---------------------------------------------------------------- the command line


def test_help_answers_without_loading_anything_heavy():
    done = python("-X", "importtime", "-m", "xc_ray", "chat", "--help")
    assert (done.returncode, done.stdout.split()[:3]) == (0, ["usage:", "xc-ray", "chat"])
    loaded = set(re.findall(r"\|\s+([a-zA-Z]\w*)", done.stderr))
    assert "argparse" in loaded
    assert not loaded & {"torch", "httpx", "PIL", "numpy", "ray", "transformers"}


def test_a_server_is_asked_without_loading_torch():
    done = python("-X", "importtime", "-m", "xc_ray", "chat", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    loaded = set(re.findall(r"\|\s+([a-zA-Z]\w*)", done.stderr))
    assert "httpx" in loaded
    assert not loaded & {"torch", "ray", "transformers"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["chatt"], "invalid choice: 'chatt'"),
        (["chat", "--temprature", "1"], "unrecognized arguments: --temprature 1"),
        (["chat", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["chat", "--temperature", "nan"], "temperature is nan, expected a number of at least 0"),
        (["chat", "--top-p", "0"], "--top-p: top_p is 0.0, expected more than 0 and at most 1"),
        (["chat", "--top-k", "-1"], "--top-k: top_k is -1, expected at least 0 (0: off)"),
        (["chat", "--max-new-tokens", "0"], "max_tokens is 0, expected at least 1"),
        (["chat", "--repetition-penalty", "0"], "repetition_penalty is 0.0, expected more than 0"),
        (["chat", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["chat", "--max-tiles", "0"], "--max-tiles: '0' is not a whole number of at least 1"),
        (["chat", "--stop", ""], "--stop: the text is empty"),
        (["chat", "--url", "localhost:8000"], "does not start with http:// or https://"),
        (["chat", "--url", "http://h", "--device", "cpu"], "--device is for a local model"),
        (["chat", "--key-file", "k"], "--key-file is for a server; give its --url"),
        (["chat", "--url", "http://h", "--api-key", "s3cret"], "would see the key; put it into a"),
        (["chat", "--url", "http://h", "--registry", "r"], "--registry is for a local model"),
        (["plan", "--adapter-slots", "0"], "--adapter-slots: '0' is not a whole number of at"),
        (["plan", "--adapter-rank", "65"], "--adapter-rank: '65' is more than 64"),
    ],
)
def test_wrong_usage_is_told_with_exit_code_2(argv, message, capsys):
    code, err = fails(capsys, *argv)
    assert (code, err.splitlines()[-1].startswith("xc-ray")) == (2, True)
    assert message in err.splitlines()[-1]
    assert "s3cret" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "no-such"], "model 'no-such' is neither 'demo', nor an existing folder"),
        (["--model", str(ROOT / "tests")], "config.json"),
        (["--device", "toaster"], "--device toaster cannot be used: "),
        (["--url", "http://127.0.0.1:9"], "cannot reach the server at http://127.0.0.1:9/v1: "),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(argv, message, capsys):
    code, err = fails(capsys, "chat", *argv)
    assert code == 1
    assert re.fullmatch(r"xc-ray: [^\n]+\n", err)
    assert message in err


def test_an_error_of_several_lines_is_put_on_one(monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise XcRayError("two\n  lines")

    monkeypatch.setattr(cli, "_chat", fail)
    assert fails(capsys, "chat") == (1, "xc-ray: two lines\n")


def test_a_damaged_checkpoint_is_one_line(tiny, tmp_path, capsys):
    shutil.copytree(tiny("2.5"), tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    code, err = fails(capsys, "chat", "--model", str(tmp_path / "model"))
    assert (code, len(err.splitlines())) == (1, 1)


def test_an_interrupted_command_exits_as_shells_expect(monkeypatch, capsys):
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_chat", interrupted)
    assert fails(capsys, "chat") == (130, "")


def test_ctrl_c_while_a_piped_session_waits_ends_it_without_a_traceback():
    with serving(lambda asked: json_reply({"data": [{"id": "m"}]})) as server:
        # The test itself may run where Ctrl-C is ignored, as background jobs do.
        listening = (
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "os.execv(sys.executable, [sys.executable, '-m', 'xc_ray', 'chat', *sys.argv[1:]])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", listening, "--url", server.url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.read(4) == b"<<< "
        time.sleep(0.5)  # it waits for input now
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"\n", b"")


def test_a_reader_that_has_gone_is_no_traceback():
    with serving(lambda asked: json_reply({"data": [{"id": "m"}]})) as server:
        command = f"{sys.executable} -m xc_ray chat --url {server.url}; echo code $? >&2"
        done = subprocess.run(
            ["bash", "-c", f"(sleep 1; yes clear | head -10000) | ({command}) | head -c 1"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
    assert (done.stdout, done.stderr) == ("<", "code 1\n")


# ---------------------------------------------------------------- each option of chat


def test_model_chooses_the_model(chat, tiny):
    assert chat(*GREEDY) != chat(*GREEDY, "--model", str(tiny("2.0")))


def test_the_demo_model_is_the_default_and_answers_rightly(chat, tmp_path):
    (tmp_path / "two.png").write_bytes(shapes("red circle", "blue square", size=(300, 200)))
    talk = (
        (f"<img>{tmp_path}/two.png</img>How many circles are there?", "One."),
        ("And stars?", "None."),
        ("12 + 30 = ", "12 + 30 = 42"),
    )
    lines = tuple(query for query, _ in talk)
    expected = f"\n{RULE}\n<<< ".join(answer for _, answer in talk)
    assert chat("--temperature", "0", lines=lines, model=False) == expected
    assert chat("--temperature", "0", "--model", "demo", lines=lines, model=False) == expected


def test_system_text_changes_the_answer_and_an_empty_one_takes_the_familys_away(chat, tiny):
    old = ("--model", str(tiny("2.0")))  # a family with a system text of its own
    answers = [chat(*old, *GREEDY, *s) for s in ((), ("--system", "Be rude"), ("--system", ""))]
    assert len(set(answers)) == 3


def test_temperature_zero_is_greedy_and_the_default_is_not(chat):
    length = ("--max-new-tokens", "12")
    assert chat("--temperature", "0", *length) == chat("--temperature", "0", *length)
    assert len({chat(*length), chat(*length), chat(*length)}) > 1


@pytest.mark.parametrize("option", [("--top-k", "1"), ("--top-p", "0.000001")])
def test_a_choice_of_one_token_is_greedy(option, chat):
    hot = ("--temperature", "1", "--max-new-tokens", "12", "--seed", "1")
    assert chat(*hot, *option) == chat(*GREEDY) != chat(*hot)


def test_repetition_penalty_changes_the_answer(chat):
    assert chat(*GREEDY, "--repetition-penalty", "1") != chat(*GREEDY, "--repetition-penalty", "5")


def test_a_seed_gives_the_same_answer_again(chat):
    one, again, two = (chat("--max-new-tokens", "12", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == again != two


def test_max_new_tokens_bounds_the_answer(chat):
    short, long = (chat("--temperature", "0", "--max-new-tokens", n) for n in ("4", "12"))
    assert long.startswith(short.rstrip("�"))
    assert len(short) < len(long)


def test_a_stop_text_ends_the_answer(chat):
    whole = chat(*GREEDY)
    assert chat(*GREEDY, "--stop", "never said", "--stop", whole[5:8]) == whole[:5]


def test_max_tiles_changes_what_is_seen(chat, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(300, 200))
    lines = (f"<img>{tmp_path / 'a.png'}</img>Describe it",)
    assert chat(*GREEDY, "--max-tiles", "1", lines=lines) != chat(*GREEDY, lines=lines)


def test_no_stream_prints_the_answer_in_one_go(chat, monkeypatch, capsys):
    def writes(*options: str) -> list[str]:
        texts: list[str] = []
        write = sys.stdout.write

        def remember(text: str) -> int:
            texts.append(text)
            return write(text)

        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "write", remember)
            chat(*GREEDY, *options)
        return texts

    answer = chat(*GREEDY) + "\n"
    assert answer in writes("--no-stream")
    assert answer not in writes("--stream")
    assert answer not in writes()


def test_device_is_where_the_model_is_loaded(monkeypatch, tiny, capsys):
    from xc_ray.pipeline import Pipeline

    seen: list[object] = []

    def load(model: str, *, device: str | None) -> None:
        seen.append((model, device))
        raise XcRayError("enough")

    monkeypatch.setattr(Pipeline, "load", load)
    fails(capsys, "chat", "--device", "meta")
    fails(capsys, "chat", "--model", "m")
    assert seen == [("demo", "meta"), ("m", None)]


def test_registry_is_where_a_reference_is_looked_up(chat, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    store = str(tmp_path / "store")
    argv = ["registry", "import", str(tiny("2.0")), "--name", "old", "--registry", store]
    assert cli.main(argv) == 0
    capsys.readouterr()
    there = chat(*GREEDY, "--model", "old@1", "--registry", store)
    assert there == chat(*GREEDY, "--model", str(tiny("2.0")))
    code, err = fails(capsys, "chat", "--model", "old@1")
    assert (code, f"file://{tmp_path}/data/xc_ray/registry is not there" in err) == (1, True)


def test_options_of_a_session_with_a_server_arrive_there(chat, monkeypatch, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())

    def answer(asked: Asked) -> Reply:
        if asked.method == "GET":
            return json_reply({"data": [{"id": "first"}]})
        if asked.json["stream"]:
            return Reply(b'data: {"choices": [{"delta": {"content": "ok"}}]}\n\ndata: [DONE]\n\n')
        return json_reply({"choices": [{"message": {"content": "ok"}}]})

    def request(*options: str, key: str | None = None) -> Any:
        told = f"xc-ray: the key is that of {key}\n" if key else ""
        line = f"<img>{tmp_path / 'a.png'}</img>"
        with serving(answer) as server:
            where = ("--url", server.url, *options)
            assert chat(*where, lines=(line,), model=False, told=told) == "ok"
            body = server.asked[-1].json
            body["key"] = server.asked[-1].headers.get("authorization")
            body["max_tiles"] = body["messages"][-1]["content"][0]["image_url"].get("max_tiles")
            body["messages"] = body["messages"][:-1]
            return body

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "key").write_text("from-a-file\n")
    plain = request()
    assert plain == {
        "model": "first",
        "messages": [],
        "stream": True,
        "key": None,
        "max_tiles": None,
    }
    for option, value, name, arrived in (
        ("--model", "mine", "model", "mine"),
        ("--system", "Be brief", "messages", [{"role": "system", "content": "Be brief"}]),
        ("--temperature", "0.5", "temperature", 0.5),
        ("--top-p", "0.5", "top_p", 0.5),
        ("--top-k", "5", "top_k", 5),
        ("--repetition-penalty", "1.5", "repetition_penalty", 1.5),
        ("--seed", "5", "seed", 5),
        ("--max-new-tokens", "5", "max_tokens", 5),
        ("--stop", "END", "stop", ["END"]),
        ("--max-tiles", "5", "max_tiles", 5),
    ):
        assert request(option, value) == {**plain, name: arrived}
    assert request("--no-stream") == {**plain, "stream": False}

    file = str(tmp_path / "key")
    of_the_file = request("--key-file", file, key=f"the file {file}")
    assert of_the_file == {**plain, "key": "Bearer from-a-file"}
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    assert request(key="$OPENAI_API_KEY")["key"] == "Bearer from-the-environment"
    assert request("--key-file", file, key=f"the file {file}") == of_the_file


def test_file_names_and_text_that_are_no_utf8_do_not_end_a_session(tiny, picture, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(picture())
    lines = b"<img>" + name + b"</img>What?\ncaf\xe9\n"
    model = ("--model", str(tiny("2.5")), "--device", "cpu", "--max-new-tokens", "3")
    done = python("-m", "xc_ray", "chat", *model, input=lines, text=False)
    assert done.returncode == 0
    err = done.stderr.decode()  # type: ignore[attr-defined]
    assert re.fullmatch(r"xc-ray: the text holds half a surrogate pair[^\n]*\n", err)
    assert done.stdout.count(RULE.encode()) == 1  # type: ignore[arg-type]


def test_an_answer_that_the_output_cannot_spell_is_printed_all_the_same(tiny):
    model = ("--model", str(tiny("2.5")), "--device", "cpu")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python(
        "-m", "xc_ray", "chat", *model, *GREEDY, input="Once upon a time\n", env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout


# ---------------------------------------------------------------- plan


def test_plan_says_how_many_tokens_either_cache_holds(capsys):
    tokens = {}
    for dtype in ("auto", "fp8"):
        argv = ["plan", "--variant", "2.5", "--device-gb", "80", "--kv-cache-dtype", dtype]
        assert cli.main(argv) == 0
        found = re.search(r"([\d,]+) tokens of ([\d.]+) KiB", capsys.readouterr().out)
        assert found is not None
        tokens[dtype] = int(found[1].replace(",", "")), float(found[2])
    assert tokens["auto"][1] == 128
    assert tokens["fp8"][1] == 66  # and a float32 scale for each 128 numbers
    assert tokens["fp8"][0] == pytest.approx(tokens["auto"][0] * 128 / 66, rel=1e-3)


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_plans_that_the_docs_show_fit(page, capsys):
    shown = re.findall(r"xc-ray (plan --variant[^`\n|]+)", (ROOT / page).read_text())
    assert shown
    for line in shown:
        assert cli.main(shlex.split(line)) == 0, line
        assert "tokens of" in capsys.readouterr().out


def test_sizes_in_the_docs_are_what_plan_says(capsys):
    page = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| (\d+) GB \| ([\d.]+)[^|]*\| ([\d,]+)", page, re.MULTILINE)
    assert len(rows) == 4
    for gb, share, tokens in rows:
        options = ["--device-gb", gb, "--decoder-share", share, "--encoder-share", "0.15"]
        assert cli.main(["plan", "--variant", "2.5", *options]) == 0
        assert f"{tokens} tokens of" in capsys.readouterr().out


def test_plan_counts_the_room_of_adapters(capsys):
    def tokens(*options: str) -> int:
        argv = ["plan", "--variant", "2.5", "--device-gb", "80", *options]
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert ("adapters" in out) == bool(options)
        found = re.search(r"([\d,]+) tokens of", out)
        assert found is not None
        return int(found[1].replace(",", ""))

    few, many = ("--adapter-slots", "4"), ("--adapter-slots", "32")
    assert tokens() > tokens(*few) > tokens(*many)
    assert tokens(*many, "--adapter-rank", "16") > tokens(*many)
