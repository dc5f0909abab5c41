"""Rows of every format become the same conversation; what cannot is refused with a reason."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.config import DataOptions
from xc_ray.errors import InvalidRequest
from xc_ray.prompt.chat import ImageSlot, Message
from xc_ray.train.formats import CAPTION_QUERY, parse_row
from xc_ray.train.rows import Conversation

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
TWO_TURNS = Conversation(
    (
        Message("user", (ImageSlot(0), "What is it?")),
        Message("assistant", ("A cat.",)),
        Message("user", ("And ", ImageSlot(1), "?")),
        Message("assistant", ("A dog.",)),
    ),
    ("cat.png", "dog.png"),
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": one} for i, one in enumerate(contents)
    ]


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


MARKED = ("<image>What is it?", "A cat.", "And <ImageHere>?", "A dog.")
LISTED = ["cat.png", "dog.png"]


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": turns(
                "<img>cat.png</img>What is it?", "A cat.", "And <img> dog.png </img>?", "A dog."
            )
        },
        {"conversations": turns(*MARKED), "image": LISTED, "id": 7},
        {"messages": messages(*MARKED), "images": LISTED},
        {
            "messages": messages(*MARKED),
            "images": [{"path": "cat.png", "bytes": None}, {"url": "dog.png"}],
        },
        {
            "messages": messages(
                [image_url("cat.png"), text("What is it?")],
                [text("A cat.")],
                [text("And "), {"type": "image", "image": "dog.png"}, text("?")],
                "A dog.",
            )
        },
        {
            "messages": messages(
                [{"type": "image", "text": None}, text("What is it?")],
                "A cat.",
                [text("And "), {"type": "image"}, text("?")],
                "A dog.",
            ),
            "images": LISTED,
        },
        {
            "query": "And <image>?",
            "response": "A dog.",
            "history": [["<image>What is it?", "A cat."]],
            "images": LISTED,
        },
        {
            "query": "And <img>dog.png</img>?",
            "response": "A dog.",
            "history": [["<img>cat.png</img>What is it?", "A cat."]],
        },
    ],
)
def test_each_format_tells_the_same_conversation(row: dict[str, Any]) -> None:
    assert parse_row(row) == TWO_TURNS


def test_the_formats_in_the_documentation_say_the_same() -> None:
    said = [parse_row(json.loads(line)) for line in block("json").splitlines()]
    assert len(said) == 5
    assert set(said) == {
        Conversation(
            (Message("user", (ImageSlot(0), "What is it?")), Message("assistant", ("A cat.",))),
            ("cat.png",),
        )
    }


def test_the_options_in_the_documentation_are_those_of_the_configuration() -> None:
    options = yaml.safe_load(block("yaml"))["data"]
    assert DataOptions.model_validate(options).max_length == 4096


def block(language: str) -> str:
    """The one block of a language in docs/training.md's part about data."""
    data = DOCS.read_text(encoding="utf-8").split("## Data", 1)[1].split("\n## ", 1)[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", data, re.DOTALL)
    return str(found)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": turns("What?", "This."), "image": "a.png"},
        {"messages": messages("What?", "This."), "images": ["a.png"]},
        {"query": "What?", "response": "This.", "images": ["a.png"], "history": []},
    ],
)
def test_a_single_picture_without_a_mark_stays_without_a_slot(row: dict[str, Any]) -> None:
    said = parse_row(row)
    assert said.messages == (Message("user", ("What?",)), Message("assistant", ("This.",)))
    assert said.pictures == ("a.png",)


def test_several_pictures_without_marks_stand_before_the_first_question() -> None:
    row = {
        "messages": [{"role": "system", "content": "Be kind."}, *messages("Compare.", "Same.")],
        "images": ["a.png", "b.png"],
    }
    said = parse_row(row)
    assert said.messages[1] == Message("user", (ImageSlot(0), ImageSlot(1), "Compare."))
    assert said.pictures == ("a.png", "b.png")


def test_one_picture_may_be_its_own_list() -> None:
    row = {"query": "<image>What?", "response": "This.", "images": "a.png"}
    assert parse_row(row).pictures == ("a.png",)


def test_a_picture_may_stand_in_an_answer() -> None:
    said = parse_row({"conversations": turns("Draw.", "Here: <img>a.png</img>")})
    assert said.messages[1] == Message("assistant", ("Here: ", ImageSlot(0)))


@pytest.mark.parametrize("given", [b"GIF", {"bytes": b"GIF", "path": "a.gif"}])
def test_bytes_come_before_the_path_they_came_from(given: object) -> None:
    row = {"query": "What?", "response": "This.", "images": [given]}
    assert parse_row(row).pictures == (b"GIF",)


def test_bytes_in_json_are_base64() -> None:
    given = {"bytes": base64.b64encode(b"GIF").decode()}
    row = {"query": "What?", "response": "This.", "images": [given]}
    assert parse_row(row).pictures == (b"GIF",)
    row["images"] = [{"bytes": "a.png"}]
    with pytest.raises(InvalidRequest, match=r"images\[0\].bytes is not valid base64"):
        parse_row(row)


def test_data_urls_are_kept_as_they_are() -> None:
    url = "data:image/png;base64,AAAA"
    assert parse_row({"messages": messages([image_url(url), text("What?")])}).pictures == (url,)
    assert parse_row({"query": f"<img>{url}</img>"}).pictures == (url,)


def test_a_caption_answers_the_question_for_one() -> None:
    said = parse_row({"image": {"bytes": b"GIF"}, "caption": "A cat. && A pet.", "image_id": 3})
    assert said.messages == (Message("user", (CAPTION_QUERY,)), Message("assistant", ("A cat.",)))
    assert said.pictures == (b"GIF",)
    assert parse_row({"image": "a.png", "caption": ["A cat.", "A pet."]}).messages == said.messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages("What?")},
        {"conversations": turns("What?")},
        {"query": "What?", "history": None, "response": None},
    ],
)
def test_a_last_question_may_be_open(row: dict[str, Any]) -> None:
    assert parse_row(row).messages == (Message("user", ("What?",)),)


def test_a_system_text_may_have_a_column_of_its_own() -> None:
    system = Message("system", ("Be kind.",))
    rows: list[dict[str, Any]] = [
        {"query": "What?", "response": "This.", "system": "Be kind."},
        {"messages": messages("What?", "This."), "system": "Be kind."},
        {"conversations": turns("What?", "This."), "system": "Be kind."},
    ]
    assert all(parse_row(row).messages[0] == system for row in rows)
    rows[1]["messages"] = [{"role": "system", "content": "Be rude."}, *rows[1]["messages"]]
    with pytest.raises(InvalidRequest, match="a system turn and a column 'system'"):
        parse_row(rows[1])


def test_other_columns_are_left_alone() -> None:
    row = {"query": "What?", "response": "This.", "score": 3, "source": "web", "videos": []}
    assert parse_row(row) == parse_row({"query": "What?", "response": "This."})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("hello", "the row is 'hello', expected an object"),
        (None, "the row is None, expected an object"),
        (
            {"question": "a", "answer": "b"},
            r'the row has the columns answer, question, expected \{"conversations"',
        ),
        ({}, "the row has the columns none, expected"),
        ({"messages": "What?"}, "messages is 'What\\?', expected a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["What?"]}, r"messages\[0\] is 'What\?', expected \{\"role\""),
        ({"conversations": {"from": "user"}}, "conversations is .*, expected a list"),
        ({"conversations": turns("a", "b")[1:]}, r"messages\[0\] has role 'assistant'"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            r"messages\[0\].role is 'tool', expected 'system', 'user' or 'assistant'",
        ),
        (
            {"messages": [*messages("a"), *messages("b")]},
            r"messages\[1\] has role 'user', expected 'assistant'",
        ),
        (
            {"messages": messages(7)},
            r"messages\[0\].content is 7, expected a string or a list of parts",
        ),
        (
            {"messages": messages([{"type": "video_url"}])},
            r"messages\[0\].content\[0\] is \{'type': 'video_url'\}, expected",
        ),
        (
            {"messages": messages([{"type": "image_url", "image_url": {}}])},
            r"messages\[0\].content\[0\].image_url is \{\}, expected a path, a URL",
        ),
        ({"query": 7, "response": "x"}, "query is 7, expected a string"),
        ({"query": "a", "response": ["b"]}, r"response is \['b'\], expected a string"),
        (
            {"query": "a", "history": [["b"]]},
            r"history\[0\] is \['b'\], expected a pair \[question, answer\]",
        ),
        ({"query": "a", "images": [7]}, r"images\[0\] is 7, expected a path"),
        ({"query": "a", "images": [""]}, r"images\[0\] is '', expected a path"),
        ({"query": "a", "image": "b", "images": ["b"]}, "'image' and 'images'; give one"),
        ({"query": "<img></img>"}, "<img></img> tag is empty"),
        ({"query": "a", "videos": ["b.mp4"]}, "has 'videos', and only text and pictures"),
        ({"image": "a.png", "caption": []}, r"caption is \[\], expected a string"),
    ],
)
def test_a_row_of_another_shape_is_refused(row: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_row(row)


def test_tags_and_a_list_are_not_mixed() -> None:
    row = {"query": "<img>a.png</img><image>What?", "images": ["b.png"]}
    with pytest.raises(InvalidRequest, match="names 1 pictures in its turns and lists 1 beside"):
        parse_row(row)


@given(marks=st.integers(0, 4), pictures=st.integers(0, 4))
def test_there_are_as_many_marks_as_pictures_or_none(marks: int, pictures: int) -> None:
    row = {
        "query": "<image>" * marks + "What?",
        "response": "This.",
        "images": [f"{i}.png" for i in range(pictures)],
    }
    if marks not in (0, pictures):
        told = f"{marks} <image> marks .* for {pictures} pictures; give each picture one mark"
        with pytest.raises(InvalidRequest, match=told):
            parse_row(row)
        return
    said = parse_row(row)
    slots = [one.index for one in said.messages[0].parts if isinstance(one, ImageSlot)]
    assert slots == ([] if not marks and pictures == 1 else list(range(pictures)))
    assert said.pictures == tuple(row["images"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "text", "image", "path"])
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
COLUMNS = st.dictionaries(
    st.sampled_from(["messages", "conversations", "query", "response", "history", "images"]), JSON
)


@given(JSON | COLUMNS)
def test_whatever_a_file_holds_is_read_or_refused(value: Any) -> None:
    try:
        said = parse_row(value)
    except InvalidRequest:
        return
    slots = [one for turn in said.messages for one in turn.parts if isinstance(one, ImageSlot)]
    assert len(said.pictures) in (len(slots), 1)
