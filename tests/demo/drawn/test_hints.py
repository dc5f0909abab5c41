"""What each patch shows, held against the pixels that the model sees there."""

from dataclasses import replace
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xc_ray.demo.drawn.backgrounds import Background
from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.drawing import Print, Scene, draw_print
from xc_ray.demo.drawn.figures import KINDS, Figure, draw_figure
from xc_ray.demo.drawn.fonts import PILLOW_FACE, Fonts, find_fonts, load_font
from xc_ray.demo.drawn.hints import NUM_COLOURS, NUM_THINGS, UNKNOWN, Hints, hints_of
from xc_ray.demo.drawn.tasks import training_sample
from xc_ray.demo.make import demo_config, tiny_config
from xc_ray.model.vision import MEAN, STD, normalise, to_squares
from xc_ray.prompt.tiles import Grid, image_grid, make_canvas

CONFIG = demo_config()  # 224 px squares of 16 × 16 patches of 14 px
SIDE, PATCH = 16, 14
WHITE = Background("plain", ((255, 255, 255), (255, 255, 255)), "white")
SHADES = {"red": (220, 10, 10), "blue": (20, 40, 220), "green": (10, 140, 30), "black": (0, 0, 0)}
MONO = next(p for p in find_fonts([]).training if p.endswith("DejaVuSansMono.ttf"))
FIRST_CHARACTER = 1 + 2 * len(KINDS)


def grid_of(scene: Scene) -> Grid:
    return image_grid(CONFIG, scene.size, CONFIG.family.max_tiles)


def hints(scene: Scene) -> Hints:
    return hints_of(CONFIG, scene, grid_of(scene))


def draw(scene: Scene) -> Image.Image:
    """Without grain and JPEG."""
    image = Image.new("RGB", scene.size, "white")
    for figure in scene.figures:
        draw_figure(image, figure)
    if scene.print is not None:
        draw_print(image, scene.print)
    return image


def seen(scene: Scene) -> npt.NDArray[np.float32]:
    """What the tower is given, (N, P, patch, patch, 3) in 0..255."""
    canvas = make_canvas(draw(scene), grid_of(scene), tiled=True)
    squares = to_squares(CONFIG, normalise(torch.from_numpy(canvas.copy())))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    pixels = (squares * std + mean) * 255
    n = len(pixels)
    parts = pixels.view(n, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 3, 5, 1)
    return parts.reshape(n, SIDE**2, PATCH, PATCH, 3).numpy()


def place(square: int, row: int, col: int) -> tuple[int, int]:
    return square, row * SIDE + col


def whole(labels: npt.NDArray[np.uint8], grid: Grid) -> npt.NDArray[np.uint8]:
    """The tiles' labels by patch of the canvas."""
    tiles = labels[1:].reshape(grid.rows, grid.cols, SIDE, SIDE)
    return tiles.swapaxes(1, 2).reshape(grid.rows * SIDE, grid.cols * SIDE)


def spelled(plane: npt.NDArray[np.uint8]) -> list[tuple[str, int, int]]:
    """Characters with their row and column, left to right."""
    found = [
        (chr(0x21 + int(plane[r, c]) - FIRST_CHARACTER), int(r), int(c))
        for r, c in np.argwhere((plane >= FIRST_CHARACTER) & (plane != UNKNOWN))
    ]
    return sorted(found, key=lambda item: item[2])


def figure(kind: str, colour: str, x: float, y: float, diameter: float) -> Figure:
    return Figure(kind, colour, SHADES[colour], x, y, diameter)


def word(text: str, size: int, left: int, top: int, **more: float) -> Print:
    return replace(Print(text, "black", (0, 0, 0), MONO, size, left, top), **more)  # type: ignore[arg-type]


# Figures


# 600 × 300 becomes 672 × 336 (× 1.12) on 2 rows of 3 tiles, the lower 112 px of them white.
TWO = Scene((600, 300), WHITE, (figure("circle", "red", 100, 60, 80),
                                figure("star", "blue", 500, 250, 80)))  # fmt: skip


def test_the_middle_of_a_figure_has_its_kind_and_colour_on_its_tile() -> None:
    grid, told = grid_of(TWO), hints(TWO)
    assert (grid.rows, grid.cols, grid.content) == (2, 3, (672, 336))
    # 100 · 1.12 / 14 = 8.0, 60 · 1.12 / 14 = 4.8: the first tile, row 4, column 8.
    circle = place(1, 4, 8)
    assert told.things[circle] == 1 + len(KINDS) + KINDS.index("circle")
    assert told.colours[circle] == 1 + COLOURS.index("red")
    # 500 · 1.12 = 560 = 2 · 224 + 112, 250 · 1.12 = 280 = 224 + 56: the last tile, row 4, column 8.
    star = place(6, 4, 8)
    assert told.things[star] == 1 + len(KINDS) + KINDS.index("star")
    assert told.colours[star] == 1 + COLOURS.index("blue")


def test_the_overview_has_the_same_where_it_is_squashed_to() -> None:
    told = hints(TWO)
    # The canvas of 672 × 448 becomes 224 × 224: columns by 1 / 3, rows by 1 / 2.
    for at, kind, colour in (((2, 2), "circle", "red"), ((10, 13), "star", "blue")):
        assert told.things[place(0, *at)] == 1 + len(KINDS) + KINDS.index(kind)
        assert told.colours[place(0, *at)] == 1 + COLOURS.index(colour)


def test_each_figure_has_one_middle_a_plane_so_that_it_can_be_counted() -> None:
    figures = tuple(
        figure(kind, "blue", 80 + 150 * (i % 4), 80 + 150 * (i // 4), 100)
        for i, kind in enumerate(KINDS)
    )
    told = hints(Scene((620, 310), WHITE, figures))
    for labels in (told.things[:1], told.things[1:]):
        for kind in range(len(KINDS)):
            assert (labels == 1 + len(KINDS) + kind).sum() == 1
    for kind in range(len(KINDS)):  # and around it in the tiles its inside
        assert (told.things[1:] == 1 + kind).sum() > 4


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_where_a_colour_is_told_it_can_be_seen(seed: int) -> None:
    random = Random(seed)
    size = random.randint(120, 1300), random.randint(120, 1300)
    diameter = min(size) * random.uniform(0.3, 0.6)
    x, y = (random.uniform(diameter / 2, s - diameter / 2) for s in size)
    colour = random.choice(list(SHADES))
    scene = Scene(size, WHITE, (figure("circle", colour, x, y, diameter),))
    told, pixels = hints(scene), seen(scene)
    known = (told.colours > 0) & (told.colours != UNKNOWN)
    assert known[1:].any()
    assert set(told.colours[known]) == {1 + COLOURS.index(colour)}
    off = np.abs(pixels - np.array(SHADES[colour])).max(-1)  # (N, P, patch, patch)
    inside = told.things == 1 + KINDS.index("circle")
    assert (off[inside][:, PATCH // 2, PATCH // 2] < 40).all()
    middle = told.things == 1 + len(KINDS) + KINDS.index("circle")  # anywhere in its patch
    assert (off[middle].min((1, 2)) < 40).all()


def test_figures_too_small_for_the_overview_are_unknown_there_and_known_in_the_tiles() -> None:
    scene = Scene((1300, 1300), WHITE, (figure("heart", "green", 650, 500, 30),))
    told = hints(scene)
    assert set(np.unique(told.things[0])) == {0, UNKNOWN}
    assert set(np.unique(told.colours[0])) == {0, UNKNOWN}
    assert 1 + len(KINDS) + KINDS.index("heart") in told.things[1:]
    assert UNKNOWN not in told.things[1:]


# Print


def test_characters_of_a_print_lie_left_to_right_where_their_ink_is() -> None:
    text = "HELLO-42"
    scene = Scene((400, 200), WHITE, print=word(text, 48, 40, 60))
    grid, told = grid_of(scene), hints(scene)
    found = spelled(whole(told.things, grid))
    assert "".join(character for character, _, _ in found) == text
    assert len({row for _, row, _ in found}) == 1
    pitch, scale = load_font(MONO, 48).getlength("H"), grid.content[0] / 400
    image = Image.eval(draw(scene).convert("L"), lambda v: 255 - v)
    for i, (_, row, col) in enumerate(found):
        left = round(40 + i * pitch)  # all characters of this font are as wide
        box = image.crop((left, 0, round(left + pitch), 200)).getbbox()
        assert box is not None
        assert abs(col + 0.5 - (left + (box[0] + box[2]) / 2) * scale / PATCH) <= 1
        assert row <= box[3] * scale / PATCH
        assert box[1] * scale / PATCH <= row + 1


@pytest.mark.parametrize("angle", [-30.0, -7.0, 0.0, 11.0, 40.0, 90.0])
def test_a_turned_print_has_ink_where_its_characters_are_told(angle: float) -> None:
    scene = Scene((440, 440), WHITE, print=word("HEBSR8", 64, 60, 60, angle=angle))
    told, pixels = hints(scene), seen(scene)
    known = told.things[1:] >= FIRST_CHARACTER
    assert known.sum() == 6
    assert (pixels[1:][known].min(axis=(1, 2, 3)) < 100).all()
    by_name = {character: (r, c) for character, r, c in spelled(whole(told.things, grid_of(scene)))}
    places = [by_name[character] for character in "HEBSR8"]
    along = [c * np.cos(np.radians(angle)) - r * np.sin(np.radians(angle)) for r, c in places]
    assert along == sorted(along)
    assert len(set(along)) == 6


def test_lines_are_told_flush_right_one_below_the_other() -> None:
    scene = Scene((300, 300), WHITE, print=word("7\n+ 345", 60, 30, 40))
    found = {c: (row, col) for c, row, col in spelled(whole(hints(scene).things, grid_of(scene)))}
    assert set(found) == set("7+345")
    assert found["7"][1] == found["5"][1]
    assert found["7"][0] < found["5"][0]
    assert [found[c][1] for c in "+345"] == sorted(found[c][1] for c in "+345")
    assert len({found[c][0] for c in "+345"}) == 1


def test_small_print_is_unknown_in_the_overview_and_known_in_the_tiles() -> None:
    scene = Scene((1200, 900), WHITE, print=word("EXIT", 24, 500, 300))
    told = hints(scene)
    assert set(np.unique(told.things[0])) == {0, UNKNOWN}
    assert set(np.unique(told.colours[0])) == {0, UNKNOWN}
    assert UNKNOWN not in told.things[1:]
    found = spelled(whole(told.things, grid_of(scene)))
    assert "".join(character for character, _, _ in found) == "EXIT"


def test_a_print_has_its_colour_at_its_characters() -> None:
    scene = Scene((200, 100), WHITE, print=replace(word("AB", 60, 40, 10), colour="purple"))
    told = hints(scene)
    assert (told.colours[told.things >= FIRST_CHARACTER] == 1 + COLOURS.index("purple")).all()
    assert (told.colours[told.things == 0] == 0).all()


def test_a_space_is_nothing() -> None:
    scene = Scene((300, 100), WHITE, print=word("A B", 60, 40, 10))
    found = spelled(whole(hints(scene).things, grid_of(scene)))
    assert [character for character, _, _ in found] == ["A", "B"]


# All of them


@pytest.mark.parametrize("config", [CONFIG, tiny_config("2.5")], ids=["pretrained", "tiny"])
def test_labels_of_any_sample_are_whole(config) -> None:
    fonts = Fonts((PILLOW_FACE,), ())
    for index in range(150):
        sample = training_sample(2, index, fonts)
        for scene, picture in zip(sample.scenes, sample.pictures, strict=True):
            grid = image_grid(config, picture.size, config.family.max_tiles)
            told = hints_of(config, scene, grid)
            shape = (1 + grid.num_tiles, config.vision.patches_per_side**2)
            for labels, num in ((told.things, NUM_THINGS), (told.colours, NUM_COLOURS)):
                assert labels.dtype == np.uint8
                assert labels.shape == shape
                assert ((labels < num) | (labels == UNKNOWN)).all()
            assert ((told.things == 0) == (told.colours == 0)).all()
            assert (told.things > 0).any()


def test_every_label_fits_beside_unknown() -> None:
    assert NUM_THINGS <= UNKNOWN
    assert NUM_COLOURS <= UNKNOWN
    assert FIRST_CHARACTER + 0x7E - 0x21 == NUM_THINGS - 1


def test_an_empty_scene_shows_nothing() -> None:
    told = hints(Scene((100, 50), WHITE))
    assert not told.things.any()
    assert not told.colours.any()
