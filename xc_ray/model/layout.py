"""Where a model folder keeps its tensors, and their shapes, without loading one.

Layouts: `model.safetensors`, `model-*.safetensors` with index, `pytorch_model.bin`,
`pytorch_model-*.bin` with index. Only the last two need torch.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xc_ray.errors import CheckpointError
from xc_ray.model.config import VISION_PREFIX, Shapes, XComposerConfig, read_config_json

# Tensors that may stand in a published file and mean nothing to the model.
_IGNORED = re.compile(r"(\.post_layernorm\.|position_ids$|rotary_emb\.inv_freq$|^video_mem_proj\.)")
# Adapter sets of 2.5 for articles and web pages; base mode leaves them off.
EXTRA_LORA = re.compile(r"\.(lora_[a-z0-9]+)_[AB]\.weight$")
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


def check_layout(layout: Layout) -> None:
    """Whether the tensors are one whole model, the one that the config describes.

    Raises:
        CheckpointError: lists every missing, unexpected and misshapen tensor.
    """
    folder, found = layout.folder, layout.shapes
    expected = expected_shapes(layout.config)
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(
        n
        for n in found.keys() - expected.keys()
        if not _IGNORED.search(n) and not EXTRA_LORA.search(n)
    )
    misshapen = [
        f"{n} is {list(found[n])}, config.json asks for {list(expected[n])}"
        for n in sorted(expected.keys() & found.keys())
        if tuple(found[n]) != tuple(expected[n])
    ]
    if not (missing or unexpected or misshapen):
        return
    parts = [
        f"{len(names)} {kind}: {name_list(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    raise CheckpointError(
        f"{folder} does not hold the model that its config.json describes; " + "; ".join(parts)
    )


def expected_shapes(config: XComposerConfig) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every tensor of a model."""
    d = config.decoder
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (d.vocab_size, d.hidden_size),
        "model.norm.weight": (d.hidden_size,),
        "output.weight": (d.vocab_size, d.hidden_size),
    }
    for number in range(d.num_hidden_layers):
        layer = f"model.layers.{number}."
        shapes[layer + "attention_norm.weight"] = shapes[layer + "ffn_norm.weight"] = (
            d.hidden_size,
        )
        for name, (out, into) in config.linear_shapes.items():
            rank = config.plora[name].rank
            shapes[f"{layer}{name}.weight"] = (out, into)
            shapes[f"{layer}{name}.Plora_A.weight"] = (rank, into)
            shapes[f"{layer}{name}.Plora_B.weight"] = (out, rank)
            if d.bias and name.startswith("attention."):
                shapes[f"{layer}{name}.bias"] = (out,)
    return shapes | _vision_shapes(config)


def _vision_shapes(config: XComposerConfig) -> dict[str, tuple[int, ...]]:
    v, size = config.vision, config.decoder.hidden_size
    c, inner = v.hidden_size, v.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        VISION_PREFIX + "embeddings.class_embedding": (c,),
        VISION_PREFIX + "embeddings.patch_embedding.weight": (c, 3, v.patch_size, v.patch_size),
        VISION_PREFIX + "embeddings.position_embedding.weight": (v.num_positions, c),
    }
    maps = {f"self_attn.{name}_proj": (c, c) for name in ("q", "k", "v", "out")}
    maps |= {"mlp.fc1": (inner, c), "mlp.fc2": (c, inner)}
    affine: dict[str, tuple[int, ...]] = {VISION_PREFIX + "pre_layrnorm": (c,)}
    for number in range(v.num_hidden_layers):
        layer = f"{VISION_PREFIX}encoder.layers.{number}."
        affine |= {layer + name: shape for name, shape in maps.items()}
        affine |= {layer + "layer_norm1": (c,), layer + "layer_norm2": (c,)}
    affine |= {"vision_proj.0": (size, config.projector_in), "vision_proj.2": (size, size)}
    for name, shape in affine.items():
        shapes[name + ".weight"] = shape
        shapes[name + ".bias"] = shape[:1]
    if config.family.tiled:
        shapes["plora_glb_GN"] = (1, 1, config.projector_in)
        shapes["plora_sub_GN"] = (1, 1, 1, config.projector_in)
    return shapes


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
