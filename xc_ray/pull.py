"""A version of the registry as a plain folder: files of one's own, free of the cache.

They are fetched as into a cache, into a hidden folder beside the target (parallel ranges, every
digest checked, what is whole stays for the next attempt), and then moved: they need their room on
the disk once, and the target is whole or absent.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from xc_ray.errors import ConfigError
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.lock import Lock
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.store import ObjectStore

Progress = Callable[[str, int, int], None]


def pull(
    store: ObjectStore, manifest: Manifest, target: Path, progress: Progress | None = None
) -> None:
    """Writes the version's files into the new folder `target`.

    Raises:
        ConfigError: the target exists, is being pulled by another process, or has no parent.
        RegistryError: the store fails or gives other bytes, or there is no room.
        OSError: the folder cannot be written.
    """
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder; make it first")
    room = target.parent / f".{target.name}.pull"
    lock = Lock.try_take(target.parent / f".{target.name}.pull.lock")
    if lock is None:
        raise ConfigError(f"another process pulls into {target} now; wait for it")
    try:
        if target.exists() or target.is_symlink():
            shutil.rmtree(room, ignore_errors=True)  # of a pull that was killed at its very end
            raise ConfigError(f"{target} exists; name a folder that does not")
        with LocalCache(room).fetch(store, manifest, progress) as lease:
            made = room / "made"
            shutil.rmtree(made, ignore_errors=True)
            _move(lease.folder, made, manifest)
        made.rename(target)
        shutil.rmtree(room)
    finally:
        lock.remove()


def _move(folder: Path, made: Path, manifest: Manifest) -> None:
    moved: dict[str, Path] = {}
    for entry in manifest.files:
        source, to = folder / entry.path, made / entry.path
        to.parent.mkdir(parents=True, exist_ok=True)
        if entry.sha256 in moved or source.is_symlink():
            # The same bytes under two names, or a disk without hard links.
            shutil.copyfile(moved.get(entry.sha256, source), to)
        else:
            source.rename(to)
            moved[entry.sha256] = to
        to.chmod(0o644)  # what is in a cache may not be written
