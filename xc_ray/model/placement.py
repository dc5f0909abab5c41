"""Where the rows of each square stand among a picture's embeddings.

The projector works row by row, so squares may be projected one by one, in any pass, and then put
in place: the result is that of `projector.lay_out` and the projector over the whole picture.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xc_ray.model.config import XComposerConfig

Rows = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Separators:
    """Projected vectors (C,): the newline behind every row, and what parts overview and tiles."""

    newline: Rows
    separator: Rows


class Placement:
    """One picture's embeddings (Ti, C), filled square by square: the overview is square 0.

    `separators` are None for untiled variants, whose one square is the whole picture.
    """

    def __init__(
        self,
        config: XComposerConfig,
        rows: int,
        cols: int,
        dtype: npt.DTypeLike,
        separators: Separators | None,
    ) -> None:
        size = config.decoder.hidden_size
        self.embeddings: Rows = np.empty((config.image_tokens(rows, cols), size), dtype)
        if separators is None:
            self._squares = [self.embeddings]
            return
        m = config.tokens_per_side
        ends = m * (m + 1)
        overview = self.embeddings[:ends].reshape(m, m + 1, size)
        big = self.embeddings[ends + 1 :].reshape(rows * m, cols * m + 1, size)
        overview[:, -1] = big[:, -1] = separators.newline
        self.embeddings[ends] = separators.separator
        tiles = [
            big[r * m : (r + 1) * m, c * m : (c + 1) * m] for r in range(rows) for c in range(cols)
        ]
        self._squares = [overview[:, :-1], *tiles]

    def put(self, first: int, rows: Rows) -> None:
        """Rows (N, R, C) of the squares from `first` on."""
        for place, block in zip(self._squares[first:], rows, strict=False):
            place[...] = block.reshape(place.shape)
