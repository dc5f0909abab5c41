"""Picture sizes, and where figures and print go so that the model can see them.

What counts is the size on the canvas that the model's own preprocessing makes of a picture
(`prompt.tiles.image_grid`), not the size in the picture.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from xc_ray.demo.drawn.drawing import print_box
from xc_ray.model.config import DecoderConfig, VisionConfig, XComposerConfig
from xc_ray.prompt.tiles import Grid, image_grid

Size: TypeAlias = tuple[int, int]  # width, height in pixels of the picture
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom
Place: TypeAlias = tuple[float, float, float]  # x, y, diameter

# As much of the demo model as a grid depends on; `demo.make`, which has the rest, imports torch.
GRID_CONFIG = XComposerConfig(
    "2.5", VisionConfig(image_size=224), DecoderConfig(1, 1, 1, 1, 1, 1), {}
)
TILE = GRID_CONFIG.tile

MIN_FIGURE = 14  # px of the canvas: one patch
MIN_FIGURE_PICTURE = 12  # px of the picture: below it a star is a blot, however enlarged
MIN_PRINT = 13  # px of the canvas, of the em
MIN_PRINT_PICTURE = 10  # px of the picture
MAX_OVERVIEW_PRINT = 5  # px of the overview, at which print cannot be read


@dataclass(frozen=True)
class Limits:
    """How hard a sample may be."""

    one_tile: bool = False
    plain: bool = False  # white or plain backgrounds, upright figures
    large_print: bool = False
    max_objects: int = 9
    max_letters: int = 10
    max_digits: int = 6
    max_turns: int = 4


def grid_of(size: Size, num_pictures: int = 1) -> Grid:
    """The tiles of a picture of `size` in a request with `num_pictures`."""
    return image_grid(GRID_CONFIG, size, GRID_CONFIG.default_max_tiles(num_pictures))


def canvas_scale(size: Size, num_pictures: int = 1) -> float:
    """Pixels of the canvas for one of the picture."""
    return max(grid_of(size, num_pictures).content) / max(size)


def overview_scale(size: Size) -> float:
    """Most pixels of the overview, in either direction, for one of the picture."""
    return canvas_scale(size) * TILE / min(grid_of(size).canvas)


def sample_size(random: Random, limits: Limits, *, least: int = 32) -> Size:
    """A picture's size; `least` is for its longer side.

    Most stay in one tile; of the others most in few: time in training goes by tiles.
    """
    u = random.random()
    if limits.one_tile or u < 0.64:
        longer = random.randint(64, 224) if random.random() < 0.85 else random.randint(32, 64)
    elif u < 0.9:
        longer = random.randint(225, 448) if random.random() < 0.75 else random.randint(449, 672)
    else:
        longer = random.randint(673, 2000)
    longer = max(longer, least)
    # Wide pictures take fewer tiles, and large ones are mostly wide.
    ratio = 1.0 if random.random() < 0.3 else random.uniform(0.45, 1.0)
    shorter = max(24, round(longer * ratio))
    return (longer, shorter) if random.random() < 0.6 else (shorter, longer)


def min_figure(scale: float) -> float:
    """The least diameter in picture pixels."""
    return max(MIN_FIGURE / scale, MIN_FIGURE_PICTURE)


def min_print(scale: float) -> int:
    """The least size of print in picture pixels."""
    return math.ceil(max(MIN_PRINT / scale, MIN_PRINT_PICTURE))


def place_figures(area: Box, num: int, least: float, random: Random) -> list[Place] | None:
    """`num` circles in `area`, apart from each other, of at least `least` px; None if too many."""
    width, height = area[2] - area[0], area[3] - area[1]
    cols, rows = _cells(width, height, num)
    cell = min(width / cols, height / rows)
    gap = max(2.0, least * 0.15)
    if cell - gap < least:
        return None
    u = random.random()
    if num > 1 and u < 0.2:
        return _in_rows(area, num, (cols, rows), max(least, (cell - gap) * random.uniform(0.5, 1)))
    if u < 0.75:
        most = min(width, height, math.sqrt(width * height / num)) * 0.9
        scattered = _scattered(area, num, (least, max(least, most)), gap, random)
        if scattered is not None:
            return scattered
    return _in_cells(area, num, (cols, rows), (least, cell - gap), random)


def fit_print(
    text: str, font: str, space: tuple[float, float], sizes: tuple[int, int]
) -> tuple[int, Size] | None:
    """The largest size of `sizes` (least, wished) at which `text` fits, and width and height."""
    least, size = sizes
    while size >= least:
        left, top, right, bottom = print_box(text, font, size)
        width, height = right - left, bottom - top
        over = max(width / max(space[0], 1), height / max(space[1], 1))
        if over <= 1:
            return size, (width, height)
        size = min(size - 1, coarse(int(size / over)))
    return None


def coarse(size: int) -> int:
    """`size` or a little less: few sizes in use keep loaded fonts at hand."""
    return size if size < 24 else size // 2 * 2 if size < 60 else size // 6 * 6


def _cells(width: float, height: float, num: int) -> tuple[int, int]:
    """Columns and rows of the largest square cells of which `num` fit."""
    best, most = (num, 1), 0.0
    for cols in range(1, num + 1):
        rows = -(-num // cols)
        if (cell := min(width / cols, height / rows)) > most:
            best, most = (cols, rows), cell
    return best


def _in_rows(area: Box, num: int, cells: tuple[int, int], diameter: float) -> list[Place]:
    """Evenly, all of one size, as in a table."""
    cols, rows = cells
    width, height = (area[2] - area[0]) / cols, (area[3] - area[1]) / rows
    return [
        (area[0] + (i % cols + 0.5) * width, area[1] + (i // cols + 0.5) * height, diameter)
        for i in range(num)
    ]


def _in_cells(
    area: Box, num: int, cells: tuple[int, int], sizes: tuple[float, float], random: Random
) -> list[Place]:
    """Each anywhere within a cell of its own."""
    cols, rows = cells
    width, height = (area[2] - area[0]) / cols, (area[3] - area[1]) / rows
    places = []
    for i in random.sample(range(cols * rows), num):
        diameter = max(random.uniform(*sizes), random.uniform(*sizes))
        left, top = area[0] + i % cols * width, area[1] + i // cols * height
        margin = (diameter + (min(width, height) - sizes[1])) / 2
        x = left + random.uniform(margin, width - margin)
        y = top + random.uniform(margin, height - margin)
        places.append((x, y, diameter))
    return places


def _scattered(
    area: Box, num: int, sizes: tuple[float, float], gap: float, random: Random
) -> list[Place] | None:
    """Anywhere, large ones first; smaller where there is no room."""
    least, most = sizes
    alike = random.random() < 0.35
    low = math.log(least)
    high = math.log(most)
    if alike:
        low = high = max(random.uniform(low, high) for _ in range(2))
    # Of two the larger, mostly: even odds by ratio would make most figures tiny on a large picture.
    tries = 2 if random.random() < 0.7 else 1
    wished = sorted(
        (math.exp(max(random.uniform(low, high) for _ in range(tries))) for _ in range(num)),
        reverse=True,
    )
    places: list[Place] = []
    cap = most
    for wish in wished:
        diameter = max(least, min(wish, cap))
        for _ in range(30):
            place = _free_place(area, diameter, gap, places, random)
            if place is not None:
                break
            diameter = max(least, diameter * 0.85)
        if place is None:
            return None
        places.append(place)
        cap = diameter if alike else most
    if alike:  # at the size of the last, which was the hardest to place
        places = [(x, y, places[-1][2]) for x, y, _ in places]
    random.shuffle(places)
    return places


def _free_place(
    area: Box, diameter: float, gap: float, places: list[Place], random: Random
) -> Place | None:
    half = diameter / 2 + 1
    if area[2] - area[0] < 2 * half or area[3] - area[1] < 2 * half:
        return None
    x = random.uniform(area[0] + half, area[2] - half)
    y = random.uniform(area[1] + half, area[3] - half)
    for px, py, p_diameter in places:
        if math.hypot(x - px, y - py) < (diameter + p_diameter) / 2 + gap:
            return None
    return x, y, diameter
