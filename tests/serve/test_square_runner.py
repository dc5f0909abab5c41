"""Pixels and rows around a pass; what runs on a GPU is in tests/gpu/test_encoder.py."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from xc_ray.config import EncoderOptions
from xc_ray.model.config import Variant
from xc_ray.model.vision import normalise, to_squares
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tiles import Grid
from xc_ray.serve.decoder import _from_array
from xc_ray.serve.square_runner import SquareRunner, sizes_up_to, to_array

Tiny = Callable[..., Path]
GRID = Grid(2, 3, (168, 112), (0, 0), (168, 112))


def runner_of(folder: Path, dtype: torch.dtype = torch.float32) -> SquareRunner:
    return SquareRunner(Checkpoint.open(folder).load_vision(dtype=dtype), EncoderOptions())


def pixels(width: int = 168, height: int = 112) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("first", "count"), [(0, 7), (0, 1), (0, 3), (1, 6), (4, 2), (6, 1)])
def test_squares_of_any_part_are_bit_by_bit_those_of_the_whole(
    tiny: Tiny, first: int, count: int
) -> None:
    runner = runner_of(tiny("2.5"))
    canvas = pixels()
    config = runner._config
    whole = to_squares(config, normalise(torch.from_numpy(canvas)))
    part = runner._squares(runner.tile(canvas, GRID), first, count)
    assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize(("variant", "squares"), [("2.0", 1), ("2.0-VL", 1), ("2.5", 2)])
def test_the_overview_is_a_square_where_there_is_one(
    tiny: Tiny, variant: Variant, squares: int
) -> None:
    runner = runner_of(tiny(variant))
    grid = Grid(1, 1, (56, 56), (0, 0), (56, 56))
    assert runner.num_squares(grid) == squares
    canvas = pixels(56, 56)
    part = runner._squares(runner.tile(canvas, grid), 0, squares)
    assert torch.equal(part, to_squares(runner._config, normalise(torch.from_numpy(canvas))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_kept_as_the_bits_that_they_are(tiny: Tiny, dtype: torch.dtype) -> None:
    folder = tiny("2.5")
    runner = runner_of(folder, dtype)
    picture = runner.tile(pixels(), GRID)
    for part in ((picture, 0, 4), (picture, 4, 3)):
        runner.collect(runner.launch([part]))
    assert picture.finite
    with torch.inference_mode():
        (want,) = Checkpoint.open(folder).load_vision()([torch.from_numpy(pixels())])
    made = _from_array(picture.placement.embeddings, dtype).float()
    assert (made - want).abs().mean() < 0.02 * want.std()


def test_sizes_that_are_prepared_are_the_small_ones_and_the_full_one() -> None:
    assert sizes_up_to(4, 25) == [1, 2, 3, 4, 25]
    assert sizes_up_to(4, 4) == [1, 2, 3, 4]
    assert sizes_up_to(4, 2) == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_cross_processes_bit_by_bit_and_uncopied(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5).to(dtype)
    x[0, :3] = torch.tensor([float("inf"), -0.0, float("nan")])
    array = to_array(x)
    array.flags.writeable = False  # as the object store gives it
    assert array.dtype == (np.float32 if dtype == torch.float32 else np.uint16)
    back = _from_array(array, dtype)
    assert (back.dtype, back.shape) == (dtype, x.shape)
    assert x.data_ptr() == array.ctypes.data == back.data_ptr()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(bits), x.view(bits))


def test_a_slice_of_a_larger_tensor_is_laid_out_anew() -> None:
    x = torch.randn(6, 4)[:, :2]
    np.testing.assert_array_equal(_from_array(to_array(x), torch.float32), x)
