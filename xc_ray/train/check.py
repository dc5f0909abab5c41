"""One conversation, checked whole: every picture opened, everything encoded as it will be learnt.

Grids, ids and pictures are those of serving (`prompt.tiles`, `prompt.sequence`), but for what
`train.data` says. A text is never cut inside; of a conversation past `max_length` whole turns may
go (`cut_history`).
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from xc_ray.config import DataOptions
from xc_ray.errors import InvalidRequest, MediaError
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.chat import ImageSlot, Message
from xc_ray.prompt.tiles import Grid, image_grid, open_image
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.data import Example, encode_conversation
from xc_ray.train.reading import read_picture
from xc_ray.train.rows import CheckedRow, Conversation, Picture, PictureSource, Place
from xc_ray.train.sources import NOT_JSON

SHOWN_CHARS = 200  # of a picture's source in a message
Kind: TypeAlias = Literal["json", "format", "picture", "answer", "length", "duplicate"]


@dataclass(frozen=True)
class Finding:
    """What is worth knowing about one row, and what to do about it."""

    place: Place
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Outcome:
    """What became of a row: checked, bad, or (with neither) left out; perhaps with a warning."""

    row: CheckedRow | None = None
    problem: Finding | None = None
    warning: Finding | None = None


@dataclass(frozen=True)
class Item:
    """A row as it was read; `part` is the index of its data set."""

    place: Place
    part: int
    said: Conversation | InvalidRequest


class RowCheck:
    """Checks rows for one model under one set of options; travels to other processes."""

    def __init__(self, config: XComposerConfig, tokenizer: Tokenizer, options: DataOptions) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.options = options
        self.max_length = options.max_length or config.decoder.max_length

    def __call__(self, item: Item) -> Outcome:
        """What becomes of a row.

        Raises:
            RegistryError: object storage fails, which says nothing about the row.
        """
        try:
            if isinstance(item.said, InvalidRequest):
                kind: Kind = "json" if item.said.code == NOT_JSON else "format"
                raise _Bad(kind, item.said.message)
            return self._checked(item, item.said)
        except _Bad as e:
            found = Finding(item.place, e.kind, e.reason)
            if e.kind == "length" and self.options.on_long == "skip":
                return Outcome(warning=found)
            return Outcome(problem=found)

    def _checked(self, item: Item, said: Conversation) -> Outcome:
        _check_answers(said.messages)
        files = [_opened(source) for source in said.pictures]
        dropped = 0
        while True:
            grids = self._grids(files)
            example = self._encoded(said.messages, grids)
            if len(example.ids) <= self.max_length:
                break
            shorter = _without_oldest(said) if self.options.on_long == "cut_history" else None
            if shorter is None:
                raise _Bad("length", self._too_long(example, dropped))
            kept, messages = shorter
            said = Conversation(messages, tuple(said.pictures[i] for i in kept))
            files = [files[i] for i in kept]
            dropped += 1
        pictures = tuple(
            Picture(file.source, file.digest, grid, file.data)
            for file, grid in zip(files, grids, strict=True)
        )
        warning = None
        if dropped:
            reason = f"its {_pairs(dropped)} cut, max_length is {self.max_length:,}"
            warning = Finding(item.place, "length", reason)
        return Outcome(CheckedRow(item.place, item.part, said, example, pictures), warning=warning)

    def _grids(self, files: Sequence["_File"]) -> list[Grid]:
        # As `prompt.sequence.picture_grids`, with the transform of the options.
        budget = self.options.max_tiles or self.config.default_max_tiles(len(files))
        transform = self.options.image_transform
        return [image_grid(self.config, file.size, budget, transform) for file in files]

    def _encoded(self, messages: Sequence[Message], grids: Sequence[Grid]) -> Example:
        try:
            return encode_conversation(
                self.config, self.tokenizer, messages, grids, max_length=sys.maxsize
            )
        except InvalidRequest as e:
            raise _Bad("format", e.message) from None

    def _too_long(self, example: Example, dropped: int) -> str:
        images = sum(span.length for span in example.spans)
        pictures = f" ({images:,} for {len(example.spans)} pictures)" if images else ""
        what = "its last question and answer alone take" if dropped else "the conversation takes"
        options = self.options.on_long
        other = "" if options == "cut_history" else " or set on_long to skip or cut_history"
        tiles = "lower max_tiles, " if images else ""
        return (
            f"{what} {len(example.ids):,} tokens{pictures}, max_length is {self.max_length:,}; "
            f"shorten it, {tiles}raise max_length{other}"
        )


def row_digest(row: CheckedRow) -> str:
    """Sha256 (hex) over what is learnt from a row: ids, labels, and pictures on their grids."""
    digest = hashlib.sha256(f"{len(row.example.ids)} ".encode())
    digest.update(array("q", row.example.ids).tobytes())
    digest.update(array("q", row.example.labels).tobytes())
    for picture in row.pictures:
        digest.update(f"{picture.digest} {picture.grid}\n".encode())
    return digest.hexdigest()


class _Bad(Exception):
    """Ends the check of one row."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind: Kind = kind
        self.reason = reason


@dataclass(frozen=True)
class _File:
    """A picture that was opened whole: width and height as displayed; `data` as in `Picture`."""

    source: str
    size: tuple[int, int]
    digest: str
    data: bytes | None


def _opened(source: PictureSource) -> _File:
    try:
        data = read_picture(source)
    except MediaError as e:
        raise _Bad("picture", e.message) from None
    try:
        size = open_image(data).size
    except MediaError as e:
        shown = "in the row itself" if _has_no_address(source) else f"{source!r:.{SHOWN_CHARS}}"
        raise _Bad("picture", f"the picture {shown}: {e.message}") from None
    digest = hashlib.sha256(data).hexdigest()
    if _has_no_address(source):
        return _File("", size, digest, data)
    return _File(str(source), size, digest, None)


def _has_no_address(source: PictureSource) -> bool:
    return isinstance(source, bytes) or source[:5].lower() == "data:"


def _check_answers(messages: Sequence[Message]) -> None:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise _Bad(
            "answer",
            "the conversation has no answer, so that nothing can be learnt from it; add one or "
            "leave the row out",
        )
    for number, answer in enumerate(answers, 1):
        if not any(isinstance(part, ImageSlot) or part.strip() for part in answer.parts):
            which = "the answer" if len(answers) == 1 else f"answer {number} of {len(answers)}"
            raise _Bad(
                "answer",
                f"{which} is empty, from which only silence can be learnt; fill it in or leave "
                "the row out",
            )


def _without_oldest(said: Conversation) -> tuple[list[int], tuple[Message, ...]] | None:
    """Which pictures stay, and the messages, without the oldest question and its answer.

    The system turn stays, and a picture without a slot, which belongs to the whole. None if no
    answer would be left.
    """
    instructed = said.messages[:1] if said.messages[0].role == "system" else ()
    turns = said.messages[len(instructed) + 2 :]
    if not any(turn.role == "assistant" for turn in turns):
        return None
    left = (*instructed, *turns)
    if not _slots(said.messages):
        return list(range(len(said.pictures))), left
    kept = _slots(left)
    number = {old: new for new, old in enumerate(kept)}
    renumbered = [
        Message(
            turn.role,
            tuple(
                ImageSlot(number[part.index]) if isinstance(part, ImageSlot) else part
                for part in turn.parts
            ),
        )
        for turn in left
    ]
    return kept, tuple(renumbered)


def _slots(messages: Sequence[Message]) -> list[int]:
    parts = [part for message in messages for part in message.parts]
    return [part.index for part in parts if isinstance(part, ImageSlot)]


def _pairs(number: int) -> str:
    return "oldest turn was" if number == 1 else f"{number} oldest turns were"
