import io

import pytest

from xc_ray.errors import XcRayError
from xc_ray.progress import Progress, amount


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_log_gets_a_line_now_and_then(clock):
    out = io.StringIO()
    with Progress(out, clock) as progress:
        for second in range(35):
            progress("a.safetensors", second * 100_000_000, 3_500_000_000)
            clock.now += 1
    assert out.getvalue().splitlines() == [
        " 29%  1.0 of 3.5 GB  100.0 MB/s  a.safetensors",
        " 57%  2.0 of 3.5 GB  100.0 MB/s  a.safetensors",
        " 86%  3.0 of 3.5 GB  100.0 MB/s  a.safetensors",
    ]


def test_what_is_quick_leaves_no_line_in_a_log(clock):
    out = io.StringIO()
    clock.now += 1_000  # however long it took to begin
    with Progress(out, clock) as progress:
        progress("a", 0, 5_000)
        progress("a", 5_000, 5_000)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_that_leaves_a_clean_line(clock):
    out = Terminal()
    with Progress(out, clock) as progress:
        progress("a", 0, 4_000)
        clock.now += 1
        progress("a", 1_000, 4_000)
        progress("a", 1_500, 4_000)  # too soon after the one before
        progress("a", 4_000, 4_000)  # the end is always shown
    assert out.getvalue().split("\r")[1:] == [
        "[------------------------]   0%  0.0 of 4.0 kB  a\x1b[K",
        "[######------------------]  25%  1.0 of 4.0 kB  1.0 kB/s  a\x1b[K",
        "[########################] 100%  4.0 of 4.0 kB  4.0 kB/s  a\x1b[K",
        "\x1b[K",
    ]


def test_a_bar_never_wraps(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    Progress(out, clock)("x" * 200, 1, 2_000)
    (line,) = out.getvalue().split("\r")[1:]
    assert len(line.removesuffix("\x1b[K")) == 59


def test_a_stage_of_steps_has_no_bytes(clock):
    out = Terminal()
    Progress(out, clock)("convert b.bin", 1, 4)
    assert out.getvalue().endswith("  25%  1 of 4  convert b.bin\x1b[K")


def test_a_stage_of_nothing_is_done(clock):
    out = Terminal()
    Progress(out, clock)("nothing", 0, 0)
    assert "100%  0 of 0" in out.getvalue()


def test_the_rate_is_that_of_the_stage(clock):
    out = Terminal()
    progress = Progress(out, clock)
    progress("convert", 1, 2)
    clock.now += 1_000
    progress("send", 5_000_000, 20_000_000)  # found there already, at no time
    clock.now += 10
    progress("send", 15_000_000, 20_000_000)
    assert "1.0 MB/s" in out.getvalue()


def test_threads_that_report_are_stopped(clock):
    progress = Progress(io.StringIO(), clock)
    progress.stop()
    with pytest.raises(XcRayError, match="interrupted"):
        progress("a", 1, 2)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999, "999"),
        (1_000, "1.0 kB"),
        (14_808, "14.8 kB"),
        (6_710_096, "6.7 MB"),
        (17.4e9, "17.4 GB"),
    ],
)
def test_amounts_are_in_powers_of_ten(number, text):
    assert amount(int(number)) == text
