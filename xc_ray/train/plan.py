"""Which rows each step learns from, and how they lie in the passes of each worker.

All of it follows from the rows' sizes, the options and the step's number: every worker computes the
whole plan by itself, a resumed run finds its place by its step alone, and another number of workers
divides the same steps differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xc_ray.config import StepOptions

# Rows of one pass through the network, end to end.
PackRows: TypeAlias = tuple[int, ...]
# Steps whose rows are sorted together by `group_by_length`: enough for alike lengths, and few
# enough that an epoch's steps still differ.
WINDOW_STEPS = 32


@dataclass(frozen=True)
class Sizes:
    """One number a row: its tokens, how many of them are learnt, and the index of its data set."""

    tokens: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.int64]
    part: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


class Plan:
    """Every step of a run; `rows_a_step` counts conversations over all workers.

    `weights[p]` is how often an epoch holds each row of data set p; the fraction is drawn anew for
    each epoch.
    """

    def __init__(
        self,
        sizes: Sizes,
        weights: Sequence[float],
        options: StepOptions,
        *,
        rows_a_step: int,
        pack_tokens: int,
    ) -> None:
        self.sizes, self.weights, self.options = sizes, tuple(weights), options
        self.rows_a_step, self.pack_tokens = rows_a_step, pack_tokens
        counts = np.bincount(sizes.part, minlength=len(weights))
        self.rows_an_epoch = sum(
            max(1, round(w * n)) if n else 0 for w, n in zip(self.weights, counts, strict=True)
        )
        self.steps_an_epoch = ceil(self.rows_an_epoch / rows_a_step)
        self._order = lru_cache(maxsize=2)(self._order_of)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        if self.options.max_steps is not None:
            return self.options.max_steps
        return max(1, ceil(self.options.epochs * self.steps_an_epoch))

    def rows(self, step: int) -> list[int]:
        """The rows of a step, counted from 0; the last step of an epoch may have fewer."""
        epoch, place = divmod(step, self.steps_an_epoch)
        return self._order(epoch)[place]

    def share(self, rows: Sequence[int], workers: int) -> list[list[PackRows]]:
        """The passes of each worker over the rows of one step; a worker may have none.

        Rows go to whoever has fewest tokens so far, the longest first.
        """
        return divide(
            self.sizes.tokens,
            rows,
            workers,
            max_rows=self.options.batch_size if self.options.packing else 1,
            max_tokens=self.pack_tokens,
        )

    def _order_of(self, epoch: int) -> list[list[int]]:
        draw = np.random.default_rng((self.options.seed, epoch))
        order = draw.permutation(np.concatenate([*self._chosen(draw)]))
        n = self.rows_a_step
        if not self.options.group_by_length:
            return [order[i : i + n].tolist() for i in range(0, len(order), n)]
        steps = []
        for start in range(0, len(order), n * WINDOW_STEPS):
            window = order[start : start + n * WINDOW_STEPS]
            window = window[np.argsort(-self.sizes.tokens[window], kind="stable")]
            steps += [window[i : i + n].tolist() for i in range(0, len(window), n)]
        return [steps[i] for i in draw.permutation(len(steps))]

    def _chosen(self, draw: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """Rows of one epoch by data set: whole rounds, and a draw for the fraction."""
        chosen = []
        for part, weight in enumerate(self.weights):
            rows = np.flatnonzero(self.sizes.part == part)
            if len(rows):
                rounds, rest = divmod(max(1, round(weight * len(rows))), len(rows))
                chosen += [rows] * rounds + [draw.choice(rows, rest, replace=False)]
        return chosen


def divide(
    tokens: npt.NDArray[np.int64],
    rows: Sequence[int],
    workers: int,
    *,
    max_rows: int,
    max_tokens: int,
) -> list[list[PackRows]]:
    """Rows -> the passes of each worker: at most `max_rows` and `max_tokens` each.

    A row above `max_tokens` has a pass to itself. First fit, the longest first.
    """
    longest_first = sorted(rows, key=lambda row: -int(tokens[row]))
    loads = [0] * workers
    mine: list[list[int]] = [[] for _ in range(workers)]
    for row in longest_first:
        to = min(range(workers), key=lambda worker: (loads[worker], len(mine[worker])))
        loads[to] += int(tokens[row])
        mine[to].append(row)
    return [_packs(tokens, own, max_rows, max_tokens) for own in mine]


def _packs(
    tokens: npt.NDArray[np.int64], rows: Sequence[int], max_rows: int, max_tokens: int
) -> list[PackRows]:
    packs: list[list[int]] = []
    room: list[int] = []  # tokens that still fit
    for row in rows:
        size = int(tokens[row])
        for i, pack in enumerate(packs):
            if len(pack) < max_rows and size <= room[i]:
                pack.append(row)
                room[i] -= size
                break
        else:
            packs.append([row])
            room.append(max_tokens - size)
    return [tuple(pack) for pack in packs]
