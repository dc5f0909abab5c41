"""Alias logs: where `prod` and `canary` point, and pointed before.

An alias is a row of numbered entries that are only ever added, each by `put_if_absent`: two who
move it at once get two numbers, one after the other, and nothing is lost. The head, the entry with
the highest number, counts.
"""

from collections.abc import Sequence

from xc_ray.errors import InvalidRequest, NotFound, RegistryError
from xc_ray.registry.keys import ALIASES, alias_key, alias_of
from xc_ray.registry.manifest import AliasEntry, Target
from xc_ray.registry.records import read_entries, read_entry
from xc_ray.registry.reference import check_alias, check_name
from xc_ray.registry.store import ObjectStore

# Others who were faster, before one gives up: each of them did move the alias.
RACES = 1_000


class AliasLog:
    """The log of one alias of one name."""

    def __init__(self, store: ObjectStore, name: str, alias: str) -> None:
        self.store, self.name, self.alias = store, check_name(name), check_alias(alias)

    def numbers(self) -> list[int]:
        """Numbers of the entries, oldest first; empty where there is no such alias."""
        found = self.store.list(f"{ALIASES}/{self.name}/{self.alias}")
        return sorted(place[2] for one in found if (place := alias_of(one.key)))

    def entry(self, number: int) -> AliasEntry:
        """One entry.

        Raises:
            RegistryError: it is damaged or missing, or the store cannot be reached.
        """
        return read_entry(self.store, alias_key(self.name, self.alias, number))

    def head(self) -> AliasEntry | None:
        """The entry that counts; None where there is no such alias."""
        numbers = self.numbers()
        return self.entry(numbers[-1]) if numbers else None

    def entries(self) -> list[AliasEntry]:
        """All entries, oldest first.

        Raises:
            NotFound: there is no such alias.
            RegistryError: one is damaged, or the store cannot be reached.
        """
        keys = [alias_key(self.name, self.alias, number) for number in self.numbers()]
        if not keys:
            raise self._unknown()
        sound, problems = read_entries(self.store, keys)
        if problems:
            raise RegistryError("; ".join(problems.values()))
        return [sound[key] for key in keys]

    def promote(self, targets: Sequence[Target]) -> AliasEntry:
        """Adds an entry with these targets, behind whatever others add meanwhile."""
        for _ in range(RACES):
            number = (self.numbers() or [0])[-1] + 1
            entry = AliasEntry(
                name=self.name,
                alias=self.alias,
                number=number,
                targets=tuple(targets),
                action="promote",
            )
            if self._add(entry):
                return entry
        raise self._busy()

    def rollback(self) -> AliasEntry:
        """Adds an entry with the targets that the alias had before those it has.

        A rollback of a rollback goes further back. Two who roll back at once mean the same step:
        the second is refused, lest both be made.

        Raises:
            NotFound: there is no such alias.
            InvalidRequest: it never pointed elsewhere before, or was moved meanwhile.
            RegistryError: an entry on the way is damaged, or the store cannot be reached.
        """
        head = self.head()
        if head is None:
            raise self._unknown()
        before = self._before(head)
        entry = AliasEntry(
            name=self.name,
            alias=self.alias,
            number=head.number + 1,
            targets=before.targets,
            action="rollback",
            restores=before.number,
        )
        if not self._add(entry):
            raise InvalidRequest(
                f"alias {self.alias!r} of {self.name!r} was moved by somebody else just now; look "
                f"where it points (`xc-ray registry log {self.name}@{self.alias}`) and try again"
            )
        return entry

    def _before(self, head: AliasEntry) -> AliasEntry:
        """The newest promotion before the one that `head` is or restores, with other targets."""
        number = head.restores or head.number
        while number > 1:
            entry = self.entry(number - 1)
            # A rollback stands for the entry that it restored, and what came after is undone.
            number = entry.restores or entry.number
            if entry.targets != head.targets:
                return entry if entry.restores is None else self.entry(entry.restores)
        raise InvalidRequest(
            f"alias {self.alias!r} of {self.name!r} has pointed at "
            f"{_shown(head.targets)} from the start: there is nothing to roll back to; promote "
            "another version"
        )

    def _add(self, entry: AliasEntry) -> bool:
        key = alias_key(self.name, self.alias, entry.number)
        return self.store.put_if_absent(key, entry.to_bytes())

    def _unknown(self) -> NotFound:
        return NotFound(f"{self.name!r} has no alias {self.alias!r}", code="model_not_found")

    def _busy(self) -> RegistryError:
        return RegistryError(
            f"alias {self.alias!r} of {self.name!r} was moved {RACES} times by others while this "
            "tried to; try again"
        )


def alias_heads(store: ObjectStore, name: str | None = None) -> list[str]:
    """Keys of the newest entry of every alias, of one name or of all."""
    newest: dict[tuple[str, str], int] = {}
    for one in store.list(f"{ALIASES}/{name}" if name else ALIASES):
        if place := alias_of(one.key):
            found, alias, number = place
            newest[found, alias] = max(number, newest.get((found, alias), 0))
    return [alias_key(found, alias, number) for (found, alias), number in sorted(newest.items())]


def _shown(targets: Sequence[Target]) -> str:
    return " and ".join(f"version {target.version}" for target in targets)
