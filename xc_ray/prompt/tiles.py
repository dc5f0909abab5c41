"""Image bytes -> picture -> canvas of whole tiles; and the grid of a picture from its header alone.

`open_image` is the one door for image bytes. Above the exact part it applies the EXIF orientation
and puts transparency on white, which the original code does not (a picture then looks as it does in
any viewer). Below it everything is exact: Pillow's 8-bit resize, float64 rounding, the family's
scale and padding rules.

Worked example, XComposer2.5 (tile 560, budget 24), a picture of 900 × 300: ratio 3, scale min(8,
ceil(900/560)) = 2, so 1120 × 373 padded to 1120 × 560: 1 row of 2 tiles, (2 + 1)·400 + 2·20 + 1 =
1241 tokens.
"""

import io
import math
import time
import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from xc_ray.errors import InvalidRequest, MediaError
from xc_ray.model.config import XComposerConfig

Canvas: TypeAlias = npt.NDArray[np.uint8]
# `serving`: the family's inference transform; `family`: the one of its fine-tuning code.
Transform = Literal["serving", "family"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 89_478_485  # Pillow's own bound, 256 MiB of RGB; 30,000 × 30,000 is ten times that
# Of a thread's own time, for one picture. A header takes less than a millisecond, 89 million pixels
# about a second; files of a few kB can be made that take hours.
HEADER_S = 0.2
DECODE_S = 10.0
WHITE = (255, 255, 255)
# Bytes between two looks at the clock: 400 scans at most, of which each goes through all pixels.
_JPEG_BLOCK = 4096
# EXIF orientations that swap width and height.
_SWAPPED = frozenset({5, 6, 7, 8})


@dataclass(frozen=True)
class Grid:
    """Where a picture lies on its tiles.

    Sizes and offsets are in pixels, before any transposing is undone.
    """

    rows: int
    cols: int
    content: tuple[int, int]  # width, height of the resized picture
    offset: tuple[int, int]  # x, y of the picture inside the white canvas
    canvas: tuple[int, int]  # width, height

    @property
    def num_tiles(self) -> int:
        """Squares that go through the tower, without the overview."""
        return self.rows * self.cols


@dataclass(frozen=True)
class ImageHeader:
    """What the header tells: the format's name, and width and height as displayed."""

    format: str
    width: int
    height: int


class _File(io.BytesIO):
    """File bytes that can be read until this thread has worked for `limit_s` seconds.

    Pillow reads on as it decodes, so that this is where it can be stopped.
    """

    def __init__(self, data: bytes, limit_s: float) -> None:
        super().__init__(data)
        self._limit_s = limit_s
        self._end = time.thread_time() + limit_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise MediaError(
                f"the image of {len(self.getbuffer()):,} bytes takes more than {self._limit_s:g} s "
                "to read; save it anew, without metadata and not progressive",
                code="image_too_complex",
            )
        return super().read(size)


def read_header(
    data: bytes, *, max_pixels: int = MAX_PIXELS, limit_s: float = HEADER_S
) -> ImageHeader:
    """Format and displayed size, from the header; no pixel is decoded.

    Raises:
        MediaError: not an image of a known format, more than `max_pixels`, or more than `limit_s`
            seconds of work.
    """
    image = _identify(data, max_pixels, limit_s)
    width, height = image.size
    if _orientation(image) in _SWAPPED:
        width, height = height, width
    return ImageHeader(str(image.format), width, height)


def open_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, limit_s: float = DECODE_S
) -> Image.Image:
    """An RGB picture from file bytes, upright as its EXIF data tells.

    Transparency is put on white; of several frames the first is taken.

    Raises:
        MediaError: not an image of a known format, damaged or cut short, more than `max_pixels`, or
            more than `limit_s` seconds of work.
    """
    image = _identify(data, max_pixels, limit_s)
    if isinstance(image, JpegImageFile):
        image.decodermaxblock = _JPEG_BLOCK
    orientation = _orientation(image)
    try:
        image.load()
        return _on_white(_turn(image, orientation))
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as e:
        raise MediaError(
            f"the {image.format} image of {len(data):,} bytes is damaged or cut short "
            f"({_reason(e)}); send it again",
            code="invalid_image",
        ) from None


def image_grid(
    config: XComposerConfig,
    size: tuple[int, int],
    max_tiles: int,
    transform: Transform = "serving",
) -> Grid:
    """The grid of a picture of `size` (width, height) under a budget of `max_tiles`.

    Raises:
        InvalidRequest: `max_tiles` is less than 1.
    """
    if max_tiles < 1:
        raise InvalidRequest(f"max_tiles is {max_tiles}, the least is 1", param="max_tiles")
    tile = config.tile
    if not config.family.tiled:
        return Grid(1, 1, (tile, tile), (0, 0), (tile, tile))
    width, height = size
    tall = width < height
    if tall:
        width, height = height, width
    # Upstream quirk: the ratio is a float64 and the new height is cut, not rounded.
    ratio = width / height
    scale = _scale(ratio, max_tiles)
    if not config.family.always_enlarge:
        enlarge = 1.5 if transform == "family" else 1.0
        scale = min(scale, math.ceil(width * enlarge / tile))
    new_width = scale * tile
    new_height = max(1, int(new_width / ratio))
    padded = math.ceil(new_height / tile) * tile
    centred = config.family.centre_padding or transform == "family"
    top = int((padded - new_height) / 2) if centred else 0
    if tall:
        return Grid(scale, padded // tile, (new_height, new_width), (top, 0), (padded, new_width))
    return Grid(padded // tile, scale, (new_width, new_height), (0, top), (new_width, padded))


def make_canvas(image: Image.Image, grid: Grid, *, tiled: bool) -> Canvas:
    """The picture resized and padded onto its grid: uint8 (H, W, 3), H and W whole tiles."""
    rgb = image.convert("RGB")
    if not tiled:
        return np.asarray(rgb.resize(grid.content, Image.Resampling.BICUBIC))
    # Pillow resizes rows first, so a tall picture must be transposed to give the original's exact
    # pixels.
    tall = rgb.width < rgb.height
    width, height = grid.content
    if tall:
        rgb = rgb.transpose(Image.Transpose.TRANSPOSE).resize(
            (height, width), Image.Resampling.BILINEAR
        )
        rgb = rgb.transpose(Image.Transpose.TRANSPOSE)
    else:
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    if rgb.size == grid.canvas:
        return np.asarray(rgb)
    canvas = Image.new("RGB", grid.canvas, WHITE)
    canvas.paste(rgb, grid.offset)
    return np.asarray(canvas)


def image_canvas(
    config: XComposerConfig, image: Image.Image, max_tiles: int, transform: Transform = "serving"
) -> Canvas:
    """`make_canvas` with the grid of the picture's own size: uint8 (H, W, 3)."""
    grid = image_grid(config, image.size, max_tiles, transform)
    return make_canvas(image, grid, tiled=config.family.tiled)


def _scale(ratio: float, max_tiles: int) -> int:
    """Tiles along the longer side: the largest s >= 1 with s·ceil(s / ratio) <= max_tiles."""
    s = 1
    while (s + 1) * math.ceil((s + 1) / ratio) <= max_tiles:
        s += 1
    return s


def _identify(data: bytes, max_pixels: int, limit_s: float) -> Image.Image:
    if not data:
        raise MediaError("the image is empty (0 bytes)", code="invalid_image")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large sizes and damaged metadata: the first are refused below with
            # a message of our own, the second say nothing about the pixels.
            warnings.simplefilter("ignore")
            image = Image.open(_File(data, limit_s), formats=FORMATS)
    except Image.DecompressionBombError:
        raise MediaError(
            f"the image has more than {2 * MAX_PIXELS:,} pixels, "
            f"the limit is {max_pixels:,}; send a smaller one",
            code="image_too_large",
        ) from None
    except UnidentifiedImageError:
        raise MediaError(
            f"the {len(data):,} bytes are not an image of a known format ({', '.join(FORMATS)})",
            code="invalid_image",
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as e:
        raise MediaError(
            f"the image header is damaged ({_reason(e)})", code="invalid_image"
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise MediaError(
            f"the image has {width:,} × {height:,} = {width * height:,} pixels, "
            f"the limit is {max_pixels:,}; send a smaller one",
            code="image_too_large",
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The base class's method: PNG's own decodes all pixels to look behind them.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError):
        return 1  # a damaged EXIF block says nothing about the pixels
    return value if isinstance(value, int) else 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image.transpose(turn) if turn is not None else image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _sixteen_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (*WHITE, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """A 16-bit gray picture by its high byte; Pillow's own conversion would clip it to white."""
    values = np.asarray(image.convert("I"))
    gray = (values >> 8).clip(0, 255).astype(np.uint8)
    gray[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray).convert("RGB")


def _reason(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:80] or type(error).__name__


# A file that ends early is an error, never a half-gray picture (Pillow's default, stated).
assert not ImageFile.LOAD_TRUNCATED_IMAGES
