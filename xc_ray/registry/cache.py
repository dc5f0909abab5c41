"""The node-local cache: a version's files on this machine's disk, checked, and shared by processes.

`fetch` gives a folder that holds exactly the manifest's files. Each blob is downloaded once,
however many processes and versions ask for it, hashed on the way, and appears under its name only
when it is whole and on the disk. At later use a blob is trusted while its stamp fits (see
`cache_files.py`); what does not fit is read whole, and moved to quarantine and fetched again if its
digest is another. While its Lease is open a folder is not evicted.

Locks are taken in the order lease (shared), build, blob, room; what is evicted is only tried.
"""

import contextlib
import os
from pathlib import Path

from xc_ray.errors import RegistryError
from xc_ray.registry.cache_files import CacheFiles, remove, walk
from xc_ray.registry.fill import Fill, Progress
from xc_ray.registry.lock import Lock
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.room import Room
from xc_ray.registry.store import ObjectStore

# One connection to S3 gives some 90 MB/s: 16 of them pass 1 GB/s.
PARALLEL = 16
PART_BYTES = 8 << 20


class Lease:
    """A model's folder, which stays while this is open: until `close`, or the process ends.

    One that is dropped unclosed holds on until the process ends: who kept the path only is safe.
    """

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder = folder
        self._lock = lock

    def close(self) -> None:
        """Gives the folder back: it may be evicted from now on. A second time does nothing."""
        if self._lock.held:
            _use(self.folder)  # a model that ran for days was used just now
            self._lock.close()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalCache:
    """The cache in one folder, for any number of threads and processes; see the module.

    `max_bytes` None is no limit. `parallel` ranges of `part_bytes` are read at once; about twice
    that much memory is used while something is fetched.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int | None = None,
        *,
        parallel: int = PARALLEL,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._files = CacheFiles(folder.absolute())
        self._room = Room(self._files, max_bytes)
        self._parallel = parallel
        self._part_bytes = part_bytes

    def fetch(
        self,
        store: ObjectStore,
        manifest: Manifest,
        progress: Progress | None = None,
        *,
        verify: bool = False,
    ) -> Lease:
        """The folder of a version, complete and checked, downloaded where something is missing.

        `progress(path, done, total)` counts bytes of all files together. `verify` reads every byte
        again, whatever the stamps say.

        Raises:
            Missing: the store lacks a blob.
            RegistryError: the store fails or gives other bytes than the manifest says, or the disk
                or the cache's limit has no room for them. What is whole by then stays for the next
                attempt.
        """
        name = manifest.digest.removeprefix("sha256:")
        try:
            self._files.create()
            lock = self._files.lock(name, "lease", shared=True)
            try:
                folder = self._files.models / name
                if verify or not self._is_complete(folder, manifest):
                    with self._files.lock(name, "build"):
                        if verify or not self._is_complete(folder, manifest):
                            fill = Fill(self._files, self._room, store, manifest, progress)
                            self._build(folder, fill, manifest, verify)
                _use(folder)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise RegistryError(f"cache {self._files.folder} cannot be used: {error}") from error
        return Lease(folder, lock)

    def shrink(self, to_bytes: int) -> int:
        """Evicts, the longest unused first, until `to_bytes` are used or all is leased.

        Returns the bytes then used.
        """
        self._files.create()
        return self._room.shrink(to_bytes)

    def used_bytes(self) -> int:
        """Bytes of the cache, quarantine and what is being fetched included."""
        self._files.create()
        return self._room.used()

    def _is_complete(self, folder: Path, manifest: Manifest) -> bool:
        if not _is_folder(folder):
            return False
        if {path for path, _ in walk(folder)} != {entry.path for entry in manifest.files}:
            return False
        return all(
            self._files.is_linked(entry.sha256, folder / entry.path)
            and self._files.is_sound(folder / entry.path, entry.sha256, entry.size)
            for entry in manifest.files
        )

    def _build(self, folder: Path, fill: Fill, manifest: Manifest, verify: bool) -> None:
        """Builds the folder beside its place and moves it there, or mends the one that is there."""

        def fill_in(place: Path) -> None:
            fill.run(place, verify=verify, parallel=self._parallel, part_bytes=self._part_bytes)

        if os.path.lexists(folder) and not _is_folder(folder):
            self._files.quarantine(folder, "is no folder")
        if folder.exists():
            # File by file: another process may be reading it.
            self._clear_strays(folder, manifest)
            fill_in(folder)
            return
        staging = self._files.tmp / f"{folder.name}.folder"
        remove(staging)  # of a process that died
        try:
            staging.mkdir()
            fill_in(staging)
            staging.rename(folder)
        except BaseException:
            remove(staging)
            raise

    def _clear_strays(self, folder: Path, manifest: Manifest) -> None:
        """Quarantines what is no file of the manifest, or stands where one or its folder goes."""
        expected = {entry.path for entry in manifest.files}
        for path, entry in list(walk(folder)):
            if path not in expected:
                self._files.quarantine(Path(entry.path), "does not belong to the model")
        for path in expected:
            if _is_folder(folder / path):
                self._files.quarantine(folder / path, "is a folder in the place of a file")


def _use(folder: Path) -> None:
    """Notes the last use, by which eviction goes."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(folder)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
