"""Greedy answers to validation rows, as a served model would give them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import Ops
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.chat import ImageSlot, Message, render
from xc_ray.prompt.sequence import build_prompt
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.formats import parse_row
from xc_ray.train.generate import greedy_answer
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
    conversation = parse_row(stored.conversation)
    asked, reference = list(conversation.messages), ""
    while asked and asked[-1].role == "assistant":
        reference = "".join(p for p in asked.pop().parts if isinstance(p, str))
    slots = sum(isinstance(p, ImageSlot) for m in asked for p in m.parts)
    unmarked = not slots and len(stored.pictures) == 1
    pictures = 1 if unmarked else slots
    if unmarked and encoder.config.variant != "2.5":
        first = next(i for i, m in enumerate(asked) if m.role == "user")
        asked[first] = Message("user", (ImageSlot(0), *asked[first].parts))
        unmarked = False
    if asked[0].role != "system":
        asked.insert(0, Message("system", ()))
    prompt = build_prompt(
        encoder.config,
        tokenizer,
        render(encoder.config, asked, unmarked_image=unmarked),
        [p.grid for p in stored.pictures[:pictures]],
    )
    with torch.no_grad():
        embeddings = torch.cat(encoder(canvases(pictures))) if pictures else None
    ids = greedy_answer(
        decoder,
        ops,
        prompt.ids,
        embeddings,
        max_tokens=max_tokens,
        stop_ids=encoder.config.stop_token_ids,
    )
    text = "\n".join(
        f"{m.role}: " + "".join(p if isinstance(p, str) else "<image>" for p in m.parts)
        for m in asked
        if m.parts
    )
    return Generation(
        row,
        str(stored.place),
        text,
        tokenizer.decode(ids),
        reference,
        tuple(p.source or "(in the data)" for p in stored.pictures),
    )
