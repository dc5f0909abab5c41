from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.engine.block_manager import BlockManager
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.scheduler import Scheduler
from xc_ray.engine.sequence import Image, SamplingParams, Sequence, SequenceStatus, Work

VOCAB = 10_000
SIZE = 4  # of a block, unless a test says otherwise


def scheduler(
    cache: int = 100, seqs: int = 4, budget: int = 8, size: int = SIZE, prefix_cache: bool = True
) -> Scheduler:
    config = EngineConfig(cache, cache, seqs, budget, size, prefix_cache=prefix_cache)
    return Scheduler(config, BlockManager(config.num_blocks))


def sequence(name: str, prompt: int, answer: int = 5, *, start: int = 0) -> Sequence:
    """Ids count up from `start`: prompts begin alike where that is equal."""
    ids = list(range(start, start + prompt))
    return Sequence(name, ids, SamplingParams(max_tokens=answer), max_generated=answer)


def others(number: int, prompt: int, answer: int = 5) -> Sequence:
    """A sequence that begins like no other one."""
    return sequence(f"s{number}", prompt, answer, start=100 * (number + 1))


def with_image(name: str, before: int, rows: int, behind: int, digest: bytes = b"d") -> Sequence:
    ids = [*range(before), *range(VOCAB, VOCAB + rows), *range(behind)]
    params = SamplingParams(max_tokens=5)
    return Sequence(name, ids, params, (Image(rows, digest),), (before,), max_generated=5)


def add(it: Scheduler, *sequences: Sequence) -> None:
    for one in sequences:
        it.add(one)


def finish_step(it: Scheduler, work: list[Work]) -> None:
    """What the engine does when the tokens of a step come."""
    for w in work:
        w.sequence.num_unchecked = 0
        if w.samples:
            w.sequence.in_flight -= 1
            if w.sequence.status is SequenceStatus.FINISHED:
                continue
            w.sequence.generated.append(VOCAB - 1 - len(w.sequence.generated))
            if len(w.sequence.generated) == w.sequence.max_generated:
                it.finish(w.sequence)
        if w.sequence.status is SequenceStatus.RUNNING:
            it.name_blocks(w.sequence)


def step(it: Scheduler) -> dict[str, int]:
    """Runs one step, without overlap; how many tokens each sequence had in it."""
    work = it.schedule().work
    finish_step(it, work)
    return sizes(work)


def sizes(work: list[Work]) -> dict[str, int]:
    return {w.sequence.request_id: w.stop - w.start for w in work}


def names(sequences: list[Sequence] | deque[Sequence]) -> list[str]:
    return [s.request_id for s in sequences]


# The token budget


def test_a_prompt_longer_than_the_budget_is_taken_in_chunks() -> None:
    it = scheduler(budget=8)
    add(it, sequence("a", 18, answer=2))
    assert [step(it) for _ in range(5)] == [{"a": 8}, {"a": 8}, {"a": 2}, {"a": 1}, {}]


def test_the_oldest_prompt_leaves_a_quarter_of_the_budget_to_those_behind() -> None:
    it = scheduler(budget=8)
    add(it, others(0, 18), others(1, 5), others(2, 5))
    assert step(it) == {"s0": 6, "s1": 2}
    assert step(it) == {"s0": 6, "s1": 2}
    assert step(it) == {"s0": 6, "s1": 1, "s2": 2}  # the last token of a prompt is as in decode
    assert step(it) == {"s0": 1, "s1": 1, "s2": 3}


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    it = scheduler(budget=8)
    add(it, others(0, 5), others(1, 5), others(2, 5))
    assert step(it) == {"s0": 5, "s1": 3}
    assert step(it) == {"s0": 1, "s1": 2, "s2": 5}


def test_decoding_comes_first_and_takes_nothing_of_the_prompts_budget() -> None:
    it = scheduler(budget=4)
    add(it, others(0, 2, answer=9), others(1, 2, answer=9))
    step(it)
    step(it)
    add(it, others(2, 12))
    plan = it.schedule()
    assert [(w.sequence.request_id, w.stop - w.start, w.decode) for w in plan.work] == [
        ("s0", 1, True),
        ("s1", 1, True),
        ("s2", 4, False),
    ]
    assert names(plan.started) == ["s2"]


def test_a_long_prompt_does_not_hold_up_who_is_answering() -> None:
    it = scheduler(cache=200, budget=4)
    add(it, others(0, 1, answer=30))
    step(it)
    add(it, others(1, 40))
    assert all(step(it) == {"s0": 1, "s1": 4} for _ in range(10))
    assert step(it) == {"s0": 1, "s1": 1}


@pytest.mark.parametrize("budget", [4, 6, 16])
def test_a_long_prompt_and_a_stream_of_short_ones_both_go_on(budget: int) -> None:
    """A short one arrives with every step, as many tokens as the share that is left for them."""
    it = scheduler(cache=2000, seqs=8, budget=budget)
    long = sequence("long", 40 * budget, answer=5, start=50_000)
    short = max(1, budget // 4)
    add(it, others(0, short, 1), long)
    arrived: dict[int, Sequence] = {}
    waited: list[int] = []
    for now in range(100):
        arrived[now] = others(now + 1, short, answer=1)
        add(it, arrived[now])
        step(it)
        for when in [w for w, s in arrived.items() if s.status is SequenceStatus.FINISHED]:
            waited.append(now - when)
            del arrived[when]
        if long.generated:
            break
    # Three quarters of each step were the long one's, and one more step each short one's at most.
    assert now <= 40 / 0.75 + 2
    assert len(waited) >= now - 2
    assert max(waited) <= 2


def test_many_short_prompts_do_not_hold_up_a_long_one() -> None:
    it = scheduler(cache=60, seqs=4, budget=6)
    long = others(99, 30)
    add(it, others(0, 2), others(1, 2), long)
    for arrived in range(2, 42):
        step(it)
        if long.status is SequenceStatus.FINISHED:
            break
        add(it, others(arrived, 2, answer=2))
    assert long.status is SequenceStatus.FINISHED


def test_prompts_behind_long_beginnings_read_no_more_in_a_step_than_one_may_hold() -> None:
    """Blocks that they share stand in the cache once; each reads a copy of its own."""
    it = scheduler(cache=100, seqs=8, budget=60)
    add(it, sequence("first", 41, answer=1))
    step(it)
    # 40 shared tokens each: two fit into the 100 of the longest sequence, and who has none.
    tails = [sequence(f"t{i}", 41 + i, answer=9) for i in range(1, 4)]
    for i, tail in enumerate(tails):
        tail.prompt[40:] = [1000 * (i + 1) + j for j in range(len(tail.prompt) - 40)]
    add(it, *tails, others(9, 5, answer=1))
    assert step(it) == {"t1": 2, "t2": 3, "s9": 5}
    assert step(it) == {"t1": 1, "t2": 1, "t3": 4}


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_a_chunk_may_begin_and_end_inside_an_image(budget: int) -> None:
    it = scheduler(budget=budget)
    one = with_image("a", before=2, rows=7, behind=2)
    one.images[0].embeddings = object()
    add(it, one)
    taken = []
    while one.prefilling:
        [w] = it.schedule().work
        taken.append((w.start, w.stop))
        finish_step(it, [w])
    expected = [(n, min(n + budget, 11)) for n in range(0, 11, budget)]
    # The last token of a prompt is computed as in decode where nothing else is left.
    assert taken == [pair for pair in expected if pair != (10, 11)]


# Admission


def test_a_request_starts_when_there_are_blocks_for_its_prompt() -> None:
    """The answer takes its blocks as it grows."""
    it = scheduler(cache=32, budget=100)
    add(it, others(0, 10, answer=10), others(1, 13, answer=15))
    step(it)
    assert names(it.running) == ["s0", "s1"]
    assert [len(s.blocks) for s in it.running] == [3, 4]


def test_a_block_for_each_running_one_stays_free_at_admission() -> None:
    it = scheduler(cache=28, budget=100)
    add(it, others(0, 10, answer=10), others(1, 13, answer=15))
    step(it)
    assert names(it.waiting) == ["s1"]


def test_a_request_costs_the_blocks_beyond_what_it_shares() -> None:
    it = scheduler(cache=40, budget=100)
    add(it, sequence("a", 22, answer=9))
    step(it)
    add(it, sequence("b", 24, answer=2), sequence("c", 24, start=1000))
    assert step(it) == {"a": 1, "b": 4}  # five blocks of six are there
    assert [s.num_cached for s in it.running] == [0, 20]
    assert it.running[0].blocks[:5] == it.running[1].blocks[:5]
    assert names(it.waiting) == ["c"]


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    it = scheduler(cache=30)
    add(it, others(0, 15), others(1, 20), others(2, 1, answer=1))
    step(it)
    assert names(it.running) == ["s0"]
    assert names(it.waiting) == ["s1", "s2"]


def test_no_more_sequences_run_than_there_are_lanes() -> None:
    it = scheduler(seqs=2)
    add(it, *(others(n, 1, answer=3) for n in range(3)))
    step(it)
    assert names(it.running) == ["s0", "s1"]
    assert names(it.waiting) == ["s2"]
    it.finish(it.running[0])
    assert "s2" in step(it)
    assert {s.lane for s in it.running} == {0, 1}


def test_a_sequence_starts_once() -> None:
    it = scheduler(budget=2)
    add(it, sequence("a", 6))
    assert names(it.schedule().started) == ["a"]
    assert it.schedule().started == []


def test_no_more_prompts_start_than_the_budget_can_serve() -> None:
    """Who waits in the queue can still find more of its beginning in the cache."""
    it = scheduler(cache=400, seqs=8, budget=8)
    add(it, *(others(n, 20) for n in range(4)))
    step(it)
    assert names(it.running) == ["s0", "s1"]


# Beginnings


def test_who_begins_alike_waits_for_the_one_that_computes() -> None:
    it = scheduler(budget=8)
    add(it, sequence("a", 22), sequence("b", 21), others(0, 3))
    assert step(it) == {"a": 8}
    assert step(it) == {"a": 8}
    # Behind the last chunk of the first, all that is left to the second is its last token.
    assert step(it) == {"a": 6}
    assert step(it) == {"a": 1, "b": 1, "s0": 3}


def test_without_the_prefix_cache_nobody_waits_and_nobody_shares() -> None:
    it = scheduler(budget=8, prefix_cache=False)
    add(it, sequence("a", 5), sequence("b", 5))
    assert step(it) == {"a": 5, "b": 3}
    assert not set(it.running[0].blocks) & set(it.running[1].blocks)


def test_who_waited_goes_on_alone_when_the_first_is_gone() -> None:
    it = scheduler(budget=8)
    first, second = sequence("a", 22), sequence("b", 22)
    add(it, first, second)
    step(it)
    it.finish(first)
    assert step(it) == {"b": 8}
    assert second.num_cached == 8  # what the first had computed


def test_the_last_block_of_a_prompt_that_is_all_known_is_computed() -> None:
    """Its last token's logits are needed, and a shared block is not written."""
    it = scheduler(budget=100)
    add(it, first := sequence("a", 8))
    step(it)
    add(it, second := sequence("b", 8))
    assert step(it) == {"a": 1, "b": 4}
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]


def test_images_of_one_digest_are_shared_and_of_two_are_not() -> None:
    it = scheduler(budget=100)
    one = with_image("a", 2, 8, 3)
    one.images[0].embeddings = object()
    add(it, one)
    step(it)
    for name, digest, cached, missing in (
        ("b", b"d", 12, ()),
        ("c", b"e", 0, (0,)),
        ("d", b"", 0, (0,)),
    ):
        other = with_image(name, 2, 8, 3, digest)
        assert it.add(other) == missing
        it.schedule()
        assert other.num_cached == cached


# Images that come later


def test_missing_images_are_asked_for_once() -> None:
    it = scheduler()
    one = with_image("a", 5, 3, 2)
    assert it.add(one) == (0,)
    plans = [it.schedule() for _ in range(3)]
    assert [p.missing for p in plans] == [[], [], []]
    assert [sizes(p.work) for p in plans] == [{"a": 5}, {}, {}]  # up to the image
    one.images[0].embeddings = object()
    assert step(it) == {"a": 5}


def test_a_sequence_that_waits_for_an_image_leaves_the_whole_budget_to_others() -> None:
    it = scheduler(budget=8)
    add(it, with_image("a", 0, 3, 2), others(0, 20))
    assert step(it) == {"s0": 8}


def test_rows_that_were_covered_are_asked_for_when_they_are_gone() -> None:
    it = scheduler(cache=32, budget=100, seqs=1)
    first = with_image("a", 2, 8, 3)
    first.images[0].embeddings = object()
    add(it, first)
    step(it)
    it.finish(first)
    add(it, large := others(0, 30, answer=2))
    later = with_image("b", 2, 8, 3)
    assert it.add(later) == ()  # covered, as yet
    step(it)
    it.finish(large)
    assert it.schedule().missing == [(later, (0,))]
    assert it.schedule().missing == []


# Preemption


def test_the_youngest_gives_its_blocks_up_and_is_the_next_to_start() -> None:
    it = scheduler(cache=40, budget=100)
    old, young, waits = others(0, 11, answer=20), others(1, 15, answer=20), others(2, 30)
    add(it, old, young, waits)
    for _ in range(6):
        step(it)
    assert it.num_preemptions == 0
    assert (len(old.blocks), len(young.blocks)) == (4, 5)  # both need another one now
    tokens = list(young.generated)
    assert step(it) == {"s0": 1}
    assert it.num_preemptions == 1
    assert names(it.running) == ["s0"]
    assert names(it.waiting) == ["s1", "s2"]
    assert young.status is SequenceStatus.WAITING
    assert (young.generated, young.blocks, young.num_computed) == (tokens, [], 0)
    it.finish(old)
    [mine] = it.schedule().work
    # It finds its own blocks again, and goes on behind its tokens.
    assert (mine.sequence, mine.start, mine.stop) == (young, 20, 15 + len(tokens))
    assert mine.samples
    assert young.num_cached == 0  # of its first admission


def test_a_sequence_whose_tokens_are_in_flight_waits_for_them_before_it_starts_anew() -> None:
    it = scheduler(cache=32, budget=100)
    old, young = others(0, 11, answer=20), others(1, 11, answer=20)
    add(it, old, young)
    flying: list[Work] = []
    while not it.num_preemptions:  # with overlap: tokens come a step later
        work = it.schedule().work
        finish_step(it, flying)
        flying = work
    assert young.status is SequenceStatus.WAITING
    assert young.in_flight == 0  # its last ones have come by now
    it.finish(old)
    finish_step(it, flying)
    young.in_flight = 1
    assert it.schedule().work == []
    young.in_flight = 0
    assert sizes(it.schedule().work).keys() == {"s1"}


def test_of_two_that_are_preempted_the_older_starts_first() -> None:
    it = scheduler(cache=36, budget=100)
    sequences = [others(n, 7, answer=25) for n in range(3)]
    add(it, *sequences)
    while it.num_preemptions < 2:
        step(it)
    assert names(it.running) == ["s0"]
    assert names(it.waiting) == ["s1", "s2"]


def test_a_sequence_alone_is_never_preempted_whatever_the_cache_keeps() -> None:
    it = scheduler(cache=40, budget=100)
    for n in range(5):
        one = others(n, 20, answer=21)
        add(it, one)
        while one.status is not SequenceStatus.FINISHED:
            assert step(it)
    assert it.num_preemptions == 0


# The end


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_finished_sequence_gives_back_its_lane_and_its_room(steps: int) -> None:
    it = scheduler(cache=20, seqs=1, budget=4)
    one = sequence("a", 10, answer=5)
    it.add(one)
    for _ in range(steps):
        step(it)
    it.finish(one)
    assert one.status is SequenceStatus.FINISHED
    assert it.blocks.num_available == 5
    assert not it.running
    assert not it.waiting
    it.add(others(0, 10, answer=10))
    assert step(it) == {"s0": 4}


def test_finishing_twice_gives_nothing_back_twice() -> None:
    it = scheduler()
    one = sequence("a", 3)
    it.add(one)
    step(it)
    it.finish(one)
    it.finish(one)
    assert it.blocks.num_available == 25


@pytest.mark.parametrize("forget", [False, True])
def test_what_is_not_sound_is_shared_no_more(forget: bool) -> None:
    it = scheduler(budget=100)
    add(it, one := sequence("a", 9))
    step(it)
    it.finish(one, forget=forget)
    add(it, other := sequence("b", 9))
    step(it)
    assert other.num_cached == (0 if forget else 8)


def test_what_a_preempted_sequence_gave_up_is_forgotten_too() -> None:
    """The tokens of its last step may come, and be no numbers, when it has no blocks any more."""
    it = scheduler(cache=40, budget=100)
    old, young = others(0, 11, answer=20), others(1, 15, answer=20)
    add(it, old, young)
    while not it.num_preemptions:
        step(it)
    it.finish(young, forget=True)
    it.finish(old)
    assert it.blocks.num_available == 10
    add(it, again := others(1, 15), kept := others(0, 11))
    step(it)
    assert (again.num_cached, kept.num_cached) == (0, 8)


# Whatever comes

ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 5),  # steps behind the one before
        st.integers(1, 25),  # prompt
        st.integers(1, 9),  # answer
        st.sampled_from([0, 0, 1, 2]),  # beginning
    ),
    min_size=1,
    max_size=15,
)


@settings(max_examples=150, deadline=None)
@given(
    ARRIVALS,
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(34, 80),
    st.integers(1, 6),
    st.booleans(),
)
def test_whatever_arrives_every_rule_holds_and_everything_ends(
    arrivals: list[tuple[int, int, int, int]],
    seqs: int,
    budget: int,
    cache: int,
    size: int,
    overlap: bool,
) -> None:
    it = scheduler(cache, seqs, budget, size)
    todo = [
        (wait, sequence(str(i), p, a, start=100 * s)) for i, (wait, p, a, s) in enumerate(arrivals)
    ]
    all_of_them = [s for _, s in todo]
    started: list[Sequence] = []
    flying: list[Work] = []
    for _ in range(3000):
        while todo and todo[0][0] <= 0:
            it.add(todo.pop(0)[1])
        todo = [(wait - 1, s) for wait, s in todo[:1]] + todo[1:]
        plan = it.schedule()
        started += [s for s in plan.started if s not in started]
        check(it, plan.work)
        if overlap:
            flying, plan.work = plan.work, flying
        finish_step(it, plan.work)
        if not (todo or it.waiting or it.running or flying):
            break
    assert all(s.status is SequenceStatus.FINISHED for s in all_of_them)
    assert all(len(s.generated) == s.params.max_tokens for s in all_of_them)
    assert started == all_of_them  # first come, first served
    assert it.blocks.num_available == it.config.num_blocks
    assert not it._coming


def check(it: Scheduler, work: list[Work]) -> None:
    prompts = [w for w in work if not w.decode]
    assert work == [w for w in work if w.decode] + prompts
    assert all(w.stop - w.start == 1 for w in work if w.decode)
    taken = sum(w.stop - w.start for w in prompts)
    assert taken <= it.config.max_prefill_tokens
    left = sum(s.num_tokens - s.num_computed for s in it.running if s.prefilling)
    read = sum(w.start for w in prompts)
    most = it.config.max_sequence_tokens
    assert read <= most
    idle = [s for s in it.running if s.prefilling and s not in [w.sequence for w in prompts]]
    # Nothing is left unused, unless who could use it has more before it than a step may read.
    full = taken == it.config.max_prefill_tokens
    assert not left or full or all(read + s.num_computed > most for s in idle)
    assert len({s.lane for s in it.running}) == len(it.running) <= it.config.max_num_seqs
    own = [b for s in it.running for b in s.blocks[s.num_shared :]]
    assert len(own) == len(set(own))
    for w in work:
        assert len(w.sequence.blocks) * it.config.block_size >= w.stop
        written = range(w.start // it.config.block_size, -(-w.stop // it.config.block_size))
        assert min(written) >= w.sequence.num_shared
