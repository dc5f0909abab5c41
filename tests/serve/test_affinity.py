"""The choice of a replica: agreement, bounds, and what a lost replica costs."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.serve.affinity import Affinity, Loaded, Outstanding, loaded_of
from xc_ray.serve.prefixes import Route

KEYS = st.integers(0, 2**64 - 1)
NAMES = st.lists(st.text("abcdef0123456789", min_size=4, max_size=8), min_size=1, unique=True)


def route(*keys: int, tokens: int = 100, adapter: str = "") -> Route:
    return Route(keys, tuple(100 * (i + 1) for i in range(len(keys))), tokens, adapter)


def first(affinity: Affinity, wanted: Route, replicas: list[str], **more: Loaded) -> str:
    return affinity.rank(wanted, replicas, more)[0][0]


class TestHash:
    @given(st.lists(KEYS, min_size=1, max_size=4), NAMES, st.randoms())
    def test_routers_agree_without_a_word(
        self, keys: list[int], names: list[str], source: random.Random
    ) -> None:
        shuffled = source.sample(names, len(names))
        assert Affinity().rank(route(*keys), names) == Affinity().rank(route(*keys), shuffled)

    @given(NAMES, KEYS)
    def test_every_replica_is_tried_once(self, names: list[str], key: int) -> None:
        for wanted in (route(key), Route(), route(adapter="cats")):
            ranks = Affinity().rank(wanted, names)
            assert sorted(name for group in ranks for name in group) == sorted(names)

    @given(NAMES, st.lists(KEYS, min_size=1, max_size=50), st.data())
    def test_a_lost_replica_moves_its_own_share_alone(
        self, names: list[str], keys: list[int], data: st.DataObject
    ) -> None:
        lost = data.draw(st.sampled_from(names))
        left = [name for name in names if name != lost]
        for key in keys if left else ():
            order = [name for (name,) in Affinity().rank(route(key), names)]
            order.remove(lost)
            assert [name for (name,) in Affinity().rank(route(key), left)] == order

    def test_an_added_replica_takes_about_its_share_and_moves_nobody_else(self) -> None:
        names, keys = [f"r{i}" for i in range(4)], range(0, 10**15, 10**12)
        before = [first(Affinity(), route(key), names) for key in keys]
        after = [first(Affinity(), route(key), [*names, "new"]) for key in keys]
        moved = [a for a, b in zip(after, before, strict=True) if a != b]
        assert set(moved) == {"new"}
        assert 0.15 < len(moved) / len(keys) < 0.25

    def test_beginnings_spread_over_the_replicas(self) -> None:
        names = [f"r{i}" for i in range(4)]
        found = Counter(first(Affinity(), route(key), names) for key in range(0, 10**15, 10**12))
        assert all(200 < found[name] < 300 for name in names)


class TestRecord:
    NAMES = ("a", "b", "c", "d")

    @given(st.permutations(NAMES), st.lists(KEYS, min_size=4, max_size=4, unique=True))
    def test_the_longest_shared_beginning_wins(self, order: list[str], keys: list[int]) -> None:
        affinity = Affinity()
        for length, name in enumerate(order, 1):  # each a longer one; the last took all four
            affinity.note(route(*keys[:length]), name)
        assert affinity.rank(route(*keys), order) == [[name] for name in reversed(order)]

    def test_a_turn_follows_the_one_that_was_sent_elsewhere(self) -> None:
        names = list(self.NAMES)
        home = first(Affinity(), route(1), names)
        other = next(name for name in names if name != home)
        affinity = Affinity()
        affinity.note(route(1, 2), other)
        assert first(affinity, route(1, 2, 3), names) == other

    def test_what_a_lost_replica_held_goes_where_the_hash_says(self) -> None:
        affinity = Affinity()
        affinity.note(route(1, 2), "gone")
        assert affinity.rank(route(1, 2), ["a", "b"]) == Affinity().rank(route(1, 2), ["a", "b"])

    def test_the_longest_unused_names_are_forgotten(self) -> None:
        affinity = Affinity(max_keys=10)
        affinity.note(route(1), "a")
        for key in range(100, 109):
            affinity.note(route(key), "b")
        affinity.note(route(1), "a")  # used again
        affinity.note(route(200), "b")
        held = [key for key in (1, *range(100, 109), 200) if affinity.held(route(key), "a")]
        assert held == [1]
        assert not affinity.held(route(100), "b")
        assert affinity.held(route(101), "b")


class TestLoad:
    @given(
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20_000), st.booleans()), max_size=200),
        st.integers(2, 6),
        st.sampled_from([1.0, 1.25, 2.0]),
        st.integers(0, 20_000),
    )
    def test_no_replica_is_given_more_than_its_bound(
        self, requests: list[tuple[int, int, bool]], count: int, factor: float, free: int
    ) -> None:
        """Whatever comes, however alike: bounded by the mean before it, and the request itself."""
        names = [f"r{i}" for i in range(count)]
        affinity = Affinity(load_factor=factor, free_tokens=free)
        under_way: list[str] = []
        for number, (key, tokens, ends) in enumerate(requests):
            if ends and under_way:
                affinity.outstanding.release(under_way.pop(0))
            limit = affinity.limit(names)
            assert limit >= free
            wanted = route(key, tokens=tokens)
            name = first(affinity, wanted, names)
            assert affinity.outstanding.tokens(name) <= limit
            affinity.outstanding.place(str(number), name, tokens)
            affinity.note(wanted, name)
            under_way.append(str(number))

    def test_below_the_free_tokens_nobody_is_passed_over(self) -> None:
        affinity = Affinity(free_tokens=1000)
        names = ["a", "b", "c", "d"]
        home = first(affinity, route(1), names)
        affinity.outstanding.place("x", home, 1000)
        assert first(affinity, route(1), names) == home
        affinity.outstanding.place("y", home, 1)
        assert first(affinity, route(1), names) != home

    def test_a_busy_one_is_passed_over_in_the_order_of_the_hash_and_tried_last(self) -> None:
        names = ["a", "b", "c", "d"]
        order = [name for (name,) in Affinity().rank(route(1), names)]
        affinity = Affinity()
        affinity.outstanding.place("x", order[0], 500)
        assert affinity.rank(route(1), names) == [[n] for n in [*order[1:], order[0]]]

    def test_one_busy_beginning_does_not_starve_others(self) -> None:
        """Everybody asks about one picture: all replicas work, none far beyond its share."""
        names = [f"r{i}" for i in range(4)]
        affinity = Affinity(load_factor=1.25, free_tokens=1000)
        sent: Counter[str] = Counter()
        for number in range(400):
            name = first(affinity, route(1), names)
            affinity.outstanding.place(str(number), name, 100)
            affinity.note(route(1), name)
            sent[name] += 1
            if number >= 100:
                affinity.outstanding.release(str(number - 100))
        assert all(10 < sent[name] < 150 for name in names)

    def test_without_anything_in_common_two_of_all_are_asked(self) -> None:
        affinity = Affinity()
        pairs = {tuple(sorted(affinity.rank(Route(), list("abcd"))[0])) for _ in range(300)}
        assert len(pairs) == 6
        assert affinity.rank(Route(), ["a"]) == [["a"]]


class TestAdapters:
    NAMES = ("a", "b", "c", "d")

    @pytest.mark.parametrize(
        ("adapter", "level"),
        [
            ("cats", 2),
            ("cats@prod", 2),
            ("cats@3", 2),
            ("cats@2", 0),
            ("cats@sha256:00", 2),
            ("dogs", 1),
            ("dogs@1", 1),
            ("cat", 0),
            ("birds", 0),
        ],
    )
    def test_what_counts_as_loaded(self, adapter: str, level: int) -> None:
        stats = {"device": ["cats@3"], "host": ["cats@3", "dogs@1"]}
        assert loaded_of(stats).level(adapter) == level
        assert loaded_of({}).level(adapter) == 0

    def test_the_replica_that_has_it_comes_first_then_host_memory(self) -> None:
        on_device, in_host = Loaded(frozenset({"cats@1"})), Loaded(host=frozenset({"cats@1"}))
        for device in self.NAMES:
            for host in set(self.NAMES) - {device}:
                ranks = Affinity().rank(
                    route(1, adapter="cats"), self.NAMES, {device: on_device, host: in_host}
                )
                assert ranks[:2] == [[device], [host]]

    def test_a_held_beginning_goes_before_an_adapter(self) -> None:
        affinity = Affinity()
        affinity.note(route(1, adapter="cats"), "b")
        has = {"c": Loaded(frozenset({"cats@1"}))}
        assert affinity.rank(route(1, adapter="cats"), self.NAMES, has)[:2] == [["b"], ["c"]]

    def test_one_that_nobody_has_goes_to_one_replica_whatever_is_asked(self) -> None:
        names = list(self.NAMES)
        found = {first(Affinity(), route(k, adapter="cats"), names) for k in range(50)}
        found |= {first(Affinity(), route(adapter="cats"), names)}
        assert len(found) == 1
        many = {first(Affinity(), route(1, adapter=f"a{i}"), names) for i in range(50)}
        assert many == set(names)

    def test_those_that_have_it_share_its_conversations(self) -> None:
        has = dict.fromkeys("ab", Loaded(frozenset({"cats@1"})))
        routes = [route(k, adapter="cats") for k in range(100)]
        found = Counter(first(Affinity(), r, list(self.NAMES), **has) for r in routes)
        assert set(found) == {"a", "b"}
        assert min(found.values()) > 30

    def test_a_busy_replica_is_passed_over_though_it_has_the_adapter(self) -> None:
        affinity = Affinity()
        affinity.outstanding.place("x", "a", 500)
        has = {"a": Loaded(frozenset({"cats@1"}))}
        assert affinity.rank(route(1, adapter="cats"), self.NAMES, has)[-1] == ["a"]


class TestOutstanding:
    def test_tokens_come_and_go_with_their_requests(self) -> None:
        o = Outstanding()
        o.place("1", "a", 10)
        o.place("2", "a", 5)
        o.place("1", "b", 10)  # sent to another after all
        assert (o.tokens("a"), o.tokens("b"), o.total) == (5, 10, 15)
        o.move("2", "b")
        o.move("3", "b")  # nobody knows it
        assert (o.tokens("a"), o.tokens("b")) == (0, 15)
        o.release("1", "a")  # the end of what was refused there
        assert o.tokens("b") == 15
        o.release("1", "b")
        o.release("2")
        o.release("2")
        assert o.total == 0

    def test_what_a_lost_replica_had_is_forgotten(self) -> None:
        o = Outstanding()
        o.place("1", "a", 10)
        o.place("2", "b", 5)
        o.keep({"b"})
        o.release("1", "a")
        assert (o.tokens("a"), o.total) == (0, 5)
