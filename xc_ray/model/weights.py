"""Published checkpoints in and out, each checked whole before anything loads.

The check lists every missing, unexpected and misshapen tensor. Layouts read: `model.safetensors`,
`model-*.safetensors` with index, `pytorch_model.bin`, `pytorch_model-*.bin` with index (weights
only: no code of a pickle runs). Written: safetensors, sharded past a size.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xc_ray.errors import CheckpointError
from xc_ray.model.bin_file import load_bin
from xc_ray.model.config import CONFIG_FILE, XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.layout import EXTRA_LORA, Layout, check_layout, read_layout
from xc_ray.model.xcomposer import ImageEncoder, XComposer

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint(Layout):
    """A model folder whose tensors are known to be one whole model; nothing is loaded yet."""

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Reads config and tensor headers, and checks that they are one whole model.

        Raises:
            CheckpointError: lists every missing, unexpected and misshapen tensor, or the missing
            files.
        """
        layout = read_layout(folder)
        check_layout(layout)
        return cls(layout.folder, layout.config, layout.shapes, layout.files)

    @property
    def extra_lora(self) -> tuple[str, ...]:
        """Names of adapter sets that the checkpoint carries and base mode does not use."""
        return tuple(sorted({m[1] for n in self.shapes if (m := EXTRA_LORA.search(n))}))

    def load(
        self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> XComposer:
        """The whole model."""
        return self._load(XComposer, device, dtype)

    def load_vision(
        self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> ImageEncoder:
        """Tower and projector alone."""
        return self._load(ImageEncoder, device, dtype)

    def load_decoder(
        self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Decoder:
        """The language model alone."""
        return self._load(Decoder, device, dtype)

    def _load(
        self,
        make: Callable[[XComposerConfig], Module],
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> Module:
        with torch.device("meta"):
            module = make(self.config)
        wanted = {
            published_name(n) if make is XComposer else n: n
            for n in module.state_dict(keep_vars=True)
        }
        if self.extra_lora and make is not ImageEncoder:
            logger.info("extra LoRA sets %s are not used in base mode", ", ".join(self.extra_lora))
        state = {wanted[n]: t for n, t in self.tensors(wanted, device=device, dtype=dtype)}
        module.load_state_dict(state, assign=True)
        _fill_buffers(module, device)
        return module.eval().requires_grad_(False)

    def tensors(
        self, names: Iterable[str], *, device: str | torch.device, dtype: torch.dtype
    ) -> Iterable[tuple[str, Tensor]]:
        """The named tensors, file by file, each on `device` in `dtype`."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, group in by_file.items():
            yield from _read(path, group, device, dtype)


def published_name(name: str) -> str:
    """`vision.vit…` or `decoder.model…` of `XComposer` -> the published tensor name."""
    return name.split(".", 1)[1]


def published_state(model: XComposer) -> dict[str, Tensor]:
    """The model's tensors under their published names."""
    return {published_name(n): t for n, t in model.state_dict().items()}


def save_checkpoint(
    folder: str | Path,
    config: XComposerConfig,
    state: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `folder`: config.json, every field explicit; safetensors under published names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        dict(state), folder, max_shard_size=max_shard_bytes, metadata={"format": "pt"}
    )
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _fill_buffers(module: nn.Module, device: str | torch.device) -> None:
    """Gives values to CLIP's position ids: a buffer made on meta that no checkpoint holds."""
    for sub in module.modules():
        for name, buffer in sub.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", name
                sub._buffers[name] = torch.arange(buffer.shape[-1], device=device)[None]


def _read(
    path: Path, names: list[str], device: str | torch.device, dtype: torch.dtype
) -> Iterable[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        state = load_bin(path)
        for name in names:
            yield name, state[name].to(device=device, dtype=dtype, copy=True)
        return
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            for name in names:
                yield name, f.get_tensor(name).to(dtype=dtype)
    except SafetensorError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
