"""What each patch of a drawn picture shows: a lesson of the tower's own, beside the answers.

Answers alone tell a tower little at first: it takes thousands of steps before it sees a letter. The
maker of a picture knows where everything is, so that every patch can be asked. Only training has
this; nothing of it is in the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.drawing import Print, Scene, print_box
from xc_ray.demo.drawn.figures import KINDS
from xc_ray.demo.drawn.fonts import load_font
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.tiles import Grid

Labels: TypeAlias = npt.NDArray[np.uint8]

UNKNOWN = 255  # too small to be seen there, or nobody says
_FIRST_CHARACTER, _LAST_CHARACTER = 0x21, 0x7E
# Nothing; inside of each kind of figure; its middle, so that figures are counted; characters.
NUM_THINGS = 1 + 2 * len(KINDS) + _LAST_CHARACTER - _FIRST_CHARACTER + 1
NUM_COLOURS = 1 + len(COLOURS)
MIN_SEEN = 10  # px of a figure or of print's em on a square, below which it is unknown
_INSIDE = 0.4  # of a figure's diameter around its middle


@dataclass(frozen=True)
class Hints:
    """Labels (N, P) of a picture's squares, overview first: what is there, in which colour."""

    things: Labels
    colours: Labels


def hints_of(config: XComposerConfig, scene: Scene, grid: Grid) -> Hints:
    """The labels of a scene whose picture lies on `grid`."""
    side = config.vision.patches_per_side
    marks = list(_marks(scene))
    fit = tuple(c / s for c, s in zip(grid.content, scene.size, strict=True))
    whole = _paint(marks, fit, grid.offset, (grid.rows * side, grid.cols * side), config)
    squash = (config.tile / grid.canvas[0], config.tile / grid.canvas[1])
    overview = _paint(
        marks,
        (fit[0] * squash[0], fit[1] * squash[1]),
        (grid.offset[0] * squash[0], grid.offset[1] * squash[1]),
        (side, side),
        config,
    )
    return Hints(*(_squares(o, w, side) for o, w in zip(overview, whole, strict=True)))


@dataclass(frozen=True)
class _Mark:
    """Something at `x`, `y` of the picture; `inside` and `middle` are its labels."""

    x: float
    y: float
    size: float  # px
    radius: float  # within which patches are inside
    inside: int
    middle: int
    colour: int


def _marks(scene: Scene) -> Iterator[_Mark]:
    for figure in scene.figures:
        kind = KINDS.index(figure.kind)
        yield _Mark(
            figure.x,
            figure.y,
            figure.diameter,
            _INSIDE * figure.diameter,
            1 + kind,
            1 + len(KINDS) + kind,
            1 + COLOURS.index(figure.colour),
        )
    if scene.print is not None:
        colour = 1 + COLOURS.index(scene.print.colour)
        for character, x, y in _characters(scene.print):
            thing = 1 + 2 * len(KINDS) + ord(character) - _FIRST_CHARACTER
            yield _Mark(x, y, scene.print.size, 0.0, thing, thing, colour)


def _characters(text: Print) -> Iterator[tuple[str, float, float]]:
    """The visible characters of a print and the middle of each, in px of the picture."""
    face = load_font(text.font, text.size)
    left, top, right, bottom = print_box(text.text, text.font, text.size)
    lines = text.text.split("\n")
    widest = max(face.getlength(line) for line in lines)
    turn = math.radians(text.angle)
    for number, line in enumerate(lines):
        start = widest - face.getlength(line) - left
        height = (bottom - top) / len(lines)
        for i, character in enumerate(line):
            if not _FIRST_CHARACTER <= ord(character) <= _LAST_CHARACTER:
                continue
            x = start + (face.getlength(line[:i]) + face.getlength(line[: i + 1])) / 2
            y = (number + 0.5) * height
            # Turned around the middle, counter-clockwise, as Pillow turns the mask.
            dx, dy = x - (right - left) / 2, y - (bottom - top) / 2
            wide = abs((right - left) * math.cos(turn)) + abs((bottom - top) * math.sin(turn))
            high = abs((right - left) * math.sin(turn)) + abs((bottom - top) * math.cos(turn))
            yield (
                character,
                text.left + wide / 2 + dx * math.cos(turn) + dy * math.sin(turn),
                text.top + high / 2 - dx * math.sin(turn) + dy * math.cos(turn),
            )


def _paint(
    marks: list[_Mark],
    scale: tuple[float, ...],
    offset: tuple[float, float],
    shape: tuple[int, int],
    config: XComposerConfig,
) -> tuple[Labels, Labels]:
    """Things and colours by patch, (rows, cols) = `shape`."""
    patch = config.vision.patch_size
    things, colours = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for mark in marks:
        x = (mark.x * scale[0] + offset[0]) / patch
        y = (mark.y * scale[1] + offset[1]) / patch
        seen = mark.size * min(scale[0], scale[1]) >= MIN_SEEN
        rx, ry = (mark.radius * s / patch for s in scale)
        row, col = min(int(y), shape[0] - 1), min(int(x), shape[1] - 1)
        if rx > 0 and ry > 0:
            rows = slice(max(0, int(y - ry)), int(y + ry) + 1)
            cols = slice(max(0, int(x - rx)), int(x + rx) + 1)
            high = (np.arange(*rows.indices(shape[0])) + 0.5 - y) / ry
            wide = (np.arange(*cols.indices(shape[1])) + 0.5 - x) / rx
            inside = high[:, None] ** 2 + wide[None] ** 2 <= 1
            things[rows, cols][inside] = mark.inside if seen else UNKNOWN
            colours[rows, cols][inside] = mark.colour if seen else UNKNOWN
        things[row, col] = mark.middle if seen else UNKNOWN
        colours[row, col] = mark.colour if seen else UNKNOWN
    return things, colours


def _squares(overview: Labels, whole: Labels, side: int) -> Labels:
    """Two planes by patch -> (N, P): overview, then tiles by rows."""
    rows, cols = (n // side for n in whole.shape)
    tiles = whole.reshape(rows, side, cols, side).swapaxes(1, 2)
    return np.concatenate([overview[None], tiles.reshape(-1, side, side)]).reshape(-1, side**2)
