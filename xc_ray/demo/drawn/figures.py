"""The eight kinds of figures, as masks with smooth edges."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TypeAlias

from PIL import Image, ImageDraw

from xc_ray.demo.drawn.colours import RGB

Points: TypeAlias = tuple[tuple[float, float], ...]

# Degrees either way within which a kind stays itself: a square on its corner is a diamond.
TURNS: Mapping[str, float] = {
    "circle": 0,
    "square": 12,
    "triangle": 35,
    "star": 18,
    "diamond": 8,
    "cross": 12,
    "heart": 20,
    "ring": 0,
}
KINDS = tuple(TURNS)
# A circle's outline is a ring, a cross's is a maze.
MAY_BE_OUTLINED = ("square", "triangle", "star", "diamond", "heart")


@dataclass(frozen=True)
class Style:
    """How the figures of one scene are painted; none of it changes what they are called."""

    outlined: bool = False  # those of `MAY_BE_OUTLINED`
    stroke: float = 0.2  # breadth of an outline, in radii; a ring's is half as broad again
    smooth: bool = True  # edges; hard ones are what Pillow's own drawing gives
    rim: RGB | None = None  # a thin line of another colour around filled figures


PLAIN = Style()


def sample_style(random: Random) -> Style:
    """Mostly filled, with smooth edges."""
    return Style(
        random.random() < 0.2,
        random.uniform(0.12, 0.28),
        random.random() < 0.65,
        (0, 0, 0) if random.random() < 0.08 else None,
    )


@dataclass(frozen=True)
class Figure:
    """One object of a scene; all of it lies within the circle around `x`, `y`."""

    kind: str
    colour: str
    rgb: RGB
    x: float
    y: float
    diameter: float
    turn: float = 0.0  # degrees
    style: Style = PLAIN

    @property
    def outlined(self) -> bool:
        """Whether it is not filled; small ones always are."""
        return self.style.outlined and self.kind in MAY_BE_OUTLINED and self.diameter >= 16


def sample_turn(kind: str, random: Random) -> float:
    """Upright half of the time, otherwise turned as far as the kind allows."""
    most = TURNS[kind]
    return random.uniform(-most, most) if random.random() < 0.5 else 0.0


def draw_figure(image: Image.Image, figure: Figure) -> None:
    """Paints it on `image`."""
    side = math.ceil(figure.diameter) + 2
    left, top = math.floor(figure.x - side / 2), math.floor(figure.y - side / 2)
    filled, line = _masks(figure, figure.x - left, figure.y - top, side)
    image.paste(figure.rgb, (left, top), filled)
    if line is not None and figure.style.rim is not None:
        image.paste(figure.style.rim, (left, top), line)


def _masks(figure: Figure, x: float, y: float, side: int) -> tuple[Image.Image, Image.Image | None]:
    """Of the figure and of its rim: drawn larger and reduced, for Pillow draws hard edges."""
    over = 4 if side <= 48 else 3 if side <= 120 else 2  # large ones show theirs less
    if not figure.style.smooth:
        over = 1
    radius, x, y = figure.diameter / 2 * over, x * over, y * over
    mask = Image.new("L", (side * over, side * over))
    draw = ImageDraw.Draw(mask)
    if figure.kind in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if figure.kind == "ring":
            inner = radius - max(2.2 * over, radius * 1.5 * figure.style.stroke)
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
        return mask.reduce(over), None
    stroke = max(2.0 * over, radius * figure.style.stroke)
    if figure.outlined:
        radius -= stroke / 2
    cos, sin = (f(math.radians(figure.turn)) for f in (math.cos, math.sin))
    points = [
        (x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos))
        for px, py in _outline(figure.kind)
    ]
    if figure.outlined:
        draw.line([*points, *points[:2]], fill=255, width=round(stroke), joint="curve")
        return mask.reduce(over), None
    draw.polygon(points, fill=255)
    if figure.style.rim is None or figure.diameter < 24:
        return mask.reduce(over), None
    line = Image.new("L", mask.size)
    width = round(max(over, radius * 0.06))
    ImageDraw.Draw(line).line([*points, *points[:2]], fill=255, width=width, joint="curve")
    return mask.reduce(over), line.reduce(over)


@lru_cache(maxsize=16)
def _outline(kind: str) -> Points:
    """Corners within the unit circle, y downwards."""
    return _OUTLINES[kind]()


def _square() -> Points:
    r = math.sqrt(0.5)
    return ((-r, -r), (r, -r), (r, r), (-r, r))


def _triangle() -> Points:
    return tuple((math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3))


def _star() -> Points:
    radii = [1.0, 0.42] * 5
    return tuple(
        (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)
    )


def _diamond() -> Points:
    return ((0, -1), (0.62, 0), (0, 1), (-0.62, 0))


def _cross() -> Points:
    a, b = 0.28, 0.95
    return (
        (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
        (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
    )  # fmt: skip


def _heart() -> Points:
    steps = [2 * math.pi * i / 36 for i in range(36)]
    return tuple(
        (
            math.sin(t) ** 3 * 0.9,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5)
            / 17.5,
        )
        for t in steps
    )


_OUTLINES: Mapping[str, Callable[[], Points]] = {
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "cross": _cross,
    "heart": _heart,
}
