"""Pictures that the demo model is asked about in tests, as the bytes of their files."""

import io
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont

Size: TypeAlias = tuple[int, int]  # width, height
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

# Shades that nobody would call otherwise: some of Pillow's own lie between two names.
SHADES: Mapping[str, str] = {
    "red": "#e01010",
    "orange": "#ff8000",
    "yellow": "#f0d010",
    "green": "#189030",
    "blue": "#1850e0",
    "purple": "#8020b0",
    "black": "#000000",
}


def shapes(*names: str, size: Size = (224, 224), file_format: str = "PNG") -> bytes:
    """Each of `names` (`red circle`) in a cell of its own, row by row, on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    cols = math.ceil(math.sqrt(len(names) * size[0] / size[1]))
    width, height = size[0] / cols, size[1] / math.ceil(len(names) / cols)
    radius = min(width, height) * 0.36
    for i, name in enumerate(names):
        colour, kind = name.split()
        x, y = (i % cols + 0.5) * width, (i // cols + 0.5) * height
        _KINDS[kind](draw, (x - radius, y - radius, x + radius, y + radius), SHADES[colour])
    return _file(image, file_format)


def printed(
    text: str,
    *,
    em: int = 40,
    size: Size | None = None,
    at: Size | None = None,
    colour: str = "black",
    file_format: str = "PNG",
) -> bytes:
    """`text` in Pillow's own face, `em` pixels high, on white, in the middle unless told."""
    font = ImageFont.load_default(em)
    left, top, right, bottom = font.getbbox(text)
    size = size or (round(right - left) + em, round(bottom - top) + em)
    image = Image.new("RGB", size, "white")
    x, y = at or ((size[0] - right + left) / 2, (size[1] - bottom + top) / 2)
    ImageDraw.Draw(image).text((x - left, y - top), text, SHADES[colour], font)
    return _file(image, file_format)


def _file(image: Image.Image, file_format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format)
    return out.getvalue()


def _polygon(num: int, *radii: float) -> Callable[[ImageDraw.ImageDraw, Box, str], None]:
    """Upright, its corners at each of `radii` in turn."""

    def paint(draw: ImageDraw.ImageDraw, box: Box, colour: str) -> None:
        x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2
        points = []
        for i in range(num):
            angle, radius = 2 * math.pi * i / num, half * radii[i % len(radii)]
            points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
        draw.polygon(points, fill=colour)

    return paint


_KINDS: Mapping[str, Callable[[ImageDraw.ImageDraw, Box, str], Any]] = {
    "circle": lambda draw, box, colour: draw.ellipse(box, fill=colour),
    "square": lambda draw, box, colour: draw.rectangle(box, fill=colour),
    "triangle": _polygon(3, 1.0),
    "diamond": _polygon(4, 1.0),
    "star": _polygon(10, 1.0, 0.4),
}
