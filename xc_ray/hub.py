"""A model's name -> its folder: `demo`, a folder, or a Hugging Face or ModelScope id.

demo                              the bundled demo model, made on first use
./path or /path                   a folder of a published checkpoint
internlm/internlm-xcomposer2d5-7b a Hugging Face id (also written hf:ORG/NAME[@REVISION])
modelscope:ORG/NAME[@REVISION]    a ModelScope id (needs the extra `modelscope`)
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from xc_ray.errors import CheckpointError

DEMO_VERSION = 1  # part of the folder's name: raise it when the demo model changes
SHOWN_CHARS = 300  # of a hub's message
_HUB_ID = re.compile(r"(?:(hf|modelscope):)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
# What a checkpoint needs; remote code (*.py) is never fetched.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
_BIN_PATTERNS = ["*.json", "pytorch_model*.bin", "tokenizer.model"]


def resolve_model(name: str) -> Path:
    """The folder of a model, downloaded into the hub's own cache if it is a hub id.

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
    """
    if name == "demo":
        return _demo_folder(cache_folder() / f"demo-v{DEMO_VERSION}")
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):  # False, not an error, for what can be no path at all
        return Path(folder)
    match = _HUB_ID.fullmatch(name)
    if match is None or name.startswith("."):
        raise CheckpointError(
            f"model {name!r} is neither 'demo', nor an existing folder, nor a hub id like ORG/NAME"
        )
    hub, repo, revision = match.groups()
    return (
        _from_modelscope(repo, revision)
        if hub == "modelscope"
        else _from_hugging_face(repo, revision)
    )


def cache_folder() -> Path:
    """Where derived files of this user are kept: `$XDG_CACHE_HOME/xc_ray` or `~/.cache/xc_ray`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "xc_ray"


def _demo_folder(target: Path) -> Path:
    if not target.is_dir():
        from xc_ray.demo.make import make_demo  # torch: only where the model is not made yet

        make_demo(target)
    return target


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
