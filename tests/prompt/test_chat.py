from typing import Literal

import pytest

from xc_ray.demo.make import tiny_config
from xc_ray.errors import InvalidRequest
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.prompt.chat import (
    ImageSlot,
    ImageTag,
    Mark,
    Message,
    TextSegment,
    check_order,
    has_system,
    render,
    split_image_tags,
    split_marks,
)

START, END = Mark("start"), Mark("end")
HEAD = (START, "assistant\n")
QUESTION = (START, "user\n", "Hi", END, "\n")


def talk(*turns: tuple[Literal["system", "user", "assistant"], str]) -> list[Message]:
    return [Message(role, (text,)) for role, text in turns]


def test_every_turn_is_opened_and_closed_and_the_assistants_head_ends_the_prompt() -> None:
    messages = talk(("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"))
    (segment,) = render(tiny_config("2.5"), messages)
    assert segment == TextSegment(
        (
            *QUESTION,
            *(START, "assistant\n", "Hello", END, "\n"),
            *(START, "user\n", "Why?", END, "\n"),
            *HEAD,
        )
    )


@pytest.mark.parametrize("variant", ["2.0", "2.0-VL", "2.0-4KHD"])
def test_the_older_variants_have_a_system_text_of_three_lines(variant: Variant) -> None:
    (segment,) = render(tiny_config(variant), talk(("user", "Hi")))
    assert isinstance(segment, TextSegment)
    mark, role, text, *rest = segment.items
    assert (mark, role) == (START, "system\n")
    assert isinstance(text, str)
    assert text.startswith(
        "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n- "
    )
    assert len(text.split("\n- ")) == 4
    assert text.endswith("based on the provided image.")
    assert tuple(rest) == (END, "\n", *QUESTION, *HEAD)


def test_xcomposer_2_5_has_no_system_turn_of_its_own() -> None:
    assert render(tiny_config("2.5"), talk(("user", "Hi"))) == [TextSegment((*QUESTION, *HEAD))]


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_system_message_replaces_the_familys_text(variant: Variant) -> None:
    messages = talk(("system", "Be short."), ("user", "Hi"))
    assert render(tiny_config(variant), messages) == [
        TextSegment((START, "system\n", "Be short.", END, "\n", *QUESTION, *HEAD))
    ]


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("parts", [("",), (), ("", "")])
def test_an_empty_system_message_means_none_at_all(
    variant: Variant, parts: tuple[str, ...]
) -> None:
    messages = [Message("system", parts), *talk(("user", "Hi"))]
    assert render(tiny_config(variant), messages) == [TextSegment((*QUESTION, *HEAD))]


@pytest.mark.parametrize("variant", FAMILIES)
def test_whether_the_first_turn_is_the_systems(variant: Variant) -> None:
    config, question = tiny_config(variant), talk(("user", "Hi"))
    assert has_system(config, question) == (variant != "2.5")
    assert has_system(config, talk(("system", "Be short."), ("user", "Hi")))
    assert not has_system(config, [Message("system", ("",)), *question])


def test_pictures_stand_between_text_segments_wherever_they_come() -> None:
    parts = (ImageSlot(0), "or", ImageSlot(1), ImageSlot(2))
    assert render(tiny_config("2.5"), [Message("user", parts)]) == [
        TextSegment((START, "user\n")),
        ImageSlot(0),
        TextSegment(("or",)),
        ImageSlot(1),
        TextSegment(()),
        ImageSlot(2),
        TextSegment((END, "\n", *HEAD)),
    ]


def test_an_unmarked_picture_stands_before_the_whole_prompt() -> None:
    messages = talk(("system", "Be short."), ("user", "Hi"))
    first, slot, *rest = render(tiny_config("2.5"), messages, unmarked_image=True)
    assert first == TextSegment(())
    assert slot == ImageSlot(0)
    assert rest == render(tiny_config("2.5"), messages)


def test_a_conversation_for_training_ends_with_its_last_turn() -> None:
    segments = render(tiny_config("2.5"), talk(("user", "Hi")), answer_follows=False)
    assert segments == [TextSegment(QUESTION)]


def test_a_segment_of_nothing_is_empty() -> None:
    assert TextSegment(()).empty
    assert TextSegment(("", "")).empty
    assert not TextSegment((START,)).empty
    assert not TextSegment(("", " ")).empty


def test_image_marks_become_slots_numbered_on() -> None:
    assert split_marks("<ImageHere>a<ImageHere><ImageHere> b", 3) == (
        ImageSlot(3),
        "a",
        ImageSlot(4),
        ImageSlot(5),
        " b",
    )
    assert split_marks("plain") == ("plain",)
    assert split_marks("") == ()


def test_image_tags_are_taken_out_in_order() -> None:
    text = "See <img> a b.png </img> and\n<img>https://x.org/1</img>."
    assert split_image_tags(text) == [
        "See ",
        ImageTag("a b.png"),
        " and\n",
        ImageTag("https://x.org/1"),
        ".",
    ]


@pytest.mark.parametrize("text", ["", "plain", "<img>never closed", "</img>", "< img>a</img>"])
def test_what_is_no_image_tag_stays_text(text: str) -> None:
    assert split_image_tags(text) == ([text] if text else [])


@pytest.mark.parametrize("text", ["a<img></img>", "<img> \n</img>"])
def test_an_empty_image_tag_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="tag is empty; write a path or a URL into it"):
        split_image_tags(text)


@pytest.mark.parametrize(
    ("roles", "message", "param"),
    [
        ("", "messages is empty; send at least one user message", "messages"),
        ("a", "messages[0] has role 'assistant', expected 'user'", "messages[0].role"),
        ("uu", "messages[1] has role 'user', expected 'assistant'", "messages[1].role"),
        ("su s", "messages[2] has role 'system', expected 'assistant'", "messages[2].role"),
        ("ss", "messages[1] has role 'system', expected 'user'", "messages[1].role"),
        ("ua", "the last message must be a user's; nothing is left to answer", "messages"),
        ("s", "the last message must be a user's; nothing is left to answer", "messages"),
    ],
)
def test_roles_out_of_order_are_refused_with_the_first_that_is(
    roles: str, message: str, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_order(of_roles(roles))
    assert caught.value.message.startswith(message)
    assert caught.value.param == param


@pytest.mark.parametrize("roles", ["u", "su", "uau", "suauau"])
def test_roles_in_order_are_accepted(roles: str) -> None:
    check_order(of_roles(roles))


def of_roles(letters: str) -> list[Message]:
    roles: dict[str, Literal["system", "user", "assistant"]] = {
        "s": "system",
        "u": "user",
        "a": "assistant",
    }
    return [Message(roles[letter], ("text",)) for letter in letters.replace(" ", "")]
