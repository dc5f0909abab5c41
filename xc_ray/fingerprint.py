"""Which base a folder is: the digest that its import has in the registry, without the registry.

The same files are hashed that an import uploads, several at once. What was hashed is remembered by
path, size, time and inode in the user's cache folder, so that a server's start does not read 17 GB
to learn a name.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xc_ray.hub import cache_folder
from xc_ray.model.layout import check_layout, read_layout
from xc_ray.model.shards import PublishedFile, published_files
from xc_ray.registry.manifest import FileEntry, files_digest

logger = logging.getLogger(__name__)

MEMORY_FILE = "fingerprints.json"
MAX_REMEMBERED = 2000  # files
# A file may change again within one tick of its clock: one so young is not remembered.
YOUNG_NS = 2_000_000_000
NUM_THREADS = 8

Stamp = list[int]  # size, mtime in ns, inode
Known = dict[str, tuple[Stamp, int, str]]  # path -> stamp, size and sha256 of the published file


def fingerprint(folder: str | Path, *, memory: Path | None = None) -> str:
    """`sha256:…` of a checkpoint folder, as its manifest would have it.

    `memory` is the file of what is known already, in the user's cache folder unless told.

    Raises:
        CheckpointError: the folder is not one whole model.
    """
    layout = read_layout(folder)
    check_layout(layout)
    return files_digest(file_entries(published_files(layout), memory=memory))


def file_entries(files: Sequence[PublishedFile], *, memory: Path | None = None) -> list[FileEntry]:
    """Size and sha256 of each file."""
    memory = memory or cache_folder() / MEMORY_FILE
    known = _recall(memory)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        found = list(threads.map(lambda file: _entry(file, known), files))
    learnt = {k: v for _, new in found for k, v in new.items() if known.get(k) != v}
    if learnt:
        # Read again: others may have learnt meanwhile.
        _remember(memory, {**_recall(memory), **learnt})
    return [entry for entry, _ in found]


def _entry(file: PublishedFile, known: Known) -> tuple[FileEntry, Known]:
    if isinstance(file.source, bytes):
        digest = hashlib.sha256(file.source).hexdigest()
        return FileEntry(path=file.name, size=len(file.source), sha256=digest), {}
    path = file.source.resolve()
    key = str(path) if file.as_it_is else f"{path} as safetensors"
    before = _stamp(path)
    if key in known and known[key][0] == before:
        _, size, digest = known[key]
        return FileEntry(path=file.name, size=size, sha256=digest), {key: known[key]}
    hasher, size = hashlib.sha256(), 0
    for chunk in file.chunks():
        hasher.update(chunk)
        size += len(chunk)
    digest = hasher.hexdigest()
    new: Known = {}
    if _stamp(path) == before and before[1] < time.time_ns() - YOUNG_NS:
        new = {key: (before, size, digest)}
    return FileEntry(path=file.name, size=size, sha256=digest), new


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _recall(memory: Path) -> Known:
    """What is remembered; nothing if the file is not there or not as we write it."""
    try:
        return {
            str(path): ([int(n) for n in stamp], int(size), _hex(digest))
            for path, (stamp, size, digest) in json.loads(memory.read_text("utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _hex(text: str) -> str:
    if len(bytes.fromhex(text)) != hashlib.sha256().digest_size:
        raise ValueError(text)
    return text


def _remember(memory: Path, known: Known) -> None:
    kept = dict(list(known.items())[-MAX_REMEMBERED:])
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memory.parent, prefix=memory.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump(kept, f)
            os.replace(name, memory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as e:
        logger.info("%s cannot be written (%s): the folder is hashed again next time", memory, e)
