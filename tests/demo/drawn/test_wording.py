import string
from random import Random

import pytest

from tests.demo.drawn.test_drawing import WHITE
from xc_ray.demo.drawn import answers
from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.drawing import Print, Scene
from xc_ray.demo.drawn.figures import KINDS, Figure
from xc_ray.demo.drawn.late import LATE_QUESTIONS, TOO_MUCH
from xc_ray.demo.drawn.phrasings import QUESTIONS
from xc_ray.demo.drawn.small_talk import SMALL_TALK, THANKS, too_small
from xc_ray.demo.drawn.wording import ask, careless, things
from xc_ray.demo.drawn.words import (
    HELD_OUT_WORDS,
    MARKS,
    TRAINING_WORDS,
    is_clear,
    sample_code,
    sample_line,
    sample_number,
    sample_symbols,
    sample_word,
)


def slots(question: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(question) if name}


@pytest.mark.parametrize(("language", "least"), [("en", 8), ("zh", 5)])
def test_each_question_has_enough_phrasings(language, least):
    for kind, phrasings in [*QUESTIONS[language].items(), *LATE_QUESTIONS[language].items()]:
        assert len(set(phrasings)) == len(phrasings) >= least, kind
        assert all(p and p == p.strip() for p in phrasings)


def test_both_languages_have_the_same_questions_and_slots():
    assert LATE_QUESTIONS["en"].keys() == LATE_QUESTIONS["zh"].keys()
    assert not LATE_QUESTIONS["en"].keys() & QUESTIONS["en"].keys()
    assert QUESTIONS["en"].keys() == QUESTIONS["zh"].keys()
    for kind, phrasings in QUESTIONS["en"].items():
        every = [slots(p) for p in phrasings + QUESTIONS["zh"][kind]]
        if kind == "exists":
            assert all(s in ({"thing"}, {"things"}) for s in every)
        else:
            assert all(s == every[0] for s in every), kind


def test_careless_questions_keep_their_words():
    seen = {careless("Which shape is it?", "en", Random(i)) for i in range(400)}
    assert {"which shape is it?", "which shape is it", "WHICH SHAPE IS IT?"} <= seen
    assert {"Which shape is it, please?", "Which shape is it please"} <= seen
    assert all("which shape is it" in question.lower() for question in seen)
    assert {careless("Thanks", "en", Random(i)).lower() for i in range(99)} == {"thanks"}
    assert "请问有几个圆形？" in {careless("有几个圆形？", "zh", Random(i)) for i in range(99)}


def test_an_article_fits_its_noun():
    asked = {ask("exists", "en", Random(i), thing="orange star", things="stars") for i in range(99)}
    assert any("an orange star" in question for question in asked)
    assert not any(" a orange" in question for question in asked)


def test_what_is_counted_is_named():
    random = Random(0)
    assert things("cross", "red", "en", random) == "red crosses"
    assert things("heart", None, "en", random) == "hearts"
    assert things("heart", "red", "zh", Random(2)) in ("红色的心形", "红色的爱心")
    assert {things("star", "gray", "en", Random(i)) for i in range(9)} == {
        "gray stars",
        "grey stars",
    }


def test_small_talk_is_a_dozen_fixed_answers_in_both_languages():
    for rows in SMALL_TALK.values():
        assert len(rows) == 12
        asked = [question for said, _ in rows for question in said]
        assert len(asked) == len(set(asked))
    assert "Thanks" in SMALL_TALK["en"][THANKS][0]
    assert "谢谢" in SMALL_TALK["zh"][THANKS][0]
    assert SMALL_TALK["en"][0][1].startswith("Hello! I am xc_ray's demo model")


def test_what_it_is_too_small_for_is_not_what_it_talks_about():
    for language, requests in TOO_MUCH.items():
        assert len(set(requests)) == len(requests) >= 20
        answer = too_small(language)
        for said, other in SMALL_TALK[language]:
            assert other == answer or not set(said) & set(requests)


# ---------------------------------------------------------------- answers


def figure(kind: str, colour: str) -> Figure:
    return Figure(kind, colour, (0, 0, 0), 10, 10, 10)


def test_answers_have_their_form():
    assert [answers.count_answer(n, "en") for n in (0, 1, 3, 12)] == [
        "None.", "One.", "Three.", "Twelve.",
    ]  # fmt: skip
    assert [answers.count_answer(n, "zh") for n in (0, 1, 2, 12, 20)] == [
        "没有。", "一个。", "两个。", "十二个。", "二十个。",
    ]  # fmt: skip
    assert answers.kind_answer("ring", "en") == "A ring."
    assert answers.figure_answer(figure("circle", "orange"), "en") == "An orange circle."
    assert answers.figure_answer(figure("circle", "red"), "zh") == "红色的圆形。"
    assert answers.colour_answer(["blue", "red", "blue"], "en") == "Red and blue."
    assert answers.colour_answer(["blue", "red", "green"], "zh") == "红色、绿色和蓝色。"
    assert answers.kinds_answer(["cross", "circle"], "en") == "Circles and crosses."
    assert answers.sum_answer(1452, 45304) == "1452 + 45304 = 46756"
    assert answers.compare_answer(2, 1, "en") == "The first picture."
    assert answers.compare_answer(1, 2, "zh") == "第二张图。"
    assert answers.compare_answer(2, 2, "en") == "Both have the same number."


def test_a_description_has_one_order():
    shapes = (figure("star", "blue"), figure("circle", "red"), figure("circle", "red"))
    for figures in (shapes, shapes[::-1]):
        scene = Scene((50, 50), WHITE, figures)
        told = answers.describe_answer(scene, "en")
        assert told == "Two red circles and one blue star on a white background."
        told = answers.describe_answer(scene, "zh")
        assert told == "白色背景上有两个红色的圆形和一个蓝色的五角星。"
    word = Print("Hi", "red", (0, 0, 0), "", 20, 0, 0)
    told = answers.describe_answer(Scene((50, 50), WHITE, (), word), "en")
    assert told == 'The text "Hi" in red on a white background.'


def test_every_kind_and_colour_has_a_chinese_name():
    assert set(answers.KINDS_ZH) == set(KINDS)
    assert set(answers.COLOURS_ZH) == set(COLOURS)
    assert len(set(answers.KINDS_ZH.values()) | set(answers.COLOURS_ZH.values())) == 19


# ---------------------------------------------------------------- words


def test_words_are_many_and_some_held_out():
    assert len(TRAINING_WORDS) > 500
    assert len(HELD_OUT_WORDS) > 50
    assert not set(TRAINING_WORDS) & set(HELD_OUT_WORDS)


@pytest.mark.parametrize("most", [1, 4, 10])
def test_texts_are_no_longer_than_asked_and_their_case_can_be_seen(most: int):
    for i in range(500):
        word = sample_word(Random(i), most)
        assert 1 <= len(word) <= most
        assert is_clear(word)
        assert 1 <= len(sample_code(Random(i), most)) <= most
        line = sample_line(Random(i), most)
        assert 1 <= len(line.split(" ")) <= 4
        assert len(line) <= 3 * 8 + 2
        assert line == " ".join(line.split())


def test_letters_that_look_alike_are_not_mixed():
    mixed = [w for w in (sample_word(Random(i), 8) for i in range(2000)) if not w.istitle()]
    mixed = [w for w in mixed if not w.isupper() and not w.islower()]
    assert len(mixed) > 100
    assert not any(set(w) & set("Il") for w in mixed)
    assert not any(set(sample_code(Random(i), 8)) & set("01IO") for i in range(500))


def test_texts_with_marks_have_every_mark_and_can_be_printed_and_told_apart():
    random = Random(4)
    texts = [sample_symbols(random) for _ in range(4000)]
    assert set("".join(texts)) >= set(MARKS)
    assert not set("".join(texts)) & set("`|")
    assert all(text.isascii() and text == text.strip() and 2 <= len(text) <= 20 for text in texts)
    assert len(set(texts)) > 3000


def test_numbers_have_their_digits():
    assert {len(sample_number(Random(i), 3, exact=True)) for i in range(99)} == {3}
    assert {len(sample_number(Random(i), 3)) for i in range(99)} == {1, 2, 3}


def test_held_out_words_are_not_those_of_training():
    held_out = {sample_word(Random(i), 10, held_out=True).lower() for i in range(3000)}
    training = {sample_word(Random(i), 10).lower() for i in range(3000)}
    long = {word for word in HELD_OUT_WORDS if len(word) > 5}
    assert len(held_out & long) > 20
    assert not training & long
