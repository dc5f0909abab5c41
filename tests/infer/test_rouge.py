import random
from collections.abc import Sequence

import pytest

from xc_ray.infer.rouge import lcs_length, rouge_l, units


def table_lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """The textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        # Lin 2004: of four words "police the gunman" is in order, of the other text two words.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # LCS "a red" of 4 and 2 words: P = 2/4, R = 2/2, F = 2/3.
        ("a dog is red", "a red", 2 / 3),
        ("The cat.", "the CAT", 1.0),
        ("one", "two", 0.0),
        # 红色的猫 and 猫是红色: LCS 红色, 2 · 2 / (4 + 4).
        ("红色的猫", "猫是红色", 0.5),
        # Mixed: "dog", 猫 and 狗 of (dog 猫 狗) and (dog 狗): 2 · 2 / 5.
        ("Dog猫狗", "dog, 狗", 0.8),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("", "", 1.0),
        ("?", " ? ", 1.0),
        ("!", "?", 0.0),
    ],
)
def test_rouge_l_is_what_a_hand_computes(response: str, reference: str, expected: float):
    assert rouge_l(response, reference) == pytest.approx(expected)
    assert rouge_l(reference, response) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5 GB, naïve_name!", ["it", "s", "3", "5", "gb", "naïve", "name"]),
        ("红色的猫。Very 红", ["红", "色", "的", "猫", "very", "红"]),
        ("ネコとねこ、猫", ["ネ", "コ", "と", "ね", "こ", "猫"]),
        ("고양이 a", ["고", "양", "이", "a"]),
        ("Щука\nплывёт", ["щука", "плывёт"]),
        ("𠀋a", ["𠀋", "a"]),
        ("  …—", []),
    ],
)
def test_words_and_single_characters_are_the_units(text: str, expected: list[str]):
    assert units(text) == expected


def test_the_bits_give_the_length_of_the_textbooks_table():
    draw = random.Random(0)
    for _ in range(300):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(90))] for _ in range(2))
        assert lcs_length(a, b) == table_lcs(a, b)
