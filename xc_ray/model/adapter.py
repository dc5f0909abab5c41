"""LoRA adapters (2106.09685) as peft saves them: every tensor bound to its linear, or refused.

W x + scaling · B (A x) on every row of the batch, on any of the five linears of a decoder layer;
PLoRA stays as it is. Names are those that peft gives over `model/hf.py` and over the original code:
`base_model.model.model.layers.0.attention.wqkv.lora_A.weight`, also `….lora_A.default.weight`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from xc_ray.errors import CheckpointError
from xc_ray.model.adapter_config import AdapterConfig, read_adapter_config, shown
from xc_ray.model.bin_file import load_bin
from xc_ray.model.config import PLORA_LINEARS, Shapes, XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.layout import name_list
from xc_ray.model.ops import Ops
from xc_ray.model.plora import ImageRows

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_BIN_FILE = "adapter_model.bin"
MAX_RANK = 64

Linear = tuple[int, str]  # layer and name: (0, "attention.wqkv")

_LINEARS = "|".join(re.escape(n) for n in PLORA_LINEARS)
_NAME = re.compile(
    rf"base_model\.model\.model\.layers\.(0|[1-9]\d{{0,4}})\.({_LINEARS})"
    r"\.lora_([AB])(?:\.default)?\.weight"
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What else a file may hold, and what is said of it; the first that is found in a name counts.
_ELSEWHERE = {
    ".Plora_": "on PLoRA, which stays as published",
    ".vit.": "on the vision tower, which adapters leave alone",
    ".vision_proj.": "on the projector, which adapters leave alone",
    "plora_glb_GN": "of the projector's separators, which adapters leave alone",
    "plora_sub_GN": "of the projector's separators, which adapters leave alone",
    "lora_magnitude_vector": "of DoRA, which is not served",
    ".bias": "biases, which adapters leave alone",
}


@dataclass(frozen=True)
class LoraPair:
    """A (R, in) and B (out, R) of one linear map."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """One adapter on the CPU; `rank` is its largest, `digest` tells it from all others."""

    digest: str
    rank: int
    pairs: Mapping[Linear, LoraPair]

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B."""
        return sum(p.a.nbytes + p.b.nbytes for p in self.pairs.values())


def load_adapter(
    folder: str | Path,
    config: XComposerConfig,
    *,
    digest: str,
    dtype: torch.dtype,
    max_rank: int = MAX_RANK,
) -> Adapter:
    """The adapter of a folder that peft saved, for a base of `config`; tensors in `dtype`.

    Raises:
        CheckpointError: lists every setting and every tensor that does not fit.
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    with _Tensors(folder) as tensors:
        bound, problems = _bind(tensors, settings, config, max_rank)
        parts = {place: tensors.load(name, dtype) for place, name in bound.items()}
    bad = sorted(bound[place] for place, t in parts.items() if not bool(t.isfinite().all()))
    if bad:
        problems.append(
            f"{len(bad)} with values that {dtype} cannot hold (NaN, inf): {name_list(bad)}"
        )
    if problems:
        raise CheckpointError(f"{folder} is not an adapter for this base: " + "; ".join(problems))
    pairs = {}
    for layer, linear in sorted({(layer, linear) for layer, linear, _ in parts}):
        a, b = parts[layer, linear, "A"], parts[layer, linear, "B"]
        pairs[layer, linear] = LoraPair(a, b, settings.scaling_of(_module(layer, linear), len(a)))
    return Adapter(digest, max(len(p.a) for p in pairs.values()), pairs)


def adapter_summary(folder: str | Path) -> dict[str, Any]:
    """Rank (the largest), alpha, linears and size, from the settings and tensor headers alone.

    Raises:
        CheckpointError: the folder is not one of an adapter.
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    with _Tensors(folder) as tensors:
        matches = {n: m for n in tensors.shapes if (m := _NAME.fullmatch(n))}
        found = {n: m for n, m in matches.items() if len(tensors.shapes[n]) == 2}
        if settings.problems or not found:
            problems = settings.problems or ("it has no tensor of a known name",)
            raise CheckpointError(f"{folder} is not an adapter: " + "; ".join(problems))
        return {
            "rank": max(tensors.shapes[n][0] for n, m in found.items() if m[3] == "A"),
            "alpha": settings.alpha,
            "rslora": settings.rslora,
            "targets": sorted({m[2] for m in found.values()}),
            "layers": len({m[1] for m in found.values()}),
            "parameters": sum(torch.Size(tensors.shapes[n]).numel() for n in found),
            "dtype": "/".join(sorted({tensors.dtypes[n] for n in found})),
        }


def merged_weight(weight: Tensor, pair: LoraPair) -> Tensor:
    """W + scaling · B A (out, in), computed in float32 at least, rounded once to W's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (t.to(weight.device, wide) for t in (pair.a, pair.b))
    return torch.addmm(weight.to(wide), b, a, alpha=pair.scaling).to(weight.dtype)


def merge_adapter(decoder: Decoder, adapter: Adapter) -> None:
    """Folds the adapter into the weights of the decoder's linears; PLoRA stays as it is."""
    with torch.no_grad():
        for module, pair in adapted_modules(decoder, adapter).items():
            assert isinstance(module, nn.Linear)
            module.weight.copy_(merged_weight(module.weight, pair))


class AdapterOps(Ops):
    """The plain meaning, with one adapter on every row: W x + scaling · B (A x)."""

    def __init__(self, pairs: Mapping[nn.Module, LoraPair]) -> None:
        self.pairs = pairs

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """x (T, in) -> (T, out)."""
        y = super().linear(module, x, image_rows)
        if (pair := self.pairs.get(module)) is None:
            return y
        a, b = (t.to(x.device, x.dtype) for t in (pair.a, pair.b))
        return y + pair.scaling * F.linear(F.linear(x, a), b)


def adapted_modules(decoder: Decoder, adapter: Adapter) -> dict[nn.Module, LoraPair]:
    """The decoder's linears that the adapter is for."""
    return {
        decoder.get_submodule(_module(layer, linear)): pair
        for (layer, linear), pair in adapter.pairs.items()
    }


def _module(layer: int, linear: str) -> str:
    return f"model.layers.{layer}.{linear}"


class _Tensors:
    """The tensors of an adapter file by name: shapes and dtypes first, values when asked for."""

    def __init__(self, folder: Path) -> None:
        self.shapes: Shapes
        self.dtypes: Mapping[str, str]
        self.path = folder / ADAPTER_FILE
        if self.path.exists():
            self._open_safetensors()
        elif (folder / ADAPTER_BIN_FILE).exists():
            self.path = folder / ADAPTER_BIN_FILE
            state = load_bin(self.path)
            if odd := [n for n, t in state.items() if t.layout is not torch.strided]:
                raise CheckpointError(f"{self.path} holds sparse tensors: {name_list(odd)}")
            self.shapes = {n: tuple(t.shape) for n, t in state.items()}
            self.dtypes = {n: str(t.dtype).removeprefix("torch.") for n, t in state.items()}
            self._get: Callable[[str], Tensor] = state.__getitem__
        else:
            raise CheckpointError(f"{folder} has no {ADAPTER_FILE}; save the adapter with peft")

    def _open_safetensors(self) -> None:
        try:
            file = safe_open(self.path, framework="pt", device="cpu")
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]  # from Rust
            headers = {n: file.get_slice(n) for n in names}  # type: ignore[no-untyped-call]  # same
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path} is damaged or cut short ({e})") from None
        self.shapes = {name: tuple(h.get_shape()) for name, h in headers.items()}
        kinds = {name: h.get_dtype() for name, h in headers.items()}
        self.dtypes = {name: _DTYPES.get(kind, kind) for name, kind in kinds.items()}
        self._get = file.get_tensor

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of its own: the file may change or go, a map of it would show that."""
        return self._get(name).to(dtype, copy=True).contiguous()

    def __enter__(self) -> "_Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        del self._get  # with it, the map of the file


def _bind(
    tensors: _Tensors, settings: AdapterConfig, config: XComposerConfig, max_rank: int
) -> tuple[dict[tuple[int, str, str], str], list[str]]:
    """(layer, linear, "A" or "B") -> name of its tensor, and what does not fit."""
    bound: dict[tuple[int, str, str], str] = {}
    problems = list(settings.problems)
    faults: dict[str, list[str]] = {}

    def fault(kind: str, text: str) -> None:
        faults.setdefault(kind, []).append(text)

    layers = config.decoder.num_hidden_layers
    for name, shape in sorted(tensors.shapes.items()):
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= layers:
            fault(_why_unknown(name, layers if match else None), shown(name))
            continue
        place = (int(match[1]), match[2], match[3])
        module = _module(*place[:2])
        if place in bound:
            fault("given twice", name)
        elif not settings.targets(module):
            fault("on linears that target_modules leaves out", name)
        elif tensors.dtypes[name] not in _DTYPES.values():
            fault("of no floating-point dtype", f"{name} is {tensors.dtypes[name]}")
        elif wanted := _misfit(shape, place, settings.rank_of(module), config):
            fault("of another shape", f"{name} is {list(shape)}, expected {wanted}")
        elif shape[place[2] == "B"] > max_rank:
            fault(f"of a rank above {max_rank}, which is the limit here", name)
        else:
            bound[place] = name
    seen = {m.groups() for n in tensors.shapes if (m := _NAME.fullmatch(n))}
    for layer in range(layers):
        for linear in PLORA_LINEARS:
            if settings.targets(_module(layer, linear)):
                for part in "AB":
                    if (str(layer), linear, part) not in seen:
                        name = f"base_model.model.{_module(layer, linear)}.lora_{part}.weight"
                        fault("missing", name)
    problems += [f"{len(names)} {kind}: {name_list(names)}" for kind, names in faults.items()]
    if not tensors.shapes:
        problems.append(f"{tensors.path.name} holds no tensor")
    elif not bound and not problems:
        problems.append("no tensor belongs to a linear of the base")
    return bound, problems


def _misfit(
    shape: Sequence[int],
    place: tuple[int, str, str],
    rank: int | None,
    config: XComposerConfig,
) -> list[int | str] | None:
    """The shape that a tensor should have; None if it has it."""
    _, linear, part = place
    out, into = config.linear_shapes[linear]
    wanted: list[int | str] = [rank or "R", into] if part == "A" else [out, rank or "R"]
    fits = len(shape) == 2 and all(
        n == w if isinstance(w, int) else n > 0 for n, w in zip(shape, wanted, strict=True)
    )
    return None if fits else wanted


def _why_unknown(name: str, layers: int | None) -> str:
    if layers is not None:
        return f"of layers that the base does not have ({layers})"
    for mark, why in _ELSEWHERE.items():
        if mark in name:
            return why
    return f"on no linear that takes an adapter ({', '.join(PLORA_LINEARS)})"
