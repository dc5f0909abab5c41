import hashlib
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.demo.drawn import conversations, questions, reading, tasks
from xc_ray.demo.drawn.answers import (
    COLOURS_ZH,
    KINDS_ZH,
    colour_answer,
    count_answer,
    describe_answer,
    kinds_answer,
    plural,
)
from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.conversations import Draw
from xc_ray.demo.drawn.figures import KINDS, Figure
from xc_ray.demo.drawn.fonts import Fonts, find_fonts
from xc_ray.demo.drawn.layout import Limits, grid_of
from xc_ray.demo.drawn.questions import Asked, selected
from xc_ray.demo.drawn.scenes import figures_scene, print_scene
from xc_ray.demo.drawn.small_talk import SMALL_TALK
from xc_ray.demo.drawn.tasks import (
    HELD_OUT,
    LATE_SHARE,
    LATE_TASKS,
    TASKS,
    Sample,
    held_out_sample,
    training_sample,
)

FONTS = find_fonts([])
seeds = st.integers(0, 2**32)

_NUMBER = r"(None|One|Two|Three|Four|Five|Six|Seven|Eight|Nine)"
_COLOUR = "(" + "|".join(COLOURS) + ")"
_KIND = "(" + "|".join(KINDS) + ")"
_KINDS = "(" + "|".join(map(plural, KINDS)) + ")"
_LETTER = r"[A-Za-z]"
FORMS = {  # kind of question: the form of its English answers
    "count": rf"{_NUMBER}\.",
    "count_in": rf"{_NUMBER}\.",
    "shape": rf"A {_KIND}\.",
    "colour": rf"(?i:{_COLOUR})\.",
    "what": rf"An? {_COLOUR} {_KIND}\.",
    "bigger": rf"The {_COLOUR} {_KIND}\.",
    "exists": r"(Yes|No)\.",
    "background": rf"(?i:{_COLOUR})\.",
    "text_colour": rf"(?i:{_COLOUR})\.",
    "they_colour": rf"(?i:{_COLOUR}(, {_COLOUR})?( and {_COLOUR})?)\.",
    "they_shape": rf"(?i:{_KINDS}(, {_KINDS})?( and {_KINDS})?)\.",
    "describe": r'((One|Two|Three|Four|Five|Six|Seven|Eight|Nine) .+|The text ".+" in .+)\.',
    "letters": r"[A-Z][a-z]+\.",
    "digits": r"[A-Z][a-z]+\.",
    "first_letter": _LETTER,
    "last_letter": _LETTER,
    "first_digit": r"\d",
    "last_digit": r"\d",
    "read": r".+",
    "add": r"\d+ \+ \d+ = \d+",
    "first_number": r"\d+",
    "second_number": r"\d+",
    "compare": r"(The (first|second) picture|Both have the same number)\.",
    "small_talk": ".+",
    "colours": rf"(?i:{_COLOUR}(, {_COLOUR}){{,2}}( and {_COLOUR})?)\.",
    "shapes": rf"(?i:{_KINDS}(, {_KINDS})?( and {_KINDS})?)\.",
    "no_picture": r"I see no picture\. Show me one\.",
    "too_much": r"I am too small for that\. .+",
}


def fingerprint(sample: Sample) -> str:
    digest = hashlib.sha256(repr((sample.task, sample.turns)).encode())
    for picture in sample.pictures:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [training_sample(7, i, FONTS) for i in range(600)]


# ---------------------------------------------------------------- drawing samples


def test_a_sample_depends_on_its_seed_and_index_alone(samples):
    again = [training_sample(7, i, FONTS) for i in reversed(range(20))][::-1]
    prints = [fingerprint(sample) for sample in samples[:20]]
    assert [fingerprint(sample) for sample in again] == prints
    assert len(set(prints)) == 20
    assert fingerprint(training_sample(8, 0, FONTS)) != prints[0]


def test_another_process_draws_the_same(samples):
    script = (
        "from tests.demo.drawn.test_tasks import *\n"
        "print(*[fingerprint(training_sample(7, i, FONTS)) for i in range(12)])"
    )
    out = subprocess.run(  # with its own hash seed
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert out.split() == [fingerprint(sample) for sample in samples[:12]]


def test_importing_the_tasks_is_light():
    script = (
        "import sys, xc_ray.demo.drawn.tasks; print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


def test_shares_add_up_and_every_task_comes(samples):
    assert sum(task.share for task in TASKS.values()) == pytest.approx(1)
    assert {sample.task for sample in samples} == set(TASKS)


def test_samples_are_whole(samples):
    for sample in samples:
        assert 1 <= len(sample.turns) <= 4
        assert all(q and a and a == a.strip() for q, a in sample.turns)
        assert len(sample.pictures) == {"compare": 2, "add_text": 0, "small_talk": 0}.get(
            sample.task, 1
        )
        for picture in sample.pictures:
            assert picture.mode == "RGB"
            assert 24 <= min(picture.size) <= max(picture.size) <= 2000


def test_an_answer_is_in_the_language_of_its_question(samples):
    def chinese(text: str) -> bool:
        return any("\u4e00" <= c <= "\u9fff" for c in text)

    for sample in samples:
        for question, answer in sample.turns:
            if chinese(answer):
                assert chinese(question)
            if answer.endswith(".") and not sample.task.startswith("read"):
                assert not chinese(question)
    share = sum(chinese(sample.turns[0][0]) for sample in samples) / len(samples)
    assert 0.28 < share < 0.42


def test_pictures_are_of_all_sizes_and_mostly_few_tiles(samples):
    pictures = [p for sample in samples for p in sample.pictures]
    longer = [max(p.size) for p in pictures]
    assert 0.45 < sum(side <= 224 for side in longer) / len(longer) < 0.65
    assert 0.08 < sum(side > 672 for side in longer) / len(longer) < 0.22
    tiles = [grid_of(p.size).num_tiles for p in pictures]
    assert sum(n <= 6 for n in tiles) / len(tiles) > 0.75


def test_at_stage_nought_everything_is_easy():
    for i in range(150):
        sample = training_sample(3, i, FONTS, 0.0)
        assert sample.task != "small_print"
        assert len(sample.turns) <= 4
        assert all(max(p.size) <= 224 or grid_of(p.size).num_tiles <= 2 for p in sample.pictures)
        if sample.task == "add":
            first, second = map(int, re.findall(r"\d+", sample.turns[0][1])[:2])
            assert max(first, second) < 1000


def test_stages_between_mix_easy_and_hard():
    wide = [
        sum(max(p.size) > 224 for i in range(150) for p in training_sample(3, i, FONTS, s).pictures)
        for s in (0.0, 0.5, 1.0)
    ]
    assert wide[0] < wide[1] < wide[2]


# ---------------------------------------------------------------- test samples


@pytest.mark.parametrize("task", [*HELD_OUT, "chinese_count", "chinese_read"])
def test_every_held_out_task_is_drawn_again_the_same(task: str):
    one = held_out_sample(task, 0, 3, FONTS)
    assert one.task == task
    assert fingerprint(one) == fingerprint(held_out_sample(task, 0, 3, FONTS))
    assert len(one.turns) == (2 if task == "two_turn" else 1)


def test_held_out_sums_have_their_digits():
    for n in range(1, 6):
        for task in (f"add_{n}_digits", f"add_text_{n}_digits"):
            first, second, total = map(
                int, re.findall(r"\d+", held_out_sample(task, 1, 2, FONTS).turns[0][1])
            )
            assert first + second == total
            assert {len(str(first)), len(str(second))} == {n}


def test_held_out_fonts_print_the_test_samples():
    only = Fonts(training=(), held_out=FONTS.training[:1])
    other = Fonts(training=(), held_out=FONTS.training[1:2])
    one, two = (held_out_sample("read", 0, 0, fonts) for fonts in (only, other))
    assert one.turns[0][1] == two.turns[0][1]  # the text, which is drawn first
    assert fingerprint(one) != fingerprint(two)
    without = replace(only, training=only.held_out, held_out=())
    assert fingerprint(held_out_sample("read", 0, 0, without)) == fingerprint(one)


def test_streams_of_training_and_test_are_apart(monkeypatch):
    seen: list[str] = []

    class Recorded(Random):
        def __init__(self, seed: str) -> None:
            seen.append(seed)
            super().__init__(seed)

    monkeypatch.setattr(tasks, "Random", Recorded)
    training_sample(0, 1, FONTS)
    assert seen == ["training-0-1"]
    training_sample(0, 1, FONTS, late=True)
    held_out_sample("count", 0, 1, FONTS)
    assert seen[:2] == ["training-0-1", "late-0-1"]
    assert seen[-1] == "held-out-0-count-1"


# ---------------------------------------------------------------- the answers are right


@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_count_is_what_the_scene_holds(seed):
    random = Random(seed)
    scene = figures_scene(random, Limits())
    asked = questions.count(scene, "en", random)
    assert asked is not None
    kind, colour = asked.selection
    num = sum((kind or f.kind, colour or f.colour) == (f.kind, f.colour) for f in scene.figures)
    assert asked.answer == count_answer(num, "en")
    lower = asked.question.lower().replace("grey", "gray")
    assert kind is None or plural(kind) in lower
    assert colour is None or colour in lower
    more = questions.and_count(scene, asked, "en", random)
    if more is not None:
        assert more.answer == count_answer(len(selected(scene, *more.selection)), "en")
        assert more.selection != asked.selection or asked.selection == (None, None)


@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_place_is_clear(seed):
    random = Random(seed)
    scene = figures_scene(random, Limits(), num=random.randint(2, 6))
    for where, figure in questions._places(scene.figures):
        others = [f for f in scene.figures if f is not figure]
        if where == "biggest":
            assert all(figure.diameter >= 1.35 * f.diameter for f in others)
        if where == "smallest":
            assert all(figure.diameter * 1.35 <= f.diameter for f in others)
        if where == "on the left":
            assert all(figure.x < f.x for f in others)
        if where == "at the bottom":
            assert all(figure.y > f.y for f in others)


def test_two_turns_lean_on_the_first():
    for i in range(60):
        (_, read), (question, answer) = held_out_sample("two_turn", 5, i, FONTS).turns
        lower = question.lower()
        if "letter" in lower and read.isalpha():
            assert answer in (read[0], read[-1], count_answer(len(read), "en"))


def test_they_are_what_was_counted():
    figures = (
        Figure("circle", "red", (0, 0, 0), 10, 10, 10),
        Figure("circle", "blue", (0, 0, 0), 30, 10, 10),
        Figure("star", "green", (0, 0, 0), 50, 10, 10),
    )
    scene = replace(figures_scene(Random(0), Limits(), num=1), figures=figures)
    last = Asked("count", "How many circles?", "Two.", figures[:2], ("circle", None))
    told = {questions.and_of_them(scene, last, "en", Random(i)) for i in range(20)}
    assert {asked.answer for asked in told if asked} == {"Red and blue."}


def test_a_reading_is_exactly_what_is_printed():
    for i, text in enumerate(("HELLO", "Open 24 hours", "007", "aB-3")):
        scene = print_scene(Random(i), Limits(), text, FONTS.training)
        asked = reading.read(scene, "en", Random(i))
        assert asked is not None
        assert asked.answer == text


def test_a_comparison_counts_both_pictures():
    for i in range(100):
        random = Random(i)
        first, second = (figures_scene(random, Limits(), num_pictures=2) for _ in range(2))
        asked = reading.compare((first, second), "en", random)
        one, two = (len(selected(scene, *asked.selection)) for scene in (first, second))
        more = "first" if one > two else "second"
        assert asked.answer == (
            "Both have the same number." if one == two else f"The {more} picture."
        )


def test_every_answer_of_a_kind_has_one_form(monkeypatch):
    asked: list[Asked] = []
    for task in [*TASKS.values(), *LATE_TASKS.values()]:
        for i in range(40):
            draw = Draw(Random(f"form {i}"), Limits(), FONTS.training, "en", 4)
            asked += task.make(draw)[0]
    seen = Counter(a.kind for a in asked)
    assert set(seen) == set(FORMS)
    for a in asked:
        assert re.fullmatch(FORMS[a.kind], a.answer), a


def test_chinese_answers_hold_no_english():
    names = set("".join([*KINDS_ZH.values(), *COLOURS_ZH.values()]))
    for name in ("count", "place", "describe", "which", "compare"):
        for i in range(30):
            answer = held_out_sample(f"chinese_{name}", 0, i, FONTS).turns[-1][1]
            assert not re.search("[A-Za-z]", answer)
            assert set(answer) & (names | set("个没有样张"))
            assert answer.endswith("。")


def test_late_samples_leave_the_others_as_they_were():
    early, late = (
        [training_sample(7, i, FONTS, late=late) for i in range(700)] for late in (False, True)
    )
    changed = [new for old, new in zip(early, late, strict=True) if new.task != old.task]
    assert {sample.task for sample in changed} == set(LATE_TASKS)
    assert 0.6 * LATE_SHARE < len(changed) / len(late) < 1.5 * LATE_SHARE
    same = [(o, n) for o, n in zip(early, late, strict=True) if n.task == o.task]
    assert all(fingerprint(old) == fingerprint(new) for old, new in same)


def test_what_is_there_means_one_object_or_the_whole():
    """`What do you see?` has the short answer for an object alone, a description otherwise."""
    for index in range(40):
        several = held_out_sample("open", 3, index, FONTS)
        assert len(several.scenes[0].figures) > 1
        described = describe_answer(several.scenes[0], "en")
        assert several.turns == ((several.turns[0][0], described),)


def test_which_there_are_is_all_of_them():
    for index in range(40):
        for task, told, listed in (
            ("colours", "colour", colour_answer),
            ("shapes", "kind", kinds_answer),
        ):
            sample = held_out_sample(task, 3, index, FONTS)
            there = {getattr(figure, told) for figure in sample.scenes[0].figures}
            assert sample.turns[0][1] == listed(sorted(there), "en")


def test_without_a_picture_it_says_so():
    for task in ("no_picture", "chinese_no_picture"):
        said = {held_out_sample(task, 3, i, FONTS).turns[0] for i in range(60)}
        assert len(said) > 40
        assert len({answer for _, answer in said}) == 1
        assert not any(held_out_sample(task, 3, i, FONTS).pictures for i in range(5))


def test_a_question_that_fits_hardly_any_scene_does_not_end_a_run(monkeypatch):
    """A run of millions of samples meets the rarest of them."""
    monkeypatch.setattr(conversations, "_FIGURE_OPENINGS", (lambda *_: None, questions.count))
    monkeypatch.setattr(conversations, "_PRINT_OPENINGS", ())
    for index in range(20):
        assert held_out_sample("no_picture", 3, index, FONTS).turns


def test_a_short_text_has_up_to_six_characters():
    lengths = {len(held_out_sample("read_short", 3, i, FONTS).turns[-1][1]) for i in range(60)}
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_small_talk_is_answered_as_written(samples):
    told = {answer for rows in SMALL_TALK.values() for _, answer in rows}
    for sample in samples:
        if sample.task == "small_talk":
            assert {answer for _, answer in sample.turns} <= told
