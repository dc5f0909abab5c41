"""A scene, which knows all that can be asked about it, and the picture that is drawn from it."""

import io
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from xc_ray.demo.drawn.backgrounds import Background, add_grain, draw_background
from xc_ray.demo.drawn.colours import RGB
from xc_ray.demo.drawn.figures import Figure, draw_figure
from xc_ray.demo.drawn.fonts import load_font


@dataclass(frozen=True)
class Print:
    """A printed text of one line, or of several set flush right."""

    text: str
    colour: str
    rgb: RGB
    font: str  # path
    size: int  # px to the em
    left: int
    top: int
    angle: float = 0.0  # degrees
    plate: RGB | None = None  # the colour of a label that it stands on


@dataclass(frozen=True)
class Scene:
    """All that is on a picture of `size` (width, height)."""

    size: tuple[int, int]
    background: Background
    figures: tuple[Figure, ...] = ()
    print: Print | None = None


def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """The picture; about half of them have been through a JPEG file."""
    image = draw_background(scene.background, scene.size, random)
    for figure in scene.figures:
        draw_figure(image, figure)
    if scene.print is not None:
        draw_print(image, scene.print)
    image = add_grain(image, scene.background.grain, random)
    if random.random() < 0.5:
        data = _jpeg(image, random)
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.load()
        return image.copy()  # a plain picture, without the file behind it
    return image


def draw_print(image: Image.Image, text: Print) -> None:
    """Paints it on `image`, label first."""
    mask = print_mask(text)
    if text.plate is not None:
        pad = plate_pad(text.size)
        right, bottom = text.left + mask.width + pad, text.top + mask.height + pad
        box = (text.left - pad, text.top - pad, right, bottom)
        ImageDraw.Draw(image).rectangle(box, fill=text.plate)
    image.paste(text.rgb, (text.left, text.top), mask)


def print_mask(text: Print) -> Image.Image:
    """The ink alone, cut close, as a mask."""
    left, top, right, bottom = print_box(text.text, text.font, text.size)
    mask = Image.new("L", (right - left, bottom - top))
    draw = ImageDraw.Draw(mask)
    font = load_font(text.font, text.size)
    draw.text((-left, -top), text.text, fill=255, font=font, align="right")
    if not text.angle:
        return mask
    return mask.rotate(text.angle, Image.Resampling.BICUBIC, expand=True)


def print_box(text: str, font: str, size: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the ink, where the text starts at 0, 0."""
    face = load_font(font, size)
    if "\n" not in text:
        left, top, right, bottom = face.getbbox(text)
    else:
        draw = ImageDraw.Draw(Image.new("L", (1, 1)))
        left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=face, align="right")
    # A pixel of air: letters may lean out of the box that the font states.
    return int(left) - 1, int(top) - 1, int(right) + 2, int(bottom) + 2


def plate_pad(size: int) -> int:
    """How far a label reaches around print of `size`."""
    return 2 + size // 4


def encode_picture(image: Image.Image, random: Random) -> bytes:
    """The bytes of a PNG or JPEG file, for those who need files."""
    if random.random() < 0.5:
        return _jpeg(image, random)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _jpeg(image: Image.Image, random: Random) -> bytes:
    buffer = io.BytesIO()
    # Colour at half the resolution takes it from thin strokes on a picture this small.
    small = max(image.size) < 128
    quality = random.randint(80 if small else 60, 95)
    image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4" if small else "4:2:0")
    return buffer.getvalue()
