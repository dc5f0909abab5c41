"""One object of a store into an open file: ranges in parallel, hashed in order as they arrive.

The ranges of all files that are under way share one pool. Each worker reads a range and writes it
to its place; the thread of the file takes the ranges in order and hashes them, so that SHA-256
(about 1.8 GB/s a core with SHA instructions, 0.5 without) runs beside the transfer and the bytes
are never read back. In memory are at most `parallel` + 2 × files ranges.

A store in a folder is copied by the kernel (`copy_file_range`), which shares the blocks instead
where the file system can (XFS, Btrfs): no byte is written then, and either file may be changed
without the other. A hard link would be as fast everywhere, but then an edit of the cached file
would edit the registry's own.
"""

import errno
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Protocol

from xc_ray.errors import RegistryError
from xc_ray.registry.store import Missing, ObjectStore

logger = logging.getLogger(__name__)

# The store repeats a request that was not answered, but not one whose answer broke off: of the two
# thousand ranges of a large model one may.
ATTEMPTS = 3
PAUSE_S = 0.2
# What copy_file_range says where it cannot help: another file system, or one without the call.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


class Stopped(Exception):
    """Another file of the same fetch failed; this one was given up."""


class Source(Protocol):
    """Where the bytes of one object come from."""

    def part(self, start: int, stop: int, target: int) -> bytes:
        """Puts the bytes `start` to `stop` at their place in the file `target`; returns them."""

    def close(self) -> None:
        """Frees what it holds."""


@dataclass(frozen=True)
class Transfer:
    """What the files of one fetch share: a pool of `parallel` workers, and the word to stop."""

    pool: ThreadPoolExecutor
    ahead: int  # ranges of one file under way
    part_bytes: int
    stop: Event

    def run(self, source: Source, size: int, target: int, arrived: Callable[[int], None]) -> str:
        """Writes `size` bytes of the source to the file; returns their SHA-256 in hex.

        Raises:
            RegistryError: the store does not give the bytes.
            OSError: the file does not take them.
            Stopped: `stop` was set.
        """
        digest = hashlib.sha256()
        parts = ((at, min(at + self.part_bytes, size)) for at in range(0, size, self.part_bytes))
        coming: deque[Future[bytes]] = deque()

        def order(count: int) -> None:
            for start, stop in islice(parts, count):
                coming.append(self.pool.submit(source.part, start, stop, target))

        try:
            order(self.ahead)
            while coming:
                if self.stop.is_set():
                    raise Stopped
                data = coming.popleft().result()
                order(1)
                digest.update(data)
                arrived(len(data))
        finally:
            # A worker that still writes must not outlive the file: its number may be another's.
            for future in coming:
                future.cancel()
            wait(coming)
        return digest.hexdigest()


def source_of(store: ObjectStore, key: str) -> Source:
    """Ranged reads of an object, or the kernel's copy where the store is a folder.

    Raises:
        Missing: a folder without this object; other stores say so at the first range.
        RegistryError: the object in the folder cannot be opened.
    """
    if store.location.scheme == "file":
        return _File(store, key)
    return _Ranges(store, key)


class _Ranges:
    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store = store
        self._key = key

    def part(self, start: int, stop: int, target: int) -> bytes:
        data = self._get(start, stop)
        write_at(target, data, start)
        return data

    def _get(self, start: int, stop: int) -> bytes:
        for attempt in range(1, ATTEMPTS):
            try:
                return self._store.get_range(self._key, start, stop)
            except Missing:
                raise
            except RegistryError as error:
                logger.info("attempt %d of %d: %s", attempt, ATTEMPTS, error)
                time.sleep(PAUSE_S * attempt)
        return self._store.get_range(self._key, start, stop)

    def close(self) -> None:
        pass


class _File:
    def __init__(self, store: ObjectStore, key: str) -> None:
        self._name = f"'{key}' in {store.location.place}"
        try:
            self._handle = os.open(Path(store.location.prefix, key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Missing(f"{store.location.place}: there is no '{key}'") from None
        except OSError as error:
            raise RegistryError(f"cannot read {self._name}: {error.strerror}") from error

    def part(self, start: int, stop: int, target: int) -> bytes:
        at = start
        try:
            while at < stop:
                copied = os.copy_file_range(self._handle, target, stop - at, at, at)
                if copied == 0:
                    raise self._short(at, stop)
                at += copied
            # What is hashed is what was stored.
            return _read_at(target, start, stop)
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
        try:
            data = _read_at(self._handle, start, stop)
        except OSError as error:
            raise RegistryError(f"cannot read {self._name}: {error.strerror}") from error
        if len(data) < stop - start:
            raise self._short(start + len(data), stop)
        write_at(target, data, start)
        return data

    def _short(self, size: int, wanted: int) -> RegistryError:
        return RegistryError(
            f"{self._name} ends after {size} bytes, where at least {wanted} are due: it is "
            "damaged; run `xc-ray registry verify` and push it again"
        )

    def close(self) -> None:
        os.close(self._handle)


def _read_at(handle: int, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`, fewer at the end of the file."""
    data = os.pread(handle, stop - start, start)
    while len(data) < stop - start:
        more = os.pread(handle, stop - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def write_at(handle: int, data: bytes, start: int) -> None:
    """Writes all bytes at their place; a file that cannot take them raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(handle, rest, start)
        rest, start = rest[written:], start + written
