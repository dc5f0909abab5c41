import io
import math
import resource
import struct
import time
import zlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps, WebPImagePlugin

from xc_ray.demo.make import tiny_config
from xc_ray.errors import InvalidRequest, MediaError
from xc_ray.model.config import FAMILIES, Variant, preset
from xc_ray.prompt.tiles import (
    MAX_PIXELS,
    Transform,
    image_canvas,
    image_grid,
    make_canvas,
    open_image,
    read_header,
)

WIDTH, HEIGHT = 30, 20
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]


def colours(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    """A picture of which no turned or mirrored form is like another."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x < 5) * 255], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def file_of(image: Image.Image, file_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def turned_file(orientation: int, file_format: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return file_of(colours(), file_format, exif=exif)


def png(
    width: int, height: int, depth: int, kind: int, rows: bytes, extra: bytes = b"", lace: int = 0
) -> bytes:
    """A PNG from its parts: `kind` is the colour type, `rows` each begin with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, lace)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
    )


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(open_image(data))


def refusal(data: bytes, read: Callable[[bytes], object] = open_image) -> MediaError:
    with pytest.raises(MediaError) as caught:
        read(data)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every attempt to decode pixels fail."""

    def decode(image: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", decode)


# Opening


@pytest.mark.parametrize("file_format", ["PNG", "BMP"])
def test_a_lossless_picture_has_its_own_pixels(file_format: str) -> None:
    assert np.array_equal(pixels(file_of(colours(), file_format)), np.asarray(colours()))


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_opens_as_pillow_opens_it(file_format: str) -> None:
    data = file_of(colours(), file_format)
    image = open_image(data)
    assert image.mode == "RGB"
    assert np.array_equal(
        np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_a_viewer_turns_it(orientation: int, file_format: str) -> None:
    data = turned_file(orientation, file_format)
    with Image.open(io.BytesIO(data)) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    assert upright.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
    assert np.array_equal(pixels(data), np.asarray(upright))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    assert np.array_equal(pixels(turned_file(orientation, "PNG")), np.asarray(colours()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "damage", [b"", b"MM", b"II*\x00\xff\xff\xff\x7f", b"MM\x00*" + b"\xff" * 40]
)
def test_a_damaged_exif_block_says_nothing_about_the_pixels(damage: bytes) -> None:
    for file_format in ("JPEG", "PNG"):
        data = file_of(colours(), file_format, exif=b"Exif\x00\x00" + damage)
        assert open_image(data).size == (WIDTH, HEIGHT)
        assert read_header(data).width == WIDTH


def test_a_turned_16_bit_gray_picture_keeps_its_values() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gray = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 100
    data = file_of(Image.fromarray(gray), "PNG", exif=exif)
    assert np.array_equal(pixels(data)[..., 0], np.rot90(gray >> 8, -1))


def test_16_bit_gray_keeps_its_high_byte() -> None:
    rows = b"\0" + struct.pack(">5H", 0, 255, 256, 40_000, 65_535)
    assert pixels(png(5, 1, 16, 0, rows))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 156, 255)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # gray and palette entries that are declared transparent
        (png(3, 1, 8, 0, b"\0\x00\x64\xc8", chunk(b"tRNS", b"\0\x64")), [0, 255, 200]),
        (
            png(3, 1, 8, 3, b"\0\0\1\2", chunk(b"PLTE", b"\0" * 9) + chunk(b"tRNS", b"\xff\x80\0")),
            [0, 127, 255],
        ),
        # 16-bit gray with a transparent value
        (
            png(
                3,
                1,
                16,
                0,
                b"\0" + struct.pack(">3H", 0, 20_000, 40_000),
                chunk(b"tRNS", b"\x4e\x20"),
            ),
            [0, 255, 156],
        ),
        # gray with alpha, and colour with alpha
        (png(3, 1, 8, 4, b"\0\0\xff\0\x80\0\0"), [0, 127, 255]),
        (png(3, 1, 8, 6, b"\0\0\0\0\xff\0\0\0\x80\0\0\0\0"), [0, 127, 255]),
    ],
    ids=["gray", "palette", "gray 16", "gray and alpha", "colour and alpha"],
)
def test_transparency_lies_on_white(data: bytes, expected: list[int]) -> None:
    assert pixels(data)[0].tolist() == [[v] * 3 for v in expected]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_half_transparent_colour_is_half_white(file_format: str) -> None:
    image = colours(mode="RGBA")
    image.putalpha(128)
    data = file_of(image, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    expected = (np.asarray(colours()) * 128.0 + 255 * 127) / 255
    assert np.abs(pixels(data) - expected).max() <= 1


def test_a_transparent_gif_lies_on_white() -> None:
    palette = colours().quantize(8)
    data = file_of(palette, "GIF", transparency=3)
    indices = np.asarray(Image.open(io.BytesIO(data)))
    result = pixels(data)
    assert (result[indices == Image.open(io.BytesIO(data)).info["transparency"]] == 255).all()
    assert not (result == 255).all()


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    data = file_of(colours(mode="CMYK"), "JPEG", quality=95)
    assert np.abs(pixels(data).astype(int) - np.asarray(colours())).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_black_and_white_gray_and_palette_pictures_become_rgb(mode: str) -> None:
    image = colours(mode=mode)
    assert np.array_equal(pixels(file_of(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(file_format: str) -> None:
    red, blue = (Image.new("RGB", (WIDTH, HEIGHT), c) for c in ("red", "blue"))
    data = file_of(red, file_format, save_all=True, append_images=[blue])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 2
    assert read_header(data).format == file_format


def test_a_photo_with_a_second_picture_behind_it_is_its_first() -> None:
    # Many phones write JPEG files that Pillow calls MPO.
    data = file_of(colours(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert open_image(data).size == (WIDTH, HEIGHT)


# The header


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_header_tells_format_and_size(file_format: str) -> None:
    header = read_header(file_of(colours(), file_format))
    assert (header.format, header.width, header.height) == (file_format, WIDTH, HEIGHT)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_size_of_the_opened_picture(orientation: int, file_format: str) -> None:
    data = turned_file(orientation, file_format)
    header = read_header(data)
    assert (header.width, header.height) == open_image(data).size


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_header_is_read_without_decoding_a_pixel(file_format: str) -> None:
    assert read_header(file_of(colours(), file_format)).width == WIDTH


# Bad files


def test_no_bytes_at_all_are_no_picture() -> None:
    for read in (open_image, read_header):
        error = refusal(b"", read)
        assert (error.message, error.code) == ("the image is empty (0 bytes)", "invalid_image")


@pytest.mark.parametrize(
    "data",
    [
        b"not an image",
        b"\x00" * 100,
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_what_is_no_picture_is_refused_with_the_known_formats(data: bytes) -> None:
    for read in (open_image, read_header):
        assert refusal(data, read).message == (
            f"the {len(data)} bytes are not an image of a known format (JPEG, PNG, WEBP, GIF, BMP)"
        )


@pytest.mark.parametrize("file_format", ["TIFF", "ICO", "PDF", "EPS", "PPM", "TGA"])
def test_a_picture_of_another_format_is_refused(file_format: str) -> None:
    data = file_of(colours(), file_format)
    assert "not an image of a known format" in refusal(data).message
    assert "not an image of a known format" in refusal(data, read_header).message


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_picture_that_is_cut_short_is_refused(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), file_format)
    error = refusal(data[: int(len(data) * share)])
    assert error.code == "invalid_image"
    assert error.status == 400


def test_the_refusal_of_a_damaged_picture_tells_its_format_size_and_what_to_do() -> None:
    data = file_of(colours(), "PNG")[:80]
    message = refusal(data).message
    assert message.startswith("the PNG image of 80 bytes is damaged or cut short (")
    assert message.endswith("; send it again")


def test_an_interlaced_picture_that_is_cut_short_is_refused() -> None:
    rows = b"\0" + bytes(WIDTH * 3)
    data = png(WIDTH, HEIGHT, 8, 2, rows, lace=1)
    assert "damaged or cut short" in refusal(data[:-20]).message


HUGE = {
    "PNG 30,000": png(30_000, 30_000, 8, 2, b"\0" * 99),
    "BMP 30,000": bmp_header(30_000, 30_000),
    "GIF 60,000": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b";",
    "PNG 12,000": png(12_000, 12_000, 8, 2, b"\0" * 99),
    "BMP 12,000": bmp_header(12_000, 12_000),
}


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("data", [v for k, v in HUGE.items() if "GIF" not in k])
@pytest.mark.parametrize("read", [open_image, read_header])
def test_a_huge_picture_is_refused_by_its_header(
    data: bytes, read: Callable[[bytes], object]
) -> None:
    started = time.monotonic()
    error = refusal(data, read)
    assert time.monotonic() - started < 1
    assert error.code == "image_too_large"
    assert f"the limit is {MAX_PIXELS:,}; send a smaller one" in error.message


def test_a_picture_just_past_the_limit_is_told_both_numbers() -> None:
    data = file_of(colours(), "PNG")
    assert open_image(data, max_pixels=600).size == (30, 20)
    for read in (open_image, read_header):
        error = refusal(data, partial(read, max_pixels=599))
        assert error.message == (
            "the image has 30 × 20 = 600 pixels, the limit is 599; send a smaller one"
        )


SEEDS = [file_of(colours(), f) for f in FORMATS] + [
    file_of(colours(mode="P"), "PNG", transparency=3),
    file_of(colours(), "GIF", save_all=True, append_images=[colours().rotate(90)]),
    file_of(colours(), "WEBP", save_all=True, append_images=[colours().rotate(90)]),
    file_of(colours(), "PNG", save_all=True, append_images=[colours().rotate(90)]),
    turned_file(6, "JPEG"),
    turned_file(6, "PNG"),
    turned_file(6, "WEBP"),
]


@pytest.mark.filterwarnings("error")
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=4),
    st.integers(0, 2000),
    st.booleans(),
)
def test_whatever_the_bytes_a_picture_opens_as_its_header_says_or_is_refused(
    seed: bytes, changes: list[tuple[int, int]], length: int, checksums: bool
) -> None:
    data = bytearray(seed[:length])
    for at, value in changes:
        data[at % len(data) if data else 0 : at % len(data) + 1 if data else 0] = bytes([value])
    file = with_checksums(bytes(data)) if checksums else bytes(data)
    try:
        header = read_header(file, max_pixels=100_000)
    except MediaError:
        header = None
    try:
        image = open_image(file, max_pixels=100_000)
    except MediaError:
        return
    assert header is not None
    assert image.size == (header.width, header.height)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is now in them; other files as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        out += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out + data[at:]


# Grids

TILED: list[Variant] = ["2.0-4KHD", "2.5"]
SIDES = st.one_of(st.integers(1, 100_000), st.sampled_from([1, 335, 336, 337, 560, 561, 100_000]))
EVERY = settings(max_examples=300, deadline=None)


def test_the_worked_example_of_the_module() -> None:
    config = preset("2.5")
    grid = image_grid(config, (900, 300), 24)
    assert (grid.rows, grid.cols, grid.num_tiles) == (1, 2, 2)
    assert (grid.content, grid.canvas, grid.offset) == ((1120, 373), (1120, 560), (0, 0))
    assert config.image_tokens(grid.rows, grid.cols) == 1241


@pytest.mark.parametrize("variant", TILED)
@EVERY
@given(SIDES, SIDES, st.integers(1, 64), st.sampled_from(["serving", "family"]))
@example(1, 100_000, 24, "serving")
@example(100_000, 1, 1, "family")
@example(1, 1, 55, "serving")
def test_a_grid_keeps_the_budget_and_holds_the_picture(
    variant: Variant, width: int, height: int, max_tiles: int, transform: Transform
) -> None:
    config = preset(variant)
    grid = image_grid(config, (width, height), max_tiles, transform)
    assert 1 <= grid.num_tiles <= max_tiles
    assert grid.canvas == (grid.cols * config.tile, grid.rows * config.tile)
    for offset, size, whole in zip(grid.offset, grid.content, grid.canvas, strict=True):
        assert offset >= 0
        assert size >= 1
        assert offset + size <= whole
        assert whole - size < config.tile  # no row or column of tiles is empty
    assert max(grid.content) == max(grid.canvas[grid.content.index(max(grid.content))], 1)


@pytest.mark.parametrize("variant", TILED)
@EVERY
@given(SIDES, SIDES, st.integers(1, 64), st.sampled_from(["serving", "family"]))
def test_a_transposed_picture_has_the_transposed_grid(
    variant: Variant, width: int, height: int, max_tiles: int, transform: Transform
) -> None:
    config = preset(variant)
    grid = image_grid(config, (width, height), max_tiles, transform)
    other = image_grid(config, (height, width), max_tiles, transform)
    if width == height:
        assert grid == other
        return
    assert (grid.rows, grid.cols) == (other.cols, other.rows)
    assert grid.content == other.content[::-1]
    assert grid.offset == other.offset[::-1]
    assert grid.canvas == other.canvas[::-1]


@EVERY
@given(SIDES, SIDES, st.integers(1, 64))
def test_4khd_takes_the_most_tiles_that_the_budget_allows(
    width: int, height: int, max_tiles: int
) -> None:
    longer, shorter = max(width, height), min(width, height)
    ratio = longer / shorter
    most = max(
        [s for s in range(1, max_tiles + 1) if s * math.ceil(s / ratio) <= max_tiles], default=1
    )
    grid = image_grid(preset("2.0-4KHD"), (longer, shorter), max_tiles)
    assert grid.cols == most


@EVERY
@given(SIDES, SIDES, st.integers(1, 64))
def test_2_5_enlarges_no_further_than_to_the_next_tile(
    width: int, height: int, max_tiles: int
) -> None:
    longer, shorter = max(width, height), min(width, height)
    most = image_grid(preset("2.0-4KHD"), (longer, shorter), max_tiles).cols
    serving, family = (
        image_grid(preset("2.5"), (longer, shorter), max_tiles, transform).cols
        for transform in ("serving", "family")
    )
    assert serving == min(most, math.ceil(longer / 560))
    assert family == min(most, math.ceil(1.5 * longer / 560))


@pytest.mark.parametrize(
    ("variant", "transform", "top"),
    [("2.0-4KHD", "serving", 30), ("2.5", "serving", 0), ("2.5", "family", 30)],
)
def test_padding_is_centred_but_for_serving_2_5(
    variant: Variant, transform: Transform, top: int
) -> None:
    config = preset(variant)
    size = (config.tile, config.tile - 61)
    grid = image_grid(config, size, 1, transform)
    assert (grid.content, grid.offset) == (size, (0, top))


def test_a_larger_budget_never_takes_fewer_tiles() -> None:
    for variant in TILED:
        tiles = [image_grid(preset(variant), (3000, 1100), n).num_tiles for n in range(1, 56)]
        assert all(a <= b for a, b in pairwise(tiles))


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_budget_of_less_than_one_tile_is_refused(variant: Variant) -> None:
    with pytest.raises(InvalidRequest) as caught:
        image_grid(preset(variant), (10, 10), 0)
    assert caught.value.message == "max_tiles is 0, the least is 1"
    assert caught.value.param == "max_tiles"


# Canvases (pixel by pixel the originals' in tests/parity)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("size", [(150, 61), (61, 150), (56, 56), (1, 900), (900, 1), (57, 56)])
def test_a_canvas_has_the_size_of_its_grid(variant: Variant, size: tuple[int, int]) -> None:
    config = tiny_config(variant)
    grid = image_grid(config, size, 9)
    canvas = image_canvas(config, colours(*size), 9)
    assert canvas.dtype == np.uint8
    assert canvas.shape == (grid.canvas[1], grid.canvas[0], 3)


@pytest.mark.parametrize("size", [(150, 61), (61, 150)])
@pytest.mark.parametrize("transform", ["serving", "family"])
def test_around_the_picture_the_canvas_is_white(
    size: tuple[int, int], transform: Transform
) -> None:
    config = tiny_config("2.5")
    grid = image_grid(config, size, 9, transform)
    canvas = image_canvas(config, Image.new("RGB", size, "black"), 9, transform)
    expected = np.full_like(canvas, 255)
    (x, y), (width, height) = grid.offset, grid.content
    expected[y : y + height, x : x + width] = 0
    assert (expected == 255).any()
    assert np.array_equal(canvas, expected)


@pytest.mark.parametrize("variant", TILED)
def test_a_transposed_picture_has_the_transposed_canvas(variant: Variant) -> None:
    config = tiny_config(variant)
    wide = colours(150, 61)
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    canvas = image_canvas(config, wide, 9)
    assert np.array_equal(image_canvas(config, tall, 9), canvas.transpose(1, 0, 2))


def test_resizing_keeps_a_picture_upright() -> None:
    config = tiny_config("2.5")
    canvas = image_canvas(config, colours(280, 280), 4).astype(int)  # 4 tiles of 56 px
    assert canvas.shape == (112, 112, 3)
    assert canvas[50, 100, 0] > canvas[50, 20, 0] + 100  # red grows to the right
    assert canvas[100, 50, 1] > canvas[20, 50, 1] + 100  # green grows downwards


def test_a_picture_of_another_mode_is_converted_and_its_alpha_dropped() -> None:
    config = tiny_config("2.5")
    image = colours(56, 56, mode="RGBA")
    image.putalpha(0)
    grid = image_grid(config, (56, 56), 1)
    expected = np.asarray(colours(56, 56))
    assert np.array_equal(make_canvas(image, grid, tiled=True), expected)


def test_an_untiled_picture_fills_its_square_whatever_its_shape() -> None:
    config = tiny_config("2.0-VL")
    canvas = image_canvas(config, Image.new("RGB", (300, 20), "black"), 1)
    assert canvas.shape == (56, 56, 3)
    assert not canvas.any()


# Files that are small and take long. Seconds of work are counted in this thread's own time, so that
# a loaded machine refuses nothing.


def slow_headers() -> dict[str, bytes]:
    jpeg, rows = file_of(colours(), "JPEG"), b"\0" * (WIDTH * 3 + 1) * HEIGHT
    return {
        "PNG of 200,000 chunks": png(WIDTH, HEIGHT, 8, 2, rows, chunk(b"prVt", b"") * 200_000),
        "JPEG of 500,000 segments": jpeg[:2] + b"\xff\xe5\0\2" * 500_000 + jpeg[2:],
    }


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG with empty scans behind its own; each takes a look at every pixel."""
    image = Image.new("RGB", (side, side), "gray")
    file = file_of(image, "JPEG", progressive=True, quality=5)
    scan = b"\xff\xda\0\x08\1\1\x11\1\x3f\0"
    return file[:-2] + scan * count + file[-2:]


@pytest.mark.parametrize("kind", slow_headers())
def test_a_header_that_takes_too_long_is_refused(kind: str) -> None:
    data = slow_headers()[kind]
    for read in (read_header, open_image):
        began = time.thread_time()
        error = refusal(data, partial(read, limit_s=0.05))
        assert time.thread_time() - began < 1
        assert error.code == "image_too_complex"
        assert error.message == (
            f"the image of {len(data):,} bytes takes more than 0.05 s to read; save it anew, "
            "without metadata and not progressive"
        )


def test_a_picture_that_takes_too_long_to_decode_is_refused() -> None:
    data = many_scans(2000, 20_000)
    assert read_header(data).width == 2000
    began = time.thread_time()
    error = refusal(data, partial(open_image, limit_s=0.1))
    assert time.thread_time() - began < 2  # all of its scans take six
    assert error.code == "image_too_complex"
    assert open_image(many_scans(2000, 2), limit_s=5).size == (2000, 2000)


def test_an_exif_block_whose_entries_are_all_of_it_takes_no_room() -> None:
    """65,535 entries of a megabyte each, at the same place: 64 GB if all were read."""
    count, extra = 65_535, 1 << 20
    length = 2 + 12 * count + 4 + extra
    entries = b"".join(struct.pack(">HHLL", i, 1, length, 0) for i in range(1, count + 1))
    block = b"MM\0*\0\0\0\x08" + struct.pack(">H", count) + entries + bytes(4 + extra)
    rows = b"\0" * (WIDTH * 3 + 1) * HEIGHT
    data = png(WIDTH, HEIGHT, 8, 2, rows, chunk(b"eXIf", block))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_header(data).width == open_image(data).width == WIDTH
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kB
