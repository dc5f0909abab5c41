"""Puts questions into words: what they name, one of their phrasings, and how people type it."""

import re
from collections.abc import Mapping
from random import Random

from xc_ray.demo.drawn.answers import COLOURS_ZH, KINDS_ZH, Language, plural
from xc_ray.demo.drawn.late import LATE_QUESTIONS
from xc_ray.demo.drawn.phrasings import QUESTIONS

_ANY_EN = ("shapes", "shapes", "objects", "objects", "things", "figures")
_ANY_ZH = ("图形", "图形", "图形", "物体", "东西")
_COLOURED_EN = ("shapes", "objects", "things", "ones", "figures")
# Other words that people use for the same; in questions only.
_ALSO_ZH: Mapping[str, tuple[str, ...]] = {
    "circle": ("圆", "圆圈"),
    "square": ("方形", "方块"),
    "star": ("星星", "星形"),
    "cross": ("十字",),
    "heart": ("爱心",),
    "ring": ("环形",),
    "diamond": ("菱形",),
    "triangle": ("三角",),
}


def things(kind: str | None, colour: str | None, language: Language, random: Random) -> str:
    """What is counted, in the plural: `red circles`, `circles`, `red objects`, `objects`."""
    if language == "zh":
        noun = kind_zh(kind, random) if kind else random.choice(_ANY_ZH)
        return f"{COLOURS_ZH[colour]}的{noun}" if colour else noun
    nouns = _COLOURED_EN if colour else _ANY_EN
    noun = plural(kind) if kind else random.choice(nouns)
    return f"{spelt(colour, random)} {noun}" if colour else noun


def thing(kind: str | None, colour: str | None, language: Language, random: Random) -> str:
    """One of them: `red circle`, `红色的圆形`."""
    if language == "zh":
        return things(kind, colour, language, random)
    noun = kind or random.choice(("shape", "object", "thing"))
    return f"{spelt(colour, random)} {noun}" if colour else noun


def kind_zh(kind: str, random: Random) -> str:
    """Its Chinese name, at times another than the answers'."""
    return random.choice(_ALSO_ZH[kind]) if random.random() < 0.25 else KINDS_ZH[kind]


def spelt(colour: str, random: Random) -> str:
    """`gray` or `grey`."""
    return "grey" if colour == "gray" and random.random() < 0.5 else colour


def ask(kind: str, language: Language, random: Random, **slots: str) -> str:
    """A question of that kind in one of its phrasings, more or less carefully written."""
    phrasings = QUESTIONS[language].get(kind) or LATE_QUESTIONS[language][kind]
    question = random.choice(phrasings).format(**slots)
    if language == "en":
        question = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", question)  # a(n) orange star
    return careless(question, language, random)


def careless(question: str, language: Language, random: Random) -> str:
    """As people type: with a please, without a mark, in lower case, or as it is."""
    u = random.random()
    if language == "zh":
        if u < 0.12:
            return f"请问{question}" if question.endswith("？") else f"请{question}"
        if u < 0.3:
            return question.rstrip("？。")
        return question.replace("？", "?") if u < 0.42 else question
    if question[0].isdigit():
        return question
    lower = question[0].lower() + question[1:]
    if u < 0.1 and question[-1] in "?.":
        bare = question[:-1]
        if u < 0.05:
            return f"Please {lower}" if question[-1] == "." else f"{bare}, please?"
        return f"{bare} please" if u < 0.075 else f"{lower[:-1]}, please"
    if u < 0.2:
        return lower.rstrip("?.")
    if u < 0.28:
        return question.lower()
    if u < 0.38:
        return question.rstrip("?.")
    return question.upper() if u < 0.4 else question
