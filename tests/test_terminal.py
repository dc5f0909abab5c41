import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.local_http import Asked, Reply, Served, serving
from xc_ray.errors import XcRayError
from xc_ray.pipeline import Pipeline
from xc_ray.terminal import HELP, RULE, Backend, ChatOptions, History, Local, Pieces, Terminal

ROOT = Path(__file__).parents[1]
GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def pipe(tiny) -> Pipeline:
    return Pipeline.load(tiny("2.5"), device="cpu")


@pytest.fixture
def local(pipe) -> Local:
    return Local(pipe, ChatOptions(sampling=GREEDY))


@dataclass
class Shown:
    """What a session left behind."""

    out: str
    err: str
    history: History


class Screen(io.StringIO):
    """A terminal's output that remembers each write and may act on it."""

    def __init__(self, on_write: Callable[[str], None] = lambda text: None, tty: bool = False):
        super().__init__()
        self.writes: list[str] = []
        self.on_write = on_write
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        self.writes.append(text)
        self.on_write(text)
        return super().write(text)


def chat(
    backend: Backend, *lines: str, live: bool = True, out: Screen | None = None, **state: Any
) -> Shown:
    """A session over plain streams, as with piped input; `lines` are typed one after the other."""
    stdin = io.StringIO("".join(line + "\n" for line in lines))
    stdout, stderr = out or Screen(), io.StringIO()
    terminal = Terminal(backend, live, stdin, stdout, stderr, **state)
    terminal.run()
    return Shown(stdout.getvalue(), stderr.getvalue(), terminal.history)


def ctrl_c_at(piece_number: int) -> Callable[[str], None]:
    """Presses Ctrl-C while that piece of an answer is printed (1 is the first)."""
    count = iter(range(1, 1_000_000))

    def on_write(text: str) -> None:
        if text and not text.startswith(("<<<", "[", "\n", RULE)) and next(count) == piece_number:
            signal.raise_signal(signal.SIGINT)

    return on_write


# ---------------------------------------------------------------- what is printed


def test_an_answer_stands_between_the_prompt_and_a_rule(local, pipe):
    answer, _ = pipe.chat("hi there", **GREEDY)
    shown = chat(local, "hi there")
    assert answer
    assert shown.out == f"<<< {answer}\n{RULE}\n<<< \n"
    assert shown.err == ""


def test_the_next_question_sees_the_turns_before(local, pipe):
    first, history = pipe.chat("hi there", **GREEDY)
    second, history = pipe.chat("and what then?", history, **GREEDY)
    assert second != pipe.chat("and what then?", **GREEDY)[0], "the history must matter"
    shown = chat(local, "hi there", "and what then?")
    assert shown.out == f"<<< {first}\n{RULE}\n<<< {second}\n{RULE}\n<<< \n"
    assert shown.history == history


def test_clear_empties_the_history_and_says_so(local, pipe):
    alone, _ = pipe.chat("and what then?", **GREEDY)
    shown = chat(local, "hi there", " Clear ", "and what then?")
    assert "<<< [the history is empty]\n" in shown.out
    assert shown.history == [("and what then?", alone)]


@pytest.mark.parametrize("word", ["exit", "quit", "EXIT "])
def test_the_session_ends_with(word, local):
    shown = chat(local, word, "hi there")
    assert shown.out == "<<< "
    assert shown.history == []


def test_blank_lines_ask_nothing(local):
    assert chat(local, "", "   ").out == "<<< <<< <<< \n"


def test_a_line_with_a_windows_ending_is_the_same_question(local):
    assert chat(local, "hi there\r").history[0][0] == "hi there"


def test_pieces_are_printed_as_they_come_or_the_answer_in_one_go(local):
    live, whole = Screen(), Screen()
    assert (
        chat(local, "hi there", out=live).out == chat(local, "hi there", out=whole, live=False).out
    )
    answer = chat(local, "hi there").history[0][1]
    assert answer not in live.writes
    assert answer + "\n" in whole.writes


def test_a_terminal_gets_no_control_characters_and_a_file_gets_all():
    answer = ["a\x1b[2J", "b\x07\x9b\tc\nd"]
    assert "a�[2Jb��\tc\nd\n" in chat(Script([answer]), "q", out=Screen(tty=True)).out
    plain = chat(Script([answer]), "q")
    assert "a\x1b[2Jb\x07\x9b\tc\nd\n" in plain.out
    assert plain.history == [("q", "a\x1b[2Jb\x07\x9b\tc\nd")]


# ---------------------------------------------------------------- several lines


def test_multi_line_input_ends_with_a_hash(local):
    shown = chat(local, "multi-line", "one", "", " two#", "three # ", "single-line#", "four#")
    assert [q for q, _ in shown.history] == ["one\n\n two", "three ", "four#"]
    assert "<<< [end your input with #; `single-line` switches back]\n<<<[M] " in shown.out
    assert "<<<[M] [one line is one input]\n<<< " in shown.out


def test_commands_need_no_hash_in_multi_line_input(local):
    shown = chat(local, "multi-line", "one#", "clear", "two#", "exit", "three#")
    assert [q for q, _ in shown.history] == ["two"]


def test_a_command_inside_of_several_lines_is_text(local):
    assert chat(local, "multi-line", "please", "exit", "#").history[0][0] == "please\nexit\n"


def test_several_lines_without_a_hash_are_asked_at_the_end_of_the_input(local):
    assert chat(local, "multi-line", "one", "two").history[0][0] == "one\ntwo"


# ---------------------------------------------------------------- pictures and errors


def test_pictures_stand_anywhere_in_any_turn(local, pipe, picture, tmp_path):
    paths = [tmp_path / "red one.png", tmp_path / "blue.jpg"]
    paths[0].write_bytes(picture(colour="red"))
    paths[1].write_bytes(picture(200, 60, "blue", "JPEG"))
    both = f"This <img>{paths[0]}</img> and <img>{paths[1]}</img>?"
    again = f"And <img>{paths[0]}</img>?"
    _, history = pipe.chat("hi there", **GREEDY)
    _, history = pipe.chat(both, history, **GREEDY)
    _, history = pipe.chat(again, history, **GREEDY)
    shown = chat(local, "hi there", both, again)
    assert shown.history == history
    assert shown.err == ""


@pytest.fixture
def bad_queries(tmp_path) -> dict[str, tuple[str, str]]:
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    return {
        "missing file": (
            "<img>/no/such.png</img>x",
            "cannot read the picture '/no/such.png': No such file or directory",
        ),
        "no picture": (f"<img>{text}</img>x", "are not an image of a known format"),
        "empty tag": (
            "<img> </img>x",
            "an <img></img> tag is empty; write a path or a URL into it",
        ),
        "too long": ("word " * 20_000, "the model holds 16,384 with the answer; shorten the text"),
        "dead URL": (
            "<img>http://127.0.0.1:9/x.png</img>x",
            "cannot fetch the picture 'http://127.0.0.1:9/x.png'",
        ),
    }


@pytest.mark.parametrize(
    "kind", ["missing file", "no picture", "empty tag", "too long", "dead URL"]
)
def test_a_bad_query_is_one_line_and_the_session_goes_on(kind, local, pipe, bad_queries):
    query, message = bad_queries[kind]
    _, history = pipe.chat("hi there", **GREEDY)
    _, history = pipe.chat("and what then?", history, **GREEDY)
    shown = chat(local, "hi there", query, "and what then?")
    assert shown.history == history
    assert re.fullmatch(r"xc-ray: [^\n]+\n", shown.err), shown.err
    assert message in shown.err


def test_a_picture_that_a_host_does_not_have_is_one_line(local):
    with serving(lambda asked: Reply(b"gone", 404)) as host:
        shown = chat(local, f"<img>{host.url}/x.png</img>What?")
    expected = f"xc-ray: cannot fetch the picture '{host.url}/x.png': HTTP 404\n"
    assert (shown.err, shown.history) == (expected, [])


def test_an_answer_that_fails_half_way_is_forgotten(local):
    backend = Script([["one"], ["tw", XcRayError("it broke\n  off")], ["three"]])
    shown = chat(backend, "a", "b", "c")
    assert shown.err == "xc-ray: it broke off\n"
    assert f"<<< tw\n<<< three\n{RULE}\n" in shown.out
    assert shown.history == [("a", "one"), ("c", "three")]


def test_a_turn_with_an_empty_answer_is_told_and_not_kept():
    shown = chat(Script([[""], ["two"]]), "a", "b")
    assert f"<<< \n[an empty answer; this turn is not kept]\n{RULE}\n" in shown.out
    assert shown.history == [("b", "two")]


# ---------------------------------------------------------------- Ctrl-C while an answer comes


class Script:
    """A backend at the seam: written answers, piece by piece; an item may be an error or a call."""

    interruptible: ClassVar[bool] = False

    def __init__(
        self, answers: list[list[Any]], at_close: Callable[[], None] = lambda: None
    ) -> None:
        self.answers = iter(answers)
        self.at_close = at_close
        self.closed = 0

    def stream(self, query: str, history: History) -> Pieces:
        answer = ""
        try:
            for item in next(self.answers):
                if isinstance(item, XcRayError):
                    raise item
                if callable(item):
                    item()
                    continue
                answer += item
                yield item, [*history, (query, answer)]
        finally:
            self.closed += 1
            self.at_close()


class ScriptOverHttp(Script):
    interruptible: ClassVar[bool] = True


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stops_the_answer_keeps_what_came_and_frees_the_engine(pipe):
    options = {"temperature": 0.0, "max_tokens": 100}
    query = "Describe it"
    full, _ = pipe.chat(query, **options)
    local = Local(pipe, ChatOptions(sampling=options))
    shown = chat(local, query, out=Screen(ctrl_c_at(3)))
    [(_, partial)] = shown.history
    assert partial
    assert len(partial) < len(full) / 4
    assert full.startswith(partial)
    assert f"<<< {partial}\n[stopped; the answer so far is kept]\n{RULE}\n<<< \n" in shown.out
    assert pipe.engine.kv_usage == 0

    after = chat(local, "And then?", history=list(shown.history)).history
    assert after == pipe.chat("And then?", shown.history, **options)[1]


def test_what_came_before_ctrl_c_is_printed_without_streaming_too():
    shown = chat(Script([["a", press, "b", "c"]]), "q", live=False)
    assert "<<< ab\n[stopped; the answer so far is kept]\n" in shown.out
    assert shown.history == [("q", "ab")]


def test_ctrl_c_before_the_first_piece_leaves_the_history_alone():
    backend = ScriptOverHttp([["one"], [press, "two"], ["three"]])
    shown = chat(backend, "a", "b", "c")
    assert "[stopped; this turn is not kept]\n" in shown.out
    assert shown.history == [("a", "one"), ("c", "three")]


def test_ctrl_c_breaks_into_a_wait_for_a_server():
    backend = ScriptOverHttp([["a", press, "never"]])
    assert chat(backend, "q").history == [("q", "a")]
    assert backend.closed == 1


def test_ctrl_c_waits_for_a_step_of_the_engine_to_end():
    done: list[str] = []
    backend = Script([["a", press, lambda: done.append("step"), "b", "never"]])
    assert chat(backend, "q").history == [("q", "ab")]
    assert done == ["step"]


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    backend = Script([["a", press, press, "never"], ["b"]])
    assert chat(backend, "q", "r").history == [("q", "a"), ("r", "b")]
    assert backend.closed == 2


@pytest.mark.parametrize("kind", [Script, ScriptOverHttp])
def test_more_presses_while_the_answer_is_closed_change_nothing(kind):
    closed: list[str] = []

    def press_and_close() -> None:
        press()
        press()
        closed.append("whole")

    backend = kind([["a", press, "b", "c"]], at_close=press_and_close)
    [(_, partial)] = chat(backend, "q").history
    assert partial in ("a", "ab")
    assert closed == ["whole"]


def test_ctrl_c_is_handled_as_before_once_the_answer_is_there(local):
    before = signal.getsignal(signal.SIGINT)
    chat(local, "hi there")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_ignores_ctrl_c_goes_on_to():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert chat(Script([["a", press, "b", "c"]]), "q").history == [("q", "abc")]
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_at_the_prompt_of_piped_input_ends_the_program(local):
    stdin = io.StringIO("hi there\n")
    stdin.readline = lambda *_: press() or ""  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(KeyboardInterrupt):
        Terminal(local, True, stdin, Screen(), io.StringIO()).run()


# ---------------------------------------------------------------- a real terminal


class Tty:
    """`python -m xc_ray chat …` on a pseudo-terminal of its own, where Ctrl-C is a key."""

    # A shell without job control starts its background jobs with Ctrl-C ignored: not this one.
    LOGIN = (
        "import os, signal, sys; os.login_tty(0); signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, '-m', 'xc_ray', 'chat', *sys.argv[1:]])"
    )

    def __init__(self, *options: str) -> None:
        self.keys, side = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LOGIN, *options],
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb", "INPUTRC": os.devnull},
        )
        os.close(side)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Reads on until the new output has `pattern`, and gives that output."""
        end = time.monotonic() + timeout_s
        new = ""
        while not re.search(pattern, new):
            ready, _, _ = select.select([self.keys], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {new!r} after {self.seen!r}"
            try:
                new += os.read(self.keys, 1).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(f"ended without {pattern!r}: {self.seen + new!r}") from None
        self.seen += new
        return new

    def press(self, key: str) -> None:
        # Between its prompt and its wait for keys readline is deaf to signals, for microseconds.
        time.sleep(0.5)
        self.type(key)

    def code(self) -> int:
        """The exit code; a terminal whose output nobody reads would hold the process back."""
        with pytest.raises(AssertionError, match="ended without"):
            self.until("(?!)")
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keys)


@pytest.fixture
def tty() -> Iterator[Callable[..., Tty]]:
    started: list[Tty] = []

    def start(*options: str) -> Tty:
        started.append(Tty(*options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_ctrl_c_on_a_terminal_stops_long_answers_and_the_session_lives(tty, tiny):
    options = ("--model", str(tiny("2.5")), "--temperature", "0", "--max-new-tokens", "2000")
    session = tty(*options, "--device", "cpu")
    session.until(re.escape(f"[{HELP}]\r\n<<< "))
    for query in ("Describe it", "Once upon a time"):
        session.type(query + "\n")
        session.until(re.escape(query) + r"\r\n[^\n]{20}")  # the echo, and then an answer
        session.type("\x03")
        rest = session.until(re.escape(f"[stopped; the answer so far is kept]\r\n{RULE}\r\n<<< "))
        assert len(rest) < 1000, "the answer went on"
    session.type("exit\n")
    assert session.code() == 0
    assert "Traceback" not in session.seen


@pytest.fixture
def server() -> Iterator[Served]:
    """A server that says "word " a hundred times a second until the client leaves."""

    def words() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'

    def answer(asked: Asked) -> Reply:
        if asked.method == "GET":
            return Reply(b'{"data": [{"id": "m"}]}')
        return Reply(words(), headers={"content-type": "text/event-stream"})

    with serving(answer) as served:
        yield served


def test_ctrl_c_at_the_prompt_of_a_terminal_clears_the_line_and_twice_ends(tty, server):
    session = tty("--url", server.url)
    session.until("\r\n<<< ")
    hint = re.escape("[Ctrl-C again ends, so does `exit`]\r\n<<< ")
    session.press("\x03")
    session.until(hint)
    session.type("clear\n")  # something in between: the next press is a first one again
    session.until("empty]\r\n<<< ")
    session.press("\x03")
    session.until(hint)
    session.type("half a quest")
    session.until("half a quest")
    session.press("\x03")  # throws the line away, no more
    assert "[" not in session.until("\r\n<<< ")
    session.press("\x03")
    assert session.code() == 0
    assert all(asked.method == "GET" for asked in server.asked)


def test_ctrl_d_ends_a_session_on_a_terminal(tty, server):
    session = tty("--url", server.url)
    session.until("\r\n<<< ")
    session.press("\x04")
    assert session.code() == 0


def test_ctrl_c_closes_the_stream_of_a_server(tty, server):
    session = tty("--url", server.url)
    session.until("\r\n<<< ")
    session.type("go on\n")
    session.until("word word ")
    session.type("\x03")
    session.until(re.escape(f"[stopped; the answer so far is kept]\r\n{RULE}\r\n<<< "))
    assert server.client_left.wait(20)
    session.type("exit\n")
    assert session.code() == 0


def test_a_piped_session_of_the_demo_model_answers_in_order(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture())
    lines = "hello\n<img>a.png</img>What is this?\n<img>b.png</img>And this?\nclear\nhello\n"
    done = subprocess.run(
        [sys.executable, "-m", "xc_ray", "chat", "--temperature", "0", "--max-new-tokens", "8"],
        input=lines,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        },
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        0,
        "xc-ray: cannot read the picture 'b.png': No such file or directory\n",
    )
    answer = rf"(?s:(.+?))\n{RULE}\n"
    shape = rf"<<< {answer}<<< {answer}<<< <<< \[the history is empty\]\n<<< {answer}<<< \n"
    match = re.fullmatch(shape, done.stdout)
    assert match, done.stdout
    assert match[1] == match[3] != match[2]
