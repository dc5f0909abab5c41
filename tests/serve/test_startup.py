"""The log of a replica's start."""

import logging

import pytest

from xc_ray.serve.startup import Startup


def test_each_phase_is_said_as_it_begins_and_all_are_summed_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = iter([0.0, 1.0, 3.5, 4.0, 4.2, 5.0])
    with caplog.at_level(logging.INFO, "ray.serve"):
        startup = Startup("decoder", lambda: next(times))
        with startup.phase("weights"):
            assert caplog.messages == ["decoder: weights"]
        with startup.phase("engine"):
            pass
        startup.ready("demo on cpu")
    assert caplog.messages == [
        "decoder: weights",
        "decoder: engine",
        "decoder ready after 5.0 s (weights 2.5 s, engine 0.2 s): demo on cpu",
    ]


def test_a_phase_that_fails_is_timed_too() -> None:
    times = iter([0.0, 1.0, 3.0])
    startup = Startup("decoder", lambda: next(times))
    with pytest.raises(ValueError, match="broken"), startup.phase("weights"):
        raise ValueError("broken")
    assert startup.phases == {"weights": 2.0}
