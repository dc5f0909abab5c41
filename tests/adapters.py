"""Adapters for tests: random LoRA folders in peft's format, written by hand or by peft itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import xc_ray.model.hf  # noqa: F401 - registers the Auto classes
from xc_ray.model.config import PLORA_LINEARS, XComposerConfig


def random_tensors(
    config: XComposerConfig,
    *,
    rank: int = 4,
    linears: Sequence[str] = PLORA_LINEARS,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A and B of every layer under the names that peft saves."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.decoder.num_hidden_layers):
        for linear in linears:
            out, into = config.linear_shapes[linear]
            stem = f"base_model.model.model.layers.{layer}.{linear}.lora_"
            a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank)
            tensors[stem + "A.weight"] = (a * into**-0.5).to(dtype)
            tensors[stem + "B.weight"] = (
                torch.randn(b.shape, generator=generator) * scale * rank**-0.5
            ).to(dtype)
    return tensors


def settings_of(
    rank: int = 4, alpha: float = 8, linears: Sequence[str] = PLORA_LINEARS
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "target_modules": list(linears),
        "bias": "none",
        "inference_mode": True,
    }


def write_adapter(
    folder: Path,
    config: XComposerConfig,
    *,
    rank: int = 4,
    linears: Sequence[str] = PLORA_LINEARS,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A random adapter in `folder`, which is returned."""
    folder.mkdir(parents=True)
    tensors = random_tensors(
        config, rank=rank, linears=linears, seed=seed, scale=scale, dtype=dtype
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = settings_of(rank, linears=linears) | settings
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def peft_model(base: Path, seed: int = 0, **options: Any) -> Any:
    """peft's model over a base folder, in float64, with random A and B."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    torch.manual_seed(seed)
    lora = LoraConfig(**{"target_modules": list(PLORA_LINEARS), "r": 4, **options})
    wrapped = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_().mul_(0.2)
    return wrapped
