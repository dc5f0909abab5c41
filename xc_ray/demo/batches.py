"""Drawn samples -> one batch of the demo model's training, the same for a step wherever it is made.

The prompt is serving's own (`train.data`, `prompt.tiles`). Pictures with the same grid are kept
together, so that the tower's side of a batch is a few large calls.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xc_ray.demo.drawn.hints import hints_of
from xc_ray.demo.drawn.tasks import Sample
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.chat import ImageSlot, Message
from xc_ray.prompt.tiles import Grid, image_grid, make_canvas
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.data import Example, encode_conversation
from xc_ray.train.network import Pack

Shape: TypeAlias = tuple[int, int]  # rows, cols
_STEP, _PART = 100_000, 10_000  # samples that a step and a part of it have to themselves
PICTURES_LAST = 0.2  # share of conversations whose pictures stand behind the question


@dataclass(frozen=True)
class Batch:
    """Conversations end to end, and their canvases by grid: uint8 (N, H, W, 3).

    Virtual ids count the rows of the pictures in the order of `canvases`; `image_rows` (Ti,) are
    their places. `things` and `colours` (N, P) uint8 are the labels of all squares, as
    `demo.drawn.hints` has them.
    """

    pack: Pack
    image_rows: Tensor
    canvases: dict[Shape, Tensor]
    things: Tensor
    colours: Tensor

    def pin_memory(self) -> "Batch":
        """The same in pages that a device copies without the CPU; a data loader calls it."""
        return self._each(lambda t: t.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def _each(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        pack = self.pack
        ids, wanted, targets = (move(t) for t in (pack.ids, pack.wanted, pack.targets))
        return Batch(
            Pack(ids, wanted, targets, pack.lengths, (), pack.predicts_behind_pictures),
            move(self.image_rows),
            {shape: move(c) for shape, c in self.canvases.items()},
            move(self.things),
            move(self.colours),
        )


def messages_of(sample: Sample, *, pictures_last: bool = False) -> list[Message]:
    """The conversation, its pictures before the first question or behind it."""
    messages = []
    for number, (question, answer) in enumerate(sample.turns):
        slots = tuple(ImageSlot(i) for i in range(len(sample.pictures)) if number == 0)
        parts: tuple[str | ImageSlot, ...] = (*slots, question)
        if pictures_last:
            parts = (question, *slots)
        messages += [Message("user", parts), Message("assistant", (answer,))]
    return messages


def grids_of(config: XComposerConfig, sample: Sample) -> list[Grid]:
    """As serving cuts them: another budget as soon as there are several."""
    budget = config.default_max_tiles(len(sample.pictures))
    return [image_grid(config, picture.size, budget) for picture in sample.pictures]


class Batches(Dataset[Batch]):
    """Batches of training, of at least `batch_tokens` tokens each; a map-style data set.

    Its keys are a step and the part of it. `draw(step, index)` gives a sample; parts share none.
    """

    def __init__(
        self,
        config: XComposerConfig,
        tokenizer: Tokenizer,
        draw: Callable[[int, int], Sample],
        *,
        batch_tokens: int,
    ) -> None:
        self.config, self.tokenizer, self.draw = config, tokenizer, draw
        self.batch_tokens = batch_tokens

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        step, part = key
        rows, total = [], 0
        for index in count(step * _STEP + part * _PART):
            sample = self.draw(step, index)
            grids = grids_of(self.config, sample)
            last = Random(f"place-{index}").random() < PICTURES_LAST
            messages = messages_of(sample, pictures_last=last)
            example = encode_conversation(self.config, self.tokenizer, messages, grids)
            rows.append((sample, grids, example))
            total += len(example.ids)
            if total >= self.batch_tokens:
                return collate(self.config, rows)
        raise AssertionError


def collate(
    config: XComposerConfig, rows: Sequence[tuple[Sample, Sequence[Grid], Example]]
) -> Batch:
    """Encoded samples -> one batch."""
    by_shape: dict[Shape, list[tuple[int, int]]] = {}
    for number, (_, grids, _) in enumerate(rows):
        for picture, grid in enumerate(grids):
            by_shape.setdefault((grid.rows, grid.cols), []).append((number, picture))
    first, offsets = config.decoder.vocab_size, dict(_offsets(config, by_shape))
    ids = [np.asarray(example.ids) for _, _, example in rows]
    for number, (_, _, example) in enumerate(rows):
        for span in example.spans:
            start = first + offsets[number, span.image]
            ids[number][span.start : span.start + span.length] = np.arange(
                start, start + span.length
            )
    canvases = {
        shape: torch.from_numpy(
            np.stack(
                [make_canvas(rows[n][0].pictures[p], rows[n][1][p], tiled=True) for n, p in places]
            )
        )
        for shape, places in by_shape.items()
    }
    hints = [
        hints_of(config, rows[n][0].scenes[p], rows[n][1][p])
        for places in by_shape.values()
        for n, p in places
    ]
    flat = torch.from_numpy(np.concatenate(ids))
    pack = Pack.of(
        flat,
        torch.tensor([label for _, _, example in rows for label in example.labels]),
        [len(i) for i in ids],
        (),
        first,
    )
    squares = config.vision.patches_per_side**2
    things, colours = (
        np.concatenate([np.zeros((0, squares), np.uint8), *labels])
        for labels in ([h.things for h in hints], [h.colours for h in hints])
    )
    return Batch(
        pack,
        (flat >= first).nonzero().squeeze(1),
        canvases,
        torch.from_numpy(things),
        torch.from_numpy(colours),
    )


def _offsets(
    config: XComposerConfig, by_shape: dict[Shape, list[tuple[int, int]]]
) -> Iterator[tuple[tuple[int, int], int]]:
    offset = 0
    for (rows, cols), places in by_shape.items():
        for place in places:
            yield place, offset
            offset += config.image_tokens(rows, cols)
