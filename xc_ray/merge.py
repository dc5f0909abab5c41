"""Base and adapter as one plain checkpoint: W + scaling · B A in the base's dtype, and proven.

Only the five linears' own weights change, at their place in a copy of the base's files: everything
else, PLoRA and tower included, keeps its bytes, and one tensor at a time is in memory. The folder
appears under its name when `proof.compare` has found its answers to be those of base and adapter.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xc_ray.errors import CheckpointError, ConfigError
from xc_ray.model.adapter import Adapter, load_adapter, merged_weight
from xc_ray.model.layout import Layout, check_layout, read_layout
from xc_ray.model.shards import PublishedFile, published_files, tensor_bytes
from xc_ray.model.weights import Checkpoint
from xc_ray.proof import Proof, compare

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

SPARE_BYTES = 64 << 20  # of disk space, beside the files themselves
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Beside what every checkpoint needs; the code of a published model is not taken along.
_SMALL_FILES = (".md", ".txt", ".jinja")


def export_merged(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Proof:
    """Writes the checkpoint `target` with the adapter of a folder folded into the base of another.

    The proof holds one layer of base and merged model at a time on `device`: at 7B from bf16 files
    it takes about 5 GB, and the time of four prompts of a thousand tokens.

    Raises:
        ConfigError: the target exists, or there is no room for it.
        CheckpointError: base and adapter do not fit, or the merged model does not answer as they
            do; nothing is left behind.
    """
    target = Path(target)
    layout = read_layout(base)
    check_layout(layout)
    folded = load_adapter(adapter, layout.config, digest="", dtype=torch.float32)
    files = [*published_files(layout), *_small_files(layout)]
    _check_room(target, files)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        try:
            dtypes = _write(made, files, folded, progress)
        except OSError as e:
            raise ConfigError(f"cannot write {target}: {e.strerror}") from None
        proof = compare(
            Checkpoint.open(layout.folder),
            folded,
            Checkpoint.open(made),
            stored=min(dtypes, key=lambda d: torch.finfo(d).bits),
            device=torch.device(device),
            progress=progress,
        )
        if proof.effect <= proof.tolerance:
            logger.warning("the adapter's effect is too small for the logits to tell: %s", proof)
        if not proof.holds:
            raise CheckpointError(
                f"the merged model would not answer as base and adapter do: {proof}; "
                "serve base and adapter apart"
            )
        _refuse_existing(target)
        made.rename(target)
    return proof


def _write(
    made: Path, files: list[PublishedFile], adapter: Adapter, progress: Progress | None
) -> set[torch.dtype]:
    """Copies the files and folds the adapter into them; the dtypes of the weights it changed."""
    left = {f"model.layers.{layer}.{n}.weight": (layer, n) for layer, n in adapter.pairs}
    dtypes: set[torch.dtype] = set()
    for number, file in enumerate(files):
        if progress:
            progress(f"write {file.name}", number, len(files))
        if file.as_it_is:
            assert isinstance(file.source, Path)
            path = Path(shutil.copyfile(file.source, made / file.name))
        else:
            path = file.write(made)
        if path.suffix == ".safetensors":
            dtypes |= _fold(path, adapter, left)
        with path.open("rb") as f:
            os.fsync(f.fileno())
    if left:
        raise CheckpointError(f"no weight file holds {', '.join(left)}")
    return dtypes


def _fold(path: Path, adapter: Adapter, left: dict[str, tuple[int, str]]) -> set[torch.dtype]:
    """Changes a file's weights in place; takes those that are done from `left`."""
    dtypes = set()
    with path.open("r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header: dict[str, Any] = json.loads(f.read(length))
        for name in sorted(header.keys() & left.keys()):
            entry = header[name]
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{name} is stored as {entry['dtype']}, which an adapter cannot be merged into"
                )
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            f.seek(start)
            numbers = torch.frombuffer(bytearray(f.read(stop - start)), dtype=torch.uint8)
            weight = numbers.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
            merged = merged_weight(weight, adapter.pairs[left.pop(name)])
            if not bool(merged.isfinite().all()):
                raise CheckpointError(f"{name} exceeds what {weight.dtype} holds when merged")
            f.seek(start)
            f.write(tensor_bytes(merged))
            dtypes.add(weight.dtype)
    return dtypes


def _small_files(layout: Layout) -> list[PublishedFile]:
    return [
        PublishedFile(path.name, path)
        for path in sorted(layout.folder.iterdir())
        if (path.suffix in _SMALL_FILES or path.name.startswith("LICENSE"))
        and path.suffix != ".py"
        and path.is_file()
    ]


def _check_room(target: Path, files: list[PublishedFile]) -> None:
    _refuse_existing(target)
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder; make it first")
    needed = SPARE_BYTES + sum(
        f.source.stat().st_size if isinstance(f.source, Path) else len(f.source) for f in files
    )
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ConfigError(
            f"{target} needs {needed:,} bytes, {target.parent} has {free:,} left; free some"
        )


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists; name a folder that does not")
