"""Deleting the blobs that no version names.

Beside running pushes this is safe without a lock, because of three rules. Versions are never
deleted, so that a named blob stays. A blob is deleted only if it was last written before the grace
period, seen by a second look just before its deletion. A push writes its manifest only when each of
its blobs is named by another version, or was written less than about a quarter of the default grace
period ago, and then is far too young (`upload.py`).

What is left is a push that finds an old blob just as gc has looked at it for the second time: it
sends it again, waits until a deletion on its way must have arrived, and looks once more.

Ages are the store's times against this machine's clock: the two may differ by hours, not by a day.
A grace period below a day is for when nobody publishes.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from xc_ray.errors import RegistryError
from xc_ray.registry.keys import BLOBS, VERSIONS, blob_of, version_of
from xc_ray.registry.records import READS_AT_ONCE, read_manifests
from xc_ray.registry.store import PROBES, Entry, Missing, ObjectStore

GRACE_S = 86_400.0
# Deletions between two looks at what the manifests name.
BATCH = 500


@dataclass(frozen=True)
class GcReport:
    """What gc deleted, or would delete in a dry run.

    `waiting` counts blobs that no version names and that are too young; `leftovers` are files of
    killed writers to a folder, `probes` objects of killed first writes.
    """

    blobs: tuple[str, ...]
    size: int
    waiting: int
    leftovers: tuple[Path, ...]
    probes: int
    dry_run: bool


def collect(store: ObjectStore, *, grace_s: float = GRACE_S, dry_run: bool = True) -> GcReport:
    """Deletes what no version names and is older than the grace period, in seconds.

    Raises:
        RegistryError: a manifest is damaged, so that nobody knows which blobs it names; or the
            store cannot be reached, or refuses.
    """
    before = datetime.now(UTC) - timedelta(seconds=grace_s)
    blobs = [one for one in store.list(BLOBS) if blob_of(one.key)]
    named = _named(store)
    unnamed = [one for one in blobs if blob_of(one.key) not in named]
    old = [one for one in unnamed if one.modified < before]
    leftovers = tuple(store.leftovers(before=before))
    probes = [one.key for one in store.list(PROBES) if one.modified < before]
    if not dry_run:
        old = _delete_blobs(store, old, before)
        store.delete(probes)
        for path in leftovers:
            path.unlink(missing_ok=True)
    return GcReport(
        blobs=tuple(one.key for one in old),
        size=sum(one.size for one in old),
        waiting=len(unnamed) - len(old),
        leftovers=leftovers,
        probes=len(probes),
        dry_run=dry_run,
    )


def _delete_blobs(store: ObjectStore, old: list[Entry], before: datetime) -> list[Entry]:
    def delete(one: Entry) -> bool:
        try:
            if store.entry(one.key).modified >= before:  # a push has sent it again
                return False
        except Missing:
            return False
        store.delete([one.key])
        return True

    deleted: list[Entry] = []
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        for start in range(0, len(old), BATCH):
            # Many deletions take time, in which a push may have named what was old and unnamed.
            named = _named(store)
            batch = [one for one in old[start : start + BATCH] if blob_of(one.key) not in named]
            gone = pool.map(delete, batch)
            deleted.extend(one for one, done in zip(batch, gone, strict=True) if done)
    return deleted


def _named(store: ObjectStore) -> set[str]:
    keys = [one.key for one in store.list(VERSIONS)]
    foreign = [key for key in keys if not version_of(key)]
    manifests, problems = read_manifests(store, [key for key in keys if version_of(key)])
    if foreign or problems:
        what = "; ".join(
            [*(f"'{key}' is no key of a manifest" for key in foreign), *problems.values()]
        )
        raise RegistryError(
            f"gc deletes nothing while it cannot tell which blobs are in use: {what[:2000]}"
        )
    return {file.sha256 for found in manifests.values() for file in found.files}
