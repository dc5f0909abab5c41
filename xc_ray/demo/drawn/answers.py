"""The answers' forms: one for each kind of question, in English and in Chinese."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.drawing import Scene
from xc_ray.demo.drawn.figures import KINDS, Figure

Language = Literal["en", "zh"]

KINDS_ZH: Mapping[str, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "diamond": "菱形",
    "cross": "十字形",
    "heart": "心形",
    "ring": "圆环",
}
COLOURS_ZH: Mapping[str, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "black": "黑色",
    "gray": "灰色",
    "white": "白色",
}
_NUMBERS_EN = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
_NUMBERS_ZH = ["零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十"]


def count_answer(num: int, language: Language) -> str:
    """`Three.`, `三个。`; of nothing `None.`, `没有。`."""
    if language == "zh":
        return f"{number(num, language)}个。" if num else "没有。"
    return f"{_capital(number(num, language))}." if num else "None."


def kind_answer(kind: str, language: Language) -> str:
    """`A circle.`, `圆形。`."""
    return f"{KINDS_ZH[kind]}。" if language == "zh" else f"A {kind}."


def colour_answer(colours: Sequence[str], language: Language) -> str:
    """`Red.`, `Red and blue.`, `红色和蓝色。`, in the order of `COLOURS`."""
    ordered = sorted(set(colours), key=COLOURS.index)
    if language == "zh":
        return f"{_list([COLOURS_ZH[c] for c in ordered], language)}。"
    return f"{_capital(_list(ordered, language))}."


def kinds_answer(kinds: Sequence[str], language: Language) -> str:
    """`Circles.`, `Circles and stars.`, `圆形和五角星。`, in the order of `KINDS`."""
    ordered = sorted(set(kinds), key=KINDS.index)
    if language == "zh":
        return f"{_list([KINDS_ZH[k] for k in ordered], language)}。"
    return f"{_capital(_list([plural(k) for k in ordered], language))}."


def figure_answer(figure: Figure, language: Language) -> str:
    """`A red circle.`, `红色的圆形。`."""
    if language == "zh":
        return f"{COLOURS_ZH[figure.colour]}的{KINDS_ZH[figure.kind]}。"
    article = "An" if figure.colour[0] in "aeiou" else "A"
    return f"{article} {figure.colour} {figure.kind}."


def the_figure_answer(figure: Figure, language: Language) -> str:
    """`The red circle.`, `红色的圆形。`."""
    if language == "zh":
        return figure_answer(figure, language)
    return f"The {figure.colour} {figure.kind}."


def exists_answer(yes: bool, language: Language) -> str:
    """`Yes.`, `有。` or `No.`, `没有。`."""
    if language == "zh":
        return "有。" if yes else "没有。"
    return "Yes." if yes else "No."


def sum_answer(first: int, second: int) -> str:
    """`12 + 30 = 42`."""
    return f"{first} + {second} = {first + second}"


def compare_answer(first: int, second: int, language: Language) -> str:
    """Which of two pictures has more, by their counts."""
    if language == "zh":
        return "一样多。" if first == second else f"第{'一' if first > second else '二'}张图。"
    if first == second:
        return "Both have the same number."
    return f"The {'first' if first > second else 'second'} picture."


def describe_answer(scene: Scene, language: Language) -> str:
    """`Two red circles and one blue star on a white background.`, or of print alone its text.

    Groups come by number, then in the order of `KINDS` and `COLOURS`; a background without a name
    is left out.
    """
    if scene.print is not None and not scene.figures:
        colour = scene.print.colour
        if language == "zh":
            what = f"{COLOURS_ZH[colour]}的文字“{scene.print.text}”"
        else:
            what = f'the text "{scene.print.text}" in {colour}'
    else:
        groups = figure_groups(scene.figures)
        what = _list([_group(k, c, n, language) for (k, c), n in groups], language)
    name = scene.background.name
    if language == "zh":
        return f"{COLOURS_ZH[name]}背景上有{what}。" if name else f"{what}。"
    article = "an" if name and name[0] in "aeiou" else "a"
    return f"{_capital(what)} on {article} {name} background." if name else f"{_capital(what)}."


def figure_groups(figures: Sequence[Figure]) -> list[tuple[tuple[str, str], int]]:
    """((kind, colour), number) in the order in which they are described."""
    counts = Counter((f.kind, f.colour) for f in figures)

    def order(group: tuple[tuple[str, str], int]) -> tuple[int, int, int]:
        (kind, colour), num = group
        return -num, KINDS.index(kind), COLOURS.index(colour)

    return sorted(counts.items(), key=order)


def number(num: int, language: Language) -> str:
    """`three`, `三`; in Chinese as before a measure word (`两`), up to ninety-nine."""
    if language == "en":
        return _NUMBERS_EN[num]
    if num <= 10:
        return _NUMBERS_ZH[num]
    tens, ones = divmod(num, 10)
    digits = "零一二三四五六七八九"
    return (digits[tens] if tens > 1 else "") + "十" + (digits[ones] if ones else "")


def plural(kind: str) -> str:
    """`circles`, `crosses`."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _group(kind: str, colour: str, num: int, language: Language) -> str:
    if language == "zh":
        return f"{number(num, language)}个{COLOURS_ZH[colour]}的{KINDS_ZH[kind]}"
    return f"{number(num, language)} {colour} {kind if num == 1 else plural(kind)}"


def _list(parts: Sequence[str], language: Language) -> str:
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return last.join(filter(None, (comma.join(parts[:-1]), parts[-1])))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
