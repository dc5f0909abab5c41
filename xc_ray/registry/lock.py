"""A lock between processes and threads: flock on a file, which the system frees with its holder.

Whoever dies, by kill -9 too, holds nothing any more. A lock file may be removed by whoever holds it
alone: those who wait for it notice that they wait for a file of yesterday, and begin again.
"""

import contextlib
import fcntl
import os
from pathlib import Path


class Lock:
    """A held lock; it ends with `close`, or with the process."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle

    @classmethod
    def take(cls, path: Path, *, shared: bool = False) -> "Lock":
        """Waits for the lock: alone, or with any number of others who share it."""
        lock = _take(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        assert lock is not None  # it waited
        return lock

    @classmethod
    def try_take(cls, path: Path) -> "Lock | None":
        """The lock, alone and at once, or None where somebody holds it."""
        return _take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def held(self) -> bool:
        """Whether it was not given back yet."""
        return self._handle is not None

    def close(self) -> None:
        """Gives it back; a second time does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def remove(self) -> None:
        """Removes the file and gives the lock back; only for who holds it alone."""
        self.path.unlink(missing_ok=True)
        self.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take(path: Path, operation: int) -> Lock | None:
    while True:
        # Written to, though nothing is ever written: NFS gives exclusive locks on such files only.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, operation)
            if _names(path, handle):
                return Lock(path, handle)
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed while we waited


def _names(path: Path, handle: int) -> bool:
    """Whether the path still leads to the file of this handle."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(handle))
    return False
