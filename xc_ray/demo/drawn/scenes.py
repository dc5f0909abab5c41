"""Scenes made up at random: figures, print, both, and small print on a large picture."""

from collections.abc import Callable
from random import Random
from typing import TypeAlias

from xc_ray.demo.drawn.backgrounds import Background, sample_any, sample_plain
from xc_ray.demo.drawn.colours import COLOURS, RGB, clear_shade, sample_background
from xc_ray.demo.drawn.drawing import Print, Scene, plate_pad, print_box
from xc_ray.demo.drawn.figures import KINDS, PLAIN, Figure, sample_style, sample_turn
from xc_ray.demo.drawn.layout import (
    MAX_OVERVIEW_PRINT,
    MIN_PRINT,
    Box,
    Limits,
    Size,
    canvas_scale,
    coarse,
    fit_print,
    min_figure,
    min_print,
    overview_scale,
    place_figures,
    sample_size,
)
from xc_ray.demo.drawn.words import sample_word

Palette: TypeAlias = dict[str, RGB]  # a shade of each colour that stands out from the background
_WHOLE = 0.96  # of a picture's width that print may take


def figures_scene(
    random: Random,
    limits: Limits,
    *,
    num: int | None = None,
    num_pictures: int = 1,
    named: bool = False,
    faces: tuple[str, ...] = (),
) -> Scene:
    """1 to 9 figures (`num` if given); with `faces`, at times a printed word beside them.

    `named`: on a plain background that has a name.
    """
    num = num or _sample_num(random, limits)
    background = sample_plain(random) if named or limits.plain else sample_any(random)
    palette = _palette(background, random)
    for least in (32, 32, 96, 160, 224):
        size = sample_size(random, limits, least=least)
        scale = canvas_scale(size, num_pictures)
        area: Box = (1, 1, size[0] - 1, size[1] - 1)
        text = None
        if faces and random.random() < 0.8:
            text, area = _banner(random, limits, (size, scale), background, faces)
        places = place_figures(area, num, min_figure(scale), random)
        if places is not None:
            break
    else:  # nine of the least size always fit here
        size, text = (224, 224), None
        places = place_figures((1, 1, 223, 223), num, min_figure(1), random) or []
    turned = not limits.plain
    style = sample_style(random) if turned else PLAIN
    figures = tuple(
        Figure(
            kind,
            colour,
            palette[colour],
            x,
            y,
            diameter,
            sample_turn(kind, random) if turned else 0.0,
            style,
        )
        for (kind, colour), (x, y, diameter) in zip(
            _compose(num, tuple(palette), random), places, strict=True
        )
    )
    return Scene(size, background, figures, text)


def print_scene(random: Random, limits: Limits, text: str, faces: tuple[str, ...]) -> Scene:
    """`text` printed on a picture, anywhere, alone."""
    background = sample_plain(random) if limits.plain else sample_any(random)
    font = random.choice(faces)
    if random.random() < 0.3:
        return _cut_close(random, limits, text, font, background)
    for least in (32, 64, 128, 224, 224):
        size = sample_size(random, limits, least=least)
        scale = canvas_scale(size)
        wished = max(min_print(scale), coarse(int(_sample_print(random, limits) / scale)))
        space = (size[0] * _WHOLE, size[1] * _WHOLE)
        fitted = fit_print(text, font, space, (min_print(scale), wished))
        if fitted is not None:
            break
    else:
        return _cut_close(random, limits, text, font, background)
    em, (width, height) = fitted
    plate, grounds = None, background.shades
    pad = plate_pad(em)
    roomy = size[0] > width + 2 * pad and size[1] > height + 2 * pad
    if not roomy:
        pad = 0
    elif not limits.plain and random.random() < 0.15:
        plate = sample_background(random.choice(COLOURS), random)
        grounds = (plate, plate)
    left, top = (
        random.randint(pad, s - b - pad) for s, b in zip(size, (width, height), strict=True)
    )
    if random.random() < 0.35:
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
    colour, rgb = _print_shade(grounds, background.name if plate is None else None, random)
    angle = 0.0
    if roomy and plate is None and not limits.plain and "\n" not in text and random.random() < 0.12:
        # As far as its corners stay within the air around it.
        reach = min(left, top, size[0] - left - width, size[1] - top - height)
        most = min(4.0, 57 * reach / max(width, height))
        angle = random.uniform(-most, most)
        left -= round(abs(angle) / 57.3 * height / 2)
        top -= round(abs(angle) / 57.3 * width / 2)
    return Scene(size, background, (), Print(text, colour, rgb, font, em, left, top, angle, plate))


def small_print_scene(
    random: Random, limits: Limits, sample_text: Callable[[], str], faces: tuple[str, ...]
) -> Scene:
    """A large picture with one line that its overview cannot show; at times figures around it."""
    for _ in range(100):
        width = random.randint(900, 1800)
        size = (width, round(width * random.uniform(0.55, 1.0)))
        size = size if random.random() < 0.7 else (size[1], size[0])
        scale, in_overview = canvas_scale(size), overview_scale(size)
        sizes = [
            em
            for em in range(min_print(scale), 2 * min_print(scale))
            if em * in_overview < MAX_OVERVIEW_PRINT
        ]
        if len(sizes) >= 2:
            break
    background = sample_any(random)
    em, font, text = random.choice(sizes), random.choice(faces), sample_text()
    left, top, right, bottom = print_box(text, font, em)
    box_width, box_height = right - left, bottom - top
    x = random.randint(em, size[0] - box_width - em)
    y = random.randint(em, size[1] - box_height - em)
    colour, rgb = _print_shade(background.shades, background.name, random)
    printed = Print(text, colour, rgb, font, em, x, y)
    figures: tuple[Figure, ...] = ()
    if random.random() < 0.6:
        figures = _beside(printed, box_height, size, background, random)
    return Scene(size, background, figures, printed)


def _beside(
    text: Print, height: int, size: Size, background: Background, random: Random
) -> tuple[Figure, ...]:
    """A few figures in the larger part above or below the line."""
    above, below = text.top - text.size, text.top + height + text.size
    area: Box = (1, 1, size[0] - 1, above)
    if above < size[1] - below:
        area = (1, below, size[0] - 1, size[1] - 1)
    palette = _palette(background, random)
    num = random.randint(1, 5)
    places = place_figures(area, num, 0.1 * min(size), random) or []
    composed = _compose(num, tuple(palette), random)
    style = sample_style(random)
    return tuple(
        Figure(kind, colour, palette[colour], x, y, d, sample_turn(kind, random), style)
        for (kind, colour), (x, y, d) in zip(composed, places, strict=False)
    )


def _banner(
    random: Random,
    limits: Limits,
    frame: tuple[Size, float],
    background: Background,
    faces: tuple[str, ...],
) -> tuple[Print | None, Box]:
    """A word along the top or the bottom, and the room that it leaves; none where it is narrow."""
    size, scale = frame
    text, font = sample_word(random, min(8, limits.max_letters)), random.choice(faces)
    wished = max(min_print(scale), coarse(int(_sample_print(random, limits) / scale)))
    space = (size[0] * _WHOLE, size[1] * 0.3)
    fitted = fit_print(text, font, space, (min_print(scale), wished))
    if fitted is None:
        return None, (1, 1, size[0] - 1, size[1] - 1)
    em, (width, height) = fitted
    margin = max(2, em // 5)
    left = random.randint(0, size[0] - width)
    colour, rgb = _print_shade(background.shades, background.name, random)
    if random.random() < 0.5:
        top, area = margin, (1, height + 2 * margin, size[0] - 1, size[1] - 1)
    else:
        top = size[1] - margin - height
        area = (1, 1, size[0] - 1, top - margin)
    return Print(text, colour, rgb, font, em, left, top), area


def _cut_close(
    random: Random, limits: Limits, text: str, font: str, background: Background
) -> Scene:
    """A picture hardly larger than its print, as cut from a page."""
    em = (
        random.randint(12, 26)
        if limits.one_tile or random.random() < 0.8
        else random.randint(27, 64)
    )
    while True:
        em = coarse(em)
        left, top, right, bottom = print_box(text, font, em)
        width, height = right - left, bottom - top
        left, top, after, below = (random.randint(1, 2 + em) for _ in range(4))
        size = (max(24, left + width + after), max(24, top + height + below))
        scale = canvas_scale(size)
        # Wider than a tile at one-tile limits, or reduced to less than can be read: smaller print.
        if em <= 10 or (em >= min_print(scale) and (not limits.one_tile or max(size) <= 224)):
            break
        em -= 1
    if em < min_print(scale):  # a long line: spread over more tiles instead
        return _cut_close(random, Limits(), text, font, background)
    colour, rgb = _print_shade(background.shades, background.name, random)
    return Scene(size, background, (), Print(text, colour, rgb, font, em, left, top))


def _sample_num(random: Random, limits: Limits) -> int:
    return random.randint(1, limits.max_objects)


def _sample_print(random: Random, limits: Limits) -> float:
    """A wished size in pixels of the canvas."""
    if limits.large_print:
        return random.uniform(26, 70)
    u = random.random()
    if u < 0.12:
        return random.uniform(MIN_PRINT, 16)
    return random.uniform(16, 40) if u < 0.7 else random.uniform(40, 100)


def _palette(background: Background, random: Random) -> Palette:
    shades = {
        name: clear_shade(name, background.shades, random)
        for name in COLOURS
        if name != background.name
    }
    return {name: shade for name, shade in shades.items() if shade is not None}


def _print_shade(grounds: tuple[RGB, RGB], taken: str | None, random: Random) -> tuple[str, RGB]:
    """A colour for print, often black or white; each that is not the background's may come."""
    names = [name for name in random.sample(COLOURS, len(COLOURS)) if name != taken]
    if random.random() < 0.4:
        names = [*(n for n in ("black", "white") if n != taken), *names]
    for name in names:
        shade = clear_shade(name, grounds, random, printed=True)
        if shade is not None:
            return name, shade
    # Between a light and a dark end of a gradient nothing is clear: `sample_any` makes none.
    raise AssertionError(f"no print can be read on {grounds}")


def _compose(num: int, colours: tuple[str, ...], random: Random) -> list[tuple[str, str]]:
    """Kinds and colours of `num` figures: one of each, one in common, or a few of both mixed."""
    few_kinds = random.sample(KINDS, random.choice((1, 2, 2, 3, 3, 4)))
    few_colours = random.sample(colours, min(len(colours), random.choice((1, 2, 2, 3, 3, 4))))
    return [(random.choice(few_kinds), random.choice(few_colours)) for _ in range(num)]
