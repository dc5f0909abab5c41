"""How many held-out samples of each kind a model answers exactly, on the device it is trained on.

An answer counts if each of its tokens, the end mark too, is the likeliest behind those before it:
then greedy decoding gives that answer. Earlier turns of a conversation are given as they should be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xc_ray.demo.batches import Batch, collate, grids_of, messages_of
from xc_ray.demo.drawn.fonts import Fonts
from xc_ray.demo.drawn.tasks import held_out_sample
from xc_ray.demo.network import embed, hidden_states
from xc_ray.model.config import XComposerConfig
from xc_ray.model.ops import Ops
from xc_ray.model.xcomposer import XComposer
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.data import IGNORED, Example, encode_conversation

ROWS = 25  # samples of one batch


@dataclass(frozen=True)
class Sheet:
    """Samples of one task as a batch that learns their last answers alone."""

    task: str
    batch: Batch


class Exam(Dataset[Sheet]):
    """`num` samples of each task, in sheets; a map-style data set."""

    def __init__(
        self,
        config: XComposerConfig,
        tokenizer: Tokenizer,
        fonts: Fonts,
        tasks: Sequence[str],
        *,
        num: int,
        seed: int,
    ) -> None:
        self.config, self.tokenizer, self.fonts, self.seed = config, tokenizer, fonts, seed
        starts = range(0, num, ROWS)
        self.parts = [(task, start, min(start + ROWS, num)) for task in tasks for start in starts]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Sheet:
        task, start, end = self.parts[number]
        rows = []
        for index in range(start, end):
            sample = held_out_sample(task, self.seed, index, self.fonts)
            grids = grids_of(self.config, sample)
            messages = messages_of(sample)
            example = encode_conversation(self.config, self.tokenizer, messages, grids)
            rows.append((sample, grids, _last_answer(self.config, example)))
        return Sheet(task, collate(self.config, rows))


def _last_answer(config: XComposerConfig, example: Example) -> Example:
    """The same with the last answer up to its end mark as all that is learnt."""
    marks = [i for i, token in enumerate(example.ids) if token == config.tokens.start_of_turn]
    end = example.ids.index(config.tokens.end_of_turn, marks[-1])
    labels = [label if marks[-1] < i <= end else IGNORED for i, label in enumerate(example.labels)]
    return replace(example, labels=labels)


@torch.no_grad()
def exact_answers(model: XComposer, batch: Batch, ops: Ops) -> list[bool]:
    """Which conversations of a batch, on the model's device, get their answers exactly."""
    pack = batch.pack
    rows = embed(model, batch.canvases)[0] if batch.canvases else None
    logits: Tensor = model.decoder.output(hidden_states(model, batch, ops, rows))
    right = (logits.argmax(-1) == pack.targets).cpu().numpy()
    ends = np.cumsum([0, *pack.lengths])
    places = np.searchsorted(pack.wanted.cpu().numpy(), ends)
    return [bool(right[start:end].all()) for start, end in pairwise(places)]
