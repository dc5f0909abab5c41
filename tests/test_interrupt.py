import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A pool whose thread does not end, unless it is told to.
SCRIPT = """
import signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from xc_ray import interrupt
interrupt.END_S = float(sys.argv[1])
told = threading.Event()
stop = told.set if sys.argv[2] == "heard" else lambda: None
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with interrupt.interruptible(stop), ThreadPoolExecutor(1) as pool:
        pool.submit(told.wait, 30)
        print("ready", flush=True)
        time.sleep(30)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def interrupted(end_s: float, stop: str, presses: int = 1) -> tuple[int, bytes, float]:
    """Exit code, what was printed after Ctrl-C, and the seconds that it took to end."""
    running = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(end_s), stop], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    began = time.monotonic()
    for _ in range(presses):
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
    out, _ = running.communicate(timeout=60)
    return running.returncode, out, time.monotonic() - began


def test_threads_that_end_when_told_leave_a_keyboard_interrupt():
    code, out, took_s = interrupted(20, "heard")
    assert (code, out) == (0, b"interrupted\n")
    assert took_s < 10


def test_threads_that_do_not_end_are_waited_for_no_longer_than_the_limit():
    code, out, took_s = interrupted(1, "deaf")
    assert (code, out) == (130, b"")
    assert 0.9 < took_s < 10


def test_a_second_ctrl_c_ends_at_once():
    code, out, took_s = interrupted(20, "deaf", presses=2)
    assert (code, out) == (130, b"")
    assert took_s < 10
