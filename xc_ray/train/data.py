"""Conversations -> ids and labels, in the turn format of serving.

    BOS [start]user ⏎ … [end] ⏎ [start]assistant ⏎ … [end] ⏎ EOS

Learnt are the text and the end mark of each answer; behind the last one the newline and EOS too.
Who speaks is marked by role, so that a system turn changes nothing (the original counts end marks,
and a system turn makes it learn the user's words). Three things differ from a served prompt, all as
the weights were trained: BOS comes once, with the first text, in every variant; no default system
text is added; the text of each turn is stripped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.chat import (
    ImageSlot,
    Mark,
    Message,
    Role,
    Segment,
    check_order,
    render,
    split_marks,
)
from xc_ray.prompt.sequence import ImageSpan, check_slots
from xc_ray.prompt.tiles import Grid
from xc_ray.prompt.tokenizer import Tokenizer

IGNORED = -100  # the label of a position that is not learnt (torch's own default)
_ANSWER_HEAD = "assistant\n"


@dataclass(frozen=True)
class Example:
    """One conversation: `labels[i]` is `ids[i]` where it is learnt and `IGNORED` elsewhere.

    Image positions are virtual ids `vocab_size + row`, rows counted in the order of `spans`.
    """

    ids: list[int]
    labels: list[int]
    spans: tuple[ImageSpan, ...]

    @property
    def num_supervised(self) -> int:
        """Positions that are learnt."""
        return sum(label != IGNORED for label in self.labels)


def parse_turns(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The family's `{"from": …, "value": …}` turns as messages, `<ImageHere>` as slots in order.

    "user" and "human" ask and "system" instructs, in any case; every other name answers.

    Raises:
        InvalidRequest: a turn whose `from` or `value` is missing or no string; names the turn.
    """
    messages: list[Message] = []
    num_slots = 0
    for i, turn in enumerate(turns):
        speaker, text = (_string(turn, i, key) for key in ("from", "value"))
        parts = split_marks(text, num_slots)
        num_slots += sum(isinstance(part, ImageSlot) for part in parts)
        messages.append(Message(_role(speaker), parts))
    return messages


def encode_conversation(
    config: XComposerConfig,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    grids: Sequence[Grid],
    *,
    max_length: int | None = None,
) -> Example:
    """Ids, labels and image spans of one conversation; `grids[i]` is the grid of picture i.

    The system turn first if there is one, then user and assistant in turn. A question as the last
    turn leaves an empty answer open, of which nothing is learnt. One picture without a slot goes
    before everything in XComposer2.5 and before the first question elsewhere (where the original
    puts it behind the last answer). A text longer than `max_length` (the model's own if None) is
    cut; what is left of a cut answer is learnt.

    Raises:
        InvalidRequest: turns out of order, no answer, or slots and pictures that do not match.
        PromptTooLong: more than `max_length` with pictures, or no answer left of a cut text.
    """
    turns = [_strip(message) for message in messages]
    _check_turns(turns)
    open_end = turns[-1].role == "user"
    no_slot = not any(isinstance(part, ImageSlot) for turn in turns for part in turn.parts)
    unmarked = no_slot and len(grids) == 1
    in_front = unmarked and config.variant == "2.5"
    if unmarked and not in_front:
        turns = picture_first(turns)
    if turns[0].role != "system":
        turns = [Message("system", ()), *turns]  # an empty one means none, not the default text
    segments = render(config, turns, unmarked_image=in_front, answer_follows=open_end)
    check_slots(segments, len(grids))
    limit = config.decoder.max_length if max_length is None else max_length
    return _encode(config, tokenizer, segments, grids, limit, open_end=open_end)


def picture_first(messages: Sequence[Message]) -> list[Message]:
    """The messages with the slot of a single picture at the head of the first question."""
    asked = next(i for i, message in enumerate(messages) if message.role == "user")
    question = Message("user", (ImageSlot(0), *messages[asked].parts))
    return [*messages[:asked], question, *messages[asked + 1 :]]


def _string(turn: Mapping[str, Any], index: int, key: str) -> str:
    value = turn.get(key) if isinstance(turn, Mapping) else None
    if not isinstance(value, str):
        raise InvalidRequest(
            f"turn {index} has {key!r} = {value!r}, expected a string: "
            'a turn is {"from": "user", "value": "text"}',
            param=f"conversations[{index}].{key}",
        )
    return value


def _role(speaker: str) -> Role:
    match speaker.lower():
        case "user" | "human":
            return "user"
        case "system":
            return "system"
        case _:
            return "assistant"


def _strip(message: Message) -> Message:
    """The message without white space at its two ends."""
    parts: list[str | ImageSlot] = []
    for part in message.parts:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return Message(message.role, tuple(part for part in parts if part != ""))


def _check_turns(messages: Sequence[Message]) -> None:
    if messages and messages[-1].role == "assistant":
        messages = [*messages, Message("user", ())]  # `check_order` wants a question last
    check_order(messages)
    if not any(message.role == "assistant" for message in messages):
        raise InvalidRequest(
            "the conversation has no answer, so that nothing can be learnt from it; "
            "add an assistant's turn",
            param="messages",
        )


class _Row:
    """Ids, labels and spans of one conversation while it grows."""

    def __init__(self, config: XComposerConfig) -> None:
        self.config = config
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.spans: list[ImageSpan] = []
        self.image_rows = 0

    def add(self, ids: list[int], learnt: bool) -> None:
        if len(self.ids) == self.image_rows:  # the first text; pictures may stand before it
            self.ids.append(self.config.tokens.bos)
            self.labels.append(IGNORED)
        self.ids += ids
        self.labels += ids if learnt else [IGNORED] * len(ids)

    def add_picture(self, index: int, grid: Grid) -> None:
        length = self.config.image_tokens(grid.rows, grid.cols)
        first = self.config.decoder.vocab_size + self.image_rows
        self.spans.append(ImageSpan(index, len(self.ids), length))
        self.ids += range(first, first + length)
        self.labels += [IGNORED] * length
        self.image_rows += length


def _encode(
    config: XComposerConfig,
    tokenizer: Tokenizer,
    segments: Sequence[Segment],
    grids: Sequence[Grid],
    limit: int,
    *,
    open_end: bool,
) -> Example:
    row = _Row(config)
    ends = [(0, False)]  # the place behind each end mark, and whether the mark ends an answer
    for item, learnt in _runs(segments):
        if isinstance(item, ImageSlot):
            row.add_picture(item.index, grids[item.index])
        elif isinstance(item, str):
            row.add(tokenizer.encode_untrusted(item), learnt)
        elif item.kind == "start":
            row.add([config.tokens.start_of_turn], learnt)
        else:
            row.add([config.tokens.end_of_turn], learnt)
            ends.append((len(row.ids), learnt))
    if not open_end:
        row.add([config.tokens.eos], False)
    cut = len(row.ids) > limit
    if cut and row.spans:
        raise _too_long(row, limit)
    # Upstream quirk: the newline behind an answer is learnt if no later end mark is in the row.
    last, of_answer = max(end for end in ends if end[0] <= limit)
    if of_answer:
        closing = slice(last, last + 1 if cut else None)
        row.labels[closing] = row.ids[closing]
    example = Example(row.ids[:limit], row.labels[:limit], tuple(row.spans))
    if not example.num_supervised:
        raise _no_answer_left(row, limit)
    return example


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[str | Mark | ImageSlot, bool]]:
    """What is encoded in one piece, and whether it is learnt.

    The head of an answer is a run of its own, cut where serving begins to generate.
    """
    for (is_text, learnt), group in groupby(_items(segments), _kind):
        if is_text:
            yield "".join(str(text) for text, _ in group), learnt
        else:
            yield from group


def _kind(item: tuple[str | Mark | ImageSlot, bool]) -> tuple[bool, bool]:
    return isinstance(item[0], str), item[1]


def _items(segments: Sequence[Segment]) -> Iterator[tuple[str | Mark | ImageSlot, bool]]:
    """Every item of a rendered conversation, and whether it is of an answer: its text, its end."""
    answer = opened = False
    for segment in segments:
        for item in (segment,) if isinstance(segment, ImageSlot) else segment.items:
            yield item, answer
            if opened:  # the turn's head
                answer = item == _ANSWER_HEAD
            elif item == Mark("end"):
                answer = False
            opened = item == Mark("start")


def _too_long(row: _Row, limit: int) -> PromptTooLong:
    each = ", ".join(f"image {span.image + 1}: {span.length:,}" for span in row.spans)
    return PromptTooLong(
        f"the conversation takes {len(row.ids):,} tokens ({row.image_rows:,} for "
        f"{len(row.spans)} images: {each}), max_length is {limit:,} and pictures are never cut; "
        "send fewer images, lower max_tiles, shorten the text or raise max_length",
        param="messages",
        code="context_length_exceeded",
    )


def _no_answer_left(row: _Row, limit: int) -> PromptTooLong:
    before = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    return PromptTooLong(
        f"the conversation takes {len(row.ids):,} tokens, {before:,} of them before its first "
        f"answer, and max_length is {limit:,}, so that nothing of an answer is left; "
        "shorten the text or raise max_length",
        param="messages",
        code="context_length_exceeded",
    )
