"""What lies in the cache's folder, and how a file in it is known to be sound.

    blobs/<sha256>            the bytes, once each, read-only
    stamps/<sha256>           size, mtime and inode of that blob when its SHA-256 was last computed
    models/<digest>/…         the files of a version under their names: hard links to blobs
    quarantine/…              damaged files, for a look at them; the first to go when room is needed
    tmp/<name>.blob, .folder  what is being fetched, built or removed
    locks/<name>.blob, .build, .lease

A name in tmp belongs to whoever holds the lock of the same name (for `.folder` that is `.build`):
what lies there and is not locked was left by a process that died, and is nobody's.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from xc_ray.errors import RegistryError
from xc_ray.registry.lock import Lock

logger = logging.getLogger(__name__)

FOLDERS = ("blobs", "stamps", "models", "quarantine", "tmp", "locks")
SECOND_NS = 10**9


class CacheFiles:
    """The paths of one cache folder, and the checks and moves of single files in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "blobs"
        self.stamps = folder / "stamps"
        self.models = folder / "models"
        self.quarantined = folder / "quarantine"
        self.tmp = folder / "tmp"
        self.locks = folder / "locks"

    def create(self) -> None:
        """Makes the folders that are missing."""
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def lock(self, name: str, kind: str, *, shared: bool = False) -> Lock:
        """Waits for a lock of a blob or a model; says so in the log when it has to wait."""
        path = self.locks / f"{name}.{kind}"
        if not shared:
            lock = Lock.try_take(path)
            if lock is not None:
                return lock
            logger.info("%s.%s is in use by another process or thread: waiting", name[:12], kind)
        return Lock.take(path, shared=shared)

    def try_lock(self, name: str, kind: str) -> Lock | None:
        """The lock, if nobody holds it."""
        return Lock.try_take(self.locks / f"{name}.{kind}")

    def is_sound(self, path: Path, sha256: str, size: int) -> bool:
        """Whether the file is the one whose digest was computed before, by its stamp.

        Change its bytes by any ordinary way, and its time or inode is another. What changes below
        the file system is seen by a full hash only (`check`).
        """
        try:
            found = os.lstat(path)
            recorded = (self.stamps / sha256).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == size and _stamp(found) == recorded

    def check(self, path: Path, sha256: str, size: int, *, full: bool) -> bool:
        """Whether the file holds the bytes of this digest, read whole unless its stamp says so."""
        if not full and self.is_sound(path, sha256, size):
            return True
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return False
            age(path)  # before the bytes are read: a write from now on changes the time
            before = os.lstat(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256 or _stamp(os.lstat(path)) != _stamp(before):
                return False
        except FileNotFoundError:
            return False
        self.stamp(path, sha256)
        return True

    def stamp(self, path: Path, sha256: str) -> None:
        """Records that this file has this digest; under the blob's lock."""
        temp = self.tmp / f"{sha256}.stamp"
        temp.write_bytes(_stamp(os.lstat(path)))
        temp.replace(self.stamps / sha256)

    def quarantine(self, path: Path, why: str) -> None:
        """Moves a file or folder out of the way, and says so in the log."""
        target = self.quarantined / f"{path.name}.{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(target)
            logger.warning("%s %s: moved to %s", path, why, target)

    def link(self, sha256: str, target: Path) -> None:
        """Makes `target` a hard link of a blob, over whatever file is there; under its lock.

        Raises:
            RegistryError: the file system has no hard links, or none left for this file.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = self.tmp / f"{sha256}.link"
        temp.unlink(missing_ok=True)
        try:
            os.link(self.blobs / sha256, temp)
        except OSError as error:
            raise RegistryError(
                f"cache {self.folder} cannot hard-link its files ({error.strerror}); put it on a "
                "file system of this machine that has hard links"
            ) from error
        temp.replace(target)

    def is_linked(self, sha256: str, target: Path) -> bool:
        """Whether `target` is the blob itself."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(os.lstat(self.blobs / sha256), os.lstat(target))
        return False


def age(path: Path | int) -> None:
    """Sets a file's time a second back.

    The system's clock for files ticks in milliseconds: a write right after ours could leave the
    same time behind. No write leaves one in the past.
    """
    now = time.time_ns()
    os.utime(path, ns=(now, now - SECOND_NS))


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below a folder by its relative path; links are files, and are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _stamp(found: os.stat_result) -> bytes:
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}".encode()
