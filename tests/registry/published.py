"""A small version in a store, without the registry's own push: what the cache's tests fetch."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from xc_ray.registry.cache_files import walk
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import FileEntry, Manifest
from xc_ray.registry.store import ObjectStore

FILES = {
    "config.json": b'{"layers": 2}',
    "model-00001.safetensors": bytes(range(256)) * 1200,  # 300 KiB
    "model-00002.safetensors": b"\x01\x02\x03" * 70_001,  # no multiple of any part
    "tokenizer/empty.txt": b"",
    "tokenizer/copy.json": b'{"layers": 2}',  # the same bytes as config.json
}


def manifest_of(files: dict[str, bytes], name: str = "model", version: int = 1) -> Manifest:
    entries = [
        FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in sorted(files.items())
    ]
    return Manifest(
        name=name,
        version=version,
        kind="base",
        files=tuple(entries),
        created=datetime(2025, 1, 1, tzinfo=UTC),
    )


def publish(store: ObjectStore, files: dict[str, bytes], name: str = "model") -> Manifest:
    manifest = manifest_of(files, name)
    for entry in manifest.files:
        store.put(blob_key(entry.sha256), files[entry.path])
    return manifest


def read(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, links as the bytes that they lead to."""
    return {path: Path(entry.path).read_bytes() for path, entry in walk(folder)}
