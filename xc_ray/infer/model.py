"""Which base and which adapter answer, each told by a digest, before anything is loaded."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from xc_ray.errors import CheckpointError, InvalidRequest, NotFound
from xc_ray.fingerprint import file_entries, fingerprint
from xc_ray.hub import find_base, in_registry, is_there, local_cache, open_store, resolve_model
from xc_ray.model.adapter import ADAPTER_BIN_FILE, ADAPTER_FILE, adapter_summary
from xc_ray.model.adapter_config import ADAPTER_CONFIG_FILE
from xc_ray.model.shards import PublishedFile
from xc_ray.registry.manifest import files_digest
from xc_ray.registry.reference import Reference
from xc_ray.registry.registry import Registry

STATE_FILE = "state.json"
VALIDATION_FILE = "validation.jsonl"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class Found:
    """A base or an adapter on this disk: as it was named, and what it is."""

    name: str
    folder: Path
    digest: str

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:19]}…)"


def find_model(name: str, registry: str | None = None) -> Found:
    """The base of a name that `hub.resolve_model` takes; all its files are read once to tell it.

    Raises:
        CheckpointError: no such model, or its files are not one whole model.
        RegistryError: the registry's store fails.
    """
    if in_registry(name):
        base = find_base(name, registry)
        # Pinned: the name may come to mean another version meanwhile.
        return Found(name, resolve_model(base.pinned, registry), base.manifest.digest)
    folder = resolve_model(name)
    return Found(name, folder, fingerprint(folder))


def find_adapter(name: str, base: Found, registry: str | None = None) -> Found:
    """The adapter of a folder of peft, or of a reference `NAME[@…]` to the registry.

    Raises:
        CheckpointError: the folder is not one of an adapter, or the name is neither.
        InvalidRequest: it is no adapter, or one of another base.
        NotFound: the registry does not have it.
        RegistryError: the registry's store fails.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return Found(name, folder, _digest(folder))
    try:
        reference = Reference.parse(name)
    except InvalidRequest:
        raise CheckpointError(
            f"adapter {name!r} is neither an existing folder nor an adapter of the registry like "
            "NAME@prod"
        ) from None
    store = open_store(registry)
    if not is_there(store):
        raise NotFound(f"there is no folder {name!r} here, and no registry at {store.url}")
    manifest = Registry(store).resolve(reference)
    told = f"{manifest.name}@{manifest.version}"
    if manifest.base is None:
        raise InvalidRequest(f"{told} is a base, not an adapter; give it as --model")
    if manifest.base.digest != base.digest:
        raise InvalidRequest(
            f"adapter {told} belongs to the base {manifest.base.name} "
            f"({manifest.base.digest[:19]}…), and the model is {base}"
        )
    # Never closed: the lease ends with the process.
    return Found(told, local_cache().fetch(store, manifest).folder, manifest.digest)


def find_checkpoint(folder: str | Path, base: Found) -> Found:
    """The adapter of a training checkpoint, or of a folder of peft.

    Raises:
        CheckpointError: there is none, or it was trained on another base.
    """
    folder = Path(folder).expanduser()
    places = (folder / ADAPTER_FOLDER, folder)
    adapter = next((p for p in places if (p / ADAPTER_CONFIG_FILE).is_file()), None)
    if adapter is None:
        inside = sorted(p.parents[1].name for p in folder.glob(f"*/{ADAPTER_FOLDER}/adapter_c*"))
        hint = f"; give one of those in it: {', '.join(inside[-3:])}" if inside else ""
        raise CheckpointError(
            f"{folder} is no training checkpoint: it has neither {ADAPTER_FOLDER}/"
            f"{ADAPTER_CONFIG_FILE} nor {ADAPTER_CONFIG_FILE}{hint}"
        )
    trained_on = _base_digest(folder / STATE_FILE)
    if trained_on not in (None, base.digest):
        raise CheckpointError(
            f"{folder} was trained on the base {trained_on!s:.19}…, and the model is {base}; "
            "give its base as --model"
        )
    return Found(str(folder), adapter, _digest(adapter))


def validation_file(folder: str | Path) -> Path:
    """The rows that a training run kept for validation, beside its checkpoint.

    Raises:
        CheckpointError: there are none.
    """
    path = Path(folder).expanduser() / VALIDATION_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there: the run had no rows for validation; give a --dataset"
        )
    return path


def _base_digest(path: Path) -> str | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    digest = state.get("base_digest") if isinstance(state, dict) else None
    return digest if isinstance(digest, str) else None


def _digest(folder: Path) -> str:
    """What the folder's version in the registry would be."""
    adapter_summary(folder)  # refuses what is no adapter
    weights = folder / ADAPTER_FILE
    if not weights.exists():
        weights = folder / ADAPTER_BIN_FILE
    config = folder / ADAPTER_CONFIG_FILE
    files = [PublishedFile(config.name, config), PublishedFile(ADAPTER_FILE, weights)]
    return files_digest(file_entries(files))
