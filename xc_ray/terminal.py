"""The terminal chat, after ms-swift's `swift infer`: one loop, wherever the answers come from.

    <<< <img>photo.jpg</img>What is in the picture?
    A cat on a mat.
    --------------------------------------------------
    <<< clear

`Terminal` reads queries and prints pieces. A `Backend` makes them: `Local` here, from a `Pipeline`;
`client` has the one for a server.
"""

import signal
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TextIO, TypeAlias

from xc_ray.errors import XcRayError

if TYPE_CHECKING:
    from xc_ray.pipeline import Pipeline

History: TypeAlias = list[tuple[str, str]]
Pieces: TypeAlias = Generator[tuple[str, History], None, None]

PROMPT = "<<< "
MULTI_LINE_PROMPT = "<<<[M] "
END_OF_INPUT = "#"
RULE = "-" * 50
HELP = "`clear` empties the history, `multi-line` takes input that ends with #, `exit` ends"
COMMANDS = frozenset({"exit", "quit", "clear", "multi-line", "single-line"})
# What a model may say and a screen would obey: escape sequences, bells, backspaces.
_CONTROLS = {c: "�" for c in (*range(32), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


@dataclass(frozen=True)
class ChatOptions:
    """What every question is asked with; `sampling` holds what was given, by its OpenAI name."""

    system: str | None = None
    max_tiles: int | None = None
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Where answers come from.

    `interruptible`: KeyboardInterrupt may be raised anywhere inside `stream`; if not, only between
    two pieces.
    """

    interruptible: ClassVar[bool]

    def stream(self, query: str, history: History) -> Pieces:
        """Yields each new piece of the answer with the history so far.

        Raises:
            XcRayError: there is no answer, or not the whole of it.
        """
        ...


# ---------------------------------------------------------------- the loop


@dataclass
class Terminal:
    """Reads queries, prints answers, keeps the history; `live` prints pieces as they come."""

    backend: Backend
    live: bool = True
    stdin: TextIO = field(default_factory=lambda: sys.stdin)
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    history: History = field(default_factory=list)
    multi_line: bool = False

    def run(self) -> None:
        """Chats until `exit`, `quit`, the end of the input, or Ctrl-C twice at the prompt."""
        if self._interactive:
            _edit_lines()
            self._note(HELP)
        pressed_before = False
        while True:
            try:
                query = self._read()
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                self._write("\n")
                if not self._interactive:
                    raise
                if _line_was_typed():
                    continue
                if pressed_before:
                    return
                pressed_before = True
                self._note("Ctrl-C again ends, so does `exit`")
                continue
            pressed_before = False
            command = query.strip().lower()
            if command in ("exit", "quit"):
                return
            if command in COMMANDS:
                self._obey(command)
            elif command:
                self._answer(query)

    @property
    def _interactive(self) -> bool:
        return self.stdin.isatty()

    def _read(self) -> str:
        """The next query, one line or several up to `#`; a command needs no `#`."""
        if not self.multi_line:
            return self._read_line(PROMPT)
        lines: list[str] = []
        while True:
            try:
                line = self._read_line("" if lines else MULTI_LINE_PROMPT)
            except EOFError:
                if not lines:
                    raise
                return "\n".join(lines)
            if not lines and line.strip().lower() in COMMANDS:
                return line
            if line.rstrip().endswith(END_OF_INPUT):
                return "\n".join([*lines, line.rstrip().removesuffix(END_OF_INPUT)])
            lines.append(line)

    def _read_line(self, prompt: str) -> str:
        if self._interactive and self.stdin is sys.stdin:
            return input(prompt)
        self._write(prompt)
        line = self.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def _obey(self, command: str) -> None:
        if command == "clear":
            self.history = []
            self._note("the history is empty")
        elif command == "multi-line":
            self.multi_line = True
            self._note("end your input with #; `single-line` switches back")
        else:
            self.multi_line = False
            self._note("one line is one input")

    def _answer(self, query: str) -> None:
        answer, after, stopped = "", self.history, False
        with _CtrlC(at_once=self.backend.interruptible) as ctrl_c:
            try:
                with closing(self.backend.stream(query, self.history)) as pieces:
                    for piece, after in pieces:  # noqa: B007 - the last one counts
                        answer += piece
                        if self.live:
                            self._write(piece)
                        ctrl_c.check()
            except KeyboardInterrupt:
                stopped = True
            except XcRayError as e:
                self._write("\n" if self.live and answer else "")
                self._complain(e)
                return
            self._write("\n" if self.live else answer + "\n")
            if answer:
                self.history = after
            if stopped:
                self._note("stopped; " + self._fate(answer))
            elif not answer:
                self._note("an empty answer; " + self._fate(answer))
            self._write(RULE + "\n")

    def _fate(self, answer: str) -> str:
        # A turn without an answer says nothing, and servers refuse it.
        return "the answer so far is kept" if answer else "this turn is not kept"

    def _write(self, text: str) -> None:
        self.stdout.write(text.translate(_CONTROLS) if self.stdout.isatty() else text)
        self.stdout.flush()

    def _note(self, text: str) -> None:
        self._write(f"[{text}]\n")

    def _complain(self, error: XcRayError) -> None:
        self.stderr.write(f"xc-ray: {' '.join(error.message.translate(_CONTROLS).split())}\n")
        self.stderr.flush()


class _CtrlC:
    """Ctrl-C while an answer comes: raised at once, or noted and raised by `check` between pieces.

    After a noted press, a second one is raised wherever the model stands (a long prefill on a CPU).
    What comes after a raised one is ignored, so that the answer is closed in peace.
    """

    def __init__(self, *, at_once: bool) -> None:
        self._left = 1 if at_once else 2  # presses until it is raised

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        # Only the main thread may handle signals. A process that ignores Ctrl-C goes on to.
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and self._before is not signal.SIG_IGN
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._pressed)
        self._noted = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._noted:
            self._left = 0
            raise KeyboardInterrupt

    def _pressed(self, _signal: int, _frame: FrameType | None) -> None:
        self._noted = True
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def _edit_lines() -> None:
    """Arrow keys and recall in `input()`, where Python has readline."""
    try:
        import readline  # noqa: F401 - importing it is what does it
    except ImportError:
        return


def _line_was_typed() -> bool:
    """Whether a Ctrl-C at the prompt threw something away."""
    readline = sys.modules.get("readline")
    return readline is not None and bool(readline.get_line_buffer())


# ---------------------------------------------------------------- a model in this process


@dataclass(frozen=True)
class Local:
    """Answers of a `Pipeline`; no engine step is broken off half way: its books must balance."""

    interruptible: ClassVar[bool] = False
    pipeline: "Pipeline"
    options: ChatOptions

    def stream(self, query: str, history: History) -> Pieces:
        """As `Backend.stream`."""
        options = self.options
        yield from self.pipeline.stream(
            query,
            history,
            system=options.system,
            max_tiles=options.max_tiles,
            stop=options.stop,
            **options.sampling,
        )
