"""A version's blobs brought into the cache and linked into a folder, several files at once.

A blob is checked or downloaded, and linked, under its lock: of all processes that want it one
downloads, and no eviction comes between its check and its link. A download goes to a temporary
file; its digest is compared, it is flushed to the disk, and only then it gets the blob's name.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

from xc_ray.errors import RegistryError
from xc_ray.registry.cache_files import CacheFiles, age
from xc_ray.registry.download import Stopped, Transfer, source_of
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import FileEntry, Manifest
from xc_ray.registry.room import Room, shown
from xc_ray.registry.store import ObjectStore

logger = logging.getLogger(__name__)

# Each file has one thread that hashes (0.5 to 1.8 GB/s).
FILES_AT_ONCE = 4
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}

Progress = Callable[[str, int, int], None]


class Fill:
    """One pass over the files of one version."""

    def __init__(
        self,
        files: CacheFiles,
        room: Room,
        store: ObjectStore,
        manifest: Manifest,
        progress: Progress | None,
    ) -> None:
        self._files = files
        self._room = room
        self._store = store
        self._manifest = manifest
        self._progress = progress
        self._telling = threading.Lock()
        self._wanted = frozenset(entry.sha256 for entry in manifest.files)
        self._done = 0  # bytes that are here, of all files
        self._downloaded = 0

    def run(self, folder: Path, *, verify: bool, parallel: int, part_bytes: int) -> None:
        """Links every file of the version into `folder`; reads sound blobs whole if told to.

        Raises:
            RegistryError: the store fails or lies, or there is no room.
            OSError: the cache folder cannot be written.
        """
        started = time.monotonic()
        # Largest first, so that no long one is left over for the end.
        entries = sorted(self._manifest.files, key=lambda entry: -entry.size)
        self._make_room_for_all()
        at_once = min(FILES_AT_ONCE, len(entries))
        with ThreadPoolExecutor(at_once) as workers, ThreadPoolExecutor(parallel) as pool:
            stop = threading.Event()
            # Enough ranges for each file to keep the pool busy while the first is hashed.
            transfer = Transfer(pool, -(-parallel // at_once) + 1, part_bytes, stop)
            jobs = [
                workers.submit(self._place, entry, folder / entry.path, transfer, verify)
                for entry in entries
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                stop.set()
                for job in jobs:
                    job.cancel()
                raise
        if self._downloaded:
            took = time.monotonic() - started
            logger.info(
                "cache: %s@%d from %s: %s in %.1f s (%.2f GB/s)",
                self._manifest.name,
                self._manifest.version,
                self._store.location.place,
                shown(self._downloaded),
                took,
                self._downloaded / took / 1e9,
            )

    def _make_room_for_all(self) -> None:
        """Refuses what cannot fit before anything is downloaded, or evicted for it in vain."""
        sizes = {entry.sha256: entry.size for entry in self._manifest.files}
        total = sum(sizes.values())
        limit = self._room.max_bytes
        if limit is not None and total > limit:
            raise RegistryError(
                f"{self._manifest.name}@{self._manifest.version} takes {shown(total)}, the cache "
                f"{self._files.folder} may hold {shown(limit)}; raise its limit"
            )
        missing = sum(
            size for sha256, size in sizes.items() if not (self._files.blobs / sha256).exists()
        )
        with self._room.reserved(missing, self._wanted):
            pass
        free = shutil.disk_usage(self._files.folder).free
        if missing > free:
            raise RegistryError(
                f"{self._manifest.name}@{self._manifest.version} needs {shown(missing)} more, the "
                f"disk of the cache {self._files.folder} has {shown(free)} free; make room there, "
                "or give the cache a limit and it will evict"
            )

    def _place(self, entry: FileEntry, target: Path, transfer: Transfer, verify: bool) -> None:
        if transfer.stop.is_set():
            raise Stopped
        blob = self._files.blobs / entry.sha256
        with self._files.lock(entry.sha256, "blob"):
            if self._files.check(blob, entry.sha256, entry.size, full=verify):
                self._tell(entry, entry.size)
            else:
                # From the folder too: no file is better than a wrong one, and its room is free.
                target.unlink(missing_ok=True)
                self._files.quarantine(blob, "is damaged")
                self._download(entry, blob, transfer)
            if not self._files.is_linked(entry.sha256, target):
                self._files.link(entry.sha256, target)

    def _download(self, entry: FileEntry, blob: Path, transfer: Transfer) -> None:
        temp = self._files.tmp / f"{entry.sha256}.blob"
        temp.unlink(missing_ok=True)  # of a process that died
        try:
            with ExitStack() as closing:
                with self._room.reserved(entry.size, self._wanted):
                    handle = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    closing.callback(os.close, handle)
                    os.ftruncate(handle, entry.size)
                self._receive(entry, handle, transfer)
            temp.rename(blob)
            self._files.stamp(blob, entry.sha256)
        except OSError as error:
            raise self._unwritten(entry, error) from error
        finally:
            temp.unlink(missing_ok=True)
        with self._telling:
            self._downloaded += entry.size

    def _receive(self, entry: FileEntry, handle: int, transfer: Transfer) -> None:
        key = blob_key(entry.sha256)
        source = source_of(self._store, key)
        try:
            found = transfer.run(source, entry.size, handle, lambda count: self._tell(entry, count))
        finally:
            source.close()
        if found != entry.sha256:
            raise RegistryError(
                f"{entry.path} ('{key}' in {self._store.location.place}) came with SHA-256 "
                f"{found}: it is damaged in the store or on the way; run `xc-ray registry verify`, "
                "and push it again if the store's copy is bad"
            )
        os.fchmod(handle, 0o444)  # whoever edits a model's file edits a copy
        age(handle)
        os.fsync(handle)

    def _unwritten(self, entry: FileEntry, error: OSError) -> RegistryError:
        advice = "check the disk"
        if error.errno in _NO_ROOM:
            free = shutil.disk_usage(self._files.folder).free
            advice = f"the disk has {shown(free)} free: make room there, or lower the cache's limit"
        elif error.errno == errno.EFBIG:
            advice = "neither the file system nor `ulimit -f` may forbid files of this size"
        return RegistryError(
            f"cannot write {entry.path} ({shown(entry.size)}) to the cache {self._files.folder}: "
            f"{error.strerror or error}; {advice}"
        )

    def _tell(self, entry: FileEntry, count: int) -> None:
        with self._telling:
            self._done += count
            if self._progress is not None:
                self._progress(entry.path, self._done, self._manifest.size)
