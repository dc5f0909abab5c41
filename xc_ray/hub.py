"""A model's name -> its folder: `demo`, a folder, a hub id, or a base of the registry.

demo                              the demo model, a part of this package
./path or /path                   a folder of a published checkpoint
internlm/internlm-xcomposer2d5-7b a Hugging Face id (also written hf:ORG/NAME[@REVISION])
modelscope:ORG/NAME[@REVISION]    a ModelScope id (needs the extra `modelscope`)
NAME[@VERSION|@ALIAS|@sha256:…]   a base of the registry, copied into this machine's cache
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xc_ray.errors import CheckpointError, InvalidRequest, NotFound
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.location import default_url
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.reference import Reference
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
SHOWN_CHARS = 300  # of a hub's message
_HUB_ID = re.compile(r"(?:(hf|modelscope):)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
# What a checkpoint needs; remote code (*.py) is never fetched.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
_BIN_PATTERNS = ["*.json", "pytorch_model*.bin", "tokenizer.model"]


def resolve_model(name: str, registry: str | None = None) -> Path:
    """The folder of a model: from the hub's own cache if it is a hub id, from ours if a reference.

    `registry` is a storage setting, None the user's own folder. What comes from there stays in the
    cache until this process ends.

    Raises:
        CheckpointError: no such model, or the hub does not give it.
        RegistryError: the registry's store fails, or gives other bytes than it should.
    """
    if name == "demo":
        return DEMO_FOLDER
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):  # False, not an error, for what can be no path at all
        return Path(folder)
    match = _HUB_ID.fullmatch(name)
    if match is None or name.startswith("."):
        found = find_base(name, registry)
        # Never closed: the lease ends with the process.
        return local_cache().fetch(found.store, found.manifest).folder
    hub, repo, revision = match.groups()
    return (
        _from_modelscope(repo, revision)
        if hub == "modelscope"
        else _from_hugging_face(repo, revision)
    )


@dataclass(frozen=True)
class Base:
    """A base in the registry; `pinned` is its reference that never means another."""

    store: ObjectStore
    manifest: Manifest

    @property
    def pinned(self) -> str:
        """`NAME@sha256:…`."""
        return f"{self.manifest.name}@{self.manifest.digest}"


def in_registry(name: str) -> bool:
    """Whether a model's name is a reference to the registry, there or not."""
    if name == "demo" or os.path.isdir(os.path.expanduser(name)):
        return False
    return _reference(name) is not None


def find_base(name: str, registry: str | None = None) -> Base:
    """The base that a reference means now.

    Raises:
        CheckpointError: there is none, or it is an adapter.
        RegistryError: the registry's store fails.
    """
    nowhere = (
        f"model {name!r} is neither 'demo', nor an existing folder, nor a hub id like ORG/NAME, "
        "nor a base of the registry like NAME@prod"
    )
    reference = _reference(name)
    if reference is None:
        raise CheckpointError(nowhere)
    store = open_store(registry)
    if not is_there(store):
        raise CheckpointError(f"{nowhere} ({store.url} is not there)")
    try:
        manifest = Registry(store).resolve(reference)
    except NotFound as e:
        raise CheckpointError(f"{nowhere} (in {store.url} {e.message})") from None
    if manifest.kind != "base":
        raise CheckpointError(
            f"model {name!r} is an adapter in the registry {store.url}; serve its base "
            f"({manifest.base and manifest.base.name}) and name the adapter in requests"
        )
    return Base(store, manifest)


def _reference(name: str) -> Reference | None:
    try:
        return Reference.parse(name)
    except InvalidRequest:
        return None


def open_store(registry: str | None) -> ObjectStore:
    """The registry's store; nothing is read or written yet.

    Raises:
        ConfigError: the setting is none.
    """
    return ObjectStore.open(default_url() if registry is None else registry)


def is_there(store: ObjectStore) -> bool:
    """False for a folder that nobody has written to; to read it would make it."""
    return store.location.scheme != "file" or os.path.isdir(store.location.prefix)


def local_cache() -> LocalCache:
    """The registry's models and adapters on this machine."""
    return LocalCache(cache_folder() / "registry")


def cache_folder() -> Path:
    """Where derived files of this user are kept: `$XDG_CACHE_HOME/xc_ray` or `~/.cache/xc_ray`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "xc_ray"


def _from_hugging_face(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return _snapshot(snapshot_download, repo, revision)
    except Exception as e:  # noqa: BLE001 - its own, its HTTP client's, and those of a bad answer
        raise CheckpointError(
            f"no folder {repo!r} here, and Hugging Face does not give {repo!r}: {_line(e)}"
        ) from None


def _from_modelscope(repo: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise CheckpointError(
            "a ModelScope id needs the package modelscope: pip install 'xc-ray[modelscope]'"
        ) from None
    try:
        return _snapshot(snapshot_download, repo, revision)
    except Exception as e:  # noqa: BLE001 - modelscope raises a dozen unrelated types
        raise CheckpointError(f"ModelScope does not give {repo!r}: {_line(e)}") from None


def _snapshot(download: Callable[..., str], repo: str, revision: str | None) -> Path:
    folder = Path(download(repo, revision=revision, allow_patterns=_PATTERNS))
    if not any(folder.glob("*.safetensors")):
        folder = Path(download(repo, revision=revision, allow_patterns=_BIN_PATTERNS))
    return folder


def _line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words[:SHOWN_CHARS] or type(error).__name__
