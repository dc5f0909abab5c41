import itertools
from typing import Any

import pytest

from xc_ray.engine.sequence import Image, SamplingParams, Sequence, uniform
from xc_ray.errors import InvalidRequest

# Parameters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected"),
        ({"temperature": float("inf")}, "temperature is inf, expected"),
        ({"top_k": -1}, "top_k is -1, expected at least 0 (0: off)"),
        ({"top_p": 0}, "top_p is 0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1, expected more than 0 and at most 1"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, expected between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3, expected between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected more than 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan, expected"),
        ({"min_p": -0.1}, "min_p is -0.1, expected between 0 and 1"),
        ({"min_p": 1.1}, "min_p is 1.1, expected between 0 and 1"),
        ({"min_tokens": -1}, "min_tokens is -1, expected between 0 and max_tokens (1024)"),
        (
            {"min_tokens": 6, "max_tokens": 5},
            "min_tokens is 6, expected between 0 and max_tokens (5)",
        ),
        (
            {"logit_bias": ((7, 100.5),)},
            "logit_bias of id 7 is 100.5, expected between −100 and 100",
        ),
        ({"logit_bias": ((7, float("nan")),)}, "logit_bias of id 7 is nan, expected"),
        ({"logprobs": 21}, "logprobs is 21, expected between 0 and 20"),
        ({"logprobs": -1}, "logprobs is -1, expected between 0 and 20"),
        # of another type
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected "),
        ({"max_tokens": True}, "max_tokens is True, expected "),
        ({"top_k": 1.5}, "top_k is 1.5, expected "),
        ({"seed": 0.5}, "seed is 0.5, expected "),
        ({"logprobs": 1.0}, "logprobs is 1.0, expected "),
        ({"temperature": "hot"}, "temperature is hot, expected "),
        ({"top_p": None}, "top_p is None, expected "),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**given)
    assert caught.value.message.startswith(message)
    assert caught.value.param == next(iter(given))


def test_values_at_the_ends_of_their_ranges_are_accepted() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1, logprobs=0)
    SamplingParams(
        temperature=100, top_p=1e-9, presence_penalty=-2, frequency_penalty=2, logprobs=20
    )
    SamplingParams(seed=-1, repetition_penalty=0.01, min_p=1, min_tokens=5, max_tokens=5)
    SamplingParams(min_p=0, min_tokens=0, logit_bias=((0, -100), (5, 100.0)))


def test_a_temperature_of_nearly_nothing_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-5).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_a_penalty_is_what_changes_scores() -> None:
    assert not SamplingParams().penalised
    for name, value in (
        ("presence_penalty", 0.1),
        ("frequency_penalty", -0.1),
        ("repetition_penalty", 1.01),
    ):
        assert SamplingParams(**{name: value}).penalised  # type: ignore[arg-type]


# A sequence's way through the engine


def test_a_prompt_is_prefilled_until_its_last_token_is_all_that_is_left() -> None:
    """That one, and then every chosen one, is computed as in decode."""
    sequence = Sequence("a", [10, 11, 12, 13, 14], SamplingParams(max_tokens=3))
    found = []
    for computed in range(5):
        sequence.num_computed = computed
        found.append(sequence.prefilling)
    assert found == [True, True, True, True, False]
    sequence.num_computed = 5
    sequence.in_flight = 1  # chosen on the device, and not known here
    assert sequence.num_tokens == 6
    assert not sequence.prefilling
    sequence.in_flight, sequence.generated = 0, [99]
    assert sequence.num_tokens == 6
    assert not sequence.prefilling
    sequence.num_computed = 0  # preempted
    assert sequence.prefilling


def test_a_last_token_that_is_a_picture_row_is_prefilled() -> None:
    """It has no id that decode could embed."""
    ids = [5, 1024, 1025]
    sequence = Sequence("a", ids, SamplingParams(), (Image(2),), (1,))
    sequence.num_computed = 2
    assert sequence.prefilling
    sequence.num_computed = 3
    sequence.in_flight = 1
    assert not sequence.prefilling
    sequence.in_flight, sequence.generated = 0, [7]
    assert not sequence.prefilling
    text_behind = Sequence("a", [*ids, 6], SamplingParams(), (Image(2),), (1,))
    text_behind.num_computed = 3
    assert not text_behind.prefilling


def test_ids_are_those_of_prompt_and_answer() -> None:
    sequence = Sequence("a", [1, 2, 3], SamplingParams(), generated=[7, 8, 9])
    whole = [1, 2, 3, 7, 8, 9]
    for start, stop in itertools.combinations(range(7), 2):
        assert sequence.ids(start, stop) == whole[start:stop]


def test_the_length_that_fixes_the_rope_counts_the_whole_answer_from_the_start() -> None:
    sequence = Sequence("a", [1, 2], SamplingParams(max_tokens=7))
    assert sequence.rope_length == 9
    sequence.generated.append(5)
    assert sequence.rope_length == 9


def test_two_sequences_are_equal_only_if_they_are_one() -> None:
    # A list of running sequences is searched by ==, which must not compare tensors.
    one, other = (Sequence("a", [1], SamplingParams()) for _ in range(2))
    assert one != other
    assert [other, one].index(one) == 1


# Draws


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    assert uniform(3, 5) == uniform(3, 5)
    draws = {uniform(seed, position) for seed in range(20) for position in range(20)}
    assert len(draws) == 400


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 + 1, -(2**70)])
def test_a_draw_of_any_seed_lies_in_0_to_1(seed: int) -> None:
    assert all(0 <= uniform(seed, position) < 1 for position in range(100))


def test_draws_are_evenly_spread_over_positions_and_over_seeds() -> None:
    # Chi-square of 16 buckets: 15 degrees of freedom, past 50 once in 100,000.
    for draws in (
        [uniform(7, position) for position in range(4000)],
        [uniform(seed, 100) for seed in range(4000)],
        [uniform(n, n) for n in range(4000)],
    ):
        buckets = [sum(int(d * 16) == b for d in draws) for b in range(16)]
        assert sum((n - 250) ** 2 / 250 for n in buckets) < 50


def test_neighbouring_draws_have_nothing_to_do_with_each_other() -> None:
    for pairs in (
        [(uniform(7, n), uniform(7, n + 1)) for n in range(4000)],
        [(uniform(n, 100), uniform(n + 1, 100)) for n in range(4000)],
    ):
        cells = [
            sum(int(a * 4) == i and int(b * 4) == j for a, b in pairs)
            for i, j in itertools.product(range(4), repeat=2)
        ]
        assert sum((n - 250) ** 2 / 250 for n in cells) < 50
