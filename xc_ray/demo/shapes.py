"""A small data set to try training with: drawn shapes, with questions about them and answers."""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from PIL import Image, ImageDraw

SHAPES_VERSION = 2  # part of the folder's name: raise it when what is drawn or asked changes

_COLOURS = {  # name: (Chinese, RGB)
    "red": ("红色", (214, 39, 40)),
    "orange": ("橙色", (255, 140, 0)),
    "yellow": ("黄色", (235, 200, 0)),
    "green": ("绿色", (34, 139, 34)),
    "blue": ("蓝色", (31, 90, 200)),
    "purple": ("紫色", (128, 40, 160)),
    "black": ("黑色", (20, 20, 20)),
}
_SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星"}
_BACKGROUNDS = [(255, 255, 255), (245, 245, 235), (232, 240, 250), (250, 238, 238)]
_SIDES = (64, 80, 96, 112, 128)  # px
_NUMBERS = {1: ("one", "一"), 2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四")}
_CORNERS = {"triangle": ("三角形", 3), "square": ("正方形", 4), "star": ("五角星", 10)}


@dataclass(frozen=True)
class _Shape:
    kind: str
    colour: str

    @property
    def english(self) -> str:
        """`a red circle`."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.kind}"

    @property
    def chinese(self) -> str:
        return f"{_COLOURS[self.colour][0]}的{_SHAPES[self.kind]}"


@dataclass(frozen=True)
class _Row:
    turns: tuple[tuple[str, str], ...]  # questions and answers
    pictures: tuple[Image.Image, ...] = ()


def shapes_folder(
    cache: Path, *, num_train: int = 64, num_validation: int = 16, seed: int = 0
) -> Path:
    """A folder with `train.jsonl`, `validation.jsonl` and `images/`, made in `cache` on first use.

    It is whole or absent, whoever else makes it at the same time; a seed makes the same bytes.
    """
    target = cache / f"shapes-v{SHAPES_VERSION}-{num_train}-{num_validation}-{seed}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="shapes-") as scratch:
        made = Path(scratch) / "shapes"
        _make(made, {"train": num_train, "validation": num_validation}, Random(seed))
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def _make(folder: Path, num_rows: dict[str, int], random: Random) -> None:
    (folder / "images").mkdir(parents=True)
    num_pictures = 0
    for split, num in num_rows.items():
        lines = []
        for i in range(num):
            row = _QUESTIONS[i % len(_QUESTIONS)](random)
            names = [f"images/{num_pictures + k:04d}.png" for k in range(1, len(row.pictures) + 1)]
            num_pictures += len(names)
            for name, picture in zip(names, row.pictures, strict=True):
                picture.save(folder / name)
            lines.append(json.dumps(_json(row, names), ensure_ascii=False) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def _json(row: _Row, names: list[str]) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    for question, answer in row.turns:
        slots = "" if messages else "<image>" * len(names)  # the pictures come first
        messages.append({"role": "user", "content": f"{slots}{question}"})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "images": names} if names else {"messages": messages}


# ---------------------------------------------------------------- questions


def _what(random: Random) -> _Row:
    shape = _any_shape(random)
    turn = ("What shape is it, and which colour?", f"{_capital(shape.english)}.")
    return _Row((turn,), (_draw([shape], random),))


def _how_many(random: Random) -> _Row:
    shapes = _some(random)
    return _Row((_count(shapes),), (_draw(shapes, random),))


def _two_turns(random: Random) -> _Row:
    shape = _any_shape(random)
    turns = (
        ("What shape is it?", f"A {shape.kind}."),
        ("And which colour is it?", f"{_capital(shape.colour)}."),
    )
    return _Row(turns, (_draw([shape], random),))


def _in_chinese(random: Random) -> _Row:
    shape = _any_shape(random)
    return _Row((("这是什么图形？", f"{shape.chinese}。"),), (_draw([shape], random),))


def _two_turns_in_chinese(random: Random) -> _Row:
    shapes = _some(random)
    turns = (
        ("图中一共有几个图形？", f"{_NUMBERS[len(shapes)][1]}个。"),
        ("是什么颜色？", f"{_COLOURS[shapes[0].colour][0]}。"),
    )
    return _Row(turns, (_draw(shapes, random),))


def _which_has_more(random: Random) -> _Row:
    fewer, more = sorted(random.sample(sorted(_NUMBERS), 2))
    shape = _any_shape(random)
    counts = [more, fewer] if random.random() < 0.5 else [fewer, more]
    pictures = tuple(_draw([shape] * n, random) for n in counts)
    answer = "The first picture." if counts[0] == more else "The second picture."
    return _Row((("Which picture has more shapes?", answer),), pictures)


def _text_only(random: Random) -> _Row:
    """Without a picture; of so many numbers that a small set hardly has one twice."""
    kind, number = random.choice(list(_CORNERS)), random.randint(2, 99)
    chinese, corners = _CORNERS[kind]
    answer = str(number * corners)
    if random.random() < 0.25:
        return _Row(((f"{number}个{chinese}一共有几个角？", f"{answer}个。"),))
    return _Row(((f"How many corners have {number} {kind}s together?", f"{answer}."),))


_Question: TypeAlias = Callable[[Random], _Row]
# Taken in turn, so that a few rows have every form.
_QUESTIONS: tuple[_Question, ...] = (
    _what,
    _two_turns,
    _which_has_more,
    _in_chinese,
    _text_only,
    _how_many,
    _what,
    _two_turns_in_chinese,
)


def _any_shape(random: Random) -> _Shape:
    return _Shape(random.choice(list(_SHAPES)), random.choice(list(_COLOURS)))


def _some(random: Random) -> list[_Shape]:
    return [_any_shape(random)] * random.choice(list(_NUMBERS))


def _count(shapes: list[_Shape]) -> tuple[str, str]:
    kind, num = shapes[0].kind, _NUMBERS[len(shapes)][0]
    return f"How many {kind}s are there?", f"{_capital(num)}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------- drawing


def _draw(shapes: list[_Shape], random: Random) -> Image.Image:
    """One shape anywhere, or up to four, each in a quarter of its own."""
    width, height = random.choice(_SIDES), random.choice(_SIDES)
    image = Image.new("RGB", (width, height), random.choice(_BACKGROUNDS))
    draw = ImageDraw.Draw(image)
    per_side = 1 if len(shapes) == 1 else 2
    cell = (width / per_side, height / per_side)
    cells = random.sample(range(per_side**2), len(shapes))
    for shape, place in zip(shapes, cells, strict=True):
        radius = min(cell) * random.uniform(0.28, 0.44)
        x, y = (
            index * side + random.uniform(radius + 1, side - radius - 1)
            for index, side in zip((place % per_side, place // per_side), cell, strict=True)
        )
        _draw_one(draw, shape, x, y, radius)
    return image


def _draw_one(draw: ImageDraw.ImageDraw, shape: _Shape, x: float, y: float, radius: float) -> None:
    fill = _COLOURS[shape.colour][1]
    if shape.kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    corners = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.4)}
    num, inner = corners[shape.kind]
    turn = math.pi / 4 if shape.kind == "square" else 0.0  # the others stand on a side
    points = [
        (
            x + radius * (inner if i % 2 else 1.0) * math.sin(2 * math.pi * i / num + turn),
            y - radius * (inner if i % 2 else 1.0) * math.cos(2 * math.pi * i / num + turn),
        )
        for i in range(num)
    ]
    draw.polygon(points, fill=fill)
