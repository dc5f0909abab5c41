"""A row of a data set as JSON tells it -> Conversation; the format is told by the row's keys.

    {"conversations": [{"from": "user", "value": "<img>a.png</img> What is it?"}, …]}
    {"image": "a.png", "conversations": [{"from": "user", "value": "<ImageHere>…"}, …]}
    {"messages": [{"role": "user", "content": "<image>…"}, …], "images": ["a.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", …}, …]}, …]}
    {"query": "<image>…", "response": "…", "history": [["…", "…"]], "images": ["a.png"]}
    {"image": "a.png", "caption": "…"}      which answers CAPTION_QUERY

In every text `<img>source</img>` names a picture in place, and `<image>` or `<ImageHere>` mark the
place of the next one of `images` (or `image`): as many marks as pictures. A single picture without
a mark stays without a slot: the encoding knows where its family wants it. Several without any mark
stand at the head of the first question.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from xc_ray.errors import InvalidRequest
from xc_ray.prompt.chat import (
    IMAGE_MARK,
    ImageSlot,
    ImageTag,
    Message,
    Role,
    check_order,
    split_image_tags,
)
from xc_ray.train.data import parse_turns
from xc_ray.train.rows import Conversation, PictureSource

ACCEPTED = (
    '{"conversations": [{"from", "value"}, …]}, {"messages": [{"role", "content"}, …]}, '
    '{"query", "response"}, each with pictures in "images", or {"image", "caption"}'
)
CAPTION_QUERY = "please describe the image."  # what ms-swift asks of such data sets
SHOWN_CHARS = 80  # of a value in a message
# A row that holds them would be learnt without what it is about.
_NOT_PICTURES = ("video", "videos", "audio", "audios")
_MARK = re.compile(r"<image>|<ImageHere>")


class _Marked:
    """The place of the next picture of the row's list."""


@dataclass(frozen=True)
class _Named:
    """A picture that is named where it stands."""

    source: PictureSource


_Item: TypeAlias = str | _Marked | _Named


@dataclass(frozen=True)
class _Turn:
    role: Role
    items: tuple[_Item, ...]


def parse_row(value: object) -> Conversation:
    """What a row says; its last turn may be a question that nothing answers.

    Columns beside those of a format are left alone, and a column that is null counts as missing.

    Raises:
        InvalidRequest: no known format, values of other types, roles out of order, or marks and
            pictures that do not match; names the column.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"the row is {_shown(value)}, expected an object: {ACCEPTED}")
    row = {str(key): column for key, column in value.items() if column is not None}
    for key in _NOT_PICTURES:
        if row.get(key):
            raise InvalidRequest(
                f"the row has {key!r}, and only text and pictures can be learnt; leave the row out",
                param=key,
            )
    turns = [*_system(row), *_turns(row)]
    if sum(turn.role == "system" for turn in turns) > 1 and "system" in row:
        raise InvalidRequest(
            "the row has a system turn and a column 'system'; give one of the two", param="system"
        )
    check_turns([Message(turn.role, ()) for turn in turns])
    return _numbered(turns, list(_listed(row)))


def check_turns(messages: Sequence[Message]) -> None:
    """System first if at all, then user and assistant in turn; either may be last.

    Raises:
        InvalidRequest: names the turn, its role and what was expected.
    """
    answered = bool(messages) and messages[-1].role == "assistant"
    check_order([*messages, Message("user", ())] if answered else messages)


def _turns(row: Mapping[str, Any]) -> list[_Turn]:
    if "messages" in row:
        return _from_messages(_list(row, "messages"))
    if "conversations" in row:
        turns = parse_turns(_list(row, "conversations"))
        return [_Turn(turn.role, tuple(_again(turn.parts))) for turn in turns]
    if "query" in row:
        return _from_query(row)
    if "caption" in row and ("image" in row or "images" in row):
        return _from_caption(row["caption"])
    seen = ", ".join(sorted(row)) or "none"
    raise InvalidRequest(f"the row has the columns {seen}, expected {ACCEPTED}")


def _system(row: Mapping[str, Any]) -> list[_Turn]:
    return [_Turn("system", _items(_text(row["system"], "system")))] if "system" in row else []


def _again(parts: Sequence[str | ImageSlot]) -> Iterator[_Item]:
    """Parts of `parse_turns`, which knows `<ImageHere>` alone."""
    for part in parts:
        if isinstance(part, str):
            yield from _items(part)
        else:
            yield _Marked()


# ---------------------------------------------------------------- messages


def _from_messages(messages: Sequence[Any]) -> list[_Turn]:
    turns = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(
                f'{where} is {_shown(message)}, expected {{"role": "user", "content": "text"}}',
                param=where,
            )
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise InvalidRequest(
                f"{where}.role is {_shown(role)}, expected 'system', 'user' or 'assistant'",
                param=f"{where}.role",
            )
        content = message.get("content")
        turns.append(_Turn(role, tuple(_content(content, f"{where}.content"))))
    return turns


def _content(content: Any, where: str) -> Iterator[_Item]:
    """A text, or OpenAI's content parts."""
    if not isinstance(content, list | tuple):
        yield from _items(_text(content, where, or_else="a string or a list of parts"))
        return
    for i, part in enumerate(content):
        yield from _part(part, f"{where}[{i}]")


def _part(part: Any, where: str) -> Iterator[_Item]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":  # which is text and nothing else: pictures have parts of their own
        yield _text(part.get("text"), f"{where}.text")
        return
    if kind not in ("image_url", "image"):
        raise InvalidRequest(
            f'{where} is {_shown(part)}, expected {{"type": "text", "text": …}} or '
            '{"type": "image_url", "image_url": {"url": …}}',
            param=where,
        )
    named = next((part[key] for key in (kind, "url", "path") if part.get(key) is not None), None)
    if named is None and kind == "image":
        yield _Marked()  # as chat templates have it: the picture is in `images`
    else:
        yield _Named(_picture(named, f"{where}.{kind}"))


# ---------------------------------------------------------------- query, response, history


def _from_query(row: Mapping[str, Any]) -> list[_Turn]:
    turns = []
    for i, pair in enumerate(_list(row, "history") if "history" in row else ()):
        where = f"history[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InvalidRequest(
                f"{where} is {_shown(pair)}, expected a pair [question, answer]", param=where
            )
        for role, text in zip(_PAIR, pair, strict=True):
            turns.append(_Turn(role, _items(_text(text, where))))
    turns.append(_Turn("user", _items(_text(row["query"], "query"))))
    if "response" in row:
        turns.append(_Turn("assistant", _items(_text(row["response"], "response"))))
    return turns


_PAIR: tuple[Role, Role] = ("user", "assistant")


def _from_caption(caption: Any) -> list[_Turn]:
    """The first caption of a picture; several are a list, or one text with && between them."""
    if isinstance(caption, list | tuple) and caption:
        caption = caption[0]
    first = _text(caption, "caption").split("&&")[0].strip()
    return [_Turn("user", (CAPTION_QUERY,)), _Turn("assistant", _items(first))]


# ---------------------------------------------------------------- pictures


def _listed(row: Mapping[str, Any]) -> Iterator[PictureSource]:
    given = [key for key in ("image", "images") if key in row]
    if len(given) > 1:
        raise InvalidRequest(
            "the row has 'image' and 'images'; give one of the two", param="images"
        )
    for key in given:
        if isinstance(row[key], list | tuple):
            for i, one in enumerate(row[key]):
                yield _picture(one, f"{key}[{i}]")
        elif row[key] != "":  # as some data sets write that there is none
            yield _picture(row[key], key)


def _picture(value: Any, where: str) -> PictureSource:
    """A path, a URL or bytes; also in an object, bytes before the path they came from."""
    if isinstance(value, Mapping):
        given = {key: value.get(key) for key in ("bytes", "url", "path")}
        found = next((one for one in given.values() if one is not None), None)
        if isinstance(given["bytes"], str):
            return _from_base64(given["bytes"], where)
        if found is not None:
            return _picture(found, where)
    if isinstance(value, bytes) or (isinstance(value, str) and value.strip()):
        return value
    raise InvalidRequest(
        f"{where} is {_shown(value)}, expected a path, a URL or an object with one of "
        '"path", "url" and "bytes"',
        param=where,
    )


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidRequest(f"{where}.bytes is not valid base64", param=where) from None


def _items(text: str) -> tuple[_Item, ...]:
    items: list[_Item] = []
    for part in split_image_tags(text):
        if isinstance(part, ImageTag):
            items.append(_Named(part.source))
            continue
        for i, piece in enumerate(_MARK.split(part)):
            items += [_Marked(), piece] if i else [piece]
    return tuple(item for item in items if item != "")


def _numbered(turns: Sequence[_Turn], listed: Sequence[PictureSource]) -> Conversation:
    items = [item for turn in turns for item in turn.items]
    marks = sum(isinstance(item, _Marked) for item in items)
    named = sum(isinstance(item, _Named) for item in items)
    if named and listed:
        raise InvalidRequest(
            f"the row names {named} pictures in its turns and lists {len(listed)} beside them; "
            "name them all in place, or list them all and mark their places with <image>",
            param="images",
        )
    in_front: tuple[_Item, ...] = ()
    if marks != len(listed):
        if marks:
            raise InvalidRequest(
                f"the text has {marks} <image> marks ({IMAGE_MARK} counts too) for {len(listed)} "
                "pictures; give each picture one mark",
                param="images",
            )
        if len(listed) == 1:
            return Conversation(_messages(turns, [], []), tuple(listed))
        in_front = tuple(_Marked() for _ in listed)
    pictures: list[PictureSource] = []
    messages = _messages(_before_first_question(turns, in_front), list(listed), pictures)
    return Conversation(messages, tuple(pictures))


def _before_first_question(turns: Sequence[_Turn], items: tuple[_Item, ...]) -> list[_Turn]:
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    question = _Turn(turns[first].role, (*items, *turns[first].items))
    return [*turns[:first], question, *turns[first + 1 :]]


def _messages(
    turns: Sequence[_Turn], listed: list[PictureSource], pictures: list[PictureSource]
) -> tuple[Message, ...]:
    """Messages of all turns; adds each slot's picture to `pictures` in order."""
    rest = iter(listed)
    messages = []
    for turn in turns:
        parts: list[str | ImageSlot] = []
        for item in turn.items:
            if isinstance(item, str):
                parts.append(item)
                continue
            parts.append(ImageSlot(len(pictures)))
            pictures.append(item.source if isinstance(item, _Named) else next(rest))
        messages.append(Message(turn.role, tuple(parts)))
    return tuple(messages)


# ---------------------------------------------------------------- values


def _list(row: Mapping[str, Any], key: str) -> Sequence[Any]:
    if not isinstance(row[key], list | tuple):
        raise InvalidRequest(f"{key} is {_shown(row[key])}, expected a list", param=key)
    return row[key]  # type: ignore[no-any-return]  # checked just now


def _text(value: Any, where: str, or_else: str = "a string") -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} is {_shown(value)}, expected {or_else}", param=where)
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
