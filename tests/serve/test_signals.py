"""What replicas measure of themselves, with a clock that the test moves."""

from dataclasses import dataclass

import pytest

from xc_ray.serve.signals import MEMORY_S, WorkMeter


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestWorkMeter:
    def test_nothing_is_known_before_anything_was_done(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        clock.now += 5
        assert (meter.rate, meter.read_use()) == (0, 0)

    def test_the_rate_is_of_the_time_at_work_and_stays_at_rest(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        for _ in range(10):
            meter.add(20, 0.5)
        clock.now += 1000
        assert meter.rate == pytest.approx(40)

    def test_the_use_is_of_the_time_since_the_last_reading(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        meter.add(20, 0.5)
        clock.now += 2
        assert meter.read_use() == pytest.approx(0.25)
        clock.now += 2
        assert meter.read_use() == 0  # exactly: else nothing ever scales to zero

    def test_a_reading_at_the_same_moment_is_nothing(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        meter.add(20, 0.5)
        assert meter.read_use() == 0

    def test_work_longer_than_the_readings_is_full_use_in_the_mean(self, clock: Clock) -> None:
        meter, readings = WorkMeter(10, clock), []
        for second in range(1, 41):
            clock.now += 1
            if second % 5 == 0:
                meter.add(100, 5.0)
            readings.append(meter.read_use())
        assert sum(readings) / len(readings) == pytest.approx(1)

    def test_the_rate_follows_other_work(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        meter.add(1000, 10)
        for _ in range(200):
            meter.add(10, MEMORY_S / 20)
        assert meter.rate == pytest.approx(10 / (MEMORY_S / 20), rel=0.02)

    def test_small_pieces_count_for_the_rate_until_a_full_one_was_seen(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        meter.add(1, 1.0)
        assert meter.rate == pytest.approx(1)
        meter.add(10, 1.0)
        assert meter.rate == pytest.approx(10)
        meter.add(1, 1.0)
        assert meter.rate == pytest.approx(10)
        clock.now += 2
        assert meter.read_use() == pytest.approx(12 / 20)  # but they were done

    def test_work_without_an_amount_or_time_says_nothing(self, clock: Clock) -> None:
        meter = WorkMeter(10, clock)
        meter.add(0, 1.0)
        meter.add(5, 0.0)
        assert meter.rate == 0
