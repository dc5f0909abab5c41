from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference import clip
from tests.reference.pictures import bicubic
from xc_ray.demo.make import save_random, tiny_config
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.vision import MEAN, STD, VisionTower, normalise, to_squares
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import ImageEncoder


def load(folder: Path, dtype: torch.dtype = torch.float64) -> ImageEncoder:
    return Checkpoint.open(folder).load_vision(dtype=dtype)


def canvas(rows: int, cols: int, tile: int = 56) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (rows * tile, cols * tile, 3), dtype=torch.uint8, generator=generator
    )


def test_values_of_0_to_255_are_normalised_channel_by_channel() -> None:
    pixels = canvas(1, 1)
    x = normalise(pixels)
    assert (x.shape, x.dtype) == ((3, 56, 56), torch.float32)
    for row, column, channel in [(0, 0, 0), (5, 9, 1), (55, 3, 2)]:
        value = pixels[row, column, channel].item() / 255
        expected = (value - MEAN[channel]) / STD[channel]
        assert x[channel, row, column].item() == pytest.approx(expected, abs=1e-6)


def test_normalising_leaves_the_canvas_as_it_was() -> None:
    pixels = canvas(1, 1)
    before = pixels.clone()
    normalise(pixels)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3), (3, 1)])
def test_tiles_follow_the_overview_row_by_row(rows: int, cols: int) -> None:
    config = tiny_config("2.5")
    x = torch.randn(3, rows * 56, cols * 56)
    squares = to_squares(config, x)
    assert squares.shape == (1 + rows * cols, 3, 56, 56)
    for row in range(rows):
        for col in range(cols):
            tile = x[:, row * 56 : (row + 1) * 56, col * 56 : (col + 1) * 56]
            assert torch.equal(squares[1 + row * cols + col], tile)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3), (3, 1)])
def test_the_overview_is_the_whole_canvas_resized_bicubically(rows: int, cols: int) -> None:
    x = torch.randn(3, rows * 56, cols * 56, dtype=torch.float64)
    overview = to_squares(tiny_config("2.5"), x, torch.float64)[0]
    torch.testing.assert_close(overview, bicubic(x, 56))


def test_squares_are_cast_after_the_overview_is_resized() -> None:
    config, x = tiny_config("2.5"), normalise(canvas(2, 1))
    squares = to_squares(config, x, torch.bfloat16)
    assert squares.dtype == torch.bfloat16
    assert torch.equal(squares, to_squares(config, x).bfloat16())


def test_an_untiled_picture_is_the_one_square() -> None:
    x = torch.randn(3, 56, 56)
    squares = to_squares(tiny_config("2.0-VL"), x)
    assert torch.equal(squares, x[None])


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_tower_is_the_textbooks(variant: Variant, tiny: Callable[[Variant], Path]) -> None:
    encoder = load(tiny(variant))
    squares = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    patches = encoder.vit(squares)
    assert patches.shape == (2, 16, 32)
    for square, ours in zip(squares, patches, strict=True):
        expected = clip.patches(encoder.config.vision, encoder.state_dict(), square)
        torch.testing.assert_close(ours, expected)


def test_a_tower_of_other_heads_and_layers_is_the_textbooks(tmp_path: Path) -> None:
    tiny = tiny_config("2.5")
    vision = replace(
        tiny.vision, num_hidden_layers=3, num_attention_heads=4, layer_norm_eps=1e-2, image_size=84
    )
    save_random(tmp_path, replace(tiny, vision=vision))
    encoder = load(tmp_path)
    square = torch.randn(3, 84, 84, dtype=torch.float64)
    expected = clip.patches(vision, encoder.state_dict(), square)
    torch.testing.assert_close(encoder.vit(square[None])[0], expected)


def test_squares_of_one_batch_do_not_change_each_other(tiny: Callable[[Variant], Path]) -> None:
    tower = load(tiny("2.5")).vit
    squares = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    alone = torch.cat([tower(square[None]) for square in squares])
    torch.testing.assert_close(tower(squares), alone)


def test_its_tensors_have_the_published_names_and_no_final_norm() -> None:
    with torch.device("meta"):
        names = {f"vit.{n}" for n, _ in VisionTower(tiny_config("2.5").vision).named_parameters()}
    assert all(n.startswith("vit.vision_tower.vision_model.") for n in names)
    assert not any("post_layernorm" in n for n in names)
    ends = {n.removeprefix("vit.vision_tower.vision_model.").split(".layers.")[0] for n in names}
    assert ends == {
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "pre_layrnorm.weight",
        "pre_layrnorm.bias",
        "encoder",
    }
