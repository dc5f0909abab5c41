"""Who gets which target of an alias."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.registry.manifest import Target
from xc_ray.registry.resolve import choose


def targets(share: float) -> tuple[Target, Target]:
    """Version 1, and its canary version 2 with a share of the users."""
    return Target(version=1, weight=1 - share), Target(version=2, weight=share)


@given(st.text(), st.floats(0.01, 0.5), st.floats(0.01, 0.49))
def test_user_keeps_the_canary_when_its_share_grows(user: str, share: float, more: float):
    if choose(targets(share), user).version == 2:
        assert choose(targets(share + more), user).version == 2


@given(st.text(), st.floats(0.01, 0.99))
def test_choice_stays_and_does_not_hang_on_the_order(user: str, share: float):
    one, other = targets(share)
    assert choose([one, other], user) == choose([other, one], user)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_shares_are_what_the_weights_say(share: float):
    got = [choose(targets(share), f"user {number}").version for number in range(20_000)]
    # Four standard deviations of a fair draw; the users are fixed, so this never flickers.
    assert got.count(2) / 20_000 == pytest.approx(
        share, abs=4 * (share * (1 - share) / 20_000) ** 0.5
    )


def test_without_a_user_the_larger_weight_counts_and_of_equals_the_older():
    assert choose(targets(0.1), None).version == 1
    assert choose(targets(0.9), None).version == 2
    assert choose(targets(0.5), None).version == 1


def test_single_target_is_everybodys():
    only = (Target(version=4),)
    assert {choose(only, user).version for user in (None, "", "a", "\ud800")} == {4}
