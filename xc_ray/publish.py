"""Checkpoints and adapters into the registry, each checked whole before a byte is sent.

    import_checkpoint("internlm/internlm-xcomposer2d5-7b", registry, "xcomposer2.5")
    push_adapter("runs/42/adapter", registry, "cats", "xcomposer2.5")

A push that was interrupted is run again: what has arrived is not sent twice.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xc_ray.errors import CheckpointError, ConfigError, InvalidRequest, NotFound
from xc_ray.fingerprint import fingerprint
from xc_ray.hub import cache_folder, in_registry, resolve_model
from xc_ray.model.adapter import (
    ADAPTER_BIN_FILE,
    ADAPTER_FILE,
    MAX_RANK,
    adapter_summary,
    load_adapter,
)
from xc_ray.model.adapter_config import ADAPTER_CONFIG_FILE
from xc_ray.model.config import XComposerConfig
from xc_ray.model.layout import Layout, check_layout, read_layout
from xc_ray.model.shards import PublishedFile, published_files
from xc_ray.registry.lock import Lock
from xc_ray.registry.manifest import BaseRef, Lineage, Manifest
from xc_ray.registry.reference import check_name
from xc_ray.registry.registry import Registry

Progress = Callable[[str, int, int], None]

# In a manifest's `config`: the whole config of a base, so that an adapter is checked against it
# where the base's files are not.
MODEL_KEY = "model"


def import_checkpoint(
    source: str | Path, registry: Registry, name: str, *, progress: Progress | None = None
) -> Manifest:
    """A new version of a base from a folder or a hub id: JSON, safetensors, tokenizer; never code.

    Old `.bin` shards become safetensors, one at a time, in the user's cache folder, where they
    wait for the next try if this one is interrupted.

    Raises:
        CheckpointError: no such model, or its files are not one whole model.
        RegistryError: the store cannot be reached, or refuses.
    """
    check_name(name)
    if in_registry(str(source)):
        raise CheckpointError(
            f"{source} is no folder here; give a folder or a hub id like ORG/NAME"
        )
    layout = read_layout(resolve_model(str(source)))
    check_layout(layout)
    files = published_files(layout)
    with _on_disk(layout, files, progress) as folder:
        return registry.push(
            folder,
            name=name,
            kind="base",
            files=[Path(f.name) for f in files],
            config=checkpoint_summary(layout),
            progress=progress,
        )


def checkpoint_summary(layout: Layout) -> dict[str, Any]:
    """What a base's manifest says of it; `MODEL_KEY` holds the config with every field."""
    config = layout.config
    return {
        "variant": config.variant,
        "layers": config.decoder.num_hidden_layers,
        "hidden_size": config.decoder.hidden_size,
        "parameters": sum(torch.Size(shape).numel() for shape in layout.shapes.values()),
        "dtype": config.torch_dtype,
        MODEL_KEY: config.to_dict(),
    }


def base_config(manifest: Manifest) -> XComposerConfig:
    """The model config of an imported base, from its manifest alone.

    Raises:
        CheckpointError: the manifest does not tell it.
    """
    model = manifest.config.get(MODEL_KEY)
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{manifest.name}@{manifest.version} does not tell its model's sizes; import it again "
            "with xc-ray registry import"
        )
    return XComposerConfig.from_dict(model, {})


def push_adapter(
    folder: str | Path,
    registry: Registry,
    name: str,
    base: str | Path,
    *,
    lineage: Lineage | None = None,
    max_rank: int = MAX_RANK,
    progress: Progress | None = None,
) -> Manifest:
    """A new version of an adapter for a base: a registry reference, or a folder imported before.

    Raises:
        CheckpointError: lists what of the adapter does not fit the base.
        NotFound: no such base in the registry.
        RegistryError: the store cannot be reached, or refuses.
    """
    check_name(name)
    owner = owner_of(registry, base)
    folder = Path(folder)
    load_adapter(folder, base_config(owner), digest="", dtype=torch.float32, max_rank=max_rank)
    with tempfile.TemporaryDirectory() as scratch:
        weights = folder / ADAPTER_FILE
        if not weights.exists():
            weights = PublishedFile(ADAPTER_FILE, folder / ADAPTER_BIN_FILE).write(Path(scratch))
            shutil.copyfile(folder / ADAPTER_CONFIG_FILE, Path(scratch) / ADAPTER_CONFIG_FILE)
        return registry.push(
            weights.parent,
            name=name,
            kind="adapter",
            base=BaseRef(name=owner.name, digest=owner.digest),
            files=[Path(ADAPTER_CONFIG_FILE), Path(weights.name)],
            config=adapter_summary(weights.parent),
            lineage=lineage or Lineage(),
            progress=progress,
        )


def owner_of(registry: Registry, base: str | Path) -> Manifest:
    """The manifest of a base: by reference, or by the bytes of what was imported.

    A reference is what `hub.resolve_model` takes for one: a folder of that name goes first.

    Raises:
        NotFound: the registry has no such base.
        InvalidRequest: it is not a base.
        CheckpointError: there is no such folder.
    """
    if in_registry(str(base)):
        manifest = registry.resolve(str(base))
        if manifest.kind != "base":
            raise InvalidRequest(
                f"{base} is an adapter of {manifest.base and manifest.base.name}; name a base"
            )
        return manifest
    digest = fingerprint(resolve_model(str(base)))
    known = [
        m for m in registry.snapshot().manifests.values() if m.kind == "base" and m.digest == digest
    ]
    if not known:
        raise NotFound(
            f"no base in the registry holds the files of {base} ({digest}); import it first: "
            f"xc-ray registry import {base} --name NAME"
        )
    return max(known, key=lambda m: m.created)


@contextmanager
def _on_disk(
    layout: Layout, files: Sequence[PublishedFile], progress: Progress | None
) -> Iterator[Path]:
    """A folder that holds the files under their names."""
    if all(f.as_it_is for f in files):
        yield layout.folder
        return
    room = cache_folder() / "converted"
    room.mkdir(parents=True, exist_ok=True)
    key = _key(files)
    with Lock.take(room / f"{key}.lock") as lock:
        for left in room.glob(f"{key}.part-*"):
            shutil.rmtree(left)
        _remove_others(room, key)
        folder = room / key
        folder.mkdir(exist_ok=True)
        _check_room(folder, files)
        done, total = 0, sum(map(_size, files))
        for file in files:
            if not (folder / file.name).exists():
                with tempfile.TemporaryDirectory(dir=room, prefix=f"{key}.part-") as scratch:
                    file.write(Path(scratch)).rename(folder / file.name)
            done += _size(file)
            if progress:
                progress(f"convert {file.name}", done, total)
        yield folder
        shutil.rmtree(folder)
        lock.remove()


def _size(file: PublishedFile) -> int:
    """Bytes of the source, near enough those of the file."""
    return file.source.stat().st_size if isinstance(file.source, Path) else len(file.source)


def _key(files: Sequence[PublishedFile]) -> str:
    """Tells the folder's state: its files by path, size and time."""
    state: list[Any] = []
    for file in files:
        if isinstance(file.source, Path):
            path = file.source.resolve()
            state.append([file.name, str(path), path.stat().st_size, path.stat().st_mtime_ns])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def _remove_others(room: Path, key: str) -> None:
    """Removes what interrupted imports left, unless somebody is at work on it."""
    for path in room.glob("*.lock"):
        if path.stem != key and (lock := Lock.try_take(path)):
            for left in room.glob(f"{path.stem}*"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
            lock.remove()


def _check_room(folder: Path, files: Sequence[PublishedFile]) -> None:
    needed = sum(_size(f) for f in files if not (folder / f.name).exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"converting to safetensors needs {needed:,} bytes in {folder.parent}, which has "
            f"{free:,} left; free some, or set XDG_CACHE_HOME to a larger disk"
        )
