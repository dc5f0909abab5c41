"""The demo model while it is trained: its first weights, and the losses of a batch.

All of it is trained, which is what `train.network` never does; the layers and operations are the
same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xc_ray.demo.batches import Batch, Shape
from xc_ray.demo.drawn.hints import NUM_COLOURS, NUM_THINGS, UNKNOWN
from xc_ray.model.config import XComposerConfig
from xc_ray.model.ops import Ops
from xc_ray.model.projector import merge_patches
from xc_ray.model.rope import inverse_frequencies, rope_table
from xc_ray.model.vision import MEAN, STD
from xc_ray.model.xcomposer import XComposer
from xc_ray.train.network import attention

# Squares that go through the tower in one pass: they bound its activations.
MAX_SQUARES = 1024
_NOTHING = 0.05  # most patches show nothing


def initialise(model: XComposer, seed: int) -> None:
    """Small normal weights, smaller where a residual branch ends; PLoRA begins as nothing."""
    torch.manual_seed(seed)
    config = model.config
    depth = {
        "decoder": (2 * config.decoder.num_hidden_layers) ** -0.5,
        "vision": (2 * config.vision.num_hidden_layers) ** -0.5,
    }
    ends = ("wo.weight", "w2.weight", "out_proj.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.ones_(parameter)  # norms
        elif name.endswith("bias") or "Plora_B" in name:
            nn.init.zeros_(parameter)
        elif "patch_embedding" in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            std = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.02
            if "embed" in name:
                std = 0.02
            nn.init.normal_(
                parameter, std=std * (depth[name.split(".")[0]] if name.endswith(ends) else 1.0)
            )


class Hinter(nn.Module):
    """What a patch shows, told from the tower's output: two linear maps that only training has."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        size = config.vision.hidden_size
        self.thing, self.colour = nn.Linear(size, NUM_THINGS), nn.Linear(size, NUM_COLOURS)

    def forward(self, patches: Tensor, batch: Batch) -> Tensor:
        """The mean loss over patches (N, P, Cv); those that show nothing count `_NOTHING` each."""
        total = patches.new_zeros((), dtype=torch.float32)
        for head, labels in ((self.thing, batch.things), (self.colour, batch.colours)):
            labels = labels.flatten()
            weights = torch.where(labels == 0, _NOTHING, 1.0) * (labels != UNKNOWN)
            each = F.cross_entropy(
                head(patches.flatten(0, 1)).float(),
                torch.where(labels == UNKNOWN, 0, labels).long(),
                reduction="none",
            )
            total = total + (each * weights).sum() / weights.sum().clamp(min=1)
        return total


class Student(nn.Module):
    """All that is trained: the model, and what tells whether its tower sees."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        self.model, self.hinter = XComposer(config), Hinter(config)

    def forward(self, batch: Batch, ops: Ops) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch's learnt tokens, and the mean one of its hints.

        The batch is on the model's device.
        """
        seen = embed(self.model, batch.canvases) if batch.canvases else None
        hidden = hidden_states(self.model, batch, ops, None if seen is None else seen[0])
        logits: Tensor = self.model.decoder.output(hidden)
        loss = F.cross_entropy(logits.float(), batch.pack.targets, reduction="sum")
        hints = loss.new_zeros(()) if seen is None else self.hinter(seen[1], batch)
        return loss, hints


def hidden_states(model: XComposer, batch: Batch, ops: Ops, rows: Tensor | None) -> Tensor:
    """Hidden states (S, C) of the positions whose next token is learnt.

    `rows` (Ti, C) are the pictures' embeddings; None if the batch has none.
    """
    decoder, pack = model.decoder, batch.pack
    vocab = model.config.decoder.vocab_size
    x = decoder.model.tok_embeddings(pack.ids.clamp(max=vocab - 1))
    image_rows = None
    if rows is not None:
        # As `Decoder.embed`, which asks the device where pictures are, and waits for its answer.
        image_rows = batch.image_rows
        x = x.index_copy(0, image_rows, rows[pack.ids[image_rows] - vocab])
    longest = max(pack.lengths)
    assert longest <= model.config.decoder.max_position_embeddings  # one table serves them all
    table = rope_table(
        torch.arange(longest, device=x.device),
        inverse_frequencies(model.config.decoder, longest, device=x.device),
    )
    positions = torch.cat([torch.arange(n) for n in pack.lengths]).to(x.device, non_blocking=True)
    rope = (table[0][positions], table[1][positions])
    result: Tensor = decoder(x, rope, attention(pack.lengths, x), image_rows, ops, pack.wanted)
    return result


def embed(model: XComposer, canvases: Mapping[Shape, Tensor]) -> tuple[Tensor, Tensor]:
    """Canvases by grid, uint8 (N, H, W, 3) -> embeddings (Ti, C) in their order, and the patches.

    What `ImageEncoder` does for one picture after another, for all of a grid at once.
    """
    vision, side = model.vision, model.config.vision.patches_per_side
    squares = [_squares(model.config, c, vision.dtype) for c in canvases.values()]
    patches = torch.cat([vision.vit(part) for part in torch.cat(squares).split(MAX_SQUARES)])
    merged = merge_patches(patches, side, model.config.family.merge)
    newline, separator = vision.plora_sub_GN.view(-1), vision.plora_glb_GN.view(-1)
    parts = []
    for (rows, cols), own in zip(canvases, merged.split([len(s) for s in squares]), strict=True):
        each = own.unflatten(0, (-1, 1 + rows * cols))  # (N, 1 + tiles, m, m, Cp)
        parts.append(_lay_out(each, rows, cols, newline, separator))
    result: Tensor = vision.vision_proj(torch.cat(parts))
    return result, patches


def _lay_out(merged: Tensor, rows: int, cols: int, newline: Tensor, separator: Tensor) -> Tensor:
    """`projector.lay_out` of N pictures: (N, 1 + rows · cols, m, m, Cp) -> (N · Ti, Cp)."""
    n, _, m, _, c = merged.shape
    big = merged[:, 1:].view(n, rows, cols, m, m, c).transpose(2, 3)
    big = big.reshape(n, rows * m, cols * m, c)
    parts = (
        _with_newlines(merged[:, 0], newline),
        separator.expand(n, 1, c),
        _with_newlines(big, newline),
    )
    return torch.cat(parts, dim=1).flatten(0, 1)


def _with_newlines(x: Tensor, newline: Tensor) -> Tensor:
    ends = newline.expand(len(x), x.shape[1], 1, -1)
    return torch.cat((x, ends), dim=2).flatten(1, 2)


def _squares(config: XComposerConfig, canvases: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (N, H, W, 3) -> (N · (1 + tiles), 3, S, S): each picture's overview and its tiles."""
    s = config.tile
    mean, std = (torch.tensor(v, device=canvases.device)[:, None, None] for v in (MEAN, STD))
    x = canvases.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)
    overview = F.interpolate(x, size=(s, s), mode="bicubic", align_corners=False).to(dtype)
    n, _, height, width = x.shape
    tiles = x.to(dtype).view(n, 3, height // s, s, width // s, s).permute(0, 2, 4, 1, 3, 5)
    return torch.cat((overview[:, None], tiles.reshape(n, -1, 3, s, s)), dim=1).flatten(0, 1)
