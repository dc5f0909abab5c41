"""2×2 merge, row and overview separators, two-layer MLP -> picture embeddings (Ti, C)."""

import torch
from torch import Tensor, nn

from xc_ray.model.config import XComposerConfig


def merge_patches(patches: Tensor, side: int, merge: int) -> Tensor:
    """(N, side², C) -> (N, side / merge, side / merge, merge²·C).

    Order of the merged patches: top-left, top-right, bottom-left, bottom-right.
    """
    n, _, c = patches.shape
    m = side // merge
    x = patches.view(n, m, merge, m, merge, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(n, m, m, merge * merge * c)


def lay_out(merged: Tensor, rows: int, cols: int, newline: Tensor, separator: Tensor) -> Tensor:
    """Token order of one tiled picture, before the projector.

    merged (1 + rows·cols, m, m, Cp), overview first; newline, separator (Cp,) -> (Ti, Cp): the
    overview's rows each followed by a newline, one separator, then the tiles as one big picture,
    each whole row followed by a newline.
    """
    m, c = merged.shape[1], merged.shape[-1]
    big = merged[1:].view(rows, cols, m, m, c).permute(0, 2, 1, 3, 4).reshape(rows * m, cols * m, c)
    parts = [_with_newlines(merged[0], newline), separator.view(1, c), _with_newlines(big, newline)]
    return torch.cat(parts)


def _with_newlines(x: Tensor, newline: Tensor) -> Tensor:
    ends = newline.view(1, 1, -1).expand(x.shape[0], 1, -1)
    return torch.cat((x, ends), dim=1).flatten(0, 1)


def make_projector(config: XComposerConfig) -> nn.Sequential:
    """Linear, exact GELU, Linear (published as `vision_proj.0` and `.2`)."""
    size = config.decoder.hidden_size
    return nn.Sequential(nn.Linear(config.projector_in, size), nn.GELU(), nn.Linear(size, size))
