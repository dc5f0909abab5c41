"""All of a registry at one moment, for those who watch it: two listings and what is new in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from xc_ray.errors import RegistryError
from xc_ray.registry.aliases import alias_heads
from xc_ray.registry.keys import VERSIONS, alias_key, alias_of, version_key, version_of
from xc_ray.registry.manifest import AliasEntry, Manifest
from xc_ray.registry.records import read_entries, read_manifests
from xc_ray.registry.reference import Reference
from xc_ray.registry.resolve import resolve
from xc_ray.registry.store import ObjectStore


@dataclass(frozen=True)
class Snapshot:
    """Every sound manifest by (name, version), every alias's head by (name, alias).

    A record that cannot be used is not among them, and `problems` has a sentence for it. An alias
    whose newest entry cannot be used keeps the head that it had in the snapshot before.
    """

    manifests: Mapping[tuple[str, int], Manifest] = field(default_factory=dict)
    aliases: Mapping[tuple[str, str], AliasEntry] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    damaged: Mapping[str, str] = field(default_factory=dict, repr=False)  # key -> sentence

    def resolve(self, ref: Reference | str, *, sticky: str | None = None) -> Manifest:
        """The version that a reference means (rules and errors: `resolve.resolve`)."""
        return resolve(self, Reference.parse(ref) if isinstance(ref, str) else ref, sticky)

    def names(self) -> list[str]:
        """Every name with a sound version, sorted."""
        return sorted(self._versions)

    def versions(self, name: str) -> list[int]:
        """Its sound versions, oldest first; empty if the name is unknown."""
        return list(self._versions.get(name, ()))

    def manifest(self, name: str, version: int) -> Manifest:
        """One version.

        Raises:
            RegistryError: it is damaged, or there is none.
        """
        found = self.manifests.get((name, version))
        if found is None:
            key = version_key(name, version)
            raise RegistryError(self.damaged.get(key, f"there is no manifest '{key}'"))
        return found

    def alias_names(self, name: str) -> list[str]:
        """Its aliases, sorted."""
        return sorted(alias for owner, alias in self.aliases if owner == name)

    def head(self, name: str, alias: str) -> AliasEntry | None:
        """Where an alias points; None if there is no such alias.

        Raises:
            RegistryError: its newest entry is damaged, and no earlier snapshot knew an older one.
        """
        found = self.aliases.get((name, alias))
        if found is None:
            for key, problem in self.damaged.items():
                if (alias_of(key) or ())[:2] == (name, alias):
                    raise RegistryError(problem)
        return found

    @cached_property
    def _versions(self) -> dict[str, list[int]]:
        grouped: dict[str, list[int]] = {}
        for name, version in sorted(self.manifests):
            grouped.setdefault(name, []).append(version)
        return grouped


def take_snapshot(store: ObjectStore, previous: Snapshot | None = None) -> Snapshot:
    """What the store holds now; records that `previous` has are not read again.

    Raises:
        RegistryError: the store cannot be reached, or refuses.
    """
    old = previous or Snapshot()
    # Aliases first: whatever they point at is then among the versions, which were there before.
    heads = alias_heads(store)
    versions = [one.key for one in store.list(VERSIONS) if version_of(one.key)]
    known_entries = {alias_key(*place, entry.number): entry for place, entry in old.aliases.items()}
    known_manifests = {version_key(*place): found for place, found in old.manifests.items()}
    new_entries, bad_entries = read_entries(
        store, [key for key in heads if key not in known_entries]
    )
    new_manifests, bad_manifests = read_manifests(
        store, [key for key in versions if key not in known_manifests]
    )
    aliases = {}
    for key in heads:
        name, alias, _ = alias_of(key) or ("", "", 0)
        entry = known_entries.get(key) or new_entries.get(key) or old.aliases.get((name, alias))
        if entry is not None:
            aliases[name, alias] = entry
    manifests = {}
    for key in versions:
        manifest = known_manifests.get(key) or new_manifests.get(key)
        if manifest is not None:
            manifests[manifest.name, manifest.version] = manifest
    damaged = {**bad_manifests, **bad_entries}
    return Snapshot(manifests, aliases, tuple(damaged.values()), damaged)
