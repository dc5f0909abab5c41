"""Questions about a scene and what may be asked next: each knows what it was about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

from xc_ray.demo.drawn import answers
from xc_ray.demo.drawn.answers import COLOURS_ZH, Language
from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.drawing import Scene
from xc_ray.demo.drawn.figures import KINDS, Figure
from xc_ray.demo.drawn.wording import ask, kind_zh, spelt, thing, things

MAX_LISTED = 3  # colours or kinds in one answer
MOST_COLOURS = 4  # in the answer to which there are
MAX_GROUPS = 4  # kinds of objects in a description
_APART = 1.35  # times as large, for one to be the bigger
_ZH_PLACES = {
    "biggest": "最大的",
    "smallest": "最小的",
    "on the left": "最左边的",
    "on the right": "最右边的",
    "at the top": "最上面的",
    "at the bottom": "最下面的",
}


@dataclass(frozen=True)
class Asked:
    """One turn; `figures` are what `they` or `it` means after it."""

    kind: str
    question: str
    answer: str
    figures: tuple[Figure, ...] = ()
    selection: tuple[str | None, str | None] = (None, None)  # kind and colour it named
    text: str = ""  # what was read


# None where the scene has no clear answer.
Question: TypeAlias = Callable[[Scene, Language, Random], Asked | None]


def selected(scene: Scene, kind: str | None, colour: str | None) -> tuple[Figure, ...]:
    """The figures of that kind and colour; None stands for any."""
    return tuple(f for f in scene.figures if kind in (None, f.kind) and colour in (None, f.colour))


# ---------------------------------------------------------------- counting


def count(scene: Scene, language: Language, random: Random) -> Asked | None:
    """All, of a kind, of a colour, or of both."""
    which = random.choice((count_all, count_all, count_kind, count_kind, count_colour, count_both))
    return which(scene, language, random)


def count_all(scene: Scene, language: Language, random: Random) -> Asked | None:
    """How many objects."""
    return _count(scene, (None, None), language, random)


def count_kind(scene: Scene, language: Language, random: Random) -> Asked | None:
    """How many circles; at times of a kind that is not there."""
    return _count(scene, (_some(scene, random).kind, None), language, random)


def count_colour(scene: Scene, language: Language, random: Random) -> Asked | None:
    """How many red objects."""
    return _count(scene, (None, _some(scene, random).colour), language, random)


def count_both(scene: Scene, language: Language, random: Random) -> Asked | None:
    """How many red circles."""
    kind = _some(scene, random).kind
    return _count(scene, (kind, _some(scene, random, kind).colour), language, random)


def _count(
    scene: Scene,
    selection: tuple[str | None, str | None],
    language: Language,
    random: Random,
    form: str = "count",
) -> Asked:
    figures = selected(scene, *selection)
    question = ask(form, language, random, things=things(*selection, language, random))
    answer = answers.count_answer(len(figures), language)
    return Asked("count", question, answer, figures, selection)


def and_count(scene: Scene, last: Asked, language: Language, random: Random) -> Asked | None:
    """After a count: `And squares?`, or `How many of them are red?`."""
    kind, colour = last.selection
    some = _some(scene, random)
    if (kind is None or colour is None) and last.figures and random.random() < 0.5:
        return _of_them(scene, last, language, random)
    if kind is None and colour is None:
        return None
    other = (some.kind if kind else None, some.colour if colour else None)
    if other == last.selection:
        return None
    return _count(scene, other, language, random, "and_count")


def _of_them(scene: Scene, last: Asked, language: Language, random: Random) -> Asked:
    """Narrows the last count by a kind or a colour."""
    kind, colour = last.selection
    some = random.choice(last.figures)
    by_colour = colour is None and (kind is not None or random.random() < 0.5)
    if by_colour:
        colour = some.colour if random.random() < 0.85 else random.choice(COLOURS)
        named = f"{COLOURS_ZH[colour]}的" if language == "zh" else spelt(colour, random)
    else:
        kind = some.kind if random.random() < 0.85 else random.choice(KINDS)
        named = kind_zh(kind, random) if language == "zh" else answers.plural(kind)
    figures = selected(scene, kind, colour)
    question = ask("of_them", language, random, property=named)
    if language == "zh":
        question = question.replace("的的", "的")
    answer = answers.count_answer(len(figures), language)
    return Asked("count", question, answer, figures, (kind, colour))


def exists(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Whether there is one of a kind, or of a kind and colour; as often yes as no."""
    figure = random.choice(scene.figures)
    kind, colour = figure.kind, figure.colour if random.random() < 0.5 else None
    if random.random() < 0.5:
        kind = random.choice(KINDS)
        colour = random.choice(COLOURS) if colour else None
    figures = selected(scene, kind, colour)
    one, more = (f(kind, colour, language, random) for f in (thing, things))
    question = ask("exists", language, random, thing=one, things=more)
    answer = answers.exists_answer(bool(figures), language)
    return Asked("exists", question, answer, figures, (kind, colour))


# ---------------------------------------------------------------- shapes and colours


def shape(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Of the only object."""
    return _of_one(scene, "shape", language, random)


def colour(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Of the only object."""
    return _of_one(scene, "colour", language, random)


def what(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Shape and colour of the only object."""
    return _of_one(scene, "what", language, random)


def _of_one(scene: Scene, form: str, language: Language, random: Random) -> Asked | None:
    if len(scene.figures) != 1:
        return None
    if scene.print is not None and form != "shape":  # "it" could be the print
        return None
    question = ask(form, language, random)
    return Asked(form, question, _told(form, scene.figures[0], language), scene.figures)


def place(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Of the biggest one, of the one on the left, ..."""
    clear = _places(scene.figures)
    if not clear:
        return None
    where, figure = random.choice(clear)
    if language == "zh":
        which = _ZH_PLACES[where] + random.choice(("图形", "物体", "那个图形"))
    elif where.endswith("est"):
        which = f"the {where} {random.choice(('shape', 'object', 'one', 'thing'))}"
    else:
        which = f"the {random.choice(('shape', 'object', 'one', 'thing'))} {where}"
    return _of_which(which, figure, language, random)


def which_colour(scene: Scene, language: Language, random: Random) -> Asked | None:
    """What colour is the circle, where there is one circle."""
    figures = [f for f in scene.figures if len(selected(scene, f.kind, None)) == 1]
    if not figures or len(scene.figures) == 1:
        return None
    figure = random.choice(figures)
    which = kind_zh(figure.kind, random) if language == "zh" else f"the {figure.kind}"
    asked = _of_which(which, figure, language, random, "which_colour")
    return replace(asked, selection=(figure.kind, None))


def which_shape(scene: Scene, language: Language, random: Random) -> Asked | None:
    """What shape is the red one, where one is red."""
    figures = [f for f in scene.figures if len(selected(scene, None, f.colour)) == 1]
    if not figures or len(scene.figures) == 1:
        return None
    figure = random.choice(figures)
    named = thing(None, figure.colour, language, random)
    which = named if language == "zh" else f"the {named}"
    asked = _of_which(which, figure, language, random, "which_shape")
    return replace(asked, selection=(None, figure.colour))


def bigger(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Of two that each are the only one of their kind and colour."""
    figures = [f for f in scene.figures if len(selected(scene, f.kind, f.colour)) == 1]
    if len(figures) < 2:
        return None
    one, other = random.sample(figures, 2)
    big, small = (one, other) if one.diameter > other.diameter else (other, one)
    if big.diameter < small.diameter * _APART:
        return None
    names = [thing(f.kind, f.colour, language, random) for f in (one, other)]
    question = ask("bigger", language, random, one=names[0], other=names[1])
    return Asked("bigger", question, answers.the_figure_answer(big, language), (big,))


def and_of_them(scene: Scene, last: Asked, language: Language, random: Random) -> Asked | None:
    """`What colour are they?`: of what the last answer was about."""
    if not last.figures:
        return None
    form = random.choice(("colour", "shape"))
    told_before = last.selection[1] if form == "colour" else last.selection[0]
    if told_before is not None:
        return None
    if len(last.figures) == 1:
        if form == last.kind or last.kind in ("what", "bigger"):
            return None
        question = ask(form, language, random)
        return Asked(form, question, _told(form, last.figures[0], language), last.figures)
    told = {f.colour if form == "colour" else f.kind for f in last.figures}
    if len(told) > MAX_LISTED:
        return None
    question = ask(f"they_{form}", language, random)
    ordered = sorted(told)
    listed = answers.colour_answer if form == "colour" else answers.kinds_answer
    return Asked(f"they_{form}", question, listed(ordered, language), last.figures)


def _of_which(
    which: str, figure: Figure, language: Language, random: Random, form: str = ""
) -> Asked:
    form = form or random.choice(("which_what", "which_shape", "which_colour"))
    question = ask(form, language, random, which=which)
    kind = form.removeprefix("which_")
    return Asked(kind, question, _told(kind, figure, language), (figure,))


def _told(form: str, figure: Figure, language: Language) -> str:
    if form == "shape":
        return answers.kind_answer(figure.kind, language)
    if form == "colour":
        return answers.colour_answer((figure.colour,), language)
    return answers.figure_answer(figure, language)


def _places(figures: Sequence[Figure]) -> list[tuple[str, Figure]]:
    """Where one clearly is what no other is."""
    if len(figures) < 2:
        return []
    clear = []
    by_size = sorted(figures, key=lambda f: f.diameter)
    if by_size[-1].diameter >= by_size[-2].diameter * _APART:
        clear.append(("biggest", by_size[-1]))
    if by_size[0].diameter * _APART <= by_size[1].diameter:
        clear.append(("smallest", by_size[0]))
    apart = max(f.diameter for f in figures) * 0.5
    by_x, by_y = (sorted(figures, key=key) for key in (lambda f: f.x, lambda f: f.y))
    if by_x[1].x - by_x[0].x >= apart:
        clear.append(("on the left", by_x[0]))
    if by_x[-1].x - by_x[-2].x >= apart:
        clear.append(("on the right", by_x[-1]))
    if by_y[1].y - by_y[0].y >= apart:
        clear.append(("at the top", by_y[0]))
    if by_y[-1].y - by_y[-2].y >= apart:
        clear.append(("at the bottom", by_y[-1]))
    return clear


# ---------------------------------------------------------------- the whole


def background(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Its colour, where it is plain and has a name."""
    if scene.background.name is None or (scene.print and scene.print.plate):
        return None
    question = ask("background", language, random)
    return Asked("background", question, answers.colour_answer((scene.background.name,), language))


def colours(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Which there are, of up to `MOST_COLOURS`."""
    found = sorted({f.colour for f in scene.figures})
    if scene.print is not None or len(found) > MOST_COLOURS:
        return None
    question = ask("colours", language, random)
    return Asked("colours", question, answers.colour_answer(found, language), scene.figures)


def shapes(scene: Scene, language: Language, random: Random) -> Asked | None:
    """Which there are, of up to `MAX_LISTED`."""
    found = sorted({f.kind for f in scene.figures})
    if len(found) > MAX_LISTED:
        return None
    question = ask("shapes", language, random)
    return Asked("shapes", question, answers.kinds_answer(found, language), scene.figures)


def open_question(scene: Scene, language: Language, random: Random) -> Asked | None:
    """What there is, of a scene that is more than one object: its description."""
    if len(scene.figures) == 1:
        return None
    described = describe(scene, language, random)
    return described and replace(described, question=ask("open", language, random))


def describe(scene: Scene, language: Language, random: Random) -> Asked | None:
    """In the one form of `answers.describe_answer`."""
    if scene.print is not None and (scene.figures or scene.print.plate):
        return None
    if len(answers.figure_groups(scene.figures)) > MAX_GROUPS:
        return None
    question = ask("describe", language, random)
    return Asked("describe", question, answers.describe_answer(scene, language), scene.figures)


def _some(scene: Scene, random: Random, kind: str | None = None) -> Figure:
    """A figure of the scene (of `kind`, if it has one), or one time in eight one it has not."""
    if not scene.figures or random.random() < 0.12:
        return Figure(random.choice(KINDS), random.choice(COLOURS), (0, 0, 0), 0, 0, 0)
    return random.choice(selected(scene, kind, None) or scene.figures)
