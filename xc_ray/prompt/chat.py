r"""Messages -> segments: the family's turn format with image slots between the text.

    [start]role\n…[end]\n   for each turn, then   [start]assistant\n

A text segment is a run of turn marks and plain text that is tokenised as one piece, as the original
does. Marks are ids by nature, so plain text can never forge one. Image segments stand between text
segments.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from xc_ray.errors import InvalidRequest
from xc_ray.model.config import XComposerConfig

Role = Literal["system", "user", "assistant"]
IMAGE_MARK = "<ImageHere>"
_IMAGE_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)


@dataclass(frozen=True)
class ImageSlot:
    """The place of a picture, by its index in the request."""

    index: int


@dataclass(frozen=True)
class ImageTag:
    """A picture named inside a text: a path or a URL."""

    source: str


@dataclass(frozen=True)
class Message:
    """One turn; `parts` in reading order."""

    role: Role
    parts: tuple[str | ImageSlot, ...]


@dataclass(frozen=True)
class Mark:
    """A turn mark; `start` opens a turn, `end` closes it."""

    kind: Literal["start", "end"]


@dataclass(frozen=True)
class TextSegment:
    """Turn marks and untrusted text, tokenised together; may be empty."""

    items: tuple[Mark | str, ...]

    @property
    def empty(self) -> bool:
        """Whether there is neither a mark nor text, so that no id comes of it but BOS."""
        return not any(self.items)


Segment: TypeAlias = TextSegment | ImageSlot


def render(
    config: XComposerConfig,
    messages: Sequence[Message],
    *,
    unmarked_image: bool = False,
    answer_follows: bool = True,
) -> list[Segment]:
    """Segments of a conversation, text and pictures alternating, text first and last.

    Without a system message the family's default system text is used; a system message with empty
    text means none. `unmarked_image` puts picture 0 before the whole prompt, as XComposer2.5's chat
    does for one picture without a slot. `answer_follows` ends with the head of the assistant's
    turn.
    """
    items: list[Mark | str | ImageSlot] = [ImageSlot(0)] if unmarked_image else []
    for message in _with_system(config, messages):
        items += [Mark("start"), f"{message.role}\n", *message.parts, Mark("end"), "\n"]
    if answer_follows:
        items += [Mark("start"), "assistant\n"]
    return _segments(items)


def split_marks(text: str, first_index: int = 0) -> tuple[str | ImageSlot, ...]:
    """The parts of a text with `<ImageHere>` slots, numbered from `first_index`."""
    pieces = text.split(IMAGE_MARK)
    parts: list[str | ImageSlot] = [pieces[0]]
    for i, piece in enumerate(pieces[1:]):
        parts += [ImageSlot(first_index + i), piece]
    return tuple(p for p in parts if p != "")


def split_image_tags(text: str) -> list[str | ImageTag]:
    """A text with `<img>path-or-URL</img>` tags as text and tags in order (as in ms-swift's chat).

    Raises:
        InvalidRequest: a tag is empty.
    """
    parts: list[str | ImageTag] = []
    end = 0
    for match in _IMAGE_TAG.finditer(text):
        if not match[1].strip():
            raise InvalidRequest("an <img></img> tag is empty; write a path or a URL into it")
        parts += [text[end : match.start()], ImageTag(match[1].strip())]
        end = match.end()
    parts.append(text[end:])
    return [p for p in parts if p != ""]


def has_system(config: XComposerConfig, messages: Sequence[Message]) -> bool:
    """Whether the first turn is the system's: the request's own, or the family's."""
    return any(message.role == "system" for message in _with_system(config, messages)[:1])


def check_order(messages: Sequence[Message]) -> None:
    """System first if at all, then user and assistant in turn, the last a user.

    Raises:
        InvalidRequest: names the message, its role and what was expected.
    """
    if not messages:
        raise InvalidRequest("messages is empty; send at least one user message", param="messages")
    turns = messages[1:] if messages[0].role == "system" else messages
    skipped = len(messages) - len(turns)
    for i, message in enumerate(turns):
        wanted = "user" if i % 2 == 0 else "assistant"
        if message.role != wanted:
            raise InvalidRequest(
                f"messages[{i + skipped}] has role {message.role!r}, expected {wanted!r}: "
                "system first if at all, then user and assistant in turn",
                param=f"messages[{i + skipped}].role",
            )
    if len(turns) % 2 == 0:
        raise InvalidRequest(
            "the last message must be a user's; nothing is left to answer", param="messages"
        )


def _with_system(config: XComposerConfig, messages: Sequence[Message]) -> Sequence[Message]:
    if messages and messages[0].role == "system":
        return messages if any(messages[0].parts) else messages[1:]
    if config.family.system_text:
        return [Message("system", (config.family.system_text,)), *messages]
    return messages


def _segments(items: Sequence[Mark | str | ImageSlot]) -> list[Segment]:
    segments: list[Segment] = []
    text: list[Mark | str] = []
    for item in items:
        if isinstance(item, ImageSlot):
            segments += [TextSegment(tuple(text)), item]
            text = []
        else:
            text.append(item)
    segments.append(TextSegment(tuple(text)))
    return segments
