"""Greedy answers to validation rows, as a served model would give them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import Ops
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.chat import render
from xc_ray.prompt.sequence import build_prompt
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.formats import parse_row
from xc_ray.train.generate import greedy_answer
from xc_ray.train.question import as_question
from xc_ray.train.store import StoredRow


@dataclass(frozen=True)
class Generation:
    """One answer beside what the data set has; `row` is the row's index, `images` its sources."""

    row: int
    place: str
    prompt: str
    answer: str
    reference: str
    images: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a line of JSON."""
        return asdict(self)


def generation(
    decoder: Decoder,
    ops: Ops,
    encoder: ImageEncoder,
    tokenizer: Tokenizer,
    stored: StoredRow,
    row: int,
    canvases: Callable[[int], Sequence[Tensor]],
    *,
    max_tokens: int,
) -> Generation:
    """The answer to the last question of a row.

    The prompt is what serving would make of it, but for the system text: a row without one was
    trained without one. `canvases(n)` gives the row's first n pictures.
    """
    config = encoder.config
    question = as_question(parse_row(stored.conversation), config, system="")
    pictures = len(question.pictures)
    segments = render(config, question.messages, unmarked_image=question.unmarked)
    grids = [picture.grid for picture in stored.pictures[:pictures]]
    prompt = build_prompt(config, tokenizer, segments, grids)
    with torch.no_grad():
        embeddings = torch.cat(encoder(canvases(pictures))) if pictures else None
    ids = greedy_answer(
        decoder,
        ops,
        prompt.ids,
        embeddings,
        max_tokens=max_tokens,
        stop_ids=config.stop_token_ids,
    )
    turns = question.as_json()["messages"]
    text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns if turn["content"])
    return Generation(
        row,
        str(stored.place),
        text,
        tokenizer.decode(ids),
        question.reference or "",
        tuple(p.source or "(in the data)" for p in stored.pictures),
    )
