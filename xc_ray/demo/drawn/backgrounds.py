"""What lies behind the figures and the print: plain, graded, blotched or grainy."""

from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

from xc_ray.demo.drawn.colours import COLOURS, RGB, sample_background, sample_tint

Texture = Literal["plain", "gradient", "blotches", "noise"]
_TEXTURES: tuple[Texture, ...] = ("plain", "gradient", "gradient", "blotches", "noise")
_GRAIN_TILE = 128  # px; grain is one random tile laid side by side: cheap on a photo's size


@dataclass(frozen=True)
class Background:
    """Two shades that it lies between; `name` where it is plain and has one."""

    texture: Texture
    shades: tuple[RGB, RGB]
    name: str | None = None
    grain: int = 0  # most that the grain changes a channel by, over figures and print too


def sample_plain(random: Random) -> Background:
    """A plain one with a name, half of the time white."""
    name = "white" if random.random() < 0.5 else random.choice(COLOURS)
    shade = (255, 255, 255) if name == "white" else sample_background(name, random)
    return Background("plain", (shade, shade), name)


def sample_any(random: Random) -> Background:
    """Any texture; mostly light."""
    if random.random() < 0.5:
        return sample_plain(random)
    dark = random.random() < 0.25
    grain = random.randint(3, 16) if random.random() < 0.3 else 0
    first = sample_tint(random, dark=dark)
    texture = random.choice(_TEXTURES)
    if texture == "plain":
        return Background("plain", (first, first), None, grain)
    if texture == "noise":
        return Background("noise", (first, first), None, random.randint(10, 28))
    return Background(texture, (first, sample_tint(random, dark=dark)), None, grain)


def draw_background(background: Background, size: tuple[int, int], random: Random) -> Image.Image:
    """A picture of `size` with nothing on it; its grain comes on top, see `add_grain`."""
    first, second = background.shades
    if background.texture == "gradient":
        # The ends of a gradient that starts in a random corner.
        ends = [first, second, second, first] if random.random() < 0.5 else [first, second] * 2
        if random.random() < 0.5:
            ends = [first, first, second, second]
        return _field(ends, 2, 2).resize(size, Image.Resampling.BILINEAR)
    if background.texture == "blotches":
        cols, rows = random.randint(3, 9), random.randint(3, 9)
        shades = [_between(first, second, random.random()) for _ in range(cols * rows)]
        return _field(shades, cols, rows).resize(size, Image.Resampling.BILINEAR)
    return Image.new("RGB", size, first)


def add_grain(image: Image.Image, grain: int, random: Random) -> Image.Image:
    """`image` with each channel changed at random by at most `grain`."""
    if not grain:
        return image
    width, height = image.size
    tile = np.frombuffer(random.randbytes(_GRAIN_TILE * _GRAIN_TILE * 3), np.uint8)
    values = (tile.astype(np.uint16) * (2 * grain + 1) >> 8).astype(np.uint8)
    rows, cols = -(-height // _GRAIN_TILE), -(-width // _GRAIN_TILE)
    laid = np.tile(values.reshape(_GRAIN_TILE, _GRAIN_TILE, 3), (rows, cols, 1))
    noise = Image.fromarray(np.ascontiguousarray(laid[:height, :width]))
    return ImageChops.add(image, noise, 1.0, -grain)


def _field(shades: list[RGB], cols: int, rows: int) -> Image.Image:
    field = Image.new("RGB", (cols, rows))
    field.putdata(shades)
    return field


def _between(one: RGB, other: RGB, part: float) -> RGB:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(one, other, strict=True))
    return red, green, blue
