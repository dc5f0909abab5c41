import logging
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from xc_ray.engine.block_manager import BlockManager
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.scheduler import Scheduler
from xc_ray.engine.sequence import SamplingParams, Sequence
from xc_ray.engine.slots import THRASH_S, AdapterSlots


@dataclass
class Device:
    """What the slots hold, copies that end when told, and a clock that stands still."""

    num_slots: int
    lag: bool = False  # whether loads wait for `end`
    now: float = 0.0
    held: dict[int, str] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    loads: list[tuple[int, str]] = field(default_factory=list)

    def load(self, slot: int, adapter: SimpleNamespace) -> None:
        assert slot not in self.pending, "a slot is overwritten while it is being written"
        assert 0 <= slot < self.num_slots
        self.loads.append((slot, adapter.digest))
        self.held[slot] = adapter.digest
        if self.lag:
            self.pending.add(slot)

    def slots(self) -> AdapterSlots:
        return AdapterSlots(
            self.num_slots, self.load, lambda i: i not in self.pending, lambda: self.now
        )


class Queue:
    """Waiting and running sequences; every adapter is a letter, the base is a dash."""

    def __init__(self, num_slots: int, *, lag: bool = False) -> None:
        self.device = Device(num_slots, lag)
        self.slots = self.device.slots()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_added = 0

    def add(self, letters: str) -> None:
        for letter in letters:
            adapter = None if letter == "-" else SimpleNamespace(digest=letter)
            one = Sequence(f"{letter}{self.num_added}", [1], SamplingParams(), adapter=adapter)
            one.arrival = self.num_added
            self.num_added += 1
            self.waiting.append(one)

    def step(self, room: int = 99) -> str:
        """Starts those who may, `room` at most; their letters."""
        self.slots.prepare(self.waiting)
        ready = [s for s in self.waiting if self.slots.ready(s)][:room]
        for one in ready:
            self.slots.pin(one)
            self.waiting.remove(one)
            self.running.append(one)
        return letters(ready)

    def end(self, letter: str) -> None:
        """The first that runs with this adapter ends."""
        one = next(s for s in self.running if s.request_id[0] == letter)
        self.running.remove(one)
        self.slots.unpin(one)

    def preempt(self, letter: str) -> None:
        """The last that runs with this adapter waits again, before all others."""
        one = next(s for s in reversed(self.running) if s.request_id[0] == letter)
        self.running.remove(one)
        self.slots.unpin(one)
        self.waiting.appendleft(one)


def letters(sequences: list[Sequence]) -> str:
    return "".join(s.request_id[0] for s in sequences)


def run(queue: Queue, letter: str) -> None:
    """One with this adapter starts and ends."""
    queue.add(letter)
    assert queue.step() == letter
    queue.end(letter)


# Who may start


def test_adapters_come_into_free_slots_in_the_order_of_the_queue() -> None:
    it = Queue(3)
    it.add("A-BC")
    assert it.step() == "A-BC"
    assert it.device.loads == [(0, "A"), (1, "B"), (2, "C")]
    assert it.slots.resident == ("A", "B", "C")
    assert [s.slot for s in it.running] == [0, -1, 1, 2]


def test_sequences_of_one_adapter_share_its_slot() -> None:
    it = Queue(2)
    it.add("AAA")
    assert it.step() == "AAA"
    assert [s.slot for s in it.running] == [0, 0, 0]
    it.add("A")
    assert it.step() == "A"
    assert it.device.loads == [(0, "A")]
    assert it.slots.stats.num_loads == 1


def test_one_waits_until_its_adapter_is_loaded_and_others_overtake_it() -> None:
    it = Queue(2, lag=True)
    it.add("A-")
    assert it.step() == "-"
    assert it.slots.resident == ("A",)
    assert list(it.slots.loading) == [0]
    assert it.step() == ""
    it.add("B-")
    assert it.step() == "-"
    assert list(it.slots.loading) == [0, 1]
    it.device.pending = {0}
    assert it.step() == "B"
    it.device.pending = set()
    assert it.step() == "A"
    assert list(it.slots.loading) == []
    assert len(it.device.loads) == 2


def test_loads_are_seen_to_end_when_nobody_waits_any_more() -> None:
    it = Queue(1, lag=True)
    it.add("A")
    it.step()
    it.waiting.clear()  # it was aborted
    it.device.pending.clear()
    it.step()
    assert it.slots.loading == ()


def test_a_slot_that_is_still_being_written_is_not_given_to_another() -> None:
    it = Queue(1, lag=True)
    it.add("A")
    it.step()
    it.waiting.clear()
    it.add("B")
    assert it.step() == ""
    assert it.device.loads == [(0, "A")]
    it.device.pending.clear()
    assert it.step() == ""
    assert it.device.loads == [(0, "A"), (0, "B")]
    it.device.pending.clear()
    assert it.step() == "B"


# Who leaves


def test_the_slot_used_longest_ago_is_given_up() -> None:
    it = Queue(3)
    for letter in "ABCA":
        run(it, letter)
    run(it, "D")
    assert sorted(it.slots.resident) == ["A", "C", "D"]
    assert it.slots.stats.num_evictions == 1
    run(it, "E")
    assert sorted(it.slots.resident) == ["A", "D", "E"]


def test_a_slot_was_used_until_its_last_sequence_ended() -> None:
    it = Queue(2)
    it.add("AB")
    it.step()
    it.end("B")
    it.end("A")
    run(it, "C")
    assert sorted(it.slots.resident) == ["A", "C"]


def test_an_adapter_that_somebody_uses_never_leaves() -> None:
    it = Queue(2)
    it.add("ABB")
    it.step()
    it.add("C")
    assert it.step() == ""
    it.end("B")
    assert it.step() == ""
    it.end("B")
    assert it.step() == "C"
    assert it.device.held == {0: "A", 1: "C"}


def test_an_adapter_that_one_before_waits_for_does_not_leave() -> None:
    it = Queue(2)
    run(it, "A")
    run(it, "B")
    it.add("ABC")
    assert it.step(room=0) == ""
    assert it.device.held == {0: "A", 1: "B"}
    assert it.step(room=1) == "A"
    it.end("A")
    assert it.step(room=0) == ""
    assert it.device.held == {0: "C", 1: "B"}


def test_an_idle_slot_is_taken_before_one_that_has_to_drain() -> None:
    it = Queue(2)
    it.add("A")
    it.step()
    run(it, "B")  # used later than A's slot
    it.add("C")
    assert it.step() == "C"
    assert it.device.held == {0: "A", 1: "C"}


def test_an_idle_slot_is_taken_before_one_that_is_still_written_for_nobody() -> None:
    it = Queue(2, lag=True)
    it.add("A")
    it.step()
    it.waiting.clear()  # it was aborted; its load goes on
    it.add("B")
    it.step()
    it.device.pending = {0}
    assert it.step() == "B"
    it.end("B")
    it.add("C")
    it.step()
    assert it.device.held == {0: "A", 1: "C"}


def test_giving_back_twice_gives_back_once() -> None:
    it = Queue(1)
    it.add("AA")
    it.step()
    one, other = it.running
    it.slots.unpin(one)
    it.slots.unpin(one)
    it.add("B")
    assert it.step() == ""
    it.slots.unpin(other)
    assert it.step() == "B"


# Fairness


def test_a_slot_that_drains_takes_nobody_who_came_later() -> None:
    it = Queue(1)
    it.add("A")
    it.step()
    it.add("BAA-")
    assert it.step() == "-"
    assert it.step() == ""
    it.end("A")
    assert it.step() == "B"
    it.end("B")
    assert it.step() == "AA"


def test_only_the_slot_used_longest_ago_drains() -> None:
    it = Queue(2)
    it.add("ABAB")
    it.step()
    it.add("CAB")
    assert it.step() == "B"
    it.end("A")
    it.add("AB")
    assert it.step() == "B", "the slot drains on although one of its sequences has ended"
    it.end("A")
    assert it.step() == "C"
    assert it.device.held == {0: "C", 1: "B"}
    # Now A's turn has come: B's slot is the older.
    it.add("BC")
    assert it.step() == "C"


def test_a_slot_that_somebody_started_with_later_drains_later() -> None:
    it = Queue(2)
    it.add("AB")
    it.step()
    it.add("A")
    assert it.step() == "A"
    it.add("CBA")
    assert it.step() == "A", "the slot of B drains: A's was used since"
    it.end("B")
    assert it.step() == "C"


def test_each_that_waits_drains_a_slot_of_its_own() -> None:
    it = Queue(2)
    it.add("AB")
    it.step()
    it.add("CDAB")
    assert it.step() == ""
    it.end("B")
    assert it.step() == "C"  # the first one, wherever room comes
    it.end("A")
    assert it.step() == "D"


def test_who_has_no_slot_to_drain_waits_for_those_before() -> None:
    it = Queue(1)
    it.add("A")
    it.step()
    it.add("BCB")
    assert it.step() == ""
    it.end("A")
    assert it.step() == "BB"
    assert it.step() == ""
    it.end("B")
    it.add("B")
    assert it.step() == ""
    it.end("B")
    assert it.step() == "C"


def test_a_preempted_sequence_waits_behind_those_it_overtook() -> None:
    it = Queue(2)
    it.add("AB")
    it.step()
    it.add("CB")
    assert it.step() == "B"
    it.preempt("B")  # the one that overtook C
    it.end("B")  # B's slot is free: C has it
    assert it.step() == "C"
    assert it.device.held == {0: "A", 1: "C"}
    assert letters(list(it.waiting)) == "B"


def test_a_preempted_sequence_goes_on_before_those_that_came_after_it() -> None:
    it = Queue(1)
    it.add("A")
    it.step()
    it.add("B")
    it.step()
    it.preempt("A")
    assert it.step() == "A"
    assert it.device.loads == [(0, "A")]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("stream", ["A", "AC", "ACD", "AACD-"])
@pytest.mark.parametrize(("cache", "seqs"), [(48, 3), (60, 4), (40, 6), (400, 6)])
def test_a_stream_of_others_does_not_starve_one_even_where_they_are_preempted(
    num_slots: int, stream: str, cache: int, seqs: int
) -> None:
    """For a while 48, 3, AC on two slots never let B in: each preemption changed the slot to drain.

    Of 30 tokens each, several times more arrive than the lanes can serve.
    """
    config = EngineConfig(cache, cache, seqs, 64, 4, max_loras=num_slots)
    device = Device(num_slots)
    it = Scheduler(config, BlockManager(config.num_blocks), device.slots())

    def add(letter: str, number: int) -> Sequence:
        adapter = None if letter == "-" else SimpleNamespace(digest=letter)
        params = SamplingParams(max_tokens=30)
        one = Sequence(
            letter, [1000 * number], params, max_generated=30, adapter=adapter,
            prefix_key=letter.encode(),
        )  # fmt: skip
        it.add(one)
        return one

    for number in range(40):
        waiting = add("B" if number == 20 else stream[number % len(stream)], number)
        if number == 20:
            mine = waiting
        steps(it, 1)
    # All before it, and those that run, one after the other: what it waits for at most.
    for number in range(40, 40 + 60 * 30):
        if mine.slot >= 0:
            break
        add(stream[number % len(stream)], number)
        steps(it, 1)
    assert mine.slot >= 0


def steps(it: Scheduler, number: int) -> None:
    for _ in range(number):
        for w in it.schedule().work:
            one = w.sequence
            if w.samples:
                one.in_flight -= 1
                one.generated.append(0)
            if len(one.generated) == one.max_generated:
                it.finish(one)


# What is counted and told


def test_loads_evictions_and_early_reloads_are_counted() -> None:
    it = Queue(1)
    for letter in "ABA":
        run(it, letter)
    stats = it.slots.stats
    assert (stats.num_loads, stats.num_evictions, stats.num_reloads) == (3, 2, 1)
    it.device.now = THRASH_S - 1
    run(it, "B")
    assert stats.num_reloads == 2
    it.device.now += THRASH_S
    run(it, "A")
    assert (stats.num_loads, stats.num_reloads) == (5, 2)


def test_thrashing_is_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    it = Queue(1)
    with caplog.at_level(logging.WARNING):
        for letter in "ABABAB":
            run(it, letter)
        assert [r.getMessage() for r in caplog.records] == [
            "more adapters are in use than the 1 slots hold: 1 were loaded again within 10 s of "
            "leaving, since the start; raise the number of slots"
        ]
        it.device.now = THRASH_S - 1
        run(it, "A")
        assert len(caplog.records) == 1
        it.device.now = THRASH_S
        run(it, "B")
        assert len(caplog.records) == 2
        assert "6 were loaded again" in caplog.records[1].getMessage()


def test_switching_now_and_then_is_not_thrashing(caplog: pytest.LogCaptureFixture) -> None:
    it = Queue(1)
    with caplog.at_level(logging.WARNING):
        for letter in "ABABAB":
            run(it, letter)
            it.device.now += THRASH_S
    assert it.slots.stats.num_reloads == 0
    assert not caplog.records


def test_what_left_long_ago_is_not_remembered() -> None:
    it = Queue(1)
    for letter in "ABCDEFGH":
        run(it, letter)
        it.device.now += THRASH_S / 2
    assert len(it.slots._evicted) <= 2


# Any order of events


class Life(RuleBasedStateMachine):
    """Sequences come, start, end and are preempted; loads end when they end."""

    @initialize(num_slots=st.integers(1, 4))
    def start(self, num_slots: int) -> None:
        self.queue = Queue(num_slots, lag=True)
        self.held_when_pinned: dict[int, str] = {}
        self.promised: dict[str, int] = {}

    @rule(letters=st.text("ABCDEF-", min_size=1, max_size=4))
    def add(self, letters: str) -> None:
        self.queue.add(letters)

    @rule(room=st.integers(0, 5))
    def step(self, room: int) -> None:
        queue = self.queue
        before = {s.slot for s in queue.running if s.slot >= 0}
        held = dict(queue.device.held)
        order = sorted(queue.waiting, key=lambda s: s.arrival)
        queue.step(room)
        for slot in before:
            assert queue.device.held[slot] == held[slot], "a slot in use was overwritten"
        self.check_first(order, room)

    def check_first(self, order: list[Sequence], room: int) -> None:
        """The one that waits longest has its adapter, or a slot loads, or one drains for it."""
        queue = self.queue
        first = next((s for s in order if s.adapter), None)
        if first is None or first in queue.running:
            return
        digest = first.adapter.digest
        resident, loading = queue.slots.resident, queue.slots.loading
        if digest in resident:
            loaded = next(i for i, d in queue.device.held.items() if d == digest) not in loading
            assert queue.slots.ready(first) == loaded
            return
        used = {s.slot for s in queue.running}
        assert set(range(queue.device.num_slots)) <= used | set(loading), "a slot is idle"

    @precondition(lambda self: self.queue.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.queue.end(data.draw(st.sampled_from(letters(self.queue.running))))

    @precondition(lambda self: self.queue.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.queue.preempt(data.draw(st.sampled_from(letters(self.queue.running))))

    @precondition(lambda self: self.queue.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        del self.queue.waiting[data.draw(st.integers(0, len(self.queue.waiting) - 1))]

    @precondition(lambda self: self.queue.device.pending)
    @rule(data=st.data())
    def load_ends(self, data: st.DataObject) -> None:
        pending = self.queue.device.pending
        pending.remove(data.draw(st.sampled_from(sorted(pending))))

    @rule(seconds=st.sampled_from([0.5, 4.0, THRASH_S]))
    def time_passes(self, seconds: float) -> None:
        self.queue.device.now += seconds

    @invariant()
    def who_runs_has_its_adapter(self) -> None:
        for one in self.queue.running:
            if one.adapter is None:
                assert one.slot == -1
            else:
                assert self.queue.device.held[one.slot] == one.adapter.digest
                assert one.slot not in self.queue.device.pending
        assert all(s.slot == -1 for s in self.queue.waiting)

    @invariant()
    def the_books_are_right(self) -> None:
        slots, device = self.queue.slots, self.queue.device
        used = [s.slot for s in self.queue.running]
        assert [s.pins for s in slots._slots] == [used.count(i) for i in range(device.num_slots)]
        assert slots._by_digest == {d: i for i, d in device.held.items()}, "one slot for each"
        assert [s.digest for s in slots._slots] == [
            device.held.get(i) for i in range(device.num_slots)
        ]
        assert device.pending <= set(slots.loading)
        stats = slots.stats
        assert stats.num_loads == len(device.loads)
        assert stats.num_loads - stats.num_evictions == len(device.held)
        assert stats.num_reloads <= stats.num_evictions

    def teardown(self) -> None:
        """Whatever has happened: loads that end and runs that end bring everybody their turn."""
        if not hasattr(self, "queue"):
            return
        queue, turns = self.queue, 0
        while queue.waiting or queue.running:
            # Each turn serves who waits longest, at the latest in three steps: drain, load, start.
            oldest = min((s.arrival for s in queue.waiting if s.adapter), default=None)
            for _ in range(3):
                queue.step()
                self.who_runs_has_its_adapter()
                self.the_books_are_right()
                queue.device.pending.clear()
                for one in list(queue.running):
                    queue.end(one.request_id[0])
            assert all(s.arrival != oldest for s in queue.waiting), "it did not get its turn"
            turns += 1
        assert turns < 200


@pytest.mark.parametrize(
    "max_examples", [150, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_in_any_order_of_events_the_books_are_right_and_everybody_has_a_turn(
    max_examples: int,
) -> None:
    run_state_machine_as_test(
        Life, settings=settings(max_examples=max_examples, deadline=None, stateful_step_count=40)
    )
