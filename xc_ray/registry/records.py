"""Reading the sealed records: each checked, and checked to stand where it says it does."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from xc_ray.errors import RegistryError
from xc_ray.registry.keys import alias_of, version_of
from xc_ray.registry.manifest import AliasEntry, Manifest
from xc_ray.registry.sealed import damaged
from xc_ray.registry.store import Missing, ObjectStore

# Reads at once: a record is small, so that what counts is the way there and back.
READS_AT_ONCE = 16

Record = TypeVar("Record", Manifest, AliasEntry)


class Damaged(RegistryError):
    """One record cannot be used; the store itself answers."""


def read_manifest(store: ObjectStore, key: str) -> Manifest:
    """The manifest under a key.

    Raises:
        Missing: there is none.
        Damaged: it is not as it was written, or written under another key.
        RegistryError: the store cannot be reached, or refuses.
    """
    where = f"manifest '{key}' in {store.location.place}"
    found = _read(store, key, where, Manifest)
    if (found.name, found.version) != version_of(key):
        raise Damaged(damaged(where, f"it is the one of {found.name}@{found.version}").message)
    return found


def read_entry(store: ObjectStore, key: str) -> AliasEntry:
    """The alias entry under a key; errors as of `read_manifest`."""
    where = f"alias entry '{key}' in {store.location.place}"
    found = _read(store, key, where, AliasEntry)
    if (found.name, found.alias, found.number) != alias_of(key):
        own = f"{found.name}@{found.alias}, number {found.number}"
        raise Damaged(damaged(where, f"it is the one of {own}").message)
    return found


def read_manifests(
    store: ObjectStore, keys: Sequence[str]
) -> tuple[Mapping[str, Manifest], Mapping[str, str]]:
    """The manifests under many keys, and a sentence for each key whose one cannot be used.

    Raises:
        RegistryError: the store cannot be reached, or refuses.
    """
    return _many(keys, lambda key: read_manifest(store, key))


def read_entries(
    store: ObjectStore, keys: Sequence[str]
) -> tuple[Mapping[str, AliasEntry], Mapping[str, str]]:
    """The alias entries under many keys, as `read_manifests` gives manifests."""
    return _many(keys, lambda key: read_entry(store, key))


def _read(store: ObjectStore, key: str, where: str, kind: type[Record]) -> Record:
    data = store.get(key)
    try:
        return kind.from_bytes(data, where)
    except RegistryError as error:
        raise Damaged(error.message) from error


def _many(
    keys: Sequence[str], read: Callable[[str], Record]
) -> tuple[dict[str, Record], dict[str, str]]:
    def one(key: str) -> Record | str:
        try:
            return read(key)
        except (Missing, Damaged) as error:
            return error.message

    sound: dict[str, Record] = {}
    problems: dict[str, str] = {}
    if not keys:
        return sound, problems
    with ThreadPoolExecutor(min(READS_AT_ONCE, len(keys))) as pool:
        for key, found in zip(keys, pool.map(one, keys), strict=True):
            if isinstance(found, str):
                problems[key] = found
            else:
                sound[key] = found
    return sound, problems
