import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from xc_ray.engine.slot_ranges import SlotRanges

CAPACITY = 60


class Cache(RuleBasedStateMachine):
    """Ranges against a plain list of slots, each free or held."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = SlotRanges(CAPACITY)
        self.held: dict[int, int] = {}
        self.free_slots = [True] * CAPACITY

    def fits(self, start: int, length: int) -> bool:
        return start + length <= CAPACITY and all(self.free_slots[start : start + length])

    @rule(length=st.integers(1, CAPACITY + 5))
    def allocate(self, length: int) -> None:
        start = self.ranges.allocate(length)
        assert start == next((s for s in range(CAPACITY) if self.fits(s, length)), None)
        if start is not None:
            self.held[start] = length
            self.free_slots[start : start + length] = [False] * length

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.held)))
        length = self.held.pop(start)
        self.ranges.free(start, length)
        self.free_slots[start : start + length] = [True] * length

    @invariant()
    def every_slot_is_free_or_held(self) -> None:
        assert self.ranges.num_free == sum(self.free_slots) == CAPACITY - sum(self.held.values())

    def teardown(self) -> None:
        for start, length in self.held.items():
            self.ranges.free(start, length)
        assert self.ranges.allocate(CAPACITY) == 0


def test_ranges_never_overlap_the_first_fit_is_taken_and_all_merge_again() -> None:
    run_state_machine_as_test(
        Cache, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_room_in_pieces_is_no_room_for_a_longer_range() -> None:
    ranges = SlotRanges(10)
    starts = [ranges.allocate(2) for _ in range(5)]
    for start in starts[::2]:
        assert start is not None
        ranges.free(start, 2)
    assert ranges.num_free == 6
    assert ranges.allocate(3) is None
    ranges.free(2, 2)
    assert ranges.allocate(6) == 0


def test_a_range_that_is_freed_twice_is_a_bug_that_shows() -> None:
    ranges = SlotRanges(10)
    ranges.allocate(4)
    ranges.free(0, 4)
    with pytest.raises(AssertionError, match="freed twice"):
        ranges.free(0, 4)
