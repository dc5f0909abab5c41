import io
import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xc_ray.demo.drawn.backgrounds import Background, add_grain, draw_background, sample_any
from xc_ray.demo.drawn.colours import (
    COLOURS,
    MIN_CONTRAST,
    MIN_PRINT_LUMINANCE,
    contrast,
    luminance,
    sample_background,
    sample_colour,
)
from xc_ray.demo.drawn.drawing import (
    Print,
    Scene,
    draw_print,
    draw_scene,
    encode_picture,
    print_mask,
)
from xc_ray.demo.drawn.figures import KINDS, TURNS, Figure, Style, draw_figure
from xc_ray.demo.drawn.fonts import PILLOW_FACE, find_fonts
from xc_ray.demo.drawn.layout import (
    GRID_CONFIG,
    MAX_OVERVIEW_PRINT,
    MIN_FIGURE,
    MIN_PRINT,
    Limits,
    canvas_scale,
    grid_of,
    overview_scale,
    place_figures,
)
from xc_ray.demo.drawn.scenes import figures_scene, print_scene, small_print_scene
from xc_ray.demo.make import demo_config
from xc_ray.model.vision import normalise, to_squares
from xc_ray.prompt.tiles import make_canvas

FACES = find_fonts([]).training
WHITE = Background("plain", ((255, 255, 255), (255, 255, 255)), "white")
seeds = st.integers(0, 2**32)


def ink(image: Image.Image) -> tuple[int, int, int, int]:
    box = Image.eval(image.convert("L"), lambda v: 255 - v).getbbox()
    assert box is not None
    return box


def test_grids_are_those_of_the_demo_model():
    config = demo_config()
    assert (GRID_CONFIG.tile, GRID_CONFIG.family) == (config.tile, config.family)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(x=st.floats(40, 60), y=st.floats(40, 60), diameter=st.floats(12, 70), turn=st.floats(-1, 1))
@settings(max_examples=15, deadline=None)
def test_a_figure_stays_within_its_circle(kind, outlined, smooth, x, y, diameter, turn):
    style = Style(outlined, smooth=smooth)
    figure = Figure(kind, "black", (0, 0, 0), x, y, diameter, turn * TURNS[kind], style)
    image = Image.new("RGB", (100, 100), "white")
    draw_figure(image, figure)
    rows, cols = np.nonzero(np.asarray(image)[..., 0] < 128)
    reach = np.hypot(cols + 0.5 - x, rows + 0.5 - y).max()
    # Outlines end a little beyond their corners where these are sharp. Unsmoothed ones are pixels,
    # up to one off in each direction (1.61 in 6,000 drawn at random).
    beyond = (0.12 * diameter if outlined else 0) + (1.5 if smooth else 2)
    assert reach <= diameter / 2 + beyond
    assert reach >= diameter / 2 * 0.8 - 1.5


def test_a_style_shows():
    def drawn(style: Style, kind: str = "square") -> bytes:
        image = Image.new("RGB", (60, 60), "white")
        draw_figure(image, Figure(kind, "red", (255, 0, 0), 30.3, 30.3, 40, 5, style))
        return image.tobytes()

    plain = drawn(Style())
    for style in (Style(outlined=True), Style(smooth=False), Style(rim=(0, 0, 0))):
        assert drawn(style) != plain
    assert drawn(Style(stroke=0.12), "ring") != drawn(Style(stroke=0.28), "ring")
    assert drawn(Style(outlined=True), "circle") == drawn(Style(), "circle")  # it would be a ring


def test_kinds_look_different_at_the_least_size():
    masks = []
    for kind in KINDS:
        image = Image.new("RGB", (20, 20), "white")
        draw_figure(image, Figure(kind, "black", (0, 0, 0), 10, 10, 12))
        masks.append(np.asarray(image.convert("L"), float))
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert np.abs(one - other).sum() > 6 * 255  # six pixels of about eighty


@given(seed=seeds, num=st.integers(1, 9), several=st.booleans())
@settings(max_examples=60, deadline=None)
def test_figures_are_large_enough_apart_and_inside(seed, num, several):
    num_pictures = 2 if several else 1
    scene = figures_scene(Random(seed), Limits(), num=num, num_pictures=num_pictures, faces=FACES)
    assert len(scene.figures) == num
    scale = canvas_scale(scene.size, num_pictures)
    for i, f in enumerate(scene.figures):
        assert f.diameter * scale >= MIN_FIGURE - 1e-6
        assert f.diameter / 2 <= min(f.x, f.y, scene.size[0] - f.x, scene.size[1] - f.y)
        for g in scene.figures[:i]:
            assert math.hypot(f.x - g.x, f.y - g.y) > (f.diameter + g.diameter) / 2
    if scene.print is not None:
        mask = print_mask(scene.print)
        for f in scene.figures:
            assert (
                f.y + f.diameter / 2 <= scene.print.top
                or f.y - f.diameter / 2 >= scene.print.top + mask.height
            )


def test_too_many_figures_for_the_room_are_refused():
    assert place_figures((0, 0, 30, 30), 9, 12, Random(0)) is None


# ---------------------------------------------------------------- colours


@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_figures_and_print_stand_out_from_the_background(seed):
    random = Random(seed)
    scene = random.choice((figures_scene(random, Limits(), faces=FACES), _printed(random)))
    for f in scene.figures:
        assert f.colour != scene.background.name
        assert all(contrast(f.rgb, shade) >= MIN_CONTRAST for shade in scene.background.shades)
    if scene.print is not None:
        plate = scene.print.plate
        for ground in (plate,) if plate else scene.background.shades:
            light = luminance(scene.print.rgb) - luminance(ground)
            assert abs(light) >= MIN_PRINT_LUMINANCE


def _printed(random: Random) -> Scene:
    return print_scene(random, Limits(), "Hello", FACES)


@pytest.mark.parametrize("name", COLOURS)
def test_a_name_covers_no_shade_of_another(name: str):
    random = Random(0)
    shades = [sample_colour(name, random) for _ in range(60)]
    for other in set(COLOURS) - {name}:
        others = [sample_colour(other, random) for _ in range(60)]
        assert min(contrast(a, b) for a in shades for b in others) > 25


@pytest.mark.parametrize("name", COLOURS)
def test_a_background_keeps_its_hue(name: str):
    red, green, blue = np.mean([sample_background(name, Random(i)) for i in range(50)], axis=0)
    expected = {
        "red": red > 2 * green,
        "green": green > red and green > blue,
        "blue": blue > red and blue > green,
        "yellow": red > blue and green > blue,
    }
    assert expected.get(name, True)


def test_backgrounds_are_of_every_texture_and_mostly_light():
    grounds = [sample_any(Random(i)) for i in range(400)]
    assert {g.texture for g in grounds} == {"plain", "gradient", "blotches", "noise"}
    light = sum(luminance(g.shades[0]) > 128 for g in grounds)
    assert 0.6 < light / 400 < 0.95


@given(seed=seeds, width=st.integers(24, 300), height=st.integers(24, 300))
@settings(max_examples=40, deadline=None)
def test_a_background_lies_between_its_shades(seed, width, height):
    random = Random(seed)
    background = sample_any(random)
    image = draw_background(background, (width, height), random)
    assert image.size == (width, height)
    values = np.asarray(image).reshape(-1, 3)
    shades = np.array(background.shades)
    assert (values >= shades.min(0) - 1).all()
    assert (values <= shades.max(0) + 1).all()


def test_grain_changes_a_channel_by_no_more_than_said():
    image = add_grain(Image.new("RGB", (300, 200), (100, 150, 200)), 7, Random(0))
    change = np.asarray(image).astype(int) - (100, 150, 200)
    assert (change.min(), change.max()) == (-7, 7)
    assert abs(change.mean()) < 0.1


# ---------------------------------------------------------------- print


@given(
    seed=seeds, text=st.sampled_from(["Qg", "HELLO", "word by word", "12\n+ 3456", "99999 + 1 ="])
)
@settings(max_examples=60, deadline=None)
def test_print_fits_and_is_large_enough_on_the_canvas(seed, text):
    scene = print_scene(Random(seed), Limits(), text, FACES)
    assert scene.print is not None
    assert scene.print.text == text
    mask = print_mask(scene.print)
    assert scene.print.left >= 0
    assert scene.print.top >= 0
    assert scene.print.left + mask.width <= scene.size[0]
    assert scene.print.top + mask.height <= scene.size[1]
    assert scene.print.size * canvas_scale(scene.size) >= MIN_PRINT


@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_small_print_is_for_the_tiles_alone(seed):
    scene = small_print_scene(Random(seed), Limits(), lambda: "Manager Indoor 24", FACES)
    assert scene.print is not None
    assert scene.print.size * canvas_scale(scene.size) >= MIN_PRINT
    assert scene.print.size * overview_scale(scene.size) < MAX_OVERVIEW_PRINT
    mask = print_mask(scene.print)
    assert 0 <= scene.print.left <= scene.size[0] - mask.width
    assert 0 <= scene.print.top <= scene.size[1] - mask.height
    assert 900 <= max(scene.size) <= 1800


def test_small_print_is_a_few_rows_of_the_overview_that_the_model_makes():
    size, em = (1200, 900), 16
    assert em * overview_scale(size) < MAX_OVERVIEW_PRINT
    picture = Image.new("RGB", size, "white")
    draw_print(picture, Print("HHHHHH", "black", (0, 0, 0), PILLOW_FACE, em, 410, 310))
    canvas = normalise(torch.from_numpy(make_canvas(picture, grid_of(size), tiled=True).copy()))
    squares = to_squares(GRID_CONFIG, canvas)
    grid = grid_of(size)
    assert len(squares) == grid.num_tiles + 1
    rows = [int((square.amin((0, 2)) < square.max() - 0.5).sum()) for square in squares]
    assert 0 < rows[0] < MAX_OVERVIEW_PRINT < MIN_PRINT * 0.6 < max(rows[1:])


def test_the_ink_lies_where_the_print_says():
    word = Print("HELLO", "black", (0, 0, 0), PILLOW_FACE, 30, 20, 40)
    image = Image.new("RGB", (200, 100), "white")
    draw_print(image, word)
    mask = print_mask(word)
    left, top, right, bottom = ink(image)
    assert 20 <= left <= 26
    assert 40 <= top <= 46
    assert right <= 20 + mask.width
    assert bottom <= 40 + mask.height
    assert bottom - top >= 0.6 * 30  # capitals


# ---------------------------------------------------------------- files


def test_pictures_are_files_of_both_formats():
    image = draw_scene(Scene((64, 48), WHITE), Random(0))
    formats = set()
    for seed in range(12):
        with Image.open(io.BytesIO(encode_picture(image, Random(seed)))) as opened:
            assert opened.size == (64, 48)
            formats.add(opened.format)
    assert formats == {"PNG", "JPEG"}


def test_a_scene_is_drawn_the_same_from_the_same_seed():
    scene = figures_scene(Random(5), Limits(), faces=FACES)
    one, same, other = (draw_scene(scene, Random(f"draw {s}")).tobytes() for s in (1, 1, 2))
    assert one == same
    assert len(one) == len(other)
