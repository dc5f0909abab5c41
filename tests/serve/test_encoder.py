"""The vision encoder: batches over requests, and each picture's own fate within them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xc_ray.config import EncoderOptions, ServeConfig
from xc_ray.errors import MediaError
from xc_ray.model.config import Variant
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tiles import Grid, image_grid, make_canvas, open_image, read_header
from xc_ray.serve.decoder import _from_array
from xc_ray.serve.encoder import VisionEncoder, to_array

Draw = Callable[..., bytes]
Tiny = Callable[..., Path]
VARIANTS: tuple[Variant, ...] = ("2.0", "2.0-VL", "2.0-4KHD", "2.5")


def encoder_of(folder: Path, max_squares: int = 8) -> VisionEncoder:
    options = EncoderOptions(max_squares=max_squares)
    return VisionEncoder(ServeConfig(model=str(folder), encoder=options).resolve(0))


def grid_of(folder: Path, data: bytes, max_tiles: int = 1) -> Grid:
    header = read_header(data)
    config = Checkpoint.open(folder).config
    return image_grid(config, (header.width, header.height), max_tiles)


@contextmanager
def held(encoder: VisionEncoder) -> Iterator[list[int]]:
    """Batches wait inside the block; yields the pictures of each batch, as they are started."""
    sizes: list[int] = []
    go = threading.Event()
    forward = encoder._forward

    def wait_and_forward(canvases: Any) -> Any:
        sizes.append(len(canvases))
        assert go.wait(30)
        return forward(canvases)

    encoder._forward = wait_and_forward  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        go.set()


async def started(sizes: list[int]) -> None:
    while not sizes:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # pictures that came later are decoded and wait


@pytest.mark.parametrize("variant", VARIANTS)
async def test_embeddings_are_those_of_tower_and_projector(
    tiny: Tiny, picture: Draw, variant: Variant
) -> None:
    folder, data = tiny(variant), picture(120, 70)
    grid = grid_of(folder, data, 6)
    made = await encoder_of(folder).encode(data, grid)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    canvas = make_canvas(open_image(data), grid, tiled=config.family.tiled)
    with torch.inference_mode():
        (expected,) = checkpoint.load_vision()([torch.from_numpy(canvas.copy())])
    assert made.dtype == np.float32
    assert made.shape == (config.image_tokens(grid.rows, grid.cols), config.decoder.hidden_size)
    torch.testing.assert_close(torch.from_numpy(made), expected)


async def test_pictures_that_wait_make_the_next_batch(tiny: Tiny, picture: Draw) -> None:
    """One tile and the overview are two squares: four such pictures make a batch of eight."""
    folder, data = tiny(), picture()
    grid = grid_of(folder, data)
    encoder = encoder_of(folder, max_squares=8)
    alone = await encoder.encode(data, grid)
    with held(encoder) as sizes:
        calls = [asyncio.create_task(encoder.encode(data, grid))]
        await started(sizes)
        calls += [asyncio.create_task(encoder.encode(data, grid)) for _ in range(6)]
        await started(sizes)
    for array in await asyncio.gather(*calls):
        torch.testing.assert_close(torch.from_numpy(array), torch.from_numpy(alone))
    assert sizes == [1, 4, 2]


async def test_a_picture_larger_than_a_batch_is_a_batch(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture(300, 300)
    grid = grid_of(folder, data, max_tiles=9)
    assert grid.num_tiles == 9
    encoder = encoder_of(folder, max_squares=4)
    assert len(await encoder.encode(data, grid)) > 0


async def test_a_damaged_picture_fails_alone(tiny: Tiny, picture: Draw) -> None:
    folder, good = tiny(), picture(400, 300)
    cut = good[: len(good) // 2]
    grid = grid_of(folder, good)
    encoder = encoder_of(folder)
    results = await asyncio.gather(
        *(encoder.encode(data, grid) for data in (good, cut, good)), return_exceptions=True
    )
    assert isinstance(results[1], MediaError)
    assert "damaged or cut short" in results[1].message
    np.testing.assert_array_equal(results[0], results[2])


async def test_a_cancelled_picture_is_not_encoded(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture()
    grid = grid_of(folder, data)
    encoder = encoder_of(folder)
    with held(encoder) as sizes:
        first = asyncio.create_task(encoder.encode(data, grid))
        await started(sizes)
        others = [asyncio.create_task(encoder.encode(data, grid)) for _ in range(3)]
        await started(sizes)
        first.cancel()  # in the batch that runs
        others[1].cancel()  # waits
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, False, True, False]
    assert sizes == [1, 2]
    assert len(await encoder.encode(data, grid)) > 0


async def test_a_batch_whose_pictures_were_all_cancelled_is_nothing(
    tiny: Tiny, picture: Draw
) -> None:
    folder, data = tiny(), picture()
    grid = grid_of(folder, data)
    encoder = encoder_of(folder)
    with held(encoder) as sizes:
        first = asyncio.create_task(encoder.encode(data, grid))
        await started(sizes)
        second = asyncio.create_task(encoder.encode(data, grid))
        await started(sizes)
        second.cancel()
    assert len(await first) > 0
    with pytest.raises(asyncio.CancelledError):
        await second
    assert len(await encoder.encode(data, grid)) > 0


async def test_a_batch_that_fails_takes_nobody_with_it(
    tiny: Tiny, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tiny(), picture()
    grid = grid_of(folder, data)
    encoder = encoder_of(folder)

    def fail(canvases: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_forward", fail)
        results = await asyncio.gather(
            encoder.encode(data, grid), encoder.encode(data, grid), return_exceptions=True
        )
    assert [str(r) for r in results] == ["out of memory"] * 2
    assert len(await encoder.encode(data, grid)) > 0


async def test_pixels_past_the_limit_are_never_decoded(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture(100, 100)
    config = ServeConfig.model_validate({"model": str(folder), "limits": {"max_image_pixels": 99}})
    encoder = VisionEncoder(config.resolve(0))
    with pytest.raises(MediaError, match="10,000 pixels, the limit is 99"):
        await encoder.encode(data, grid_of(folder, data))


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


async def test_it_reports_the_tiles_on_hand_and_how_fast_they_go(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture()
    grid = grid_of(folder, data)
    encoder = encoder_of(folder)
    assert encoder.record_autoscaling_stats() == {"tiles": 0, "use": 0, "tiles_per_s": 0}
    with held(encoder) as sizes:
        calls = [asyncio.create_task(encoder.encode(data, grid)) for _ in range(3)]
        await started(sizes)
        assert encoder.record_autoscaling_stats()["tiles"] == 3 * (grid.num_tiles + 1)
    await asyncio.gather(*calls)
    stats = encoder.record_autoscaling_stats()
    assert stats["tiles"] == 0
    assert stats["use"] > 0
    assert stats["tiles_per_s"] > 0
