"""Room in the cache: what goes when its limit would be exceeded, and what never goes.

In this order: what dead processes left, quarantined files, blobs that no model holds, and then
whole models, the one that was used longest ago first. A model with a lease, and whatever is being
fetched, is locked and stays. One process at a time counts and removes (the lock `room`), and what
it makes room for counts from then on: a temporary file has its full size from the beginning.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xc_ray.errors import RegistryError
from xc_ray.registry.cache_files import CacheFiles, remove, walk
from xc_ray.registry.lock import Lock

logger = logging.getLogger(__name__)

GIB = 1 << 30


@dataclass(frozen=True)
class Room:
    """The limit of one cache folder; `max_bytes` None is no limit."""

    files: CacheFiles
    max_bytes: int | None

    @contextlib.contextmanager
    def reserved(self, size: int, keep: frozenset[str]) -> Iterator[None]:
        """Makes room for `size` bytes; until the block ends nobody else counts or takes it.

        `keep` are the blobs that the caller still wants, though no model may hold them yet.

        Raises:
            RegistryError: what is in use leaves less room than that.
        """
        if self.max_bytes is None:
            yield
            return
        with Lock.take(self.files.locks / "room"):
            used = self._shrink(self.max_bytes - size, keep)
            if used > self.max_bytes - size:
                raise RegistryError(
                    f"cache {self.files.folder} may hold {shown(self.max_bytes)}: {shown(used)} "
                    f"are in use and {shown(size)} more are needed; raise its limit, or stop a "
                    "process that holds another model"
                )
            yield

    def shrink(self, to_bytes: int) -> int:
        """Removes what may go until at most `to_bytes` are used; returns the bytes then used."""
        with Lock.take(self.files.locks / "room"):
            return self._shrink(to_bytes, frozenset())

    def used(self) -> int:
        """Bytes of the cache: blobs, files under way, and quarantine; a linked file counts once."""
        found: dict[int, int] = {}
        files = self.files
        for folder in (files.blobs, files.tmp, files.quarantined, files.models):
            with contextlib.suppress(FileNotFoundError):  # somebody removes it right now
                for _, entry in walk(folder):
                    at = entry.stat(follow_symlinks=False)
                    found[at.st_ino] = at.st_size
        return sum(found.values())

    def _shrink(self, target: int, keep: frozenset[str]) -> int:
        steps: tuple[tuple[Path, Callable[[Path, frozenset[str]], None]], ...] = (
            (self.files.tmp, self._drop_leftover),
            (self.files.quarantined, self._drop_quarantined),
            (self.files.blobs, self._drop_blob),
            (self.files.models, self._drop_model),
        )
        for folder, drop in steps:
            for path in _by_time(folder):
                used = self.used()
                if used <= target:
                    return used
                drop(path, keep)
        return self.used()

    def _drop_leftover(self, path: Path, _: frozenset[str]) -> None:
        kind = "build" if path.suffix == ".folder" else "blob"
        lock = self.files.try_lock(path.stem, kind)
        if lock is not None:
            remove(path)
            lock.remove()

    def _drop_quarantined(self, path: Path, _: frozenset[str]) -> None:
        logger.info("cache: %s removed for room", path)
        remove(path)

    def _drop_blob(self, path: Path, keep: frozenset[str]) -> None:
        if path.name in keep or _links(path) != 1:
            return
        lock = self.files.try_lock(path.name, "blob")
        if lock is None:
            return
        if _links(path) == 1:  # under the lock nobody is about to link it
            path.unlink()
            (self.files.stamps / path.name).unlink(missing_ok=True)
        lock.remove()

    def _drop_model(self, path: Path, keep: frozenset[str]) -> None:
        lease = self.files.try_lock(path.name, "lease")
        if lease is None:
            return
        held = {entry.inode() for _, entry in walk(path)} if path.is_dir() else set[int]()
        # Out of sight at once, then file by file.
        trash = self.files.tmp / f"{path.name}.folder"
        remove(trash)
        path.rename(trash)
        remove(trash)
        for blob in self.files.blobs.iterdir():
            if os.lstat(blob).st_ino in held:
                self._drop_blob(blob, keep)
        logger.info("cache: model %s removed for room", path.name[:12])
        # Whoever builds holds the lease too, so that nobody holds this one.
        (self.files.locks / f"{path.name}.build").unlink(missing_ok=True)
        lease.remove()


def _by_time(folder: Path) -> list[Path]:
    """What is in a folder, the one that was written to longest ago first."""
    times: list[tuple[int, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append((os.lstat(path).st_mtime_ns, path))
    return [path for _, path in sorted(times)]


def _links(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path).st_nlink
    return 0


def shown(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size} bytes"
