"""ObjectStore: bytes under keys, in a folder, a bucket or this process's memory.

A key is a relative path of plain segments. What is written is whole or absent: S3, GCS and Azure do
so by nature, and obstore's folder writes beside the key and moves the file there. `put_if_absent`
is the one primitive on which versions and alias logs stand: of several writers of one key exactly
one wins. Nothing else here needs a lock, so that a store may be used from many threads at once.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from xc_ray.errors import RegistryError
from xc_ray.registry.access import failure, is_missing
from xc_ray.registry.client import Client, arrow_filesystem, open_clients
from xc_ray.registry.location import Location

# A file above this size goes up in parts of it, several at once: memory in flight is
# PART_BYTES × PARTS_AT_ONCE for each file.
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 6
# Up to here a write is bounded by `timeout_s` without an answer, above by client.UPLOAD_S.
SMALL_BYTES = 256 << 10
# S3 knows part numbers up to 10,000: larger files have larger parts.
MAX_PARTS = 9_000
# Keys of one page of a listing; S3 gives no more.
PAGE = 1_000
PROBES = "probes"
# Writers at once of one probe, and how many such races a bucket is asked to decide.
RACERS = 8
RACES = 12
# Times that a store may answer "somebody is writing this" without anything being written.
CONFLICTS = 5

T = TypeVar("T")


class Missing(RegistryError):
    """There is no object under this key."""


@dataclass(frozen=True)
class Entry:
    """One object of a listing: its size in bytes, and when it was last written (UTC)."""

    key: str
    size: int
    modified: datetime


class ObjectStore:
    """The objects of one storage setting; safe for many threads, and pickled by its setting."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._proof = threading.Lock()
        self._proven = False

    @classmethod
    def open(cls, url: str) -> "ObjectStore":
        """The store that a setting names (see `location.py`); nothing is read or written yet.

        Every `memory://` is a store of its own.
        """
        return cls(Location.parse(url))

    def __reduce__(self) -> tuple[Callable[[str], "ObjectStore"], tuple[str]]:
        if self.location.scheme == "memory":
            raise TypeError("memory:// stays in its process; use a folder between processes")
        return ObjectStore.open, (self.url,)

    @cached_property
    def _clients(self) -> tuple[Client, Client]:
        # At first use, because a folder is made then; twice does no harm.
        return open_clients(self.location)

    @property
    def _client(self) -> Client:
        return self._clients[0]

    @property
    def _uploads(self) -> Client:
        return self._clients[1]

    @property
    def url(self) -> str:
        """The setting in its full form; it never holds credentials."""
        return str(self.location)

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            Missing: there is none.
            RegistryError: the store cannot be reached, or refuses.
        """
        return self._call("read", key, lambda: obstore.get(self._client, key).bytes().to_bytes())

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` (exclusive) of an object; all of them, or an error.

        Raises:
            Missing: there is no such object.
            RegistryError: the object is shorter, or the store cannot be reached, or refuses.
        """
        if not 0 <= start < stop:
            raise ValueError(f"range {start} to {stop} holds no byte")
        found = self._call(
            "read",
            key,
            lambda: obstore.get_range(self._client, key, start=start, end=stop).to_bytes(),
        )
        if len(found) != stop - start:
            raise RegistryError(
                f"{self.location.place}: '{key}' gave {len(found)} of the {stop - start} bytes "
                f"from {start} to {stop}: the object is shorter than it should be; run "
                "`xc-ray registry verify`"
            )
        return found

    def size(self, key: str) -> int:
        """Bytes of an object, without reading it.

        Raises:
            Missing: there is none.
            RegistryError: the store cannot be reached, or refuses.
        """
        return self.entry(key).size

    def entry(self, key: str) -> Entry:
        """Size and time of an object, without reading it.

        Raises:
            Missing: there is none.
            RegistryError: the store cannot be reached, or refuses.
        """
        found = self._call("read", key, lambda: obstore.head(self._client, key))
        return Entry(key, found["size"], found["last_modified"])

    def put(self, key: str, data: bytes | Path) -> None:
        """Writes an object over whatever is there: bytes, or a file that is read as it goes up.

        Raises:
            OSError: the file cannot be read.
            RegistryError: the store cannot be reached, or refuses.
        """
        if isinstance(data, bytes):
            # A body that takes its time needs the client that lets it.
            which = 0 if len(data) <= SMALL_BYTES else 1
            self._call(
                "write",
                key,
                lambda: obstore.put(self._clients[which], key, data, use_multipart=False),
            )
            self._flush(key)
        else:
            size = data.stat().st_size  # an OSError of our file must not look like the store's
            self._upload(key, data, size)

    def put_chunks(self, key: str, chunks: Iterator[bytes], size: int) -> None:
        """Writes what an iterator yields, `size` bytes in all, as it comes.

        An error of the iterator goes through to the caller, and then nothing was written: so it
        may look at what it yields, and refuse the last chunk.

        Raises:
            RegistryError: the store cannot be reached, or refuses.
        """
        failed: list[OSError] = []

        def watched() -> Iterator[bytes]:
            try:
                yield from chunks
            except OSError as error:  # of our own disk, which is not the store's failure
                failed.append(error)
                raise

        try:
            self._upload(key, watched(), size)
        except RegistryError:
            if failed:
                raise failed[0] from None
            raise

    def _upload(self, key: str, data: Path | Iterator[bytes], size: int) -> None:
        part = max(PART_BYTES, -(-size // MAX_PARTS))
        self._call(
            "write",
            key,
            lambda: obstore.put(
                self._uploads, key, data, chunk_size=part, max_concurrency=PARTS_AT_ONCE
            ),
        )
        self._flush(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes an object unless one is there; of many writers at once one is told True.

        An answer can be lost after the store did what it was asked, and the call is then repeated:
        what is found under the key is therefore compared, and one's own bytes count as success. So
        that no other writer's count as one's own, `data` must hold something unique.

        Raises:
            RegistryError: the store ignores `If-None-Match: *`, cannot be reached, or refuses.
        """
        self.prove_put_if_absent()
        # A store that sees two writers in conflict may refuse both (S3: 409): then nobody's bytes
        # are there, and one asks again.
        for _ in range(CONFLICTS):
            try:
                obstore.put(self._client, key, data, mode="create")
            except (BaseError, OSError) as error:
                refused = error
            else:
                self._flush(key)
                return True
            try:
                held = self.get(key)
            except RegistryError as unread:
                if isinstance(refused, AlreadyExistsError) and isinstance(unread, Missing):
                    continue
                break
            if held == data:
                self._flush(key)
            return held == data
        raise failure("create", self.location, key, refused) from refused

    def list(self, prefix: str, *, after: str | None = None) -> list[Entry]:
        """The objects below a prefix of whole segments, by key; `after` leaves out keys up to it.

        Raises:
            RegistryError: the store cannot be reached, or refuses.
        """
        folder = prefix.rstrip("/")
        found = self._call(
            "list",
            f"{folder}/",
            lambda: obstore.list(
                self._client, folder or None, offset=after, chunk_size=PAGE
            ).collect(),
        )
        entries = [Entry(one["path"], one["size"], one["last_modified"]) for one in found]
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; those that are not there are as good as removed.

        Raises:
            RegistryError: the store cannot be reached, or refuses.
        """
        if self.location.scheme in ("s3", "memory"):  # these do not mind a missing key
            if keys:
                self._call("delete", keys[0], lambda: obstore.delete(self._client, [*keys]))
            return
        for key in keys:
            with contextlib.suppress(Missing):
                self._delete(key)

    def leftovers(self, *, before: datetime) -> Sequence[Path]:
        """Half-written files that a killed writer left in a folder, last written before a time.

        They are no objects: nothing lists or reads them. The parts of a broken upload to a bucket
        are seen by the bucket's owner only, whose lifecycle rule removes them
        (`AbortIncompleteMultipartUpload`).
        """
        if self.location.scheme != "file":
            return []
        # obstore writes KEY#1 (#2, …) and moves it to KEY; '#' is in no key of ours.
        found = Path(self.location.prefix).rglob("*#*")
        return [path for path in found if _written_before(path, before)]

    def filesystem(self) -> tuple[Any, str]:
        """The same place as a pyarrow filesystem and a path in it, for Ray Train's RunConfig.

        Raises:
            ConfigError: a place that other processes cannot see, or an Azure account that is
                missing.
        """
        return arrow_filesystem(self.location)

    def _delete(self, key: str) -> None:
        self._call("delete", key, lambda: obstore.delete(self._client, key))

    def _call(self, verb: str, key: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (BaseError, OSError) as error:
            if is_missing(error):
                raise Missing(f"{self.location.place}: there is no '{key}'") from error
            raise failure(verb, self.location, key, error) from error

    def prove_put_if_absent(self) -> None:
        """Shows once, before the first such write, that of several writers one wins.

        Of two that come one after the other, then of several at once: some servers look first and
        write later. A race that goes well proves nothing, so a bucket is asked more than once.

        Raises:
            RegistryError: more than one wins, or the store cannot be reached.
        """
        if self._proven or self.location.scheme == "memory":
            return
        with self._proof:
            if self._proven:
                return
            honoured = False
            key = f"{PROBES}/{uuid.uuid4().hex}"
            self._call("create", key, lambda: obstore.put(self._client, key, b"1", mode="create"))
            try:
                obstore.put(self._client, key, b"2", mode="create")
            except AlreadyExistsError:
                honoured = True
            except (BaseError, OSError) as error:
                raise failure("create", self.location, key, error) from error
            finally:
                # Whoever may not delete may still write; gc removes the probes that stay.
                with contextlib.suppress(RegistryError):
                    self.delete([key])
            if not honoured:
                raise RegistryError(
                    f"{self.location.place} wrote '{key}' twice although the second write said "
                    "`If-None-Match: *`: it ignores conditional writes, and two publishers could "
                    "overwrite each other. Use a store that honours them (AWS S3, MinIO, Ceph, "
                    "GCS, Azure, a folder) or update this server; a proxy in between may "
                    "also drop the header"
                )
            if self.location.scheme != "file":  # there it is one call to the system
                self._prove_one_winner()
            self._proven = True

    def _prove_one_winner(self) -> None:
        def create(key: str) -> bool:
            try:
                obstore.put(self._client, key, b"", mode="create")
            except (BaseError, OSError):  # refused, or told to try again: not a winner
                return False
            return True

        keys = [f"{PROBES}/{uuid.uuid4().hex}" for _ in range(RACES)]
        try:
            with ThreadPoolExecutor(RACERS) as racers:
                won = [sum(racers.map(create, [key] * RACERS)) for key in keys]
        finally:
            with contextlib.suppress(RegistryError):
                self.delete(keys)
        if max(won) > 1:
            raise RegistryError(
                f"{self.location.place} told {max(won)} of {RACERS} writers that came at once that "
                "they had created the same object, although all said `If-None-Match: *`: two "
                "publishers could overwrite each other. Use a store whose conditional writes are "
                "atomic (AWS S3, MinIO, Ceph, GCS, Azure, a folder)"
            )

    def _flush(self, key: str) -> None:
        """A written file and its folders' entries, onto the disk: obstore leaves it to the system.

        Blobs are flushed before the manifest that names them is written, so that a power cut
        leaves no version without its bytes.
        """
        if self.location.scheme != "file":
            return
        path = Path(self.location.prefix, key)
        inside = [path, *path.parents][: key.count("/") + 2]  # up to the store's own folder
        for name in inside:
            # Another writer of the same blob may be replacing it, and gc removes probes.
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(name, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def _written_before(path: Path, before: datetime) -> bool:
    try:
        return path.is_file() and path.stat().st_mtime < before.timestamp()
    except FileNotFoundError:  # its writer has finished since
        return False
