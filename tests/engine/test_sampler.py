import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import sampling as reference
from xc_ray.engine.sampler import Sampler
from xc_ray.engine.sequence import SamplingParams, TokenLogprob

V = 12
CPU = torch.device("cpu")
LOGITS = [2.0, -1.0, 0.5, 1.9, -3.0, 0.0, 1.2, -0.4, 0.9, 2.4, -2.0, 0.1]


def one_row(logits: list[float], params: SamplingParams, position: int = 5) -> int:
    sampler = Sampler(1, len(logits), CPU)
    exact = torch.tensor([logits], dtype=torch.float64)
    return sampler(exact, [params], [0], [position]).ids[0]


def scores(rows: int, size: int = V, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, size, dtype=torch.float64, generator=generator)


# The distribution


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 0.05},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
        {"temperature": 0.3, "top_k": 3, "top_p": 0.99},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 0.7, "presence_penalty": -1, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_tokens_are_drawn_from_the_textbooks_distribution(
    options: dict[str, Any], vary: str
) -> None:
    """Chi-square of 4,000 draws with fixed seeds; its bound is passed once in 100,000 by chance."""
    count, generated = 4000, [9, 9, 3, 4]
    sampler = Sampler(count, V, CPU)
    for token in generated:
        sampler.counts[:, token] += 1
    params = [SamplingParams(seed=i if vary == "seed" else 7, **options) for i in range(count)]
    positions = [i if vary == "position" else 20 for i in range(count)]
    logits = torch.tensor([LOGITS]).expand(count, V)
    drawn = Counter(sampler(logits, params, range(count), positions).ids)
    seen = generated if params[0].penalised else []
    expected = reference.distribution(LOGITS, params[0], seen)
    assert drawn.keys() <= expected.keys()
    chi_square = sum((drawn[t] - count * p) ** 2 / (count * p) for t, p in expected.items())
    degrees = len(expected) - 1
    # Wilson and Hilferty's approximation of the quantile at 4.3 standard deviations
    bound = (
        degrees * (1 - 2 / (9 * max(degrees, 1)) + 4.3 * math.sqrt(2 / (9 * max(degrees, 1)))) ** 3
    )
    assert chi_square <= bound


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-20, 20), min_size=V, max_size=V, unique=True),
    st.integers(0, V + 3),
    st.floats(0.01, 1),
    st.floats(0.02, 50),
    st.integers(),
)
def test_what_is_drawn_could_be_drawn(
    logits: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, temperature=temperature, seed=seed)
    wider = SamplingParams(top_k=top_k, top_p=min(1.0, top_p + 1e-5), temperature=temperature)
    assert one_row(logits, params) in reference.distribution(logits, wider)


def test_a_vocabulary_of_real_size_is_drawn_by_either_way_alike() -> None:
    # Few candidates are found by a partial sort, many by a whole one; a neighbour's wish decides.
    logits = scores(1, 92_544).float()
    for seed in range(30):
        few = SamplingParams(top_k=50, top_p=0.9, seed=seed)
        sampler = Sampler(2, 92_544, CPU)
        alone = sampler(logits, [few], [0], [9]).ids
        with_all = sampler(logits.expand(2, -1), [few, SamplingParams()], [0, 1], [9, 9]).ids
        assert with_all[0] == alone[0]


# Seeds


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch() -> None:
    rows = 6
    logits = scores(rows)
    params = [
        SamplingParams(seed=3, temperature=2),
        SamplingParams(temperature=0),
        SamplingParams(seed=3, top_k=4, temperature=2),
        SamplingParams(seed=9, top_p=0.5, temperature=5),
        SamplingParams(seed=3, presence_penalty=1.0),
        SamplingParams(seed=4, logprobs=2),
    ]
    positions = [4, 4, 5, 6, 7, 4]
    alone = [
        Sampler(rows, V, CPU)(logits[i : i + 1], [params[i]], [i], [positions[i]]).ids[0]
        for i in range(rows)
    ]
    for order in (range(rows), reversed(range(rows)), [5, 0, 3], [2, 1]):
        rows_of = list(order)
        together = Sampler(rows, V, CPU)(
            logits[rows_of],
            [params[i] for i in rows_of],
            rows_of,
            [positions[i] for i in rows_of],
        )
        assert together.ids == [alone[i] for i in rows_of]


def test_another_seed_or_another_position_draws_anew() -> None:
    flat = [0.0] * V
    by_seed = {one_row(flat, SamplingParams(seed=s)) for s in range(200)}
    by_position = {one_row(flat, SamplingParams(seed=1), position=p) for p in range(200)}
    assert len(by_seed) == len(by_position) == V


# Greedy rows and penalties


def test_greedy_rows_take_their_best_whatever_their_neighbours_do() -> None:
    logits = scores(4)
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.1)
    for other in (greedy, SamplingParams(temperature=50), SamplingParams(repetition_penalty=1.4)):
        sampler = Sampler(4, V, CPU)
        ids = sampler(logits, [greedy, other, greedy, other], [0, 1, 2, 3], [1] * 4).ids
        assert ids[0] == int(logits[0].argmax())
        assert ids[2] == int(logits[2].argmax())


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.2},
        {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.4},
    ],
)
def test_penalties_fall_on_what_the_sequence_itself_has_generated(
    options: dict[str, float],
) -> None:
    params = [
        SamplingParams(temperature=0, **options),  # type: ignore[arg-type]
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, presence_penalty=2),
    ]
    sampler = Sampler(5, V, CPU)
    lanes = [3, 0, 4]
    generated: list[list[int]] = [[], [], []]
    base = scores(3)
    for i in range(25):
        logits = base + 0.3 * scores(3, seed=i)
        order = [0, 1, 2] if i % 2 else [2, 0, 1]
        ids = sampler(
            logits[order], [params[j] for j in order], [lanes[j] for j in order], [i] * 3
        ).ids
        for j, token in zip(order, ids, strict=True):
            (best,) = reference.distribution(logits[j].tolist(), params[j], generated[j])
            assert token == best
            generated[j].append(token)


def test_a_lane_that_is_reset_has_generated_nothing() -> None:
    sampler = Sampler(2, V, CPU)
    params = SamplingParams(temperature=0, presence_penalty=2)
    logits = torch.tensor([LOGITS])
    first, second = (sampler(logits, [params], [1], [i]).ids[0] for i in range(2))
    assert (first, second) == (9, 0)
    sampler.reset(1)
    assert sampler(logits, [params], [1], [2]).ids == [first]


def test_penalties_leave_the_logits_as_they_were() -> None:
    logits = torch.tensor([LOGITS])
    sampler = Sampler(1, V, CPU)
    for i in range(3):
        sampler(logits, [SamplingParams(presence_penalty=2, frequency_penalty=1)], [0], [i])
    assert torch.equal(logits, torch.tensor([LOGITS]))


# Log-probabilities


@pytest.mark.parametrize("greedy", [True, False])
def test_logprobs_are_of_the_models_own_distribution(greedy: bool) -> None:
    params = SamplingParams(
        temperature=0 if greedy else 3, presence_penalty=2, top_k=4, logprobs=3, seed=5
    )
    sampler = Sampler(1, V, CPU)
    for position in range(4):
        logits = scores(1, seed=position)
        result = sampler(logits, [params], [0], [position])
        expected = reference.logprobs(logits[0].tolist())
        (logprob,) = result.logprobs
        assert logprob is not None
        assert logprob.logprob == pytest.approx(expected[result.ids[0]])
        best = sorted(range(V), key=lambda i: -expected[i])[:3]
        assert [token for token, _ in logprob.top] == best
        assert [p for _, p in logprob.top] == pytest.approx([expected[i] for i in best])


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    wishes = [None, 0, 5, 2]
    params = [SamplingParams(temperature=0, logprobs=n) for n in wishes]
    result = Sampler(4, V, CPU)(scores(4), params, [0, 1, 2, 3], [1] * 4)
    assert result.logprobs[0] is None
    tops = [logprob.top for logprob in result.logprobs if isinstance(logprob, TokenLogprob)]
    assert [len(top) for top in tops] == [0, 5, 2]


def test_the_last_ids_of_a_real_vocabulary_keep_their_numbers() -> None:
    logits = torch.zeros(1, 92_544)
    logits[0, 92_543] = 9
    result = Sampler(1, 92_544, CPU)(logits, [SamplingParams(temperature=0, logprobs=1)], [0], [1])
    assert result.ids == [92_543]
    assert result.logprobs[0] is not None
    assert result.logprobs[0].top[0][0] == 92_543


# Extremes: whatever one request asks for, the step that all share goes on


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1e-46},
        {"top_p": 1e-300},
        {"temperature": 1.1e-5},
        {"temperature": 1e300},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e300},
        {"top_k": 10**12},
        {"seed": 2**70},
        {"seed": -1},
    ],
)
def test_extreme_parameters_draw_an_id_and_leave_the_others_alone(options: dict[str, Any]) -> None:
    logits = torch.tensor([LOGITS] * 2)
    sampler = Sampler(2, V, CPU)
    for position in range(5):
        params = [SamplingParams(**options), SamplingParams(temperature=0)]
        odd, greedy = sampler(logits, params, [0, 1], [position] * 2).ids
        assert 0 <= odd < V
        assert greedy == 9


def test_the_smallest_top_p_keeps_the_best() -> None:
    params = [SamplingParams(top_p=1e-46, seed=s) for s in range(20)]
    logits = torch.tensor([LOGITS] * 20)  # in float32 that top_p is 0
    assert Sampler(20, V, CPU)(logits, params, range(20), [1] * 20).ids == [9] * 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_still_yields_ids(value: float) -> None:
    logits = torch.tensor([[value] * V, LOGITS])
    ids = Sampler(2, V, CPU)(
        logits, [SamplingParams(), SamplingParams(temperature=0)], [0, 1], [1, 1]
    ).ids
    assert 0 <= ids[0] < V
    assert ids[1] == 9


def test_more_logprobs_than_ids_are_all_of_them() -> None:
    result = Sampler(1, V, CPU)(scores(1), [SamplingParams(logprobs=20)], [0], [1])
    assert result.logprobs[0] is not None
    assert len(result.logprobs[0].top) == V
