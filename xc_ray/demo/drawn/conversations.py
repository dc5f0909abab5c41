"""Conversations: a scene, a first question about it, and those that lean on what was said."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

from xc_ray.demo.drawn import questions, reading
from xc_ray.demo.drawn.answers import Language
from xc_ray.demo.drawn.drawing import Scene
from xc_ray.demo.drawn.late import NO_PICTURE, TOO_MUCH
from xc_ray.demo.drawn.layout import Limits
from xc_ray.demo.drawn.questions import Asked, Question
from xc_ray.demo.drawn.scenes import figures_scene, print_scene, small_print_scene
from xc_ray.demo.drawn.small_talk import SMALL_TALK, too_small
from xc_ray.demo.drawn.wording import careless
from xc_ray.demo.drawn.words import (
    sample_code,
    sample_line,
    sample_number,
    sample_symbols,
    sample_word,
)

MAX_SUM_DIGITS = 5
_MOST_TRIES = 60


@dataclass(frozen=True)
class Draw:
    """What one sample is made with."""

    random: Random
    limits: Limits
    faces: tuple[str, ...]  # paths of fonts
    language: Language
    num_turns: int
    held_out: bool = False
    num_digits: int | None = None  # of both numbers of a sum; None: as the limits say


Maker: TypeAlias = Callable[[Draw], tuple[Sequence[Asked], tuple[Scene, ...]]]


# ---------------------------------------------------------------- conversations on one scene


def about(
    *first: Question, num: tuple[int, int] = (1, 9), named: bool = False, banner: float = 0.1
) -> Maker:
    """A maker that asks one of `first` about figures, then whatever follows.

    `num` objects, on a background that has a name if `named`, with print beside them at times.
    """

    def make(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
        random, limits = draw.random, draw.limits
        for _ in range(_MOST_TRIES):
            most = min(num[1], max(num[0], limits.max_objects))
            scene = figures_scene(
                random,
                limits,
                num=random.randint(num[0], most),
                named=named or random.random() < 0.2,
                faces=draw.faces if random.random() < banner else (),
            )
            opening = random.choice(first)(scene, draw.language, random)
            if opening is not None:
                return _converse(scene, opening, draw), (scene,)
        raise AssertionError(f"no scene for {first}")

    return make


def _converse(scene: Scene, opening: Asked, draw: Draw) -> list[Asked]:
    """`opening` and what may follow it, up to the number of turns; no question comes twice."""
    asked = [opening]
    random = draw.random
    seen = {(opening.kind, opening.answer, opening.selection)}
    for _ in range(4 * draw.num_turns):
        if len(asked) >= draw.num_turns:
            break
        more = _next(scene, asked[-1], draw.language, random)
        if more is not None and (more.kind, more.answer, more.selection) not in seen:
            asked.append(more)
            seen.add((more.kind, more.answer, more.selection))
    return asked


def _next(scene: Scene, last: Asked, language: Language, random: Random) -> Asked | None:
    """A question that leans on the last one, or another one about the scene."""
    if random.random() < 0.7:
        if last.text:
            return reading.about_text(scene, last, language, random)
        if last.kind == "count" and random.random() < 0.6:
            return questions.and_count(scene, last, language, random)
        if last.figures:
            return questions.and_of_them(scene, last, language, random)
    openings = (_PRINT_OPENINGS if scene.print else ()) + (
        _FIGURE_OPENINGS if scene.figures else ()
    )
    return random.choice(openings or (questions.background,))(scene, language, random)


_FIGURE_OPENINGS: tuple[Question, ...] = (
    questions.count,
    questions.count,
    questions.place,
    questions.place,
    questions.which_colour,
    questions.which_shape,
    questions.exists,
    questions.bigger,
    questions.shape,
    questions.colour,
    questions.what,
    questions.background,
    questions.describe,
)
_PRINT_OPENINGS: tuple[Question, ...] = (
    reading.read,
    reading.read,
    reading.text_colour,
    questions.background,
)


# ---------------------------------------------------------------- print


def word_text(draw: Draw) -> str:
    """A word, letters, or letters and digits."""
    most = draw.limits.max_letters
    if draw.random.random() < 0.2:
        return sample_code(draw.random, most)
    return sample_word(draw.random, most, held_out=draw.held_out)


def short_text(draw: Draw) -> str:
    """A word of up to six characters."""
    limits = replace(draw.limits, max_letters=min(6, draw.limits.max_letters))
    return word_text(replace(draw, limits=limits))


def number_text(draw: Draw) -> str:
    """One number."""
    return sample_number(draw.random, draw.limits.max_digits)


def line_text(draw: Draw) -> str:
    """One to three words."""
    return sample_line(draw.random, draw.limits.max_letters, held_out=draw.held_out)


def symbols_text(draw: Draw) -> str:
    """A text with marks in it."""
    return sample_symbols(draw.random, held_out=draw.held_out)


def any_text(draw: Draw) -> str:
    """Any of these."""
    return draw.random.choice((word_text, word_text, number_text, line_text))(draw)


def reads(sample_text: Callable[[Draw], str], first: Question = reading.read) -> Maker:
    """A maker that prints a text alone and asks `first` about it."""

    def make(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
        for _ in range(_MOST_TRIES):
            scene = print_scene(draw.random, draw.limits, sample_text(draw), draw.faces)
            opening = first(scene, draw.language, draw.random)
            if opening is not None:
                return _converse(scene, opening, draw), (scene,)
        raise AssertionError(f"no scene for {first}")

    return make


def small_print(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """A line that is read from the tiles alone."""
    scene = small_print_scene(draw.random, draw.limits, lambda: any_text(draw), draw.faces)
    opening = reading.read(scene, draw.language, draw.random)
    assert opening is not None
    return _converse(scene, opening, draw), (scene,)


# ---------------------------------------------------------------- sums, two pictures, small talk


def _numbers(draw: Draw) -> tuple[int, int]:
    """Each with its own number of digits, more often many: those are the harder sums."""
    most = min(MAX_SUM_DIGITS, draw.limits.max_digits)
    weights = range(1, most + 1)
    first, second = (
        sample_number(
            draw.random, draw.num_digits or draw.random.choices(weights, weights)[0], exact=True
        )
        for _ in range(2)
    )
    return int(first), int(second)


def add(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """A sum that is printed."""
    random = draw.random
    first, second = _numbers(draw)
    if random.random() < 0.15:
        text = f"{first}\n+ {second}"  # one below the other
    else:
        joint = random.choice((" + ", " + ", "+"))
        end = random.choice((" =", " = ?", "=", "", "=?"))
        text = f"{first}{joint}{second}{end}"
    scene = print_scene(random, draw.limits, text, draw.faces)
    asked = [reading.add_printed(first, second, draw.language, random)]
    if draw.num_turns > 1:
        asked.append(reading.about_sum(first, second, draw.language, random))
    return asked, (scene,)


def add_text(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """Sums without a picture, one a turn."""
    pairs = [_numbers(draw) for _ in range(draw.num_turns)]
    return [reading.add_asked(*pair, draw.language, draw.random) for pair in pairs], ()


def compare(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """Two pictures, and which has more."""
    random, limits = draw.random, draw.limits
    # Two large pictures of up to six tiles each would be dear.
    if random.random() < 0.8:
        limits = replace(limits, one_tile=True)
    nums = [random.randint(1, limits.max_objects) for _ in range(2)]
    if random.random() < 0.15:
        nums[1] = nums[0]
    first, second = (figures_scene(random, limits, num=n, num_pictures=2) for n in nums)
    if random.random() < 0.5:  # the same kinds and colours on both, or there is little to compare
        second = _alike(first, second, random)
    pair = (first, second)
    asked = [reading.compare(pair, draw.language, random)]
    for which in random.sample((0, 1), min(2, draw.num_turns - 1)):
        asked.append(reading.count_in(pair, asked[-1], which, draw.language, random))
    return asked, pair


def _alike(first: Scene, second: Scene, random: Random) -> Scene:
    """`second` with kinds of `first`; its colours stay, which its background was chosen for."""
    kinds = [f.kind for f in first.figures]
    figures = (replace(f, kind=random.choice(kinds), turn=0.0) for f in second.figures)
    return replace(second, figures=tuple(figures))


def small_talk(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """Several turns at once: there are few such rows, and they are short."""
    random = draw.random
    rows = random.sample(SMALL_TALK[draw.language], draw.num_turns)
    return [
        Asked("small_talk", careless(random.choice(said), draw.language, random), answer)
        for said, answer in rows
    ], ()


def no_picture(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """A question about a picture without one."""
    for _ in range(_MOST_TRIES):
        first = draw.random.choice(_FIGURE_OPENINGS + _PRINT_OPENINGS)
        scene = (
            print_scene(draw.random, draw.limits, word_text(draw), draw.faces)
            if first in _PRINT_OPENINGS
            else figures_scene(draw.random, draw.limits)
        )
        asked = first(scene, draw.language, draw.random)
        if asked is not None:
            return [Asked("no_picture", asked.question, NO_PICTURE[draw.language])], ()
    raise AssertionError("no scene for a question")


def too_much(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """Requests that it is too small for, one a turn."""
    requests = draw.random.sample(TOO_MUCH[draw.language], draw.num_turns)
    answer = too_small(draw.language)
    return [
        Asked("too_much", careless(request, draw.language, draw.random), answer)
        for request in requests
    ], ()


def two_turn(draw: Draw) -> tuple[list[Asked], tuple[Scene, ...]]:
    """Two turns, of which the second cannot be answered without the first."""
    random = draw.random
    for _ in range(_MOST_TRIES):
        if random.random() < 0.35:
            word = random.choice((word_text, word_text, number_text))(draw)
            scene = print_scene(random, draw.limits, word, draw.faces)
            first = reading.read(scene, draw.language, random)
        else:
            scene = figures_scene(random, draw.limits)
            opening = random.choice((questions.count, questions.count, questions.place))
            first = opening(scene, draw.language, random)
        if first is None:
            continue
        follow = reading.about_text if first.text else questions.and_of_them
        if first.kind == "count" and random.random() < 0.6:
            follow = questions.and_count
        second = follow(scene, first, draw.language, random)
        if second is not None:
            more = replace(draw, num_turns=max(1, draw.num_turns - 1))
            return [first, *_converse(scene, second, more)], (scene,)
    raise AssertionError("no two turns found")
