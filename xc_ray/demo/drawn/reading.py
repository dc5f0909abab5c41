"""Questions about print, sums and two pictures, and about what was read."""

from random import Random

from xc_ray.demo.drawn import answers
from xc_ray.demo.drawn.answers import Language
from xc_ray.demo.drawn.drawing import Scene
from xc_ray.demo.drawn.questions import Asked, selected
from xc_ray.demo.drawn.wording import ask, things


def read(scene: Scene, language: Language, random: Random) -> Asked | None:
    """What is printed, exactly."""
    if scene.print is None:
        return None
    text = scene.print.text
    number = text.isdigit() and random.random() < 0.7
    question = ask("read_number" if number else "read", language, random)
    return Asked("read", question, text, text=text)


def text_colour(scene: Scene, language: Language, random: Random) -> Asked | None:
    """The colour of the print."""
    if scene.print is None:
        return None
    question = ask("text_colour", language, random)
    answer = answers.colour_answer((scene.print.colour,), language)
    return Asked("text_colour", question, answer)


def about_text(scene: Scene, last: Asked, language: Language, random: Random) -> Asked | None:
    """After reading a word or a number: its length, its first and last letter, its colour."""
    del scene  # all of it is in the history
    text = last.text
    if not (text.isalpha() or text.isdigit()) or len(text) > 20:
        return None
    unit = "digit" if text.isdigit() else "letter"
    form = random.choice((f"{unit}s", f"{unit}s", f"first_{unit}", f"last_{unit}"))
    if form == f"{unit}s":
        answer = answers.count_answer(len(text), language)
        if language == "zh" and unit == "digit":
            answer = answer.replace("个", "位")
    else:
        answer = text[0] if form.startswith("first") else text[-1]
    return Asked(form, ask(form, language, random), answer, text=text)


def add_printed(first: int, second: int, language: Language, random: Random) -> Asked:
    """The sum that is printed."""
    question = ask("add", language, random)
    return Asked("add", question, answers.sum_answer(first, second))


def add_asked(first: int, second: int, language: Language, random: Random) -> Asked:
    """The sum that the question names."""
    question = ask("add_text", language, random, a=str(first), b=str(second))
    return Asked("add", question, answers.sum_answer(first, second))


def about_sum(first: int, second: int, language: Language, random: Random) -> Asked:
    """One of the two numbers, after their sum."""
    form, number = random.choice((("first_number", first), ("second_number", second)))
    return Asked(form, ask(form, language, random), str(number))


def compare(pair: tuple[Scene, Scene], language: Language, random: Random) -> Asked:
    """Which of two pictures has more of all, of a kind or of a colour that one of them shows."""
    shown = [f for scene in pair for f in scene.figures]
    u, one = random.random(), random.choice(shown)
    selection = (one.kind if 0.4 <= u < 0.8 else None, one.colour if u >= 0.8 else None)
    first, second = (len(selected(scene, *selection)) for scene in pair)
    question = ask("compare", language, random, things=things(*selection, language, random))
    answer = answers.compare_answer(first, second, language)
    return Asked("compare", question, answer, selection=selection)


def count_in(
    pair: tuple[Scene, Scene], last: Asked, which: int, language: Language, random: Random
) -> Asked:
    """After a comparison: how many of what was compared one of the two has."""
    ordinal = ("一", "二")[which] if language == "zh" else ("first", "second")[which]
    question = ask("count_in", language, random, ordinal=ordinal)
    num = len(selected(pair[which], *last.selection))
    answer = answers.count_answer(num, language)
    return Asked("count_in", question, answer, selection=last.selection)
