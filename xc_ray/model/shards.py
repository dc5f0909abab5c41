"""The files of a checkpoint as it is stored and passed on: safetensors, JSON, tokenizer; no code.

Old `.bin` shards stand here as the safetensors that hold the same tensors, byte for byte the same
whenever they are made: so a digest can be taken, and an import goes on, without a copy on disk.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xc_ray.errors import CheckpointError
from xc_ray.model.bin_file import load_bin
from xc_ray.model.layout import Layout

TOKENIZER_FILE = "tokenizer.model"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 8 << 20

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PublishedFile:
    """One file: its name in the folder, and where its bytes are (a `.bin` is converted)."""

    name: str
    source: Path | bytes

    @property
    def as_it_is(self) -> bool:
        """Whether the bytes are those of the source."""
        return isinstance(self.source, Path) and self.source.suffix != ".bin"

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file, part by part."""
        if isinstance(self.source, bytes):
            yield self.source
        elif self.source.suffix == ".bin":
            yield from safetensors_chunks(load_bin(self.source), self.source)
        else:
            with self.source.open("rb") as f:
                while chunk := f.read(CHUNK_BYTES):
                    yield chunk

    def write(self, folder: Path) -> Path:
        """Writes the file into a folder."""
        path = folder / self.name
        with path.open("wb") as f:
            for chunk in self.chunks():
                f.write(chunk)
        return path


def published_files(layout: Layout) -> list[PublishedFile]:
    """The weight files that the layout names, `*.json` beside them, and `tokenizer.model`.

    Raises:
        CheckpointError: weights are in files of other names.
    """
    folder = layout.folder
    weights = sorted(set(layout.files.values()))
    names = {path: _safetensors_name(path) for path in weights}
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{folder} has shards of one name in two formats; remove the old ones"
        )
    files = [PublishedFile(name, path) for path, name in names.items()]
    converted = any(path.suffix == ".bin" for path in weights)
    if converted and len(weights) > 1:
        files.append(PublishedFile(INDEX_FILE, _index(layout, names)))
    taken = {f.name for f in files}
    for path in sorted(folder.iterdir()):
        wanted = path.suffix == ".json" or path.name == TOKENIZER_FILE
        if not wanted or path.name.startswith(".") or not path.is_file():
            continue
        if path.name not in taken and not path.name.endswith(".bin.index.json"):
            files.append(PublishedFile(path.name, path))
    return sorted(files, key=lambda f: f.name)


def safetensors_chunks(tensors: Mapping[str, Tensor], where: Path) -> Iterator[bytes | memoryview]:
    """A safetensors file of these tensors, tensor by tensor, the same bytes for the same tensors.

    Raises:
        CheckpointError: tensors that the format does not know, such as sparse ones.
    """
    odd = [n for n, t in tensors.items() if t.dtype not in _DTYPES or t.layout != torch.strided]
    if odd:
        raise CheckpointError(f"{where} holds tensors that safetensors cannot: {', '.join(odd)}")
    # Wide numbers first keeps each tensor aligned to its own size.
    names = sorted(tensors, key=lambda n: (-tensors[n].itemsize, n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor on the CPU, row by row."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _safetensors_name(path: Path) -> str:
    if path.suffix not in (".bin", ".safetensors") or path.name.startswith("."):
        raise CheckpointError(
            f"{path.parent} keeps weights in {path.name}; they belong in *.safetensors or *.bin"
        )
    if path.suffix == ".safetensors":
        return path.name
    return path.stem.replace("pytorch_model", "model", 1) + ".safetensors"


def _index(layout: Layout, names: Mapping[Path, str]) -> bytes:
    old = layout.folder / "pytorch_model.bin.index.json"
    metadata = json.loads(old.read_text(encoding="utf-8")).get("metadata") or {}
    weight_map = {name: names[path] for name, path in sorted(layout.files.items())}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    return (text + "\n").encode()
