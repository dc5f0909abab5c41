"""Which rows a step has, and how workers divide them: no model, no Ray."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.config import StepOptions
from xc_ray.train.plan import Plan, Sizes, divide


def sizes(tokens: list[int], parts: list[int] | None = None) -> Sizes:
    array = np.asarray(tokens, np.int64)
    return Sizes(array, array // 2, np.asarray(parts or [0] * len(tokens), np.int64))


def plan(of: Sizes, rows_a_step: int = 4, weights: tuple[float, ...] = (1.0,), **more) -> Plan:
    options = StepOptions(**more)
    return Plan(of, weights, options, rows_a_step=rows_a_step, pack_tokens=100)


lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(lengths, st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_row_once(
    tokens: list[int], rows_a_step: int, epoch: int, grouped: bool
) -> None:
    made = plan(sizes(tokens), rows_a_step, group_by_length=grouped)
    first = epoch * made.steps_an_epoch
    steps = [made.rows(first + i) for i in range(made.steps_an_epoch)]
    assert Counter(row for rows in steps for row in rows) == Counter(range(len(tokens)))
    assert all(0 < len(rows) <= rows_a_step for rows in steps)
    assert sum(len(rows) < rows_a_step for rows in steps) <= 1  # the last, partial batch


@given(lengths, st.integers(0, 40))
def test_a_step_is_the_same_whoever_asks_and_when(tokens: list[int], step: int) -> None:
    one, other = plan(sizes(tokens), seed=7), plan(sizes(tokens), seed=7)
    for before in range(0, step, 3):
        one.rows(before)
    assert one.rows(step) == other.rows(step)


def test_epochs_and_seeds_give_other_orders() -> None:
    of = sizes([5] * 64)
    orders = {tuple(plan(of, 64, seed=seed).rows(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_weight_is_how_often_an_epoch_holds_a_row() -> None:
    of = sizes([1] * 10 + [1] * 10, [0] * 10 + [1] * 10)
    made = plan(of, 5, (2.0, 0.5))
    epochs = []
    for epoch in range(2):
        first = epoch * made.steps_an_epoch
        rows = [row for i in range(made.steps_an_epoch) for row in made.rows(first + i)]
        counts = Counter(rows)
        assert [counts[row] for row in range(10)] == [2] * 10
        assert sum(counts[row] for row in range(10, 20)) == 5
        epochs.append({row for row in rows if row >= 10})
    assert epochs[0] != epochs[1]  # the half is drawn anew


def test_steps_follow_from_epochs_unless_they_are_given() -> None:
    of = sizes([1] * 10)
    assert plan(of, 4).num_steps == 3
    assert plan(of, 4, epochs=2.5).num_steps == 8
    assert plan(of, 4, epochs=0.01).num_steps == 1
    assert plan(of, 4, epochs=2.5, max_steps=5).num_steps == 5


def test_group_by_length_puts_alike_lengths_together() -> None:
    tokens = np.random.default_rng(0).integers(1, 1000, 512).tolist()

    def spread(grouped: bool) -> float:
        made = plan(sizes(tokens), 8, group_by_length=grouped)
        steps = [made.rows(i) for i in range(made.steps_an_epoch)]
        return float(np.mean([np.ptp([tokens[row] for row in rows]) for rows in steps]))

    assert spread(True) < 0.15 * spread(False)


@given(
    lengths,
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 150),
)
def test_workers_share_all_rows_within_the_bounds_of_a_pass(
    tokens: list[int], workers: int, max_rows: int, max_tokens: int
) -> None:
    array = np.asarray(tokens, np.int64)
    shares = divide(array, range(len(tokens)), workers, max_rows=max_rows, max_tokens=max_tokens)
    assert len(shares) == workers
    assert sorted(r for packs in shares for pack in packs for r in pack) == list(range(len(tokens)))
    for pack in (pack for packs in shares for pack in packs):
        total = int(array[list(pack)].sum())
        assert len(pack) <= max_rows
        assert total <= max_tokens or len(pack) == 1
    loads = [sum(int(array[list(pack)].sum()) for pack in packs) for packs in shares]
    assert max(loads) - min(loads) <= max(tokens)


def test_without_packing_every_row_has_a_pass_to_itself() -> None:
    of = sizes([10, 20, 30, 40])
    packed = plan(of, batch_size=4).share([0, 1, 2, 3], 1)
    alone = plan(of, batch_size=4, packing=False).share([0, 1, 2, 3], 1)
    assert packed == [[(3, 2, 1, 0)]]
    assert alone == [[(3,), (2,), (1,), (0,)]]


def test_a_worker_may_have_nothing() -> None:
    assert plan(sizes([10])).share([0], 3) == [[(0,)], [], []]


def test_rows_go_to_whoever_has_fewest_tokens_so_far() -> None:
    array = np.asarray([10, 2, 2, 2, 2], np.int64)
    assert divide(array, range(5), 2, max_rows=9, max_tokens=99) == [[(0,)], [(1, 2, 3, 4)]]


def test_steps_grouped_by_length_do_not_come_longest_first() -> None:
    tokens = np.random.default_rng(0).integers(1, 1000, 256).tolist()
    made = plan(sizes(tokens), 8, group_by_length=True)
    longest = [max(tokens[row] for row in made.rows(i)) for i in range(made.steps_an_epoch)]
    assert longest != sorted(longest, reverse=True)
    assert longest[:8] != sorted(longest, reverse=True)[:8]


def test_a_small_weight_keeps_a_row_and_a_data_set_without_rows_has_none() -> None:
    of = sizes([1] * 20, [0] * 10 + [1] * 10)
    made = plan(of, 1, (1.0, 0.01, 1.0))
    assert made.steps_an_epoch == 11
    rows = [row for step in range(11) for row in made.rows(step)]
    assert sorted(rows)[:10] == list(range(10))
    assert sum(row >= 10 for row in rows) == 1


def test_the_fraction_of_a_weight_holds_no_row_twice() -> None:
    made = plan(sizes([1] * 40), 60, (1.5,))
    for epoch in range(3):
        assert set(Counter(made.rows(epoch)).values()) == {1, 2}
