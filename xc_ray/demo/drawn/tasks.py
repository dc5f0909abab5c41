"""The samples that the demo model learns from, made on the fly, and those it is tested with.

A sample is a function of its seed and index alone, so that any number of processes can draw
their own. Test samples come from other random streams, are printed in other fonts and use words
that training never shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from PIL import Image

from xc_ray.demo.drawn import questions, reading
from xc_ray.demo.drawn.answers import Language
from xc_ray.demo.drawn.conversations import (
    MAX_SUM_DIGITS,
    Draw,
    Maker,
    about,
    add,
    add_text,
    any_text,
    compare,
    line_text,
    no_picture,
    number_text,
    reads,
    short_text,
    small_print,
    small_talk,
    symbols_text,
    too_much,
    two_turn,
    word_text,
)
from xc_ray.demo.drawn.drawing import Scene, draw_scene
from xc_ray.demo.drawn.fonts import Fonts
from xc_ray.demo.drawn.layout import Limits
from xc_ray.demo.drawn.small_talk import SMALL_TALK, THANKS
from xc_ray.demo.drawn.wording import careless

Turn: TypeAlias = tuple[str, str]  # question, answer

CHINESE_SHARE = 0.35
LATE_SHARE = 0.15


@dataclass(frozen=True)
class Sample:
    """A conversation; its pictures come before the first question."""

    task: str
    turns: tuple[Turn, ...]
    pictures: tuple[Image.Image, ...]
    scenes: tuple[Scene, ...]  # that they show


@dataclass(frozen=True)
class Task:
    """One kind of sample and its share of training."""

    share: float
    make: Maker


def training_sample(
    seed: int, index: int, fonts: Fonts, stage: float = 1.0, *, late: bool = False
) -> Sample:
    """The sample at `index`; `stage` 0 has easy ones only (one tile, few objects, large print).

    Of `late` ones a part is of `LATE_TASKS`; the others are as if it were not set.
    """
    if late:
        random = Random(f"late-{seed}-{index}")
        if random.random() < LATE_SHARE:
            return _training(LATE_TASKS, random, Limits(), fonts)
    random = Random(f"training-{seed}-{index}")
    return _training(TASKS, random, _limits(random, stage), fonts)


def _training(tasks: Mapping[str, Task], random: Random, limits: Limits, fonts: Fonts) -> Sample:
    name = random.choices(list(tasks), [t.share for t in tasks.values()])[0]
    if limits.one_tile and name == "small_print":
        name = "read"
    language: Language = "zh" if random.random() < CHINESE_SHARE else "en"
    # Pictures cost much more than words: half of them get as many questions as the limits allow.
    num_turns = random.randint(1, 6)
    draw = Draw(random, limits, fonts.training, language, min(num_turns, limits.max_turns))
    return make_sample(name, tasks[name].make, draw)


def held_out_sample(task: str, seed: int, index: int, fonts: Fonts) -> Sample:
    """A test sample of one of `HELD_OUT`, or in Chinese of `chinese_` and its name.

    In held-out fonts, where there are any. The last answer is the one to judge; all tasks but
    `two_turn` have one turn.

    Raises:
        KeyError: no such task.
    """
    name = task.removeprefix("chinese_")
    make, num_digits = HELD_OUT[name]
    random = Random(f"held-out-{seed}-{task}-{index}")
    language: Language = "zh" if task != name else "en"
    faces = fonts.held_out or fonts.training
    num_turns = 2 if name == "two_turn" else 1
    draw = Draw(random, Limits(), faces, language, num_turns, True, num_digits)
    return make_sample(task, make, draw)


def make_sample(task: str, make: Maker, draw: Draw) -> Sample:
    """A conversation with its pictures drawn; in training one may end with thanks."""
    asked, scenes = make(draw)
    turns = [(a.question, a.answer) for a in asked]
    random = draw.random
    if not draw.held_out and len(turns) < draw.num_turns and random.random() < 0.1:
        thanks, welcome = SMALL_TALK[draw.language][THANKS]
        turns.append((careless(random.choice(thanks), draw.language, random), welcome))
    pictures = tuple(draw_scene(scene, random) for scene in scenes)
    return Sample(task, tuple(turns), pictures, scenes)


def _limits(random: Random, stage: float) -> Limits:
    """The full range with probability `stage`; otherwise easy, and less so as it rises."""
    if random.random() < stage:
        return Limits()
    return Limits(
        one_tile=True,
        plain=random.random() >= stage,
        large_print=True,
        max_objects=3 + round(4 * stage),
        max_letters=4 + round(4 * stage),
        max_digits=3 + round(2 * stage),
        max_turns=4,
    )


_SHAPE = about(questions.shape, num=(1, 1))
_COLOUR = about(questions.colour, num=(1, 1))
_WHAT = about(questions.what, num=(1, 1), banner=0)
_PLACE = about(questions.place, questions.place, questions.bigger, num=(2, 7))
_WHICH = about(questions.which_colour, questions.which_shape, num=(2, 6))
_BACKGROUND = about(questions.background, num=(1, 5), named=True)
_DESCRIBE = about(questions.describe, banner=0)
_READ = reads(word_text)
_READ_NUMBER = reads(number_text)
_READ_LINE = reads(line_text)
_TEXT_COLOUR = reads(any_text, reading.text_colour)

TASKS: Mapping[str, Task] = {
    "count": Task(0.15, about(questions.count)),
    "shape": Task(0.02, _SHAPE),
    "colour": Task(0.02, _COLOUR),
    "what": Task(0.03, _WHAT),
    "place": Task(0.05, _PLACE),
    "which": Task(0.03, _WHICH),
    "exists": Task(0.02, about(questions.exists)),
    "background": Task(0.02, _BACKGROUND),
    "describe": Task(0.08, _DESCRIBE),
    "read": Task(0.13, _READ),
    "read_number": Task(0.07, _READ_NUMBER),
    "read_line": Task(0.09, _READ_LINE),
    "text_colour": Task(0.02, _TEXT_COLOUR),
    "small_print": Task(0.03, small_print),
    "add": Task(0.08, add),
    "add_text": Task(0.05, add_text),
    "compare": Task(0.05, compare),
    "two_turn": Task(0.05, two_turn),
    "small_talk": Task(0.01, small_talk),
}
_OPEN = about(questions.open_question, num=(2, 9), banner=0)
_COLOURS = about(questions.colours)
_SHAPES = about(questions.shapes)
_SYMBOLS = reads(symbols_text)
LATE_TASKS: Mapping[str, Task] = {
    "open": Task(0.3, _OPEN),
    "open_text": Task(0.1, reads(any_text, questions.open_question)),
    "colours": Task(0.12, _COLOURS),
    "shapes": Task(0.12, _SHAPES),
    "read_symbols": Task(0.2, _SYMBOLS),
    "no_picture": Task(0.08, no_picture),
    "too_much": Task(0.08, too_much),
}
# Name of a test: its maker, and the digits of both numbers of a sum.
HELD_OUT: Mapping[str, tuple[Maker, int | None]] = {
    "count": (about(questions.count, banner=0), None),
    "count_all": (about(questions.count_all, banner=0), None),
    "shape": (_SHAPE, None),
    "colour": (_COLOUR, None),
    "what": (_WHAT, None),
    "place": (_PLACE, None),
    "which": (_WHICH, None),
    "exists": (about(questions.exists), None),
    "background": (_BACKGROUND, None),
    "describe": (_DESCRIBE, None),
    "read": (_READ, None),
    "read_short": (reads(short_text), None),
    "read_number": (_READ_NUMBER, None),
    "read_line": (_READ_LINE, None),
    "text_colour": (_TEXT_COLOUR, None),
    "small_print": (small_print, None),
    **{f"add_{n}_digits": (add, n) for n in range(1, MAX_SUM_DIGITS + 1)},
    **{f"add_text_{n}_digits": (add_text, n) for n in range(1, MAX_SUM_DIGITS + 1)},
    "compare": (compare, None),
    "two_turn": (two_turn, None),
    "small_talk": (small_talk, None),
    "open": (_OPEN, None),
    "colours": (_COLOURS, None),
    "shapes": (_SHAPES, None),
    "read_symbols": (_SYMBOLS, None),
    "no_picture": (no_picture, None),
}
