"""What several decoders know of adapters, as one list of models."""

import openai.types
import pytest

from xc_ray.errors import NotFound
from xc_ray.registry.reference import ModelName
from xc_ray.serve.answers import ModelCard
from xc_ray.serve.cards import card_of, cards_of, problems_of
from xc_ray.serve.messages import AliasState, DecoderState, VersionState

BASE = ModelCard(id="m", created=1, owned_by="xc_ray", max_model_len=4096)
OLD = VersionState("cats", 1, "sha256:old", 10.5)
NEW = VersionState("cats", 2, "sha256:new", 20.0)
MOVED = AliasState("cats", "prod", ((2, 1.0),), ((2, 1.0),))
BEHIND = AliasState("cats", "prod", ((2, 1.0),), ((1, 1.0),), "it is broken")
DOGS = VersionState("dogs", 7, "sha256:dog", 30.0, "device")


def states() -> list[DecoderState]:
    one = VersionState("cats", 1, "sha256:old", 10.5, "device")
    two = VersionState("cats", 2, "sha256:new", 20.0, "host")
    bad = VersionState("cats", 2, "sha256:new", 20.0, "", "it is broken")
    return [
        DecoderState("r1", "sha256:base", (one, two, DOGS), (MOVED,)),
        DecoderState("r2", "sha256:base", (one, bad, DOGS), (BEHIND,), ("a", "b")),
        DecoderState("r3", None, problems=("a",)),
    ]


def test_without_adapters_there_is_the_base() -> None:
    assert cards_of(BASE, []) == [BASE]
    assert cards_of(BASE, [DecoderState("r1")])[0].model_dump() == BASE.model_dump()


def test_the_list_is_the_base_then_aliases_and_versions_the_newest_first() -> None:
    cards = cards_of(BASE, states())
    assert [card.id for card in cards] == [
        "m",
        "m:cats@prod",
        "m:cats@2",
        "m:cats@1",
        "m:dogs@7",
    ]
    assert cards[0].digest == "sha256:base"
    assert all(card.parent == "m" for card in cards[1:])


def test_a_version_tells_where_it_is_loaded_and_what_leads_to_it() -> None:
    *_, new, old, dogs = cards_of(BASE, states())
    assert old.model_dump() == {
        "id": "m:cats@1",
        "object": "model",
        "created": 10,
        "owned_by": "xc_ray",
        "max_model_len": 4096,
        "parent": "m",
        "version": 1,
        "digest": "sha256:old",
        "aliases": ["prod"],  # on r2 it stayed
        "loaded": {"r1": "device", "r2": "device"},
    }
    assert new.aliases == ["prod"]
    assert (new.loaded, new.error) == ({"r1": "host"}, "it is broken")
    assert (dogs.aliases, dogs.loaded) == ([], {"r1": "device", "r2": "device"})


def test_an_alias_tells_where_it_points_and_what_each_decoder_serves() -> None:
    alias = cards_of(BASE, states())[1].model_dump()
    assert alias["targets"] == [{"version": 2, "weight": 1.0}]
    assert alias["serving"] == {
        "r1": [{"version": 2, "weight": 1.0}],
        "r2": [{"version": 1, "weight": 1.0}],
    }
    assert alias["error"] == "it is broken"
    assert "version" not in alias  # it is not one


def test_an_alias_that_is_one_version_everywhere_has_its_digest() -> None:
    alias = cards_of(BASE, states()[:1])[1]
    assert (alias.version, alias.digest) == (2, "sha256:new")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("m:cats", 2),  # prod
        ("m:cats@prod", 2),
        ("m:cats@1", 1),
        ("m:dogs", 7),  # the newest
    ],
)
def test_a_card_is_that_of_what_a_request_would_get(name: str, version: int) -> None:
    card = card_of(cards_of(BASE, states()[:1]), name, ModelName.parse(name).adapter)
    assert (card.id, card.version) == (name, version)


def test_a_digest_finds_its_version() -> None:
    digest = f"sha256:{'1' * 64}"
    version = VersionState("cats", 3, digest, 1.0)
    name = f"m:cats@{digest}"
    cards = cards_of(BASE, [DecoderState("r1", versions=(version,))])
    assert card_of(cards, name, ModelName.parse(name).adapter).version == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m:cats@9", r"'m:cats@9' does not exist; there are m:cats@prod, m:cats@2, m:cats@1$"),
        ("m:birds", r"there are m, m:cats@prod, m:cats@2, m:cats@1, m:dogs@7$"),
    ],
)
def test_what_does_not_exist_says_what_does(name: str, message: str) -> None:
    with pytest.raises(NotFound, match=message):
        card_of(cards_of(BASE, states()), name, ModelName.parse(name).adapter)


def test_of_many_it_says_some() -> None:
    versions = tuple(VersionState("cats", n, "sha256:x", 1.0) for n in range(1, 31))
    cards = cards_of(BASE, [DecoderState("r1", versions=versions)])
    with pytest.raises(NotFound, match=r"m:cats@11 and 10 more$"):
        card_of(cards, "m:cats@99", ModelName.parse("m:cats@99").adapter)


def test_problems_name_the_decoders_that_have_them() -> None:
    assert problems_of(states()) == ["a (decoder r2, r3)", "b (decoder r2)"]


def test_openais_client_reads_every_card() -> None:
    for card in cards_of(BASE, states()):
        openai.types.Model.model_validate(card.model_dump())
