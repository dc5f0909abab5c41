"""Rates of a key, and the gate: who is let in, who waits, who is told to come again."""

import asyncio
import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.config import Allowance
from xc_ray.errors import InvalidRequest, Overloaded
from xc_ray.serve.admission import MAX_IDLE_KEYS, UNKNOWN_S, Entry, Gate, KeyLimits, Rate


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def gate(room: float = 2, *, clock: Clock | None = None, **fields: Any) -> Gate:
    bounds: dict[str, Any] = {"max_waiting": 1000, "max_wait_s": 1e9} | fields
    return Gate({"lanes": room}, clock=clock or Clock(), **bounds)


async def enter(at: Gate, key: str, **amounts: float) -> Entry:
    """Asks, and waits for room."""
    entry = at.ask(key, **amounts)
    try:
        await at.wait(entry)
    except asyncio.CancelledError:
        at.leave(entry)
        raise
    return entry


def wait_of(at: Gate, key: str, **amounts: float) -> float:
    return at._wait_of(at._entry(key, amounts))


class Crowd:
    """Requests at one gate; who is inside, in the order of entering."""

    def __init__(self, at: Gate) -> None:
        self.gate = at
        self.inside: list[Entry] = []
        self.entered: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def send(self, key: str, lanes: float = 1) -> asyncio.Task[None]:
        async def come() -> None:
            self.inside.append(await enter(self.gate, key, lanes=lanes))
            self.entered.append(key)

        self.tasks.append(asyncio.create_task(come()))
        await settle()
        return self.tasks[-1]

    async def leave(self) -> None:
        """The one who has been inside longest goes."""
        self.gate.leave(self.inside.pop(0))
        await settle()


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


class TestRoom:
    async def test_who_fits_enters_at_once_and_the_next_when_one_leaves(self) -> None:
        crowd = Crowd(gate(2))
        for _ in range(3):
            await crowd.send("a")
        assert len(crowd.inside) == 2
        assert crowd.gate.num_waiting == 1
        await crowd.leave()
        assert len(crowd.inside) == 2
        assert crowd.gate.num_waiting == 0

    async def test_each_kind_of_room_counts(self) -> None:
        at = Gate({"lanes": 8, "tokens": 100}, max_waiting=9, max_wait_s=9)
        await enter(at, "a", lanes=1, tokens=90)
        late = asyncio.create_task(enter(at, "a", lanes=1, tokens=20))
        await settle()
        assert not late.done()
        late.cancel()
        await enter(at, "a", lanes=1, tokens=10)

    async def test_what_is_given_back_lets_the_next_one_in_and_is_not_given_back_again(
        self,
    ) -> None:
        at = Gate({"lanes": 8, "tokens": 100}, max_waiting=9, max_wait_s=9)
        first = await enter(at, "a", lanes=1, tokens=90)
        late = asyncio.create_task(enter(at, "a", lanes=1, tokens=60))
        await settle()
        at.give_back(first, tokens=49)
        await settle()
        assert not late.done()
        at.give_back(first, tokens=1)
        await settle()
        assert at._inside == [2, 100]
        at.give_back(first, tokens=1000)
        assert at._inside == [2, 60]
        at.leave(first)
        at.leave(late.result())
        assert at._inside == [0, 0]

    async def test_more_than_there_is_room_for_goes_in_alone(self) -> None:
        crowd = Crowd(gate(2))
        await crowd.send("a")
        await crowd.send("b", lanes=5)
        await crowd.send("c")  # would fit, and does not overtake
        assert crowd.entered == ["a"]
        await crowd.leave()
        assert crowd.entered == ["a", "b"]
        await crowd.leave()
        assert crowd.entered == ["a", "b", "c"]

    async def test_who_gives_up_leaves_nothing_behind(self) -> None:
        crowd = Crowd(gate(1))
        await crowd.send("a")
        big = await crowd.send("b")
        await crowd.send("c")
        big.cancel()
        await settle()
        assert crowd.gate.num_waiting == 1
        await crowd.leave()
        assert crowd.entered == ["a", "c"]
        await crowd.leave()
        assert crowd.gate._inside == [0.0]

    async def test_who_gives_up_as_its_turn_comes_passes_the_room_on(self) -> None:
        crowd = Crowd(gate(1))
        await crowd.send("a")
        second = await crowd.send("b")
        await crowd.send("c")
        crowd.gate.leave(crowd.inside.pop())  # b's turn is set, b has not run yet
        second.cancel()
        await settle()
        assert crowd.entered == ["a", "c"]

    async def test_who_gives_up_at_the_moment_of_a_leaving_gets_nothing(self) -> None:
        crowd = Crowd(gate(1))
        await crowd.send("a")
        second = await crowd.send("b")
        await crowd.send("c")
        second.cancel()
        crowd.gate.leave(crowd.inside.pop())  # b does not know yet that it was cancelled
        await settle()
        assert crowd.entered == ["a", "c"]
        assert crowd.gate.num_waiting == 0
        assert crowd.gate._inside == [1.0]

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 6), st.integers(0, 3))))
    @settings(max_examples=60, deadline=None)
    def test_nothing_is_lost_and_the_room_holds(self, steps: list[tuple[str, float, int]]) -> None:
        async def run() -> None:
            crowd = Crowd(gate(4))
            given_up = 0
            for key, lanes, action in steps:
                if action == 0 and crowd.inside:
                    await crowd.leave()
                elif action == 1:
                    waiting = [t for t in crowd.tasks if not t.done()]
                    if waiting:
                        waiting[len(waiting) // 2].cancel()
                        await settle()
                        given_up += 1
                else:
                    await crowd.send(key, lanes)
                held = sum(entry.amounts[0] for entry in crowd.inside)
                assert held <= 4 + 1e-6
                waiting = [t for t in crowd.tasks if not t.done()]
                assert crowd.gate.num_waiting == len(waiting)
                assert not waiting or crowd.inside  # nobody waits for nothing
            while crowd.inside:
                await crowd.leave()
            assert len(crowd.entered) + given_up == len(crowd.tasks)
            assert crowd.gate._inside[0] == pytest.approx(0, abs=1e-9)

        asyncio.run(run())


class TestFairness:
    async def test_a_key_that_sends_much_waits_behind_itself(self) -> None:
        crowd = Crowd(gate(1))
        await crowd.send("flood")
        for _ in range(10):
            await crowd.send("flood")
        await crowd.send("one")
        for _ in range(2):
            await crowd.leave()
        assert "one" in crowd.entered

    async def test_keys_get_the_same_share_of_room_not_of_requests(self) -> None:
        crowd = Crowd(gate(6))
        for _ in range(40):
            await crowd.send("big", lanes=6)
        for _ in range(120):
            await crowd.send("small", lanes=1)
        while len(crowd.entered) < 70:
            await crowd.leave()
        count = Counter(crowd.entered)
        assert count["big"] * 6 == pytest.approx(count["small"], rel=0.15)

    async def test_who_was_away_has_saved_nothing_up(self) -> None:
        crowd = Crowd(gate(1))
        await crowd.send("a")
        for _ in range(50):
            await crowd.send("a")
        for _ in range(30):
            await crowd.leave()
        for _ in range(10):
            await crowd.send("b")
        begin = len(crowd.entered)
        for _ in range(10):
            await crowd.leave()
        assert Counter(crowd.entered[begin:]) == {"a": 5, "b": 5}

    async def test_a_full_queue_still_has_a_place_for_a_key_with_less_than_its_share(self) -> None:
        crowd = Crowd(gate(1, max_waiting=8))
        for _ in range(9):
            await crowd.send("flood")
        with pytest.raises(Overloaded):
            await enter(crowd.gate, "flood", lanes=1)
        for _ in range(4):
            await crowd.send("quiet")
        assert crowd.gate.num_waiting == 12
        with pytest.raises(Overloaded):
            await enter(crowd.gate, "quiet", lanes=1)

    async def test_it_is_never_more_than_twice_the_places(self) -> None:
        crowd = Crowd(gate(1, max_waiting=8))
        for i in range(40):
            await crowd.send(f"key {i}")
        assert crowd.gate.num_waiting == 16
        refused = [t for t in crowd.tasks if t.done() and t.exception()]
        assert len(refused) == 40 - 1 - 16

    async def test_keys_that_came_and_went_are_forgotten(self) -> None:
        crowd = Crowd(gate(1))
        for i in range(500):  # there is always somebody who waits
            await crowd.send(f"key {i}")
            if i:
                await crowd.leave()
        assert len(crowd.gate._lines) < 100


class TestWait:
    """Two requests a second pass, one after the other."""

    async def crowd(self, **fields: Any) -> tuple[Crowd, Clock]:
        clock = Clock()
        crowd = Crowd(gate(1, clock=clock, **fields))
        for _ in range(21):
            await crowd.send("a")
        for _ in range(10):
            clock.now += 0.5
            await crowd.leave()
        assert crowd.gate.num_waiting == 10
        return crowd, clock

    async def test_it_is_that_of_those_before_it_at_the_measured_rate(self) -> None:
        crowd, _ = await self.crowd()
        assert wait_of(crowd.gate, "a", lanes=1) == pytest.approx(5.5, rel=0.05)
        # b is served in turn with a: one of each.
        assert wait_of(crowd.gate, "b", lanes=1) == pytest.approx(1.0, rel=0.05)

    async def test_a_gate_says_for_how_long_it_will_refuse_others_like_it(self) -> None:
        crowd, clock = await self.crowd(max_wait_s=1000)
        crowd.gate._max_wait_s = 4.0
        assert crowd.gate.closed_s("a", lanes=1) == pytest.approx(1.5, rel=0.1)
        assert crowd.gate.closed_s("b", lanes=1) == 0
        with pytest.raises(Overloaded):
            crowd.gate.check("a", lanes=1)
        crowd.gate.check("b", lanes=1)
        for _ in range(4):
            clock.now += 0.5
            await crowd.leave()
        assert crowd.gate.closed_s("a", lanes=1) == 0
        crowd.gate.check("a", lanes=1)

    async def test_one_whose_places_are_taken_is_closed_until_the_next_one_passes(self) -> None:
        crowd, _ = await self.crowd()
        crowd.gate._max_waiting = 10
        assert crowd.gate.closed_s("a", lanes=1) == pytest.approx(0.5, rel=0.1)

    async def test_before_anything_has_passed_it_is_closed_for_a_moment(self) -> None:
        crowd = Crowd(gate(1, max_waiting=1))
        for _ in range(2):
            await crowd.send("a")
        assert crowd.gate.closed_s("a", lanes=1) == UNKNOWN_S
        assert crowd.gate.closed_s("b", lanes=1) == 0

    async def test_who_was_promised_a_place_is_not_refused(self) -> None:
        crowd, _ = await self.crowd()
        crowd.gate._max_waiting = 10
        with pytest.raises(Overloaded):
            crowd.gate.ask("a", lanes=1)
        entry = crowd.gate.line_up("a", lanes=1)
        assert crowd.gate.num_waiting == 11
        crowd.gate.leave(entry)
        assert crowd.gate.num_waiting == 10

    async def test_who_would_wait_too_long_is_told_when_to_come_again(self) -> None:
        crowd, _ = await self.crowd(max_wait_s=3)
        with pytest.raises(Overloaded) as caught:
            await enter(crowd.gate, "a", lanes=1)
        assert caught.value.code == "overloaded"
        assert caught.value.retry_after_s == pytest.approx(2.5, rel=0.1)
        assert "5 s" in caught.value.message or "6 s" in caught.value.message
        assert (await crowd.send("b")).done() is False  # another key waits a second only

    async def test_without_a_queue_nobody_waits(self) -> None:
        crowd, clock = await self.crowd()
        while crowd.inside:
            clock.now += 0.5
            await crowd.leave()
        assert wait_of(crowd.gate, "a", lanes=1) == 0

    def test_the_rate_follows_a_change(self) -> None:
        clock = Clock()
        rate = Rate(20.0, clock)
        assert rate.value == 0
        rate.begin()
        for _ in range(100):
            clock.now += 0.1
            rate.add(1)
        assert rate.value == pytest.approx(10, rel=0.05)
        rate.end()
        clock.now += 3600  # nobody waits: that says nothing about what could pass
        assert rate.value == pytest.approx(10, rel=0.05)
        rate.begin()
        for _ in range(120):
            clock.now += 1
            rate.add(1)
        assert rate.value == pytest.approx(1, rel=0.1)


class TestKeyLimits:
    def limits(self, clock: Clock | None = None, **allowed: Any) -> KeyLimits:
        return KeyLimits(Allowance(**allowed), clock=clock or Clock())

    def test_without_limits_everything_passes(self) -> None:
        limits = self.limits()
        for _ in range(1000):
            limits.begin("a").charge(tokens=10**9, tiles=10**6)

    def test_each_refusal_is_told_with_its_limit_and_key(self) -> None:
        told: list[tuple[str, str]] = []
        allowed = Allowance(requests_per_minute=3, tokens_per_minute=100, concurrent=1)
        limits = KeyLimits(allowed, refused=lambda *what: told.append(what), clock=Clock())
        permit = limits.begin("a")
        with pytest.raises(Overloaded):
            limits.begin("a")
        permit.charge(tokens=90, tiles=10**6)
        for error, tokens in ((Overloaded, 20), (InvalidRequest, 101)):
            with pytest.raises(error):
                permit.charge(tokens=tokens, tiles=0)
        for _ in range(2):
            permit.end()
            permit = limits.begin("a")
        permit.end()
        with pytest.raises(Overloaded):
            limits.begin("a")
        limits.begin("b")
        assert told == [(limit, "a") for limit in ("concurrent", "tokens", "tokens", "requests")]

    def test_a_key_with_an_allowance_of_its_own_is_held_to_that(self) -> None:
        limits = self.limits(requests_per_minute=1)
        own = Allowance(requests_per_minute=3)
        for _ in range(3):
            limits.begin("a", own).end()
        with pytest.raises(Overloaded):
            limits.begin("a", own)
        for _ in range(9):
            limits.begin("b", Allowance()).end()
        limits.begin("c").end()
        with pytest.raises(Overloaded):
            limits.begin("c")

    def test_another_allowance_holds_at_once_and_counts_what_runs(self) -> None:
        limits = self.limits()
        running = [limits.begin("a", Allowance(concurrent=9)) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 requests of this key are running, 2 may"):
            limits.begin("a", Allowance(concurrent=2))
        for permit in running[:2]:
            permit.end(unused_tokens=5)
        limits.begin("a", Allowance(concurrent=2, tokens_per_minute=100)).end(unused_tokens=5)

    def test_requests_a_minute(self) -> None:
        clock = Clock()
        limits = self.limits(clock, requests_per_minute=3)
        for _ in range(3):
            limits.begin("a").end()
        with pytest.raises(Overloaded) as caught:
            limits.begin("a")
        assert caught.value.retry_after_s == pytest.approx(20)
        assert caught.value.code == "rate_limit_exceeded"
        limits.begin("b")
        clock.now += 20.01
        limits.begin("a")

    @pytest.mark.parametrize("kind", ["tokens", "tiles"])
    def test_tokens_and_tiles_a_minute(self, kind: str) -> None:
        clock = Clock()
        limits = self.limits(clock, **{f"{kind}_per_minute": 100})
        price = {"tokens": 0, "tiles": 0, kind: 70}
        limits.begin("a").charge(**price)
        with pytest.raises(Overloaded, match=kind) as caught:
            limits.begin("a").charge(**price)
        assert caught.value.retry_after_s == pytest.approx(24)  # 40 more, 100 a minute
        clock.now += 24.01
        limits.begin("a").charge(**price)

    def test_what_can_never_fit_is_the_requests_fault(self) -> None:
        limits = self.limits(tokens_per_minute=100)
        with pytest.raises(InvalidRequest, match="101 tokens"):
            limits.begin("a").charge(tokens=101, tiles=0)

    def test_a_refused_charge_takes_nothing(self) -> None:
        limits = self.limits(tokens_per_minute=100, tiles_per_minute=10)
        with pytest.raises(InvalidRequest):
            limits.begin("a").charge(tokens=100, tiles=11)
        limits.begin("a").charge(tokens=100, tiles=10)

    def test_tokens_that_were_not_generated_come_back_once(self) -> None:
        limits = self.limits(tokens_per_minute=100)
        permit = limits.begin("a")
        permit.charge(tokens=100, tiles=0)
        permit.end(unused_tokens=60)
        permit.end(unused_tokens=60)
        limits.begin("a").charge(tokens=60, tiles=0)
        with pytest.raises(Overloaded):
            limits.begin("a").charge(tokens=1, tiles=0)

    def test_so_many_at_the_same_time(self) -> None:
        limits = self.limits(concurrent=2)
        first = limits.begin("a")
        limits.begin("a")
        with pytest.raises(Overloaded, match="2 requests of this key"):
            limits.begin("a")
        limits.begin("b")
        first.end()
        limits.begin("a")

    def test_keys_are_forgotten_once_that_changes_nothing(self) -> None:
        clock = Clock()
        limits = self.limits(clock, requests_per_minute=60)
        busy = limits.begin("busy")
        for i in range(MAX_IDLE_KEYS + 5000):
            clock.now += 0.01
            limits.begin(f"key {i}").end()
        assert len(limits._usages) <= MAX_IDLE_KEYS + 1000
        assert "busy" in limits._usages
        busy.end()

    @given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), max_size=50))
    def test_in_no_minute_more_passes_than_a_bucket_and_its_refill(
        self, asked: list[tuple[float, int]]
    ) -> None:
        clock = Clock()
        limits = self.limits(clock, tokens_per_minute=100)
        passed: list[tuple[float, int]] = []
        for wait, tokens in asked:
            clock.now += wait
            try:
                limits.begin("a").charge(tokens=tokens, tiles=0)
            except Overloaded:
                continue
            passed.append((clock.now, tokens))
        for i, (begin, _) in enumerate(passed):
            within = sum(tokens for at, tokens in passed[i:] if at <= begin + 60)
            assert within <= 200 + 1e-6


def test_when_to_come_again_survives_the_way_between_processes() -> None:
    error = Overloaded("full", param="p", code="c", retry_after_s=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.param, copy.code, copy.retry_after_s) == ("full", "p", "c", 2.5)
