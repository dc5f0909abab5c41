"""A query and its history -> messages with numbered slots, and what is said to stand in them.

Pictures are named in place, `<img>path-or-URL</img>`, or stand as `<ImageHere>` marks that a list
fills in order; both in any turn. Nothing is read here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from xc_ray.errors import InvalidRequest
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.chat import (
    IMAGE_MARK,
    ImageSlot,
    ImageTag,
    Message,
    split_image_tags,
    split_marks,
)

ImageSource: TypeAlias = str | Path | bytes  # a path, a URL, or file bytes
History: TypeAlias = list[tuple[str, str]]


@dataclass(frozen=True)
class Conversation:
    """Messages whose slots are numbered in the order of `sources`.

    `unmarked`: the one picture goes before the whole prompt (see `prompt.chat.render`).
    """

    messages: list[Message]
    sources: list[ImageSource]
    unmarked: bool = False


def conversation(
    config: XComposerConfig,
    history: History,
    query: str,
    system: str | None = None,
    images: Sequence[ImageSource] = (),
) -> Conversation:
    """Messages of a history and a query; a `system` of None leaves the family's text in place.

    `images` without any mark stand before the query; XComposer2.5 puts a single one before the
    whole prompt, as its own chat does.

    Raises:
        InvalidRequest: marks and `images` differ in number.
    """
    questions = [*(question for question, _ in history), query]
    marks = sum(q.count(IMAGE_MARK) for q in questions)
    if images and marks not in (0, len(images)):
        raise InvalidRequest(
            f"the text has {marks} {IMAGE_MARK} marks for {len(images)} pictures; "
            "give each picture one mark"
        )
    system_turn = [] if system is None else [Message("system", (system,))]
    alone = len(images) == 1 and not marks and not any("<img>" in q for q in questions)
    if alone and config.variant == "2.5":
        turns = _turns(history, query, (), [])
        return Conversation(system_turn + turns, list(images), unmarked=True)
    if images and not marks:
        query = IMAGE_MARK * len(images) + query
    sources: list[ImageSource] = []
    return Conversation(system_turn + _turns(history, query, images, sources), sources)


def history_pairs(history: Sequence[Sequence[str]]) -> History:
    """A history as (question, answer) pairs.

    Raises:
        InvalidRequest: shows the turn that is no pair of texts.
    """
    for turn in history:
        pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not pair or not all(isinstance(text, str) for text in turn):
            raise InvalidRequest(
                f"history is a list of pairs of texts, (question, answer); it holds {turn!r:.80}",
                param="history",
            )
    return [(question, answer) for question, answer in history]


def _turns(
    history: History, query: str, images: Sequence[ImageSource], sources: list[ImageSource]
) -> list[Message]:
    """Messages of all turns; adds each slot's source to `sources` in order."""
    given = iter(images)
    messages = []
    for question, answer in history:
        messages.append(Message("user", _parts(question, given, sources, marked=bool(images))))
        messages.append(Message("assistant", (answer,)))
    messages.append(Message("user", _parts(query, given, sources, marked=bool(images))))
    return messages


def _parts(
    text: str, given: Iterator[ImageSource], sources: list[ImageSource], *, marked: bool
) -> tuple[str | ImageSlot, ...]:
    """Text and slots of one question; without a list to fill them, marks are plain text."""
    parts: list[str | ImageSlot] = []
    for part in split_image_tags(text):
        if isinstance(part, ImageTag):
            parts.append(ImageSlot(len(sources)))
            sources.append(part.source)
            continue
        pieces = split_marks(part, len(sources)) if marked else (part,)
        sources += [next(given) for piece in pieces if isinstance(piece, ImageSlot)]
        parts += pieces
    return tuple(parts)
