"""What a conversation asks last: all turns before its last answer, which is the reference."""

import hashlib
from dataclasses import dataclass
from typing import Any

from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.chat import IMAGE_MARK, ImageSlot, Message, check_order
from xc_ray.train.data import picture_first
from xc_ray.train.rows import Conversation, PictureSource


@dataclass(frozen=True)
class Question:
    """What is asked; `pictures[i]` fills slot i. `reference` is the data set's own answer.

    `unmarked`: the one picture has no slot and goes before the whole prompt.
    """

    messages: tuple[Message, ...]
    pictures: tuple[PictureSource, ...] = ()
    reference: str | None = None
    unmarked: bool = False

    def as_json(self) -> dict[str, Any]:
        """Its turns with `<ImageHere>` marks, and its pictures: bytes by their digest."""
        return {
            "messages": [{"role": m.role, "content": _text(m)} for m in self.messages],
            "images": [_name(picture) for picture in self.pictures],
        }


def as_question(
    conversation: Conversation, config: XComposerConfig, system: str | None = None
) -> Question:
    """What a conversation asks last; a `system` of None leaves the family's text in place.

    One picture without a slot goes where training puts it: before everything in XComposer2.5, and
    before the first question elsewhere.

    Raises:
        InvalidRequest: there is no question, or roles are out of order.
    """
    messages, pictures = conversation.messages, conversation.pictures
    unmarked = len(pictures) == 1 and not any(map(_slots, messages))
    reference = None
    if messages and messages[-1].role == "assistant":
        reference = _text(messages[-1])
        messages = messages[:-1]
    check_order(messages)
    if not unmarked:
        # Slots are numbered in reading order: those of the reference come last.
        pictures = pictures[: sum(map(_slots, messages))]
    elif config.variant != "2.5":
        unmarked, messages = False, tuple(picture_first(messages))
    if system is not None and messages[0].role != "system":
        messages = (Message("system", (system,)), *messages)
    return Question(tuple(messages), tuple(pictures), reference, unmarked)


def _slots(message: Message) -> int:
    return sum(isinstance(part, ImageSlot) for part in message.parts)


def _text(message: Message) -> str:
    return "".join(IMAGE_MARK if isinstance(p, ImageSlot) else p for p in message.parts)


def _name(picture: PictureSource) -> str:
    if isinstance(picture, bytes):
        return f"sha256:{hashlib.sha256(picture).hexdigest()}"
    return picture
