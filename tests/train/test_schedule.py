"""Learning rates by step."""

import math

import pytest

from xc_ray.config import StepOptions
from xc_ray.train.schedule import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    made = StepOptions.model_validate({"learning_rate": 1.0, **options})
    return [learning_rate(made, step, steps) for step in range(steps)]


def test_warm_up_rises_to_the_peak() -> None:
    assert rates(100, warmup=0.04)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_linear_and_constant_fall_as_they_are_called() -> None:
    cosine, linear = rates(10, warmup=0), rates(10, warmup=0, schedule="linear")
    assert cosine == pytest.approx([(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])
    assert linear == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(10, warmup=0, schedule="constant") == [1.0] * 10


def test_no_step_has_a_rate_of_zero() -> None:
    for schedule in ("cosine", "linear", "constant"):
        for steps in (1, 2, 7):
            assert min(rates(steps, schedule=schedule, warmup=0.5)) > 0


def test_behind_the_warm_up_the_rest_of_the_steps_falls_to_the_bottom() -> None:
    linear = rates(10, warmup=0.5, schedule="linear")
    assert linear[5:] == pytest.approx([1 - i / 5 for i in range(5)])
    cosine = rates(10, warmup=0.5)
    assert cosine[5:] == pytest.approx([(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)])
