import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import sampling as reference
from xc_ray.engine.sampler import Sampler, to_logprobs, uniforms
from xc_ray.engine.sequence import SamplingParams, uniform

V = 12
CPU = torch.device("cpu")
LOGITS = [2.0, -1.0, 0.5, 1.9, -3.0, 0.0, 1.2, -0.4, 0.9, 2.4, -2.0, 0.1]
INF = math.inf


def filled(
    params: Sequence[SamplingParams], generated: Sequence[int] = (), size: int = V
) -> Sampler:
    """A sampler whose lanes are taken in order, each with the same ids generated so far."""
    sampler = Sampler(len(params), size, CPU)
    sampler.set_lanes([(lane, p, generated) for lane, p in enumerate(params)])
    return sampler


def draw(
    sampler: Sampler, logits: Tensor, lanes: Sequence[int], positions: Sequence[int]
) -> list[int]:
    ids: list[int] = sampler.choose(logits, torch.tensor(lanes), torch.tensor(positions)).tolist()
    return ids


def one_row(logits: list[float], params: SamplingParams, position: int = 5) -> int:
    exact = torch.tensor([logits], dtype=torch.float64)
    return draw(filled([params], size=len(logits)), exact, [0], [position])[0]


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
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
        {"temperature": 0.3, "top_k": 3, "top_p": 0.99},
        {"temperature": 3, "top_k": 9, "top_p": 0.95, "min_p": 0.3},
        {"logit_bias": ((4, 5.0), (9, -100.0), (0, 0.5))},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 0.7, "presence_penalty": -1, "top_p": 0.9},
        {"repetition_penalty": 1.5, "logit_bias": ((4, 4.5), (9, -3.0)), "min_p": 0.1},
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_tokens_are_drawn_from_the_textbooks_distribution(
    options: dict[str, Any], vary: str
) -> None:
    """Chi-square of 4,000 draws with fixed seeds; its bound is passed once in 100,000 by chance."""
    count, generated = 4000, [9, 9, 3, 4]
    params = [SamplingParams(seed=i if vary == "seed" else 7, **options) for i in range(count)]
    positions = [i if vary == "position" else 20 for i in range(count)]
    sampler = filled(params, generated)
    logits = torch.tensor([LOGITS]).expand(count, V)
    for token, bias in params[0].logit_bias:
        rows = torch.arange(count)
        ids, values = torch.full((count,), token), torch.full((count,), bias)
        logits = sampler.edit(logits, rows, ids, values)
    drawn = Counter(draw(sampler, logits, range(count), positions))
    expected = reference.distribution(LOGITS, params[0], generated)
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
    # in hundredths: equal ones come up, and none that only rounding tells apart
    st.lists(st.integers(-2000, 2000).map(lambda n: n / 100), min_size=V, max_size=V),
    st.integers(0, V + 3),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0.02, 50),
    st.integers(),
)
def test_what_is_drawn_could_be_drawn(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float, seed: int
) -> None:
    params = SamplingParams(
        top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature, seed=seed
    )
    wider = SamplingParams(
        top_k=top_k,
        top_p=min(1.0, top_p + 1e-5),
        min_p=min_p * (1 - 1e-9),
        temperature=temperature,
    )
    assert one_row(logits, params) in reference.distribution(logits, wider)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.45}, {"min_p": 0.9}])
def test_ids_as_likely_as_the_last_one_kept_are_kept_too(options: dict[str, Any]) -> None:
    logits = [1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 2.0] if "min_p" not in options else [5.0, 0.0] * 3
    params = SamplingParams(**options)
    expected = reference.distribution(logits, params)
    drawn = {one_row(logits, params, position=p) for p in range(200)}
    assert drawn == expected.keys()
    assert len(drawn) in (3, 4)


def test_half_precision_logits_are_drawn_as_their_float32_values() -> None:
    params = [SamplingParams(seed=i, top_p=0.9) for i in range(50)]
    logits = scores(50).bfloat16()
    half, wide = (
        draw(filled(params), values, range(50), [3] * 50) for values in (logits, logits.float())
    )
    assert half == wide


# Seeds


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(), st.integers(0, 2**40)), min_size=1, max_size=20))
def test_the_devices_uniform_numbers_are_those_of_the_sequence(
    pairs: list[tuple[int, int]],
) -> None:
    sampler = filled([SamplingParams(seed=seed) for seed, _ in pairs])
    seeds = sampler.wholes[: len(pairs), 1]
    positions = torch.tensor([position for _, position in pairs])
    assert uniforms(seeds, positions).tolist() == [uniform(s, p) for s, p in pairs]


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch() -> None:
    rows = 7
    logits = scores(rows)
    params = [
        SamplingParams(seed=3, temperature=2),
        SamplingParams(temperature=0),
        SamplingParams(seed=3, top_k=4, temperature=2),
        SamplingParams(seed=9, top_p=0.5, temperature=5),
        SamplingParams(seed=3, presence_penalty=1.0),
        SamplingParams(seed=4, logprobs=2),
        SamplingParams(seed=8, min_p=0.05, temperature=4),
    ]
    positions = [4, 4, 5, 6, 7, 4, 4]
    alone = [
        draw(filled([params[i]]), logits[i : i + 1], [0], [positions[i]])[0] for i in range(rows)
    ]
    for order in (range(rows), reversed(range(rows)), [5, 0, 3], [2, 1]):
        rows_of = list(order)
        together = draw(filled(params), logits[rows_of], rows_of, [positions[i] for i in rows_of])
        assert together == [alone[i] for i in rows_of]


def test_a_row_over_a_real_vocabulary_does_not_depend_on_the_batch() -> None:
    logits = scores(3, 92_544).float()
    few, most = SamplingParams(top_k=50, top_p=0.9, seed=5), SamplingParams(seed=5)
    alone = [draw(filled([p], size=92_544), logits[:1], [0], [9])[0] for p in (few, most)]
    sampler = filled([SamplingParams(), most, few], size=92_544)
    together = draw(sampler, logits[[1, 0, 0, 2]], [0, 1, 2, sampler.padding_lane], [9] * 4)
    assert together[1:3] == alone[::-1]


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
        ids = draw(filled([greedy, other, greedy, other]), logits, [0, 1, 2, 3], [1] * 4)
        assert ids[0] == int(logits[0].argmax())
        assert ids[2] == int(logits[2].argmax())


def test_of_equal_bests_a_greedy_row_takes_the_lowest_id() -> None:
    assert one_row([0.0, 3.0, 1.0, 3.0, 3.0], SamplingParams(temperature=0)) == 1


def test_padding_rows_are_greedy_and_change_nothing() -> None:
    sampler = filled([SamplingParams(presence_penalty=2)] * 2)
    pad = sampler.padding_lane
    ids = draw(sampler, torch.tensor([LOGITS] * 3), [pad, pad, pad], [0, 0, 7])
    assert ids == [9] * 3
    assert not sampler.counts.any()


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
    lanes = [3, 0, 4]
    sampler = Sampler(5, V, CPU)
    sampler.set_lanes([(lane, p, []) for lane, p in zip(lanes, params, strict=True)])
    generated: list[list[int]] = [[], [], []]
    base = scores(3)
    for i in range(25):
        logits = base + 0.3 * scores(3, seed=i)
        order = [0, 1, 2] if i % 2 else [2, 0, 1]
        ids = draw(sampler, logits[order], [lanes[j] for j in order], [i] * 3)
        for j, token in zip(order, ids, strict=True):
            (best,) = reference.distribution(logits[j].tolist(), params[j], generated[j])
            assert token == best
            generated[j].append(token)


def test_a_lane_given_to_another_sequence_has_generated_nothing() -> None:
    params = SamplingParams(temperature=0, presence_penalty=2)
    sampler = filled([params] * 2)
    logits = torch.tensor([LOGITS])
    first, second = (draw(sampler, logits, [1], [i])[0] for i in range(2))
    assert (first, second) == (9, 0)
    sampler.set_lanes([(1, params, [])])
    assert draw(sampler, logits, [1], [2]) == [first]


def test_a_sequence_that_takes_a_lane_again_brings_what_it_has_generated() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=0.3, repetition_penalty=1.1)
    going, back = filled([params] * 2), filled([params] * 2)
    generated: list[int] = []
    for i in range(12):
        logits = scores(1, seed=i)
        back.set_lanes([(1, params, generated), (0, SamplingParams(), [3, 4])])
        (token,) = draw(going, logits, [1], [i])
        assert draw(back, logits, [1], [i]) == [token]
        assert torch.equal(back.counts[1], going.counts[1])
        generated.append(token)
    assert not back.counts[0].any()  # nothing of it is penalised


def test_choosing_leaves_the_logits_as_they_were() -> None:
    logits = torch.tensor([LOGITS])
    sampler = filled([SamplingParams(presence_penalty=2, frequency_penalty=1)])
    for i in range(3):
        draw(sampler, logits, [0], [i])
        sampler.edit(logits, torch.tensor([0]), torch.tensor([3]), torch.tensor([-INF]))
    assert torch.equal(logits, torch.tensor([LOGITS]))


def test_ids_are_written_where_the_caller_wants_them() -> None:
    out = torch.full((2,), 77, dtype=torch.int32)
    sampler = filled([SamplingParams(temperature=0)] * 2)
    lanes = torch.tensor([0, 1])
    assert sampler.choose(torch.tensor([LOGITS] * 2), lanes, lanes, out) is out
    assert out.tolist() == [9, 9]


def test_a_samplers_bytes_are_those_of_its_tensors() -> None:
    sampler = Sampler(5, V, CPU)
    held = sum(t.nbytes for t in vars(sampler).values() if isinstance(t, Tensor))
    assert Sampler.num_bytes(5, V, on_gpu=False) == held
    # counts, parameters (six float32, four int64), candidates' scores and ids in whole sixteens
    assert Sampler.num_bytes(2, 100, on_gpu=True) == 3 * 400 + 3 * (24 + 32) + 2 * 112 * 8


# Edits


def test_edits_add_up_and_minus_infinity_stays() -> None:
    logits = torch.tensor([LOGITS] * 2, dtype=torch.bfloat16)
    sampler = filled([SamplingParams()])
    pairs = [(0, 3, 1.5), (0, 3, -0.5), (1, 9, -INF), (1, 9, 100.0), (1, 9, -INF)]
    rows, ids, values = zip(*pairs, strict=True)
    edited = sampler.edit(logits, torch.tensor(rows), torch.tensor(ids), torch.tensor(values))
    expected = logits.float()
    expected[0, 3] += 1
    expected[1, 9] = -INF
    assert edited.dtype == torch.float32
    assert torch.equal(edited, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 100},
        {"temperature": 100, "repetition_penalty": 0.5, "presence_penalty": -2},
        {"temperature": 0, "repetition_penalty": 1e-30, "frequency_penalty": -2},
    ],
)
def test_a_stop_id_at_minus_infinity_is_never_chosen(options: dict[str, Any]) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=frozenset({9, 3}), **options)
    sampler = filled([params] * 300, generated=[9, 3, 3])
    rows = torch.arange(300).repeat(2)
    ids = torch.tensor([9] * 300 + [3] * 300)
    logits = torch.tensor([LOGITS] * 300)
    edited = sampler.edit(logits, rows, ids, torch.full((600,), -INF))
    assert not {9, 3, -1} & set(draw(sampler, edited, range(300), range(300)))


# Log-probabilities


@pytest.mark.parametrize("greedy", [True, False])
def test_logprobs_are_of_the_models_own_distribution(greedy: bool) -> None:
    params = SamplingParams(
        temperature=0 if greedy else 3, presence_penalty=2, top_k=4, logprobs=3, seed=5
    )
    sampler = filled([params])
    for position in range(4):
        logits = scores(1, seed=position)
        chosen = sampler.choose(logits, torch.tensor([0]), torch.tensor([position]))
        packed = sampler.logprobs(logits, chosen, 3)
        assert packed.dtype == torch.float64
        expected = reference.logprobs(logits[0].tolist())
        logprob = to_logprobs(packed[0].tolist(), 3)
        assert logprob.logprob == pytest.approx(expected[int(chosen)])
        best = sorted(range(V), key=lambda i: -expected[i])[:3]
        assert [token for token, _ in logprob.top] == best
        assert [p for _, p in logprob.top] == pytest.approx([expected[i] for i in best])


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    sampler = filled([SamplingParams()])
    packed = sampler.logprobs(scores(3), torch.tensor([0, 1, 2]), 5).tolist()
    tops = [to_logprobs(row, k).top for row, k in zip(packed, (0, 5, 2), strict=True)]
    assert [len(top) for top in tops] == [0, 5, 2]
    assert sampler.logprobs(scores(3), torch.tensor([0, 1, 2]), 0).shape == (3, 1)


def test_the_last_ids_of_a_real_vocabulary_keep_their_numbers() -> None:
    logits = torch.zeros(1, 92_544, dtype=torch.bfloat16)
    logits[0, 92_543] = 9
    sampler = filled([SamplingParams(temperature=0)], size=92_544)
    chosen = sampler.choose(logits, torch.tensor([0]), torch.tensor([1]))
    assert chosen.tolist() == [92_543]
    assert to_logprobs(sampler.logprobs(logits, chosen, 1)[0].tolist(), 1).top[0][0] == 92_543


def test_as_many_logprobs_as_ids_are_all_of_them() -> None:
    packed = filled([SamplingParams()]).logprobs(scores(1), torch.tensor([4]), V)
    assert sorted(token for token, _ in to_logprobs(packed[0].tolist(), 20).top) == [*range(V)]


def test_a_failed_row_has_logprobs_for_nobody_to_read() -> None:
    logits = torch.tensor([[math.nan] * V, LOGITS])
    packed = filled([SamplingParams()]).logprobs(logits, torch.tensor([-1, 9]), 2)
    assert packed[1, 3] == 9


# Extremes: whatever one request asks for, the step that all share goes on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1e-46},
        {"top_p": 1e-300},
        {"min_p": 1e-300},
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
def test_extreme_parameters_draw_an_id_and_leave_the_others_alone(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    logits = torch.tensor([LOGITS] * 2, dtype=dtype)
    sampler = filled([SamplingParams(**options), SamplingParams(temperature=0)])
    for position in range(5):
        odd, greedy = draw(sampler, logits, [0, 1], [position] * 2)
        assert 0 <= odd < V
        assert greedy == 9


def test_the_smallest_top_p_keeps_the_best() -> None:
    params = [SamplingParams(top_p=1e-46, seed=s) for s in range(20)]
    logits = torch.tensor([LOGITS] * 20)  # in float32 that top_p is 0
    assert draw(filled(params), logits, range(20), [1] * 20) == [9] * 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row",
    [
        [math.nan] * V,
        [*LOGITS[:-1], math.nan],
        [INF] * V,
        [*LOGITS[:-1], INF],
        [-INF] * V,
        [INF, math.nan] * (V // 2),
    ],
)
def test_a_row_without_numbers_fails_alone(row: list[float], temperature: float) -> None:
    drawn = SamplingParams(temperature=temperature, presence_penalty=1)
    sampler = filled([drawn, drawn, SamplingParams(temperature=0)])
    logits = torch.tensor([row, LOGITS, LOGITS])
    ids = draw(sampler, logits, [0, 1, 2], [1] * 3)
    assert ids[0] == -1
    assert ids[1:] == [*draw(filled([drawn, drawn]), logits[1:2], [1], [1]), 9]
    assert not sampler.counts[0].any()
    assert sampler.counts[1].sum() == 1


def test_a_row_with_one_finite_number_draws_it() -> None:
    logits = [-INF] * V
    logits[7] = -1e30
    assert one_row(logits, SamplingParams(temperature=5, top_p=0.3, top_k=4)) == 7
