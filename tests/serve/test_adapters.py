"""Adapters on one decoder: names, aliases that follow the registry, and what happens when not."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.adapter_kit import OTHER_BASE, Kit
from xc_ray.engine.sequence import SamplingParams
from xc_ray.errors import CheckpointError, InvalidRequest, NotFound, RegistryError, XcRayError
from xc_ray.registry.manifest import Target
from xc_ray.registry.registry import Registry
from xc_ray.serve import watch
from xc_ray.serve.messages import Tokens
from xc_ray.serve.watch import Source

Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are not known are looked for without a pause."""
    monkeypatch.setattr(watch, "LOOK_AGAIN_S", 0.0)


@pytest.fixture
async def kit(tiny: Tiny, tmp_path: Path) -> Kit:
    return Kit(tmp_path, tiny())


async def refusal(kit: Kit, reference: str) -> XcRayError:
    with pytest.raises(XcRayError) as caught:
        await kit.adapters.take(reference, "")
    assert caught.value.param == "model"
    assert str(kit.home) not in caught.value.message
    return caught.value


async def test_routers_are_told_what_is_loaded_and_where(kit: Kit) -> None:
    for _ in range(2):
        kit.push()
    assert kit.adapters.loaded() == {"device": [], "host": []}
    await kit.label("cats@2")
    assert kit.adapters.loaded() == {"device": [], "host": ["cats@2"]}
    use = await kit.adapters.take("cats@1", "")
    kit.engine.add("r", [1, 5, 6], SamplingParams(max_tokens=1), adapter=use.hold.packed)
    while kit.engine.has_work:
        kit.engine.step()
    assert kit.adapters.loaded() == {"device": ["cats@1"], "host": ["cats@2"]}


class TestNames:
    async def test_a_version_and_a_digest_mean_themselves(self, kit: Kit) -> None:
        first, second = kit.push(), kit.push()
        assert await kit.label("cats@1") == "cats@1"
        assert await kit.label(f"cats@{second.digest}") == "cats@2"
        assert await kit.label(f"cats@{first.digest}") == "cats@1"

    async def test_a_bare_name_is_prod_and_without_it_the_newest(self, kit: Kit) -> None:
        kit.push()
        kit.push()
        assert await kit.label("cats") == "cats@2"
        kit.promote(1)
        await kit.poll()
        assert await kit.label("cats") == await kit.label("cats@prod") == "cats@1"

    async def test_the_newest_is_the_newest_for_this_base(self, kit: Kit) -> None:
        kit.push()
        kit.push(base=OTHER_BASE)
        assert await kit.label("cats") == "cats@1"

    async def test_what_was_published_a_moment_ago_is_found_at_once(self, kit: Kit) -> None:
        kit.push()
        await kit.poll()
        kit.push()
        assert await kit.label("cats@2") == "cats@2"
        kit.promote(2, alias="beta")
        assert await kit.label("cats@beta") == "cats@2"

    async def test_many_unknown_names_cost_one_reading(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch, "LOOK_AGAIN_S", 0.2)
        await kit.poll()
        asked = [kit.adapters.take(f"cats@{i + 1}", "") for i in range(20)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(e, NotFound) for e in found)
        assert kit.metrics.count("poll", True) == 2

    async def test_an_unknown_name_says_what_there_is(self, kit: Kit) -> None:
        kit.push()
        kit.push("dogs")
        kit.push("birds", base=OTHER_BASE)
        kit.promote(1)
        error = await refusal(kit, "cats@7")
        assert (error.status, error.code) == (404, "model_not_found")
        assert error.message == (
            "adapter 'cats@7' of 'tiny' does not exist; there are cats@1, cats@prod, dogs@1"
        )

    async def test_who_sees_some_adapters_is_told_of_no_others(self, kit: Kit) -> None:
        kit.push()
        kit.push("dogs")
        for sees, there in (({"dogs"}, "there are dogs@1"), (set[str](), "there are none")):
            with pytest.raises(XcRayError) as caught:
                await kit.adapters.take("cats@7", "", frozenset(sees))
            assert caught.value.message.endswith(f"does not exist; {there}")

    async def test_of_many_it_names_some_and_how_many_more(self, kit: Kit) -> None:
        kit.push()
        for number in range(24):
            kit.registry.promote("cats", [(1, 1.0)], f"alias-{number:02}")
        error = await refusal(kit, "dogs")
        assert error.message.endswith("cats@alias-18 and 5 more")

    async def test_without_any_it_says_so(self, kit: Kit) -> None:
        assert (await refusal(kit, "cats")).message.endswith("does not exist; there are none")

    async def test_one_of_another_base_says_whose_it_is(self, kit: Kit) -> None:
        kit.push(base=OTHER_BASE)
        for name in ("cats@1", "cats"):
            error = await refusal(kit, name)
            assert error.status == 404
            assert error.message == (
                "adapter 'cats@1' belongs to the base 'other' (sha256:000000000000…), and served "
                f"is 'tiny' ({kit.owner.digest[:19]}…)"
            )
        assert kit.loads == []

    async def test_a_base_is_no_adapter(self, kit: Kit) -> None:
        error = await refusal(kit, "base@1")
        assert (error.status, error.message) == (404, "'base@1' is a base, not an adapter")

    async def test_what_does_not_fit_is_refused_with_the_list(self, kit: Kit) -> None:
        kit.push_broken()
        error = await refusal(kit, "cats@1")
        assert isinstance(error, InvalidRequest)
        assert "cats@1" in error.message
        assert "layers.0.attention.wo.lora_A.weight is [4, 32], expected [5, 32]" in error.message

    async def test_a_rank_above_the_slots_is_refused_with_both(
        self, tiny: Tiny, tmp_path: Path
    ) -> None:
        kit = Kit(tmp_path, tiny(), max_rank=8)
        kit.push(rank=9)
        assert "of a rank above 8, which is the limit here" in (await refusal(kit, "cats")).message


class TestFollowing:
    async def test_a_moved_alias_switches_when_the_new_version_is_loaded(self, kit: Kit) -> None:
        kit.push()
        kit.promote(1)
        assert await kit.label("cats") == "cats@1"
        kit.push()
        kit.promote(2)
        kit.gate.clear()
        await kit.adapters.watch.refresh()
        await kit.moment()
        assert kit.loads == ["cats@1", "cats@2"]
        assert await kit.label("cats") == "cats@1"  # nobody waits for the new one
        kit.gate.set()
        await kit.adapters.aliases.settled()
        assert await kit.label("cats") == "cats@2"
        assert kit.metrics.count("switch", True) == 2

    async def test_a_request_keeps_the_version_it_began_with(self, kit: Kit) -> None:
        kit.push()
        kit.promote(1)
        old = await kit.adapters.take("cats", "")
        kit.push()
        kit.promote(2)
        await kit.poll()
        assert await kit.label("cats") == "cats@2"
        assert kit.version(1).where == "host"
        assert old.hold.packed.digest == kit.registry.manifest("cats", 1).digest
        old.release()
        assert kit.version(1).where == ""  # dropped with its last request
        assert kit.version(2).where == "host"

    async def test_a_version_that_another_alias_serves_stays(self, kit: Kit) -> None:
        kit.push()
        kit.promote(1)
        kit.promote(1, alias="stable")
        await kit.label("cats@stable")
        await kit.label("cats@prod")
        kit.push()
        kit.promote(2)
        await kit.poll()
        assert (kit.version(1).where, kit.version(2).where) == ("host", "host")

    async def test_a_rollback_brings_the_old_version_back(self, kit: Kit) -> None:
        kit.push()
        kit.push()
        kit.promote(1)
        assert await kit.label("cats") == "cats@1"
        kit.promote(2)
        await kit.poll()
        assert await kit.label("cats") == "cats@2"
        kit.registry.rollback("cats", "prod")
        await kit.poll()
        assert await kit.label("cats") == "cats@1"

    async def test_the_newest_version_of_a_bare_name_is_followed_too(self, kit: Kit) -> None:
        kit.push()
        assert await kit.label("cats") == "cats@1"
        kit.push()
        await kit.poll()
        assert kit.loads == ["cats@1", "cats@2"]
        assert await kit.label("cats") == "cats@2"

    async def test_what_nobody_uses_here_is_not_loaded(self, kit: Kit) -> None:
        kit.push()
        kit.promote(1)
        await kit.poll()
        kit.push()
        kit.promote(2)
        await kit.poll()
        assert kit.loads == []
        assert await kit.label("cats") == "cats@2"

    async def test_two_moves_at_once_end_at_the_last(self, kit: Kit) -> None:
        for _ in range(3):
            kit.push()
        kit.promote(1)
        await kit.label("cats")
        kit.promote(2)
        kit.gate.clear()
        await kit.adapters.watch.refresh()
        kit.promote(3)
        await kit.adapters.watch.refresh()
        kit.gate.set()
        await kit.adapters.aliases.settled()
        await kit.poll()
        assert await kit.label("cats") == "cats@3"


class TestWhatCannotBeLoaded:
    async def broken_move(self, kit: Kit, how: str) -> Callable[[], None]:
        """cats@prod serves version 1 and was moved to a version 2 that cannot be; undoes it."""
        kit.push()
        kit.promote(1)
        await kit.label("cats")
        undo: Callable[[], None] = lambda: None  # noqa: E731 - as what `damage` returns
        if how == "of another base":
            kit.push(base=OTHER_BASE)
        elif how == "does not fit":
            kit.push_broken()
        else:
            undo = kit.damage(kit.push())
        kit.promote(2)
        await kit.poll()
        return undo

    @pytest.mark.parametrize(
        ("how", "why"),
        [
            ("of another base", r"adapter 'cats@2' belongs to the base 'other'"),
            ("does not fit", r"adapter 'cats@2': .*is \[4, 32\], expected \[5, 32\]"),
            ("damaged", r"adapter 'cats@2' cannot be loaded now"),
        ],
    )
    async def test_the_old_version_stays_and_everybody_says_so(
        self, kit: Kit, caplog: pytest.LogCaptureFixture, how: str, why: str
    ) -> None:
        caplog.set_level(logging.WARNING, "ray.serve")
        await self.broken_move(kit, how)
        assert await kit.label("cats") == "cats@1"
        (problem,) = kit.problems()
        assert problem.startswith("alias cats@prod points at version 2 and serves version 1: ")
        assert str(kit.home) not in problem
        assert kit.alias().targets == ((2, 1.0),)
        assert kit.alias().serving == ((1, 1.0),)
        with pytest.raises(XcRayError, match=why) as caught:
            raise InvalidRequest(kit.alias().error)
        assert caught.value.message in problem
        assert kit.metrics.count("switch", False) == 1
        assert kit.metrics.said[-1] != ("behind", 0)
        assert ("behind", 1) in kit.metrics.said
        told = [r.message for r in caplog.records if "cannot move" in r.message]
        assert len(told) == 1
        assert told[0].startswith("alias cats@prod cannot move to version 2 and serves version 1")

    async def test_it_is_tried_again_with_growing_pauses(self, kit: Kit) -> None:
        repair = await self.broken_move(kit, "damaged")
        tries = []
        for _ in range(40):
            kit.now += 1
            await kit.poll()
            tries.append(kit.loads.count("cats@2"))
        assert tries[0] == 2
        pauses = [i - j for i, j in zip(tries[1:], tries, strict=False)]
        assert 5 <= tries[-1] <= 7, tries  # after 1, 2, 4, 8, 16 s
        assert pauses
        assert kit.metrics.count("switch", False) == 1  # once for one cause
        repair()
        kit.now += 60
        await kit.poll()
        assert await kit.label("cats") == "cats@2"
        assert kit.problems() == ()
        assert kit.metrics.said[-1] == ("request", "cats", 2, 0)
        assert kit.version(2).error == ""

    async def test_the_next_move_does_not_wait_for_it(self, kit: Kit) -> None:
        await self.broken_move(kit, "does not fit")
        kit.push()
        kit.promote(3)
        await kit.poll()
        assert await kit.label("cats") == "cats@3"
        assert kit.problems() == ()

    async def test_a_rollback_makes_it_good(self, kit: Kit) -> None:
        await self.broken_move(kit, "of another base")
        kit.registry.rollback("cats", "prod")
        await kit.poll()
        assert kit.problems() == ()
        assert kit.alias().error == ""
        assert await kit.label("cats") == "cats@1"

    async def test_a_version_that_was_left_and_forgotten_is_loaded_again(
        self, tiny: Tiny, tmp_path: Path
    ) -> None:
        kit = Kit(tmp_path, tiny(), host_bytes=0)  # nothing stays that nobody holds
        await self.broken_move(kit, "does not fit")
        assert await kit.label("cats") == "cats@1"
        assert kit.alias().error

    async def test_a_decoder_that_starts_then_serves_what_was_before(self, kit: Kit) -> None:
        """Two decoders of one application agree, whenever they were started."""
        await self.broken_move(kit, "damaged")
        kit.open()
        assert await kit.label("cats") == "cats@1"
        (problem,) = kit.problems()
        assert problem.startswith("alias cats@prod points at version 2 and serves version 1: ")

    async def test_of_a_bare_name_too(self, kit: Kit) -> None:
        kit.push()
        kit.push_broken()
        assert await kit.label("cats") == "cats@1"

    async def test_without_anything_before_the_request_hears_why(self, kit: Kit) -> None:
        kit.push_broken()
        kit.promote(1)
        error = await refusal(kit, "cats")
        assert isinstance(error, InvalidRequest)
        assert kit.alias().serving == ()
        assert kit.alias().error == error.message

    async def test_and_so_do_all_others_without_another_look_at_the_log(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kit.push_broken()
        kit.promote(1)
        reads: list[str] = []
        earlier = Source.earlier

        def counted(source: Source, name: str, alias: str) -> list[tuple[Target, ...]]:
            reads.append(alias)
            return earlier(source, name, alias)

        monkeypatch.setattr(Source, "earlier", counted)
        for _ in range(5):
            await refusal(kit, "cats")
        assert reads == ["prod"]
        assert kit.loads == ["cats@1"]
        await kit.poll()
        await refusal(kit, "cats")
        assert reads == ["prod"] * 2

    async def test_a_canary_of_which_one_is_broken_does_not_begin(self, kit: Kit) -> None:
        kit.push()
        kit.promote(1)
        await kit.label("cats")
        kit.push_broken()
        kit.promote((1, 0.5), (2, 0.5))
        await kit.poll()
        assert {await kit.label("cats", f"user {i}") for i in range(20)} == {"cats@1"}
        assert kit.problems()[0].startswith(
            "alias cats@prod points at version 1 (50%) and 2 (50%) and serves version 1: "
        )


class TestCanary:
    async def test_a_user_always_gets_the_same_and_the_shares_are_the_weights(
        self, kit: Kit
    ) -> None:
        kit.push()
        kit.push()
        kit.promote((1, 0.75), (2, 0.25))
        users = [f"user {i}" for i in range(400)]
        first = {user: await kit.label("cats", user) for user in users}
        assert {user: await kit.label("cats", user) for user in users} == first
        assert 60 < Counter(first.values())["cats@2"] < 140
        kit.promote((1, 0.5), (2, 0.5))
        await kit.poll()
        later = {user: await kit.label("cats", user) for user in users}
        assert all(later[u] == "cats@2" for u in users if first[u] == "cats@2")
        assert Counter(later.values())["cats@2"] > Counter(first.values())["cats@2"]


class TestTheStore:
    async def test_an_outage_does_not_stop_what_is_loaded(
        self, kit: Kit, caplog: pytest.LogCaptureFixture
    ) -> None:
        kit.push()
        kit.promote(1)
        await kit.label("cats")
        back = kit.take_away()
        for _ in range(3):
            await kit.poll()
        assert await kit.label("cats") == await kit.label("cats@1") == "cats@1"
        assert kit.problems() == ("the registry cannot be read; what is known is served on",)
        assert kit.metrics.count("poll", False) == 3
        told = [r for r in caplog.records if "what is known stays" in r.message]
        assert len(told) == 1
        assert "newer ones are not known" in (await refusal(kit, "cats@2")).message
        back()
        await kit.poll()
        assert kit.problems() == ()

    async def test_one_from_the_start_is_no_404(self, kit: Kit) -> None:
        kit.push()
        back = kit.take_away()
        error = await refusal(kit, "cats")
        assert isinstance(error, RegistryError)
        assert "cannot be looked up" in error.message
        back()
        assert await kit.label("cats") == "cats@1"

    async def test_a_registry_that_nobody_made_is_empty_and_stays_unmade(
        self, kit: Kit, tmp_path: Path
    ) -> None:
        place = tmp_path / "nowhere"
        kit.registry = Registry.open(str(place))
        source = Source(kit.registry.store, place.exists)
        kit.adapters.watch._source = source
        assert (await refusal(kit, "cats")).status == 404
        assert kit.problems() == ()
        assert not place.exists()

    async def test_damaged_records_are_told_and_the_others_served(self, kit: Kit) -> None:
        kit.push()
        kit.push()
        path = Path(kit.registry.store.location.prefix, "versions/cats/00000002.json")
        path.write_bytes(path.read_bytes()[:-9])
        assert await kit.label("cats@1") == "cats@1"
        assert kit.problems() == ("records of the registry are damaged: 1",)


class TestTheBase:
    async def test_requests_wait_until_it_is_known(self, kit: Kit) -> None:
        kit.push()
        told = threading.Event()
        kit.open(lambda: (told.wait(10), kit.owner.digest)[1])
        asked = asyncio.create_task(kit.label("cats"))
        await kit.moment()
        assert not asked.done()
        told.set()
        assert await asked == "cats@1"

    async def test_one_that_cannot_be_told_turns_adapters_off_and_says_so(self, kit: Kit) -> None:
        def fail() -> str:
            raise CheckpointError("/srv/model has gone")

        kit.push()
        kit.open(fail)
        error = await refusal(kit, "cats")
        assert error.message.startswith("adapters are not available")
        assert "/srv" not in error.message
        assert kit.problems()[0].startswith("adapters are not available")


async def test_a_version_tells_where_it_is_loaded(kit: Kit) -> None:
    kit.push()
    await kit.poll()
    assert kit.version(1).where == ""
    use = await kit.adapters.take("cats", "")
    assert kit.version(1).where == "host"
    use.note([Tokens(0, [1] * 5, 5), Tokens(1, [1] * 2, 2)])
    use.note([Tokens(0, [1], 6)])
    use.release()
    assert kit.metrics.said[-1] == ("request", "cats", 1, 8)
