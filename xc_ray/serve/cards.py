"""What decoders say of their adapters -> the cards of /v1/models, and the sentences of /readyz."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from xc_ray.errors import NotFound
from xc_ray.registry.reference import Reference
from xc_ray.registry.resolve import PROD
from xc_ray.serve.answers import ModelCard, VersionShare
from xc_ray.serve.messages import AliasState, DecoderState, VersionState

OWNER = "xc_ray"
SHOWN = 20  # of what exists, in an error


def cards_of(
    base: ModelCard,
    states: Sequence[DecoderState],
    sees: Callable[[str], bool] = lambda _: True,
) -> list[ModelCard]:
    """The base, then for each adapter that is seen its aliases and versions, the newest first."""
    digest = next((s.base for s in states if s.base), None)
    versions: dict[tuple[str, int], dict[str, VersionState]] = {}
    aliases: dict[tuple[str, str], dict[str, AliasState]] = {}
    for state in states:
        for version in state.versions:
            versions.setdefault((version.name, version.version), {})[state.replica] = version
        for alias in state.aliases:
            aliases.setdefault((alias.name, alias.alias), {})[state.replica] = alias
    cards = [base.model_copy(update={"digest": digest})]
    for name in sorted({name for name, _ in (*versions, *aliases) if sees(name)}):
        newest_first = sorted(versions.items(), reverse=True)
        of_name = [_version_card(base, of, aliases) for key, of in newest_first if key[0] == name]
        digests = {card.version: card.digest for card in of_name}
        cards += [
            _alias_card(base, of, digests) for key, of in sorted(aliases.items()) if key[0] == name
        ]
        cards += of_name
    return cards


def card_of(cards: Sequence[ModelCard], name: str, adapter: Reference | None) -> ModelCard:
    """The card of what a request would get for the model `name`, under that name.

    Raises:
        NotFound: there is none; names what there is.
    """
    base = cards[0]
    if adapter is None:
        return base
    of_name = [c for c in cards if c.id.startswith(f"{base.id}:{adapter.name}@")]
    by_id = {card.id: card for card in of_name}
    versions = [card for card in of_name if card.targets is None]
    found = by_id.get(f"{base.id}:{adapter}")
    if adapter.digest is not None:
        found = next((card for card in versions if card.digest == adapter.digest), None)
    elif adapter.selector is None:
        found = by_id.get(f"{base.id}:{adapter.name}@{PROD}") or next(iter(versions), None)
    if found is None:
        ids = [card.id for card in of_name or cards]
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        raise NotFound(
            f"model {name!r} does not exist; there are {', '.join(ids[:SHOWN])}{more}",
            param="model",
            code="model_not_found",
        )
    return found.model_copy(update={"id": name})


def problems_of(states: Sequence[DecoderState]) -> list[str]:
    """What is wrong with adapters, each sentence with the replicas that say it."""
    said: dict[str, list[str]] = {}
    for state in states:
        for problem in state.problems:
            said.setdefault(problem, []).append(state.replica)
    return [f"{problem} (decoder {', '.join(on)})" for problem, on in said.items()]


def _version_card(
    base: ModelCard,
    of: Mapping[str, VersionState],
    aliases: Mapping[tuple[str, str], Mapping[str, AliasState]],
) -> ModelCard:
    version = next(iter(of.values()))
    return ModelCard(
        id=f"{base.id}:{version.name}@{version.version}",
        created=int(version.created),
        owned_by=OWNER,
        max_model_len=base.max_model_len,
        parent=base.id,
        version=version.version,
        digest=version.digest,
        aliases=[
            alias
            for (name, alias), states in sorted(aliases.items())
            if name == version.name
            and any(version.version in dict(s.serving or s.targets) for s in states.values())
        ],
        loaded={replica: v.where for replica, v in of.items() if v.where},
        error=_first(v.error for v in of.values()),
    )


def _alias_card(
    base: ModelCard, of: Mapping[str, AliasState], digests: Mapping[int | None, str | None]
) -> ModelCard:
    alias = next(iter(of.values()))
    meant = {version for a in of.values() for version, _ in a.serving or a.targets}
    version = meant.pop() if len(meant) == 1 else None
    return ModelCard(
        id=f"{base.id}:{alias.name}@{alias.alias}",
        created=base.created,
        owned_by=OWNER,
        max_model_len=base.max_model_len,
        parent=base.id,
        version=version,
        digest=digests.get(version),
        targets=_shares(alias.targets),
        serving={replica: _shares(a.serving) for replica, a in of.items() if a.serving},
        error=_first(a.error for a in of.values()),
    )


def _shares(pairs: Iterable[tuple[int, float]]) -> list[VersionShare]:
    return [VersionShare(version=version, weight=weight) for version, weight in pairs]


def _first(errors: Iterable[str]) -> str | None:
    return next(filter(None, errors), None)
