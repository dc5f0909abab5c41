"""What the demo model sees when it is served: pictures drawn here, asked about over HTTP."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serve_run import ROOT, ServeRun, assistant, body, image, post, text_of, user
from tests.pictures import printed, shapes
from xc_ray.terminal import RULE

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

ARGS = {"adapters": {"poll_s": 0.5}}  # as test_examples, which runs before: one server for both
TWO = image(shapes("red circle", "blue square", size=(300, 200)))
ONE_CIRCLE = image(shapes("red circle", size=(200, 200)))
FOUR_CIRCLES = image(shapes(*["red circle"] * 4, size=(200, 200)))
SEVEN = image(shapes(*["red circle"] * 3, *["blue square"] * 4))
THREE_KINDS = image(shapes("red circle", "blue square", "yellow star"))
WORD = image(printed("BALL"))
ASKED = [
    ((image(shapes("black square", "yellow star")), "How many shapes are there?"), "Two."),
    ((TWO, "How many circles are there?"), "One."),
    ((TWO, "How many stars are there?"), "None."),
    ((image(shapes(*["green triangle"] * 2)), "Count the triangles."), "Two."),
    ((image(shapes(*["red circle"] * 3)), "How many circles are there?"), "Three."),
    ((image(shapes(*["red circle"] * 5)), "How many circles are there?"), "Five."),
    ((image(shapes(*["green triangle"] * 9)), "How many shapes are there?"), "Nine."),
    ((SEVEN, "How many shapes are there?"), "Seven."),
    ((SEVEN, "How many squares are there?"), "Four."),
    ((SEVEN, "How many red shapes are there?"), "Three."),
    ((TWO, "Is there a square?"), "Yes."),
    ((TWO, "Is there a star?"), "No."),
    ((image(shapes("purple circle")), "What is it?"), "A purple circle."),
    ((image(shapes("black square", size=(448, 300))), "What is it?"), "A black square."),
    ((image(shapes("orange triangle", size=(120, 90))), "What shape is it?"), "A triangle."),
    ((image(shapes("green circle")), "What colour is it?"), "Green."),
    (
        (TWO, "Describe the picture."),
        "One red circle and one blue square on a white background.",
    ),
    (
        (THREE_KINDS, "What is in the picture?"),
        "One red circle, one blue square and one yellow star on a white background.",
    ),
    ((WORD, "What is in the picture?"), 'The text "BALL" in black on a white background.'),
    ((WORD, "What does it say?"), "BALL"),
    ((image(printed("road", colour="red")), "Read the text."), "road"),
    ((image(printed("Coffee shop")), "Read the text."), "Coffee shop"),
    ((image(printed("$9.99")), "What does it say?"), "$9.99"),
    ((image(printed("road", colour="red")), "What colour is the text?"), "Red."),
    ((image(printed("2024")), "What number is it?"), "2024"),
    ((image(printed("2 + 3 =")), "What is the sum?"), "2 + 3 = 5"),
    ((image(printed("12 + 30")), "Add the numbers."), "12 + 30 = 42"),
    ((image(printed("1452 + 45304 =")), "What is the sum?"), "1452 + 45304 = 46756"),
    (("1452 + 45304 = ",), "1452 + 45304 = 46756"),
    (("What is in the picture?",), "I see no picture. Show me one."),
    ((ONE_CIRCLE, FOUR_CIRCLES, "Which picture has more circles?"), "The second picture."),
    ((FOUR_CIRCLES, ONE_CIRCLE, "Which picture has more circles?"), "The first picture."),
    ((ONE_CIRCLE, "这是什么？"), "红色的圆形。"),
    ((image(shapes("blue square")), "它是什么颜色？"), "蓝色。"),
    ((TWO, "图中有几个五角星？"), "没有。"),
    ((SEVEN, "图中有几个正方形？"), "四个。"),
    (
        (THREE_KINDS, "图中有什么？"),
        "白色背景上有一个红色的圆形、一个蓝色的正方形和一个黄色的五角星。",
    ),
    ((WORD, "上面写了什么？"), "BALL"),
    ((image(printed("42")), "这是什么数字？"), "42"),
    ((image(printed("2 + 3 =")), "结果是多少？"), "2 + 3 = 5"),
    (("1452加45304等于多少？",), "1452 + 45304 = 46756"),
    ((ONE_CIRCLE, FOUR_CIRCLES, "哪张图的圆形更多？"), "第二张图。"),
]
TALKS: list[list[tuple[tuple[Any, ...], str]]] = [  # each last question leans on an earlier one
    [((WORD, "What does it say?"), "BALL"), (("How many letters is that?",), "Four.")],
    [((TWO, "How many circles are there?"), "One."), (("And stars?",), "None.")],
    [(("12 + 30 = ",), "12 + 30 = 42"), (("What was the second number?",), "30")],
    [(("365 + 24 = ",), "365 + 24 = 389"), (("What was the first number?",), "365")],
    [((WORD, "上面写了什么？"), "BALL"), (("有几个字母？",), "四个。")],
    [(("12加30等于多少？",), "12 + 30 = 42"), (("第一个数是多少？",), "12")],
]
# As large as a photo: in its overview this print is six pixels high. Both texts lie across the
# border of two tiles; one shows 400 × 400 pixels of the photo.
SMALL_PRINT = {
    text: printed(text, em=42, size=(2000, 1500), at=at, file_format="JPEG")
    for text, at in (("2024", (750, 200)), ("BALL", (1150, 1000)))
}


def said(server: ServeRun, *messages: dict[str, Any]) -> str:
    return text_of(post(server, json=body(max_tokens=40) | {"messages": messages}))


def words(value: Any) -> str | None:
    """Tests are named by what is asked, not by the pictures."""
    if isinstance(value, tuple):
        return str(value[-1])
    return " ".join(str(parts[-1]) for parts, _ in value) if isinstance(value, list) else value


@pytest.mark.parametrize(("parts", "answer"), ASKED, ids=words)
def test_a_question_gets_the_right_answer(
    server: ServeRun, parts: Sequence[Any], answer: str
) -> None:
    assert said(server, user(*parts)) == answer


@pytest.mark.parametrize("talk", TALKS, ids=words)
def test_a_question_that_leans_on_an_earlier_one_gets_the_right_answer(
    server: ServeRun, talk: list[tuple[tuple[Any, ...], str]]
) -> None:
    messages: list[dict[str, Any]] = []
    for parts, answer in talk:
        messages.append(user(*parts))
        messages.append(assistant(said(server, *messages)))
        assert messages[-1]["content"] == answer


@pytest.mark.parametrize("text", SMALL_PRINT)
def test_small_print_on_a_photo_is_read_from_its_tiles_and_not_from_its_overview(
    server: ServeRun, text: str
) -> None:
    photo = SMALL_PRINT[text]
    assert said(server, user(image(photo), "What does it say?")) == text
    assert said(server, user(image(photo, detail="high"), "What does it say?")) == text
    assert said(server, user(image(photo, detail="low"), "What does it say?")) != text


def test_the_chat_command_has_the_same_conversation(server: ServeRun, tmp_path: Path) -> None:
    file = tmp_path / "two.png"
    file.write_bytes(shapes("red circle", "blue square", size=(300, 200)))
    talk = (
        (f"<img>{file}</img>How many circles are there?", "One."),
        ("And stars?", "None."),
        ("12 + 30 = ", "12 + 30 = 42"),
    )
    command = [sys.executable, "-m", "xc_ray", "chat", "--url", server.url, "--temperature", "0"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        input="".join(f"{query}\n" for query, _ in talk),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    printed_answers = "".join(f"<<< {answer}\n{RULE}\n" for _, answer in talk)
    assert (done.stdout, done.stderr, done.returncode) == (f"{printed_answers}<<< \n", "", 0)
