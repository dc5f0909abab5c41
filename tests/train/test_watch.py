"""Who hangs, told from what the workers said last; the clock is the test's."""

import os
import signal
import subprocess
import sys

import pytest

from xc_ray.train.watch import Beat, Board, end_process, process_stamp


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def beat(rank: int, doing: str, step: int = 7) -> Beat:
    return Beat(rank, step, doing, 1000 + rank, "5", "node")


def ping(board: Board, *ranks: int) -> None:
    for rank in ranks:
        board.ping("group", rank)


def board_of(clock: Clock, *beats: Beat) -> Board:
    board = Board(clock)
    for one in beats:
        board.beat("group", one)
    return board


def test_who_works_too_long_is_late_and_who_waits_for_him_is_not() -> None:
    clock = Clock()
    board = board_of(
        clock, beat(0, "exchanging gradients"), beat(1, "reading data"), beat(2, "computing pass 1")
    )
    clock.now = 5
    board.beat("group", beat(2, "exchanging gradients"))
    clock.now = 11
    ping(board, 0, 1, 2)
    assert board.late(12) == []
    assert [str(b) for b in board.late(10)] == ["rank 1 (pid 1001): reading data at step 7"]


def test_if_all_wait_the_exchange_itself_hangs() -> None:
    clock = Clock()
    board = board_of(clock, beat(0, "exchanging gradients"), beat(1, "exchanging gradients"))
    clock.now = 9
    ping(board, 0, 1)
    clock.now = 11
    assert [b.rank for b in board.late(10)] == [0, 1]


def test_who_falls_silent_while_all_wait_is_late_alone() -> None:
    """A process that is stopped has the same last word as those who wait for it."""
    clock = Clock()
    board = board_of(clock, beat(0, "exchanging gradients"), beat(1, "exchanging gradients"))
    for clock.now in range(1, 30):
        ping(board, 0)
        if clock.now == 1:
            ping(board, 1)
        assert [b.rank for b in board.late(10)] == ([] if clock.now < 12 else [1])


def test_whoever_waits_for_a_long_step_is_not_late() -> None:
    clock = Clock()
    board = board_of(clock, beat(0, "exchanging gradients"))
    clock.now = 9
    ping(board, 0)
    board.beat("group", beat(1, "computing pass 1 of 2"))
    clock.now = 11
    assert board.late(10) == []


def test_a_new_group_begins_a_new_board() -> None:
    clock = Clock()
    board = board_of(clock, beat(0, "updating"), beat(1, "reading data"))
    clock.now = 100
    board.beat("another", beat(0, "loading the model"))
    assert board.late(10) == []


def test_who_is_done_may_be_silent() -> None:
    clock = Clock()
    board = board_of(clock, beat(0, "logging"), beat(1, "updating"))
    board.leave("another", 0)
    board.leave("group", 1)
    clock.now = 100
    assert [b.rank for b in board.late(10)] == [0]


def test_a_cleared_board_has_nobody_late() -> None:
    clock = Clock()
    board = board_of(clock, beat(1, "reading data"))
    clock.now = 100
    board.clear()
    assert board.late(10) == []


def test_only_the_very_process_is_ended() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        try:
            stamp = process_stamp(process.pid)
            assert stamp is not None
            assert not end_process(process.pid, "another start")
            assert process.poll() is None
            os.kill(process.pid, signal.SIGSTOP)  # as if it hung
            assert end_process(process.pid, stamp)
            assert process.wait(10) == -signal.SIGKILL
        finally:
            process.kill()
    assert process_stamp(process.pid) is None


@pytest.mark.parametrize(
    "waits", ["exchanging gradients", "saving a checkpoint", "exchanging results"]
)
def test_who_works_is_named_and_not_those_who_wait_for_him_there(waits: str) -> None:
    clock = Clock()
    board = board_of(clock, beat(0, waits), beat(1, "writing a checkpoint"))
    clock.now = 11
    ping(board, 0, 1)
    assert [b.rank for b in board.late(10)] == [1]


def test_nobody_is_late_while_all_wait_and_one_may_be_falling_silent() -> None:
    clock = Clock()
    board = board_of(clock, beat(0, "exchanging gradients"), beat(1, "exchanging gradients"))
    clock.now = 3
    ping(board, 1)
    for clock.now in range(4, 30):
        ping(board, 0)
        assert [b.rank for b in board.late(10)] == ([] if clock.now < 14 else [1])


def test_a_ping_of_a_group_that_was_replaced_is_no_sign_of_life() -> None:
    clock = Clock()
    board = board_of(clock, beat(0, "exchanging gradients"))
    clock.now = 9
    board.beat("group", beat(1, "computing pass 1 of 1"))
    clock.now = 11
    board.ping("another", 0)
    assert [b.rank for b in board.late(10)] == [0]


def test_the_wish_to_stop_outlives_a_group() -> None:
    board = board_of(Clock(), beat(0, "updating"))
    assert not board.stopping()
    board.stop()
    board.clear()
    board.beat("another", beat(0, "loading the model"))
    assert board.stopping()
