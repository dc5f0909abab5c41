"""Who is where: workers say what they do, and one that has not moved for too long is named.

One small actor beside the driver holds the last word of every worker and the wish to stop. A guard
in the driver asks it, and ends a worker that hangs, so that Ray Train replaces it: waiting in a
collective for somebody else is no fault, doing one thing for too long is, and so is silence.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

# What a worker does while it waits for the others.
WAITING = frozenset({"exchanging gradients", "saving a checkpoint", "exchanging results"})


@dataclass(frozen=True)
class Beat:
    """What a worker does: since when, and when it was last heard of, on the board's clock (s)."""

    rank: int
    step: int
    doing: str
    pid: int
    stamp: str
    node: str
    since: float = 0.0
    heard: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}): {self.doing} at step {self.step}"


class Board:
    """The last words of one group of workers; what the actor holds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._group = ""
        self._beats: dict[int, Beat] = {}
        self._stopping = False

    def beat(self, group: str, beat: Beat) -> None:
        """A worker's word; one of another group than before begins a new board."""
        if group != self._group:
            self._group, self._beats = group, {}
        now = self._clock()
        self._beats[beat.rank] = replace(beat, since=now, heard=now)

    def ping(self, group: str, rank: int) -> None:
        """A sign of life, whatever the worker does."""
        if group == self._group and rank in self._beats:
            self._beats[rank] = replace(self._beats[rank], heard=self._clock())

    def leave(self, group: str, rank: int) -> None:
        """A worker is done: from now on its silence says nothing."""
        if group == self._group:
            self._beats.pop(rank, None)

    def clear(self) -> None:
        """Forgets everybody: the group is being replaced, or done."""
        self._beats = {}

    def late(self, timeout_s: float) -> list[Beat]:
        """Who has hung for `timeout_s`: the silent, else those at work, else all if all wait."""
        now, everybody = self._clock(), list(self._beats.values())
        if silent := [b for b in everybody if now - b.heard > timeout_s]:
            return silent
        still = [b for b in everybody if now - b.since > timeout_s]
        at_work = [b for b in still if b.doing not in WAITING]
        if at_work or len(still) < len(everybody):
            return at_work
        # Whoever falls silent while all wait is to be named alone.
        return still if all(now - b.heard < timeout_s / 2 for b in still) else []

    def stop(self) -> None:
        """From now on everybody is asked to save and end."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether that was asked."""
        return self._stopping


def start_board() -> Any:
    """The board as an actor, on this node if Ray puts it there, without a share of its CPUs.

    It starts anew, empty, if its process or its node is lost.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Board)
    return actor.options(scheduling_strategy=here).remote()


class Reporter:
    """A worker's side: tells the board what it does, and asks whether to stop.

    A context, at whose end it leaves the board. A thread tells each `ping_s` seconds that the
    process lives.
    """

    def __init__(self, board: Any, group: str, rank: int, ping_s: float) -> None:
        self._board, self._group, self._ping_s = board, group, ping_s
        self._me = Beat(rank, 0, "", os.getpid(), process_stamp(os.getpid()) or "", _own_node())
        self._asked: Any = None
        self._stopping = False
        self._ended = threading.Event()
        threading.Thread(target=self._live, name="ping", daemon=True).start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._board.leave.remote(self._group, self._me.rank)

    def _live(self) -> None:
        while not self._ended.wait(self._ping_s):
            self._board.ping.remote(self._group, self._me.rank)

    def doing(self, what: str, step: int) -> None:
        """Tells it, without waiting."""
        self._board.beat.remote(self._group, replace(self._me, doing=what, step=step))

    @property
    def stopping(self) -> bool:
        """Whether to save and end; the answer to the question asked at the last call."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayActorError):  # it is being started anew
                self._stopping = self._stopping or bool(ray.get(self._asked))
            self._asked = None
        if self._asked is None:
            self._asked = self._board.stopping.remote()
        return self._stopping


class Guard:
    """The driver's side: looks at the board now and then, in a thread; a context.

    After `ask_to_stop`, which a signal handler may call, workers save and end.
    """

    def __init__(self, board: Any, hang_timeout_s: float) -> None:
        self._board, self._timeout = board, hang_timeout_s
        self._every = min(1.0, hang_timeout_s / 4)
        self._stop, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self.hung: list[str] = []

    def ask_to_stop(self) -> None:
        """Has the workers save a last checkpoint and end."""
        self._stop.set()

    def __enter__(self) -> "Guard":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._done.wait(self._every):
            try:
                if self._stop.is_set():  # again and again: a new board has not heard of it
                    ray.get(self._board.stop.remote())
                for beat in ray.get(self._board.late.remote(self._timeout)):
                    self._end(beat)
            except ray.exceptions.RayError as e:
                logger.warning("the watch cannot be reached: %s", e)

    def _end(self, beat: Beat) -> None:
        text = f"{beat}, and has not moved for {self._timeout:g} s"
        logger.error("%s; it is killed and replaced", text)
        self.hung.append(text)
        ray.get(self._board.clear.remote())
        try:
            there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
            kill = ray.remote(num_cpus=0, max_retries=0)(end_process)
            ray.get(
                kill.options(scheduling_strategy=there).remote(beat.pid, beat.stamp), timeout=30
            )
        except ray.exceptions.RayError as e:  # its node has gone: so has it
            logger.warning("%s could not be killed: %s", beat, e)


def end_process(pid: int, stamp: str) -> bool:
    """Kills a process of this machine if it is the one with that stamp."""
    if process_stamp(pid) != stamp:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def process_stamp(pid: int) -> str | None:
    """When a process started, in clock ticks since the system did; None if there is none.

    Numbers of processes come again, with another start.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]


def _own_node() -> str:
    return str(ray.get_runtime_context().get_node_id())
