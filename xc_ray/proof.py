"""Whether a merged checkpoint answers as base and adapter do: logits on text and picture prompts.

Both are computed in wide numbers (float32 for 16-bit weights, float64 for float32), so that what
differs is what merging did: every weight was rounded once to the stored dtype. How much of that is
in order is measured, not guessed: base and adapter are computed in the stored dtype as well, as a
server does, and what that loses against the wide result, times `SLACK`, is the tolerance. A merged
model within it is as near to base and adapter as their own serving is.

One layer at a time is in memory, of both models.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xc_ray.model.adapter import Adapter, AdapterOps
from xc_ray.model.attention import DenseAttend
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import packed_rope
from xc_ray.prompt.chat import ImageSlot, Message, render
from xc_ray.prompt.sequence import build_prompt, picture_grids
from xc_ray.prompt.tiles import make_canvas
from xc_ray.prompt.tokenizer import load_tokenizer

# Of the largest difference that computing in the stored dtype makes. Over 180 random models and
# adapters merging made at most 0.77 of it.
SLACK = 2.0
PICTURE = (600, 400)  # width, height in pixels
_PICTURE_SEED = 7

Part = str | ImageSlot
PROMPTS: tuple[tuple[Part, ...], ...] = (
    ("What is the capital of France, and which river runs through it?",),
    ("用一句话介绍一下黄山。",),
    ("Write a Python function that returns the n-th Fibonacci number.",),
    (ImageSlot(0), "Describe the picture in one sentence."),
)


@dataclass(frozen=True)
class Proof:
    """What was found: largest differences of any logit, over all positions of all prompts."""

    difference: float  # merged against base and adapter
    tolerance: float
    effect: float  # base and adapter against the base alone
    tokens: int
    same_tokens: int  # positions with the same likeliest next token
    dtype: torch.dtype  # of the weights

    @property
    def holds(self) -> bool:
        """Whether the merged model is within the tolerance; NaN is not, nor is all within inf."""
        return self.difference <= self.tolerance < math.inf

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.3g} (tolerance {self.tolerance:.3g} at "
            f"{self.dtype}, the adapter changes them by up to {self.effect:.3g}); the likeliest "
            f"next token is the same at {self.same_tokens:,} of {self.tokens:,} positions"
        )


def compare(
    base: Checkpoint,
    adapter: Adapter,
    merged: Checkpoint,
    *,
    stored: torch.dtype,
    device: torch.device,
    progress: Callable[[str, int, int], None] | None = None,
) -> Proof:
    """Runs the prompts through base, base with adapter, and the merged model.

    `stored` is the narrowest dtype of a merged weight.
    """
    narrow = stored if torch.finfo(stored).bits < 32 else torch.float32
    wide = torch.float32 if torch.finfo(narrow).bits < 32 else torch.float64
    prompts = _prompts(base)
    apart, folded = _Parts(base, wide, device), _Parts(merged, wide, device)
    rope = packed_rope(base.config, prompts.lengths, device, wide)
    attend = DenseAttend(prompts.lengths)
    with torch.no_grad():
        alone, rows = apart.embed(prompts)
        whole, _ = folded.embed(prompts)
        adapted, served = alone, alone.to(narrow)
        layers = base.config.decoder.num_hidden_layers
        for number in range(layers):
            if progress:
                progress("compare merged model with base and adapter", number, layers)

            def step(layer: nn.Module, x: Tensor, ops: Ops = PLAIN, number: int = number) -> Tensor:
                cos, sin = (t.to(x.dtype) for t in rope)
                result: Tensor = layer(x, (cos, sin), rows, attend, number, ops)
                return result

            with apart.part(f"model.layers.{number}") as layer:
                alone = step(layer, alone)
                adapted = step(layer, adapted, _layer_ops(layer, number, adapter))
                layer.to(narrow)
                served = step(layer, served, _layer_ops(layer, number, adapter))
            with folded.part(f"model.layers.{number}") as layer:
                whole = step(layer, whole)
        with folded.part("model.norm"), folded.part("output"):
            got = folded.decoder.logits(folded.decoder.model.norm(whole))
        with apart.part("model.norm"), apart.part("output"):
            head = apart.decoder
            wanted = head.logits(head.model.norm(adapted))
            effect = _largest(wanted, head.logits(head.model.norm(alone)))
            head.to(narrow)
            rough = _largest(wanted, head.logits(head.model.norm(served)))
    return Proof(
        difference=_largest(wanted, got),
        tolerance=SLACK * rough,
        effect=effect,
        tokens=len(wanted),
        same_tokens=int((wanted.argmax(1) == got.argmax(1)).sum()),
        dtype=stored,
    )


@dataclass(frozen=True)
class _Prompts:
    """All prompts laid end to end: virtual ids (T,) of pictures whose canvases stand beside."""

    ids: Tensor
    lengths: list[int]
    canvases: list[Tensor]


class _Parts:
    """A checkpoint's model, of which only what is used is on the device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        with torch.device("meta"):
            self.decoder = Decoder(checkpoint.config)

    @contextmanager
    def part(self, name: str) -> Iterator[nn.Module]:
        """The decoder's module of a name with its weights."""
        module = self.decoder.get_submodule(name)
        wanted = [f"{name}.{n}" for n in module.state_dict()]
        found = self.checkpoint.tensors(wanted, device=self.device, dtype=self.dtype)
        module.load_state_dict({n[len(name) + 1 :]: t for n, t in found}, assign=True)
        try:
            yield module
        finally:
            module.to("meta")

    def embed(self, prompts: _Prompts) -> tuple[Tensor, Tensor | None]:
        """Embeddings (T, C), and the rows that are pictures."""
        vision = self.checkpoint.load_vision(device=self.device, dtype=self.dtype)
        pictures = torch.cat(vision(prompts.canvases))
        del vision
        with self.part("model.tok_embeddings"):
            return self.decoder.embed(prompts.ids.to(self.device), pictures)


def _layer_ops(layer: nn.Module, number: int, adapter: Adapter) -> Ops:
    mine = {linear: pair for (at, linear), pair in adapter.pairs.items() if at == number}
    return AdapterOps({layer.get_submodule(linear): pair for linear, pair in mine.items()})


def _prompts(checkpoint: Checkpoint) -> _Prompts:
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.folder, config.decoder.vocab_size)
    picture = _picture()
    (grid,) = picture_grids(config, [picture.size], [1])
    canvas = torch.from_numpy(make_canvas(picture, grid, tiled=config.family.tiled).copy())
    ids: list[int] = []
    lengths: list[int] = []
    canvases: list[Tensor] = []
    for parts in PROMPTS:
        grids = [grid for part in parts if isinstance(part, ImageSlot)]
        segments = render(config, [Message("user", parts)])
        prompt = build_prompt(config, tokenizer, segments, grids)
        before = config.image_tokens(grid.rows, grid.cols) * len(canvases)
        vocab = config.decoder.vocab_size
        ids += [i + before if i >= vocab else i for i in prompt.ids]
        lengths.append(len(prompt.ids))
        canvases += [canvas] * len(grids)
    return _Prompts(torch.tensor(ids), lengths, canvases)


def _picture() -> Image.Image:
    """Coarse coloured noise: no two patches look alike."""
    generator = np.random.default_rng(_PICTURE_SEED)
    width, height = PICTURE
    coarse = generator.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
