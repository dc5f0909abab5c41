"""Where a model folder keeps its tensors, and their shapes, without loading one.

Layouts: `model.safetensors`, `model-*.safetensors` with index, `pytorch_model.bin`,
`pytorch_model-*.bin` with index. Only the last two need torch.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xc_ray.errors import CheckpointError
from xc_ray.model.config import Shapes, XComposerConfig, read_config_json

LISTED = 20  # names of one kind in a message before "and N more"


@dataclass(frozen=True)
class Layout:
    """A folder's config, and shape and file of every tensor."""

    folder: Path
    config: XComposerConfig
    shapes: Shapes
    files: Mapping[str, Path]


def read_layout(folder: str | Path) -> Layout:
    """Reads `config.json` and the headers of the weight files.

    Raises:
        CheckpointError: a file is missing or damaged, or the config is not of this family.
    """
    folder = Path(folder)
    raw = read_config_json(folder)
    shapes, files = _headers(folder)
    return Layout(folder, XComposerConfig.from_dict(raw, shapes), shapes, files)


def _headers(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    paths = _files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for path in paths:
        for name, shape in (
            _bin_shapes(path) if path.suffix == ".bin" else _safetensors_shapes(path)
        ).items():
            shapes[name], files[name] = shape, path
    return shapes, files


def _files(folder: Path) -> list[Path]:
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(folder, index)
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
        loose = sorted(folder.glob(f"{stem}-*{suffix}"))
        if loose:
            raise CheckpointError(
                f"{folder} has {len(loose)} shards but no {index.name}; copy the index too"
            )
    raise CheckpointError(
        f"{folder} has no weights: "
        "neither model.safetensors nor pytorch_model.bin nor an index of shards"
    )


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(isinstance(n, str) for n in names):
            raise TypeError("a file name that is no string")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise CheckpointError(f"{index} is not an index of shards: {e!r}") from None
    if any(Path(n).name != n for n in names):
        raise CheckpointError(f"{index} names files outside its folder; copy the checkpoint whole")
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {name_list(missing)}; "
            "download them again"
        )
    return [folder / n for n in names]


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(f.read(length))
        header.pop("__metadata__", None)
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size:,} bytes, its header tells {8 + length + end:,}")
        return {name: tuple(t["shape"]) for name, t in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as e:
        raise CheckpointError(f"{path} is damaged or cut short ({e}); download it again") from None


def _bin_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from xc_ray.model.bin_file import load_bin  # torch, for this old layout only

    return {name: tuple(t.shape) for name, t in load_bin(path).items()}


def name_list(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
