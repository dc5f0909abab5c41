"""A frozen decoder with LoRA on its linears, and the loss of one pass through it.

LoRA is peft's (2106.09685): its layers hold the parameters and save them; `LoraOps` computes them
in the decoder's dtype, with one pass over the output instead of three.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from xc_ray.config import LoraOptions
from xc_ray.model.attention import Attend, DenseAttend, VarlenAttend
from xc_ray.model.decoder import Decoder, RMSNorm, rms_norm
from xc_ray.model.ops import Ops, Rope, unpack
from xc_ray.model.plora import ImageRows
from xc_ray.model.xcomposer import ImageEncoder, packed_rope
from xc_ray.train.data import IGNORED
from xc_ray.train.loss import head_loss

logger = logging.getLogger(__name__)

NAME = "default"  # peft's for the one adapter
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pack:
    """Conversations of one pass, end to end: ids and labels (T,) int64, their lengths in tokens.

    Picture positions are virtual ids that count the rows of all `canvases` together. `wanted` (S,)
    are the positions whose next token is learnt, `targets` (S,) those tokens.
    """

    ids: Tensor
    wanted: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    canvases: tuple[Tensor, ...] = ()
    predicts_behind_pictures: bool = False

    @classmethod
    def of(
        cls,
        ids: Tensor,
        labels: Tensor,
        lengths: Sequence[int],
        canvases: Iterable[Tensor],
        vocab_size: int,
    ) -> "Pack":
        """From ids and labels (T,)."""
        wanted = (labels[1:] != IGNORED).nonzero().squeeze(1)
        behind = bool((ids[wanted] >= vocab_size).any())
        return cls(ids, wanted, labels[wanted + 1], tuple(lengths), tuple(canvases), behind)

    def to(self, device: torch.device) -> "Pack":
        """The same with its ids on a device; canvases stay, the tower takes them there."""
        ids, wanted, targets = (
            (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)
            for t in (self.ids, self.wanted, self.targets)
        )
        return Pack(
            ids, wanted, targets, self.lengths, self.canvases, self.predicts_behind_pictures
        )


def add_lora(decoder: Decoder, options: LoraOptions, seed: int) -> PeftModel:
    """Freezes the decoder and wraps its linears `options.targets`; PLoRA is left alone.

    A is drawn by the seed and B is 0, both in float32, so that nothing changes before a step.
    """
    decoder.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft divides it, whatever it is
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        use_rslora=options.rslora,
    )
    return get_peft_model(decoder, config)


def wrapped_linears(decoder: nn.Module) -> list[str]:
    """The names of the linears that have a LoRA."""
    return [name for name, module in decoder.named_modules() if isinstance(module, LoraLayer)]


def name_linears(names: Sequence[str]) -> str:
    """Names for a person: one for all layers that have it, `model.layers.{0–31}.attention.wo`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number, linear = name.removeprefix("model.layers.").split(".", 1)
        layers.setdefault(linear, []).append(int(number))
    return ", ".join(f"model.layers.{{{_ranges(n)}}}.{linear}" for linear, n in layers.items())


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def lora_parameters(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {n: p for n, p in decoder.named_parameters() if p.requires_grad}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """A folder as peft saves it, which the registry takes."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


class LoraOps(Ops):
    """The plain meaning, with peft's layers computed as y = W x + scaling · B A dropout(x)."""

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        if not isinstance(module, LoraLayer):
            return super().linear(module, x, image_rows)
        y = module.get_base_layer()(x, image_rows)
        a, b = (getattr(module, part)[NAME].weight.to(x.dtype) for part in ("lora_A", "lora_B"))
        low = nn.functional.linear(module.lora_dropout[NAME](x), a)  # (T, R)
        return torch.addmm(y, low, b.T, alpha=module.scaling[NAME])


class FusedLoraOps(LoraOps):
    """`LoraOps` with its pointwise parts compiled, forward and backward, for a GPU.

    What stays for the backward pass is less, too: the compiler computes again what is cheap.
    """

    def __init__(self) -> None:
        compiled = partial(torch.compile, dynamic=True)
        self._norm, self._swiglu, self._unpack = map(compiled, (rms_norm, _swiglu, _unpack))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `Ops`."""
        assert isinstance(module, RMSNorm)
        result: Tensor = self._norm(x, module.weight, module.eps)
        return result

    def gated(self, w1: nn.Module, w3: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """See `Ops`."""
        result: Tensor = self._swiglu(
            self.linear(w1, x, image_rows), self.linear(w3, x, image_rows)
        )
        return result

    def attention(self, attend: Attend, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """See `Ops`."""
        return attend(layer, *self._unpack(qkv, *rope))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def _unpack(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = unpack(qkv, cos, sin)
    return q, k, v.contiguous()  # in the same kernel


def ops_for(device: torch.device) -> LoraOps:
    """What computes fastest there."""
    return FusedLoraOps() if device.type == "cuda" else LoraOps()


class Learner(nn.Module):
    """A pack and its pictures' embeddings -> the sum of the losses of its learnt tokens."""

    def __init__(self, decoder: Decoder, ops: Ops, *, recompute: bool) -> None:
        super().__init__()
        self.decoder, self.ops, self.recompute = decoder, ops, recompute

    def forward(self, pack: Pack, embeddings: Tensor | None) -> Tensor:
        """Embeddings (Ti, C) of all pictures in the order of their rows; None if there are none."""
        decoder = self.decoder
        x, image_rows = decoder.embed(pack.ids, embeddings)
        wide = torch.promote_types(x.dtype, torch.float32)
        rope = packed_rope(decoder.config, pack.lengths, x.device, wide)
        # The last layer is computed for the rows that predict alone, if all of these are text.
        early = not pack.predicts_behind_pictures and len(pack.wanted) > 0
        hidden = decoder(
            x,
            rope,
            attention(pack.lengths, x),
            image_rows,
            self.ops,
            pack.wanted if early else None,
            self.recompute and self.training,
        )
        if not early:
            hidden = hidden[pack.wanted]
        return head_loss(hidden, decoder.output.weight, pack.targets)


@torch.no_grad()
def embed_pictures(encoder: ImageEncoder, pack: Pack) -> Tensor | None:
    """Embeddings (Ti, C) of a pack's pictures by the frozen tower; None if there are none."""
    return torch.cat(encoder(pack.canvases)) if pack.canvases else None


def attention(lengths: Sequence[int], x: Tensor) -> Attend:
    """How the sequences of a pack attend: one call for all where the device has a kernel for it."""
    if x.is_cuda and x.dtype in _HALF and len(lengths) > 1:
        return VarlenAttend(lengths, x.device)
    return DenseAttend(lengths)
