"""A reference made into one version: the same rules for the store and for a snapshot of it."""

import difflib
import hashlib
from collections.abc import Sequence
from typing import Protocol

from xc_ray.errors import NotFound
from xc_ray.registry.manifest import AliasEntry, Manifest, Target
from xc_ray.registry.reference import Reference

# The alias that a bare name means where it exists.
PROD = "prod"
# How many of what exists an error names.
SHOWN = 10


class Catalogue(Protocol):
    """What can be asked about a registry."""

    def names(self) -> list[str]:
        """Every name with a version, sorted."""
        ...

    def versions(self, name: str) -> list[int]:
        """Its versions, oldest first; empty if the name is unknown."""
        ...

    def manifest(self, name: str, version: int) -> Manifest:
        """One version, which exists."""
        ...

    def alias_names(self, name: str) -> list[str]:
        """Its aliases, sorted."""
        ...

    def head(self, name: str, alias: str) -> AliasEntry | None:
        """Where an alias points now; None if there is no such alias."""
        ...


def resolve(catalogue: Catalogue, ref: Reference, sticky: str | None) -> Manifest:
    """The version that a reference means.

    A bare name is its alias `prod` if there is one, else the newest version; a digest is the
    newest version with these files; an alias with two targets is settled by `choose`, and without
    `sticky` is the one with the larger weight.

    Raises:
        NotFound: nothing is meant by it; the message names what there is.
        RegistryError: the store cannot be reached, or what is meant is damaged.
    """
    name = ref.name
    if ref.alias is not None or ref.selector is None:
        entry = catalogue.head(name, ref.alias or PROD)
        if entry is not None:
            who = None if sticky is None else f"{name}@{entry.alias}:{sticky}"
            return catalogue.manifest(name, choose(entry.targets, who).version)
        if ref.alias is not None:
            raise _no_alias(catalogue, ref)
    versions = catalogue.versions(name)
    if not versions:
        raise unknown_name(catalogue, name)
    if ref.digest is not None:
        for version in reversed(versions):
            manifest = catalogue.manifest(name, version)
            if manifest.digest == ref.digest:
                return manifest
        raise NotFound(
            f"no version of {name!r} has the digest {ref.digest}; it has {_listed(versions)}",
            code="model_not_found",
        )
    version = ref.version if ref.version is not None else versions[-1]
    if version not in versions:
        raise unknown_version(name, version, versions)
    return catalogue.manifest(name, version)


def choose(targets: Sequence[Target], sticky: str | None) -> Target:
    """The target that a user gets, always the same one while the weights stay.

    A user is a point in [0, 1), the sha256 of `sticky`; the newest version takes the top end. When
    its weight grows, those who had it keep it. Without `sticky`: the larger weight, of equals the
    older.
    """
    ordered = sorted(targets, key=lambda target: target.version)
    if sticky is None:
        return max(ordered, key=lambda target: target.weight)
    digest = hashlib.sha256(sticky.encode("utf-8", "surrogatepass")).digest()
    # 53 bits, what a float holds: all of them below 1.
    point = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    edge = 0.0
    for target in ordered[:-1]:
        edge += target.weight
        if point < edge:
            return target
    return ordered[-1]


def unknown_name(catalogue: Catalogue, name: str) -> NotFound:
    """The error of a name that nothing has: the nearest ones, and how many there are."""
    names = catalogue.names()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif names:
        hint = f"there is {_listed(names)}"
    else:
        hint = "it is empty"
    return NotFound(f"{name!r} is not in the registry; {hint}", code="model_not_found")


def unknown_version(name: str, version: int, versions: Sequence[int]) -> NotFound:
    """The error of a version that a name does not have."""
    return NotFound(
        f"{name!r} has no version {version}; it has {_listed(versions)}", code="model_not_found"
    )


def _no_alias(catalogue: Catalogue, ref: Reference) -> NotFound:
    if not catalogue.versions(ref.name):
        return unknown_name(catalogue, ref.name)
    aliases = catalogue.alias_names(ref.name)
    return NotFound(
        f"{ref.name!r} has no alias {ref.alias!r}; it has {_listed(aliases) or 'none'}",
        code="model_not_found",
    )


def _listed(values: Sequence[object]) -> str:
    """`1, 2 and 3`, the last ones where there are many."""
    shown = [str(value) for value in values[-SHOWN:]]
    if len(shown) < len(values):
        shown.insert(0, f"{len(values) - len(shown)} others")
    *front, last = shown or [""]
    return f"{', '.join(front)} and {last}" if front else last
