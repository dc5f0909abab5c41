from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.scheduler import Scheduler
from xc_ray.engine.sequence import SamplingParams, Sequence, SequenceStatus, Work
from xc_ray.engine.slot_ranges import SlotRanges


def scheduler(cache: int = 100, seqs: int = 4, budget: int = 8) -> Scheduler:
    config = EngineConfig(
        max_model_len=cache, kv_cache_tokens=cache, max_num_seqs=seqs, max_prefill_tokens=budget
    )
    return Scheduler(config, SlotRanges(cache))


def sequence(name: str, prompt: int, answer: int = 5) -> Sequence:
    return Sequence(name, list(range(prompt)), SamplingParams(max_tokens=answer))


def add(it: Scheduler, *sequences: Sequence) -> None:
    for one in sequences:
        it.add(one)


def step(it: Scheduler) -> dict[str, int]:
    """Runs one step as the engine does; how many tokens each sequence had in it."""
    work, _ = it.schedule()
    for w in work:
        samples = w.samples
        w.sequence.num_computed += len(w.ids)
        if samples:
            w.sequence.generated.append(0)
            if len(w.sequence.generated) == w.sequence.params.max_tokens:
                it.finish(w.sequence)
    return {w.sequence.request_id: len(w.ids) for w in work}


def names(sequences: list[Sequence] | deque[Sequence]) -> list[str]:
    return [s.request_id for s in sequences]


def test_a_prompt_longer_than_the_budget_is_taken_in_chunks() -> None:
    it = scheduler(budget=8)
    add(it, sequence("a", 18, answer=2))
    assert [step(it) for _ in range(5)] == [{"a": 8}, {"a": 8}, {"a": 2}, {"a": 1}, {}]


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    it = scheduler(budget=8)
    add(it, sequence("a", 5), sequence("b", 5), sequence("c", 5))
    assert step(it) == {"a": 5, "b": 3}
    assert step(it) == {"a": 1, "b": 2, "c": 5}


def test_decoding_comes_first_and_takes_nothing_of_the_prompts_budget() -> None:
    it = scheduler(budget=4)
    add(it, sequence("a", 2, answer=9), sequence("b", 2, answer=9))
    step(it)
    add(it, sequence("long", 12))
    work, started = it.schedule()
    assert [(w.sequence.request_id, len(w.ids)) for w in work] == [("a", 1), ("b", 1), ("long", 4)]
    assert names(started) == ["long"]


def test_a_long_prompt_does_not_hold_up_who_is_answering() -> None:
    it = scheduler(cache=200, budget=4)
    add(it, sequence("a", 1, answer=30))
    step(it)
    add(it, sequence("long", 40))
    assert all(step(it) == {"a": 1, "long": 4} for _ in range(10))
    assert step(it) == {"a": 1, "long": 1}


def test_many_short_prompts_do_not_hold_up_a_long_one() -> None:
    it = scheduler(cache=60, seqs=4, budget=6)
    add(it, sequence("s0", 2), sequence("s1", 2), sequence("long", 30, answer=5))
    arrived = 2
    long = it.waiting[-1]
    for _ in range(40):
        step(it)
        if long.status is SequenceStatus.FINISHED:
            break
        add(it, sequence(f"s{arrived}", 2, answer=2))
        arrived += 1
    assert long.status is SequenceStatus.FINISHED


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    it = scheduler(cache=30)
    add(it, sequence("a", 15), sequence("large", 20), sequence("small", 1, answer=1))
    step(it)
    assert names(it.running) == ["a"]
    assert names(it.waiting) == ["large", "small"]


def test_a_request_starts_only_when_prompt_and_answer_fit_whole() -> None:
    it = scheduler(cache=30)
    add(it, sequence("a", 10, answer=10), sequence("b", 5, answer=6))
    step(it)
    assert names(it.waiting) == ["b"]
    it.finish(it.running[0])
    assert step(it) == {"b": 5}


def test_no_more_sequences_run_than_there_are_lanes() -> None:
    it = scheduler(seqs=2)
    add(it, *(sequence(n, 1, answer=3) for n in "abc"))
    step(it)
    assert names(it.running) == ["a", "b"]
    assert names(it.waiting) == ["c"]
    it.finish(it.running[0])
    assert "c" in step(it)
    assert {s.lane for s in it.running} == {0, 1}


def test_a_sequence_starts_once() -> None:
    it = scheduler(budget=2)
    add(it, sequence("a", 6))
    assert names(it.schedule()[1]) == ["a"]
    assert it.schedule()[1] == []


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_finished_sequence_gives_back_its_lane_and_its_room(steps: int) -> None:
    it = scheduler(cache=20, seqs=1, budget=4)
    one = sequence("a", 10, answer=5)
    it.add(one)
    for _ in range(steps):
        step(it)
    it.finish(one)
    assert one.status is SequenceStatus.FINISHED
    assert it.ranges.num_free == 20
    assert not it.running
    assert not it.waiting
    it.add(sequence("b", 10, answer=10))
    assert step(it) == {"b": 4}


def test_finishing_twice_gives_nothing_back_twice() -> None:
    it = scheduler()
    one = sequence("a", 3)
    it.add(one)
    step(it)
    it.finish(one)
    it.finish(one)
    assert it.ranges.num_free == 100


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 25), st.integers(1, 6)), min_size=1, max_size=15
)


@settings(max_examples=100, deadline=None)
@given(ARRIVALS, st.integers(1, 4), st.integers(1, 12), st.integers(31, 80))
def test_whatever_arrives_every_rule_holds_and_everything_ends(
    arrivals: list[tuple[int, int, int]], seqs: int, budget: int, cache: int
) -> None:
    it = scheduler(cache, seqs, budget)
    todo = [(wait, sequence(str(i), p, a)) for i, (wait, p, a) in enumerate(arrivals)]
    all_of_them = [s for _, s in todo]
    started: list[Sequence] = []
    for _ in range(2000):
        while todo and todo[0][0] <= 0:
            it.add(todo.pop(0)[1])
        todo = [(wait - 1, s) for wait, s in todo[:1]] + todo[1:]
        decoding = [s.request_id for s in it.running if not s.prefilling]
        work, new = it.schedule()
        started += new
        check(it, work, decoding)
        for w in work:
            samples = w.samples
            w.sequence.num_computed += len(w.ids)
            if samples:
                w.sequence.generated.append(0)
                if len(w.sequence.generated) == w.sequence.params.max_tokens:
                    it.finish(w.sequence)
        if not (todo or it.waiting or it.running):
            break
    assert all(s.status is SequenceStatus.FINISHED for s in all_of_them)
    assert all(len(s.generated) == s.params.max_tokens for s in all_of_them)
    assert started == all_of_them  # first come, first served
    assert it.ranges.num_free == cache


def check(it: Scheduler, work: list[Work], decoding: list[str]) -> None:
    assert [w.sequence.request_id for w in work[: len(decoding)]] == decoding
    prompts = work[len(decoding) :]
    assert all(w.sequence.prefilling and w.ids for w in prompts)
    taken = sum(len(w.ids) for w in prompts)
    assert taken <= it.config.max_prefill_tokens
    waiting_ids = sum(len(s.prompt) - s.num_computed for s in it.running if s.prefilling)
    assert taken == min(waiting_ids, it.config.max_prefill_tokens)  # nothing is left unused
    assert len({s.lane for s in it.running}) == len(it.running) <= it.config.max_num_seqs
    slots = [slot for s in it.running for slot in range(s.start, s.start + s.rope_length)]
    assert len(slots) == len(set(slots))
    assert max(slots, default=0) < it.config.kv_cache_tokens
