"""Reading everything, and saying in sentences what is not as it was written."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from xc_ray.registry.keys import (
    ALIASES,
    BLOBS,
    VERSIONS,
    alias_key,
    alias_of,
    blob_key,
    blob_of,
    version_key,
    version_of,
)
from xc_ray.registry.manifest import AliasEntry, Manifest
from xc_ray.registry.records import read_entries, read_manifests
from xc_ray.registry.store import Missing, ObjectStore

# Bytes of one read, and blobs at once: 64 MiB in memory.
READ_BYTES = 16 << 20
BLOBS_AT_ONCE = 4

Progress = Callable[[str, int, int], None]


def verify(
    store: ObjectStore, names: Sequence[str] | None = None, progress: Progress | None = None
) -> list[str]:
    """Checks manifests, alias logs and every blob's digest; of some names, or of all.

    With `names` left out the blobs that no version names are read too: a push would rely on them.
    `progress(key, done, total)` counts bytes of the blobs. A sound registry gives no sentence.

    Raises:
        RegistryError: the store cannot be reached, or refuses.
    """
    manifests, problems = _manifests(store, names)
    problems += _logs(store, names, manifests)
    users: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for found in manifests:
        for file in found.files:
            users.setdefault(file.sha256, []).append(f"{found.name}@{found.version} {file.path}")
            sizes[file.sha256] = file.size
    if names is None:
        for one in store.list(BLOBS):
            sha256 = blob_of(one.key)
            if sha256 is None:
                problems.append(f"'{one.key}' in {store.location.place} is no key of a blob")
            elif sha256 not in sizes:
                sizes[sha256] = one.size
    return problems + _blobs(store, sizes, users, progress)


def _manifests(store: ObjectStore, names: Sequence[str] | None) -> tuple[list[Manifest], list[str]]:
    keys, problems = _keys(store, VERSIONS, names, lambda key: version_of(key) is not None)
    sound, damaged = read_manifests(store, keys)
    numbers: dict[str, list[int]] = {}
    for key in keys:
        if place := version_of(key):
            numbers.setdefault(place[0], []).append(place[1])
    gaps = [
        f"there is no '{version_key(name, gap)}' in {store.location.place}, but a later version"
        for name, found in numbers.items()
        for gap in _gaps(found)
    ]
    return list(sound.values()), [*problems, *damaged.values(), *gaps]


def _logs(store: ObjectStore, names: Sequence[str] | None, manifests: list[Manifest]) -> list[str]:
    keys, problems = _keys(store, ALIASES, names, lambda key: alias_of(key) is not None)
    sound, damaged = read_entries(store, keys)
    problems += damaged.values()
    numbers: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        if place := alias_of(key):
            numbers.setdefault(place[:2], []).append(place[2])
    for (name, alias), found in numbers.items():
        problems += (
            f"there is no '{alias_key(name, alias, gap)}' in {store.location.place}, "
            "but a later entry"
            for gap in _gaps(found)
        )
    there = {(found.name, found.version) for found in manifests}
    for key, entry in sound.items():
        problems += _entry(store, key, entry, there, sound)
    return problems


def _entry(
    store: ObjectStore,
    key: str,
    entry: AliasEntry,
    there: set[tuple[str, int]],
    entries: Mapping[str, AliasEntry],
) -> Iterator[str]:
    for target in entry.targets:
        if (entry.name, target.version) not in there:
            yield (
                f"alias entry '{key}' in {store.location.place} points at {entry.name}@"
                f"{target.version}, which is missing or damaged"
            )
    if entry.restores is not None:
        before = entries.get(alias_key(entry.name, entry.alias, entry.restores))
        if before is None or before.targets != entry.targets:
            yield (
                f"alias entry '{key}' in {store.location.place} restores entry {entry.restores}, "
                "which is missing, damaged or points elsewhere"
            )


def _blobs(
    store: ObjectStore,
    sizes: dict[str, int],
    users: dict[str, list[str]],
    progress: Progress | None,
) -> list[str]:
    total, done = sum(sizes.values()), 0
    problems = []
    with ThreadPoolExecutor(BLOBS_AT_ONCE) as pool:
        found = pool.map(lambda one: check_blob(store, one[0], one[1]), sizes.items())
        for (sha256, size), problem in zip(sizes.items(), found, strict=True):
            done += size
            if progress is not None:
                progress(blob_key(sha256), done, total)
            if problem is not None:
                of = "; ".join(users.get(sha256, ["no version"])[:5])
                problems.append(f"{problem}, needed by {of}")
    return problems


def check_blob(store: ObjectStore, sha256: str, size: int) -> str | None:
    """What is wrong with a blob, or None.

    Raises:
        RegistryError: the store cannot be reached, or refuses.
    """
    key = blob_key(sha256)
    where = f"blob '{key}' in {store.location.place}"
    try:
        held = store.entry(key).size
        if held != size:
            return f"{where} has {held} bytes instead of {size}"
        digest = hashlib.sha256()
        for start in range(0, size, READ_BYTES):
            digest.update(store.get_range(key, start, min(start + READ_BYTES, size)))
    except Missing:
        return f"{where} is missing"
    if digest.hexdigest() != sha256:
        return f"{where} is damaged: its sha256 is {digest.hexdigest()}"
    return None


def _keys(
    store: ObjectStore, room: str, names: Sequence[str] | None, known: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    rooms = [room] if names is None else [f"{room}/{name}" for name in names]
    keys = [one.key for place in rooms for one in store.list(place)]
    foreign = [
        f"'{key}' in {store.location.place} is no key of ours" for key in keys if not known(key)
    ]
    return [key for key in keys if known(key)], foreign


def _gaps(numbers: list[int]) -> list[int]:
    return sorted(set(range(1, max(numbers) + 1)) - set(numbers))
