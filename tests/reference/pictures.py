"""Where each token of a picture comes from (2404.06512, 2407.03320), told by coordinates."""

import math

import torch
from torch import Tensor


def tiled_tokens(
    patches: Tensor, side: int, rows: int, cols: int, newline: Tensor, separator: Tensor
) -> Tensor:
    """Projector inputs of one tiled picture.

    patches (1 + rows·cols, side², C), overview first; newline, separator (4 C,). A token is the
    four patches of a 2 × 2 block: top-left, top-right, bottom-left, bottom-right.
    """
    half = side // 2

    def block(square: int, y: int, x: int) -> Tensor:
        corners = ((2 * y, 2 * x), (2 * y, 2 * x + 1), (2 * y + 1, 2 * x), (2 * y + 1, 2 * x + 1))
        return torch.cat([patches[square, row * side + col] for row, col in corners])

    tokens = []
    for y in range(half):
        tokens += [block(0, y, x) for x in range(half)]
        tokens.append(newline)
    tokens.append(separator)
    for y in range(rows * half):
        for x in range(cols * half):
            tile = 1 + y // half * cols + x // half
            tokens.append(block(tile, y % half, x % half))
        tokens.append(newline)
    return torch.stack(tokens)


def bicubic(x: Tensor, size: int) -> Tensor:
    """x (3, H, W) resized to (3, size, size) by Keys' cubic (1981, a = −3/4), no antialiasing.

    Pixels are areas: the middle of output pixel i lies at (i + ½)·H / size − ½; edges are repeated.
    """
    for dim in (1, 2):
        x = x.transpose(dim, -1)
        length = x.shape[-1]
        columns = []
        for i in range(size):
            at = (i + 0.5) * length / size - 0.5
            base = math.floor(at)
            column = torch.zeros_like(x[..., 0])
            for j in range(base - 1, base + 3):
                column += _cubic(abs(at - j)) * x[..., min(max(j, 0), length - 1)]
            columns.append(column)
        x = torch.stack(columns, -1).transpose(dim, -1)
    return x


def _cubic(t: float, a: float = -0.75) -> float:
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0
