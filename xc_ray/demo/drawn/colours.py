"""The colours that the demo model knows: what a name covers, and what can be told apart."""

import colorsys
import math
from collections.abc import Mapping
from random import Random
from typing import TypeAlias

RGB: TypeAlias = tuple[int, int, int]
Range: TypeAlias = tuple[float, float]

# name: hue in degrees, saturation and value in 0..1. Between two names lies a gap.
_RANGES: Mapping[str, tuple[Range, Range, Range]] = {
    "red": ((-8, 6), (0.8, 1.0), (0.72, 1.0)),
    "orange": ((23, 36), (0.88, 1.0), (0.92, 1.0)),
    "yellow": ((48, 60), (0.75, 1.0), (0.88, 1.0)),
    "green": ((95, 150), (0.6, 1.0), (0.42, 0.8)),
    "blue": ((207, 240), (0.68, 1.0), (0.55, 1.0)),
    "purple": ((272, 294), (0.6, 0.95), (0.45, 0.8)),
    "pink": ((320, 348), (0.28, 0.58), (0.95, 1.0)),
    "brown": ((16, 28), (0.6, 0.85), (0.36, 0.58)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.11)),
    "gray": ((0, 360), (0.0, 0.05), (0.4, 0.63)),
    "white": ((0, 360), (0.0, 0.02), (0.96, 1.0)),
}
COLOURS = tuple(_RANGES)
# A background may also be a light shade of these and still has the name.
_LIGHT: Mapping[str, tuple[Range, Range, Range]] = {
    "yellow": ((50, 60), (0.3, 0.7), (0.95, 1.0)),
    "green": ((95, 140), (0.22, 0.6), (0.85, 1.0)),
    "blue": ((200, 232), (0.22, 0.6), (0.88, 1.0)),
    "purple": ((262, 286), (0.22, 0.5), (0.85, 1.0)),
    "gray": ((0, 360), (0.0, 0.03), (0.66, 0.84)),
}
MIN_CONTRAST = 170  # of a figure; by `contrast`, where black and white are 765 apart
MIN_PRINT_LUMINANCE = 75  # of print, in 0..255: thin strokes are told by light, not by hue


def sample_colour(name: str, random: Random) -> RGB:
    """Some shade that everybody calls `name`."""
    return _sample(_RANGES[name], random)


def sample_background(name: str, random: Random) -> RGB:
    """Some shade that a large field of it is called `name` for."""
    if name in _LIGHT and random.random() < 0.6:
        return _sample(_LIGHT[name], random)
    return _sample(_RANGES[name], random)


def sample_tint(random: Random, *, dark: bool) -> RGB:
    """A background without a name: nearly white, or nearly black, of any hue."""
    if dark:
        return _sample(((0, 360), (0.1, 0.7), (0.08, 0.26)), random)
    return _sample(((0, 360), (0.03, 0.2), (0.88, 1.0)), random)


def contrast(one: RGB, other: RGB) -> float:
    """How far apart two colours look, 0 to 765 (compuphase.com/cmetric.htm, "redmean")."""
    red, green, blue = (a - b for a, b in zip(one, other, strict=True))
    mean = (one[0] + other[0]) / 512
    return math.sqrt((2 + mean) * red**2 + 4 * green**2 + (3 - mean) * blue**2)


def luminance(colour: RGB) -> float:
    """How light it is, 0..255 (ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def clear_shade(
    name: str, grounds: tuple[RGB, ...], random: Random, *, printed: bool = False
) -> RGB | None:
    """A shade of `name` that stands out from all `grounds`; None where none was found."""
    for _ in range(4):
        shade = sample_colour(name, random)
        if all(contrast(shade, ground) >= MIN_CONTRAST for ground in grounds) and (
            not printed or _light_apart(shade, grounds)
        ):
            return shade
    return None


def _light_apart(shade: RGB, grounds: tuple[RGB, ...]) -> bool:
    light = luminance(shade)
    sides = {light > luminance(ground) for ground in grounds}
    # Between two grounds it would vanish half way in a gradient.
    return len(sides) == 1 and all(
        abs(light - luminance(ground)) >= MIN_PRINT_LUMINANCE for ground in grounds
    )


def _sample(ranges: tuple[Range, Range, Range], random: Random) -> RGB:
    hue, saturation, value = (random.uniform(*r) for r in ranges)
    red, green, blue = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
