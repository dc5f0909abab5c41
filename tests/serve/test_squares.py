"""Passes of squares: nothing lost, nothing twice, full while there is work, and nobody starves."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.serve.squares import Piece, SquareBatcher

PICTURES = st.lists(st.integers(1, 57), min_size=1, max_size=12)
MOST = st.integers(1, 32)
unhurried = settings(deadline=None)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Traffic:
    """A batcher, and a check of every pass against what it was told."""

    batcher: SquareBatcher
    sizes: dict[int, int] = field(default_factory=dict)
    seen: Counter[tuple[int, int]] = field(default_factory=Counter)
    taken: Counter[int] = field(default_factory=Counter)
    whole: list[int] = field(default_factory=list)

    def come(self, size: int) -> int:
        key = self.batcher.expect(size)
        self.sizes[key] = size
        return key

    def run(self) -> list[Piece]:
        waiting = sum(self.left(key) for key in self.sizes)
        pieces = self.batcher.take()
        assert sum(p.count for p in pieces) == min(waiting, self.batcher.max_squares)
        assert [p.key for p in pieces] == sorted({p.key for p in pieces})
        self.note(pieces)
        return pieces

    def note(self, pieces: list[Piece]) -> None:
        for p in pieces:
            self.seen.update((p.key, i) for i in range(p.first, p.first + p.count))
            self.taken[p.key] += p.count

    def end(self, pieces: list[Piece]) -> None:
        for key in self.batcher.ended(pieces):
            self.whole.append(key)
            assert self.left(key) == 0
            self.batcher.drop(key)

    def left(self, key: int) -> int:
        return self.sizes[key] - self.taken[key]


def ready(traffic: Traffic, size: int) -> int:
    key = traffic.come(size)
    traffic.batcher.ready(key)
    return key


@unhurried
@given(PICTURES, MOST, st.booleans())
def test_every_square_runs_once_and_passes_are_full(
    sizes: list[int], most: int, behind: bool
) -> None:
    """Also where a pass ends only after the next one was taken."""
    traffic = Traffic(SquareBatcher(most))
    for size in sizes:
        ready(traffic, size)
    running: list[Piece] = []
    while traffic.batcher.wait_s() is not None:
        pieces = traffic.run()
        if not behind:
            traffic.end(pieces)
            continue
        traffic.end(running)
        running = pieces
        assert traffic.batcher.running_squares == sum(p.count for p in running)
    traffic.end(running)
    assert sorted(traffic.whole) == list(range(len(sizes)))
    assert traffic.seen == {(key, i): 1 for key, size in enumerate(sizes) for i in range(size)}
    assert (traffic.batcher.waiting_squares, traffic.batcher.running_squares) == (0, 0)
    assert traffic.batcher.take() == []


@unhurried
@given(PICTURES, PICTURES, MOST, st.integers(1, 57))
def test_later_pictures_delay_none_past_its_bound(
    before: list[int], after: list[int], most: int, own: int
) -> None:
    """However many come behind, two passes give the oldest as many squares as one holds."""
    traffic = Traffic(SquareBatcher(most))
    for size in before:
        ready(traffic, size)
    key = ready(traffic, own)
    bound = 2 * -(-(sum(before) + own) // most) + 1
    for number in range(bound):
        if key in traffic.whole:
            return
        for size in after[number % len(after) :]:
            ready(traffic, size)
        traffic.end(traffic.run())
    assert key in traffic.whole


@unhurried
@given(st.integers(20, 57), st.integers(2, 16), st.data())
def test_a_small_picture_does_not_wait_for_a_large_one(
    large: int, most: int, data: st.DataObject
) -> None:
    """What fits into half a pass is in the next one, whatever came before it."""
    small = data.draw(st.integers(1, most // 2))
    traffic = Traffic(SquareBatcher(most))
    ready(traffic, large)
    traffic.end(traffic.run())
    key = ready(traffic, small)
    traffic.end(traffic.run())
    assert key in traffic.whole


def test_half_of_a_pass_is_the_oldest_pictures() -> None:
    batcher = SquareBatcher(8)
    for key, size in enumerate((56, 2, 2, 9)):
        batcher.expect(size)
        batcher.ready(key)
    assert batcher.take() == [Piece(0, 0, 4), Piece(1, 0, 2), Piece(2, 0, 2)]
    assert batcher.take() == [Piece(0, 4, 4), Piece(3, 0, 4)]
    assert batcher.take() == [Piece(0, 8, 4), Piece(3, 4, 4)]
    assert batcher.take() == [Piece(0, 12, 7), Piece(3, 8, 1)]
    assert batcher.take() == [Piece(0, 19, 8)]


def test_single_squares_go_to_the_oldest_and_the_smallest_by_turns() -> None:
    batcher = SquareBatcher(1)
    for key, size in enumerate((50, 2)):
        batcher.expect(size)
        batcher.ready(key)
    assert [batcher.take()[0].key for _ in range(5)] == [0, 1, 0, 1, 0]


@unhurried
@given(st.lists(st.tuples(st.sampled_from("crtedx"), st.integers(0, 30)), max_size=60), MOST)
def test_whatever_happens_squares_are_counted_and_none_runs_twice(
    events: list[tuple[str, int]], most: int
) -> None:
    """Come, ready, take, end, drop, in any order and with pictures leaving at any time."""
    traffic = Traffic(SquareBatcher(most))
    batcher, running = traffic.batcher, []
    coming: list[int] = []
    there: set[int] = set()
    for event, number in events:
        if event == "c":
            coming.append(traffic.come(number + 1))
        elif event == "r" and coming:
            key = coming.pop(number % len(coming))
            batcher.ready(key)
            there.add(key)
        elif event == "t":
            pieces = batcher.take()
            assert {p.key for p in pieces} <= there
            assert sum(p.count for p in pieces) <= most
            traffic.note(pieces)
            running.append(pieces)
        elif event == "e" and running:
            for key in batcher.ended(running.pop(0)):
                assert key in there
                assert traffic.left(key) == 0
        elif event == "d" and there:
            key = sorted(there)[number % len(there)]
            there.discard(key)
            batcher.drop(key)
            batcher.drop(key)  # twice is once
        assert batcher.running_squares == sum(p.count for pieces in running for p in pieces)
        assert batcher.waiting_squares == sum(traffic.left(k) for k in [*coming, *there])
    assert not traffic.seen or max(traffic.seen.values()) == 1


def test_a_pass_waits_only_while_somebody_is_being_read() -> None:
    clock = Clock(5.0)
    batcher = SquareBatcher(8, 0.002, clock)
    assert batcher.wait_s() is None
    first = batcher.expect(2)
    assert batcher.wait_s() is None
    batcher.ready(first)
    assert batcher.wait_s() == 0
    second = batcher.expect(2)
    assert batcher.wait_s() == pytest.approx(0.002)
    clock.now += 0.0015
    assert batcher.wait_s() == pytest.approx(0.0005)
    batcher.drop(second)
    assert batcher.wait_s() == 0
    batcher.expect(2)
    clock.now += 1
    assert batcher.wait_s() == 0


def test_a_full_pass_waits_for_nobody() -> None:
    batcher = SquareBatcher(4, 1.0, Clock())
    for size in (3, 1, 5):
        key = batcher.expect(size)
        if size < 5:
            batcher.ready(key)
    assert batcher.wait_s() == 0
    assert batcher.waiting_squares == 9
