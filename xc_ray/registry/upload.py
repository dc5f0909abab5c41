"""The files of a version into the store: hashed and sent side by side, what is there is left there.

A blob that is found is relied upon only where `gc` cannot be about to delete it: it is younger than
FRESH_S, or a manifest names it, which no one ever deletes. What is old and named by none (a push
was killed, and taken up again days later) is sent again, which makes it young. See `gc.py` for why
that is enough.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from xc_ray.errors import InvalidRequest
from xc_ray.registry.keys import VERSIONS, blob_key, version_of
from xc_ray.registry.manifest import FileEntry
from xc_ray.registry.records import read_manifests
from xc_ray.registry.store import PART_BYTES, Missing, ObjectStore

T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

# With FRESH_S below half of gc's grace period, a push has the other half for everything between
# looking at a blob and writing the manifest.
FRESH_S = 6 * 3600.0
# What was looked at longer ago than this is looked at again before the manifest is written.
RECHECK_S = 600.0
# gc may have looked at an old blob just before it was sent again, with its deletion on the way: no
# longer than twice the longest `timeout_s` (location.py), its retries included, and then some.
SETTLE_S = 150.0
# Files at once. Each goes up in several parts at once (store.PARTS_AT_ONCE).
FILES_AT_ONCE = 4
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Source:
    """A file to be sent: its path in the version, and where it is here."""

    path: str
    file: Path


class Upload:
    """One push on its way. `progress(path, done, total)` counts bytes of all files together."""

    def __init__(
        self,
        store: ObjectStore,
        sources: Sequence[Source],
        progress: Progress | None = None,
        *,
        settle_s: float = SETTLE_S,
    ) -> None:
        self.store, self.sources, self.settle_s = store, sources, settle_s
        self._progress = progress
        self._total = sum(source.file.stat().st_size for source in sources)
        self._done = 0
        self._lock = threading.Lock()
        self._seen: dict[str, float] = {}  # sha256 -> when it was last known to be there
        self._resent = 0.0  # when an old blob was last sent again

    def run(self) -> tuple[FileEntry, ...]:
        """Sends what is not there yet, and says what all the files are.

        Raises:
            InvalidRequest: a file changed while it was read.
            OSError: a file cannot be read.
            RegistryError: the store cannot be reached, or refuses.
        """
        return tuple(_each(self._send, self.sources))

    def ensure(self, files: Sequence[FileEntry]) -> None:
        """Right before the manifest: every blob is there, and stays (errors as of `run`)."""
        while True:
            if self._resent:
                wait_s = max(0.0, self._resent + self.settle_s - time.monotonic())
                logger.info("old blobs were sent again; looking once more in %.0f s", wait_s)
                time.sleep(wait_s)
                self._resent, stale = 0.0, 0.0
            else:
                stale = time.monotonic() - RECHECK_S
            again = [
                (source, entry)
                for source, entry in zip(self.sources, files, strict=True)
                if stale == 0.0 or self._seen[entry.sha256] < stale
            ]
            _each(lambda one: self._put(one[0], one[1], None), again)
            if not self._resent:
                return

    def _send(self, source: Source) -> FileEntry:
        data, size, sha256 = _read(source.file)
        entry = FileEntry(path=source.path, size=size, sha256=sha256)
        self._put(source, entry, data)
        return entry

    def _put(self, source: Source, entry: FileEntry, data: bytes | None) -> None:
        key = blob_key(entry.sha256)
        if self._there(entry):
            self._count(entry.path, entry.size)
        elif data is not None:
            self.store.put(key, data)
            self._count(entry.path, entry.size)
        else:
            self.store.put_chunks(key, self._checked(source, entry), entry.size)
        self._seen[entry.sha256] = time.monotonic()

    def _there(self, entry: FileEntry) -> bool:
        try:
            found = self.store.entry(blob_key(entry.sha256))
        except Missing:
            return False
        if found.size != entry.size:
            return False
        if time.time() - found.modified.timestamp() < FRESH_S or entry.sha256 in self._named:
            return True
        self._resent = time.monotonic()
        return False

    @cached_property
    def _named(self) -> frozenset[str]:
        """The blobs that any manifest names. Asked for rarely: it reads them all."""
        keys = [one.key for one in self.store.list(VERSIONS) if version_of(one.key)]
        manifests, _ = read_manifests(self.store, keys)
        return frozenset(file.sha256 for found in manifests.values() for file in found.files)

    def _checked(self, source: Source, entry: FileEntry) -> Iterator[bytes]:
        """The file's chunks, the last one only if it is still the file that was hashed."""
        digest = hashlib.sha256()
        left = entry.size
        with source.file.open("rb") as file:
            while left:
                chunk = file.read(min(READ_BYTES, left))
                digest.update(chunk)
                left -= len(chunk)
                if not chunk or (not left and digest.hexdigest() != entry.sha256):
                    raise InvalidRequest(
                        f"{source.path!r} changed while it was being read; wait until whatever "
                        "writes it is done, and push again"
                    )
                yield chunk
                self._count(entry.path, len(chunk))

    def _count(self, path: str, size: int) -> None:
        with self._lock:
            self._done = min(self._done + size, self._total)
            if self._progress is not None:
                self._progress(path, self._done, self._total)


def _each(do: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Does it for all, several at once; after a failure no further one is begun."""
    if not items:
        return []
    with ThreadPoolExecutor(min(FILES_AT_ONCE, len(items))) as pool:
        futures = [pool.submit(do, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(file: Path) -> tuple[bytes | None, int, str]:
    """Bytes (of a small file only), size and sha256."""
    if file.stat().st_size <= PART_BYTES:
        data = file.read_bytes()
        return data, len(data), hashlib.sha256(data).hexdigest()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return None, stream.tell(), digest
