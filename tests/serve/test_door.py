"""The ingress's door: what every decoder would refuse is refused there, and nothing else."""

import pytest

from xc_ray.errors import Overloaded
from xc_ray.serve.door import MAX_CLOSED_S, MAX_KEYS, Door


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(clock: Clock) -> Door:
    door = Door(clock)
    door.set_decoders({"a", "b"})
    return door


def test_a_door_is_open_until_every_decoder_is_closed(door: Door, clock: Clock) -> None:
    door.check("k", False)
    door.close("a", "k", False, 0.5)
    door.check("k", False)
    door.close("b", "k", False, 0.25)
    with pytest.raises(Overloaded) as caught:
        door.check("k", False)
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1.0)
    clock.now += 0.2
    with pytest.raises(Overloaded):
        door.check("k", False)
    clock.now += 0.1  # the first of them takes more
    door.check("k", False)


def test_other_keys_and_the_other_kind_are_not_meant(door: Door) -> None:
    for decoder in "ab":
        door.close(decoder, "k", True, 0.5)
    door.check("k", False)
    door.check("other", True)
    with pytest.raises(Overloaded):
        door.check("k", True)


def test_decoders_that_come_open_it_and_those_that_go_do_not_count(door: Door) -> None:
    door.close("a", "k", False, 0.5)
    door.set_decoders({"a"})
    with pytest.raises(Overloaded):
        door.check("k", False)
    door.set_decoders({"a", "new"})
    door.check("k", False)
    door.set_decoders(())
    door.check("k", False)


def test_a_wrong_estimate_keeps_it_closed_for_no_longer_than_a_second(
    door: Door, clock: Clock
) -> None:
    for decoder in "ab":
        door.close(decoder, "k", False, 3600)
    clock.now += MAX_CLOSED_S - 0.01
    with pytest.raises(Overloaded):
        door.check("k", False)
    clock.now += 0.02
    door.check("k", False)


def test_keys_that_nobody_sends_again_do_not_add_up(door: Door) -> None:
    for number in range(MAX_KEYS + 1):
        door.close("a", str(number), False, 0.5)
    assert len(door._until) <= MAX_KEYS
