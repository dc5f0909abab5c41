"""The vision encoder: passes that requests share, and each picture's own fate within them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from xc_ray.config import ServeConfig
from xc_ray.errors import EngineError, MediaError
from xc_ray.model.config import Variant
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tiles import Grid, image_grid, make_canvas, open_image, read_header
from xc_ray.serve.encoder import VisionEncoder

Draw = Callable[..., bytes]
Tiny = Callable[..., Path]
VARIANTS: tuple[Variant, ...] = ("2.0", "2.0-VL", "2.0-4KHD", "2.5")


def encoder_of(folder: Path, max_squares: int = 8, **options: float) -> VisionEncoder:
    values = {"model": str(folder), "encoder": {"max_squares": max_squares, **options}}
    return VisionEncoder(ServeConfig.model_validate(values).resolve(0))


def grid_of(folder: Path, data: bytes, max_tiles: int = 1) -> Grid:
    header = read_header(data)
    config = Checkpoint.open(folder).config
    return image_grid(config, (header.width, header.height), max_tiles)


@contextmanager
def held(encoder: VisionEncoder) -> Iterator[list[int]]:
    """Passes wait inside the block; yields the squares of each pass, as they are started."""
    sizes: list[int] = []
    go = threading.Event()
    launch = encoder._runner.launch

    def wait_and_launch(parts: Any) -> Any:
        sizes.append(sum(count for _, _, count in parts))
        assert go.wait(30)
        return launch(parts)

    encoder._runner.launch = wait_and_launch  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        go.set()


async def started(sizes: list[int]) -> None:
    while not sizes:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # pictures that came later are read and wait


def alone(folder: Path, data: bytes, grid: Grid) -> torch.Tensor:
    """The picture by the plain tower and projector."""
    encoder = Checkpoint.open(folder).load_vision()
    canvas = make_canvas(open_image(data), grid, tiled=encoder.config.family.tiled)
    with torch.inference_mode():
        embeddings: list[torch.Tensor] = encoder([torch.from_numpy(canvas.copy())])
    return embeddings[0]


def assert_close(array: npt.NDArray[np.generic], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(array.copy()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
async def test_embeddings_are_those_of_tower_and_projector(
    tiny: Tiny, picture: Draw, variant: Variant
) -> None:
    folder, data = tiny(variant), picture(120, 70)
    grid, config = grid_of(folder, data, 6), Checkpoint.open(folder).config
    made = await encoder_of(folder).encode(data, grid)
    assert made.dtype == np.float32
    assert made.shape == (config.image_tokens(grid.rows, grid.cols), config.decoder.hidden_size)
    assert_close(made, alone(folder, data, grid))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_squares", [1, 3, 8])
async def test_pictures_of_all_sizes_share_passes_and_each_is_as_if_alone(
    tiny: Tiny, picture: Draw, variant: Variant, max_squares: int
) -> None:
    folder = tiny(variant)
    pictures = [picture(*size) for size in ((300, 300), (40, 30), (60, 200), (90, 31), (31, 90))]
    grids = [grid_of(folder, data, 9) for data in pictures]
    encoder = encoder_of(folder, max_squares)
    with held(encoder) as sizes:
        calls = [asyncio.create_task(encoder.encode(*p)) for p in zip(pictures, grids, strict=True)]
        await started(sizes)
    for data, grid, array in zip(pictures, grids, await asyncio.gather(*calls), strict=True):
        assert_close(array, alone(folder, data, grid))
    tiled = Checkpoint.open(folder).config.family.tiled
    assert sum(sizes) == sum(grid.num_tiles + tiled for grid in grids)
    assert max(sizes) <= max_squares
    if max_squares == 1 or not tiled:
        return
    assert sizes[1:-1] == [max_squares] * (len(sizes) - 2)  # full while there is work


async def test_a_small_picture_does_not_wait_for_all_of_a_large_one(
    tiny: Tiny, picture: Draw
) -> None:
    folder, large, small = tiny(), picture(400, 400), picture()
    encoder = encoder_of(folder, max_squares=4)
    with held(encoder) as sizes:
        first = asyncio.create_task(encoder.encode(large, grid_of(folder, large, 49)))
        await started(sizes)
        second = asyncio.create_task(encoder.encode(small, grid_of(folder, small)))
        await started(sizes)
        assert encoder.batcher.waiting_squares + encoder.batcher.running_squares == 52
    await second
    assert len(sizes) <= 5  # of 13
    assert not first.done()
    assert_close(await first, alone(folder, large, grid_of(folder, large, 49)))
    assert (encoder.batcher.waiting_squares, encoder.batcher.running_squares) == (0, 0)


async def test_a_picture_that_comes_again_is_not_encoded_again(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture(120, 70)
    grid, other_grid = grid_of(folder, data, 6), grid_of(folder, data, 1)
    assert grid != other_grid
    encoder = encoder_of(folder)
    with held(encoder) as sizes:
        calls = [asyncio.create_task(encoder.encode(data, grid)) for _ in range(3)]
        await started(sizes)
        calls[0].cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] is results[2]
    assert await encoder.encode(data, grid) is results[1]
    assert sum(sizes) == grid.num_tiles + 1
    # The same bytes on another grid are another picture.
    assert_close(await encoder.encode(data, other_grid), alone(folder, data, other_grid))


@pytest.mark.parametrize(("limit_s", "refused"), [(1e-9, True), (10.0, False)])
async def test_decoding_may_take_as_long_as_the_limits_say(
    tiny: Tiny, picture: Draw, limit_s: float, refused: bool
) -> None:
    folder, data = tiny(), picture()
    values = {"model": str(folder), "limits": {"max_decode_s": limit_s}}
    encoder = VisionEncoder(ServeConfig.model_validate(values).resolve(0))
    if refused:
        with pytest.raises(MediaError, match=r"takes more than 1e-09 s to read") as caught:
            await encoder.encode(data, grid_of(folder, data))
        assert caught.value.code == "image_too_complex"
    else:
        assert len(await encoder.encode(data, grid_of(folder, data))) > 0


async def test_pictures_of_another_salt_are_encoded_anew(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture()
    encoder, grid = encoder_of(folder), grid_of(folder, data)
    plain, one, again = [await encoder.encode(data, grid, salt) for salt in ("", "one", "one")]
    assert plain is not one
    assert one is again


async def test_nothing_is_kept_without_room(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture()
    encoder = encoder_of(folder, cache_gb=0)
    first, second = [await encoder.encode(data, grid_of(folder, data)) for _ in range(2)]
    assert first is not second
    np.testing.assert_array_equal(first, second)


async def test_pictures_are_read_on_a_bounded_number_of_threads(
    tiny: Tiny, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny()
    pictures = [picture(40 + i, 30) for i in range(8)]
    encoder = encoder_of(folder, num_cpus=3)
    names: set[str] = set()
    read = encoder._read

    def read_and_tell(data: bytes, grid: Grid) -> Any:
        names.add(threading.current_thread().name)
        time.sleep(0.05)
        return read(data, grid)

    monkeypatch.setattr(encoder, "_read", read_and_tell)
    await asyncio.gather(*(encoder.encode(p, grid_of(folder, p)) for p in pictures))
    assert names == {f"encoder-read_{i}" for i in range(3)}


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


async def test_a_damaged_picture_is_not_kept(
    tiny: Tiny, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tiny(), picture()
    encoder, grid = encoder_of(folder), grid_of(folder, data)
    with monkeypatch.context() as patch:
        patch.setattr("xc_ray.serve.encoder.open_image", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await encoder.encode(data, grid)
    assert len(await encoder.encode(data, grid)) > 0


async def test_a_cancelled_picture_is_not_encoded(tiny: Tiny, picture: Draw) -> None:
    folder = tiny()
    pictures = [picture(40 + i, 30) for i in range(4)]
    encoder = encoder_of(folder)
    with held(encoder) as sizes:
        calls = [asyncio.create_task(encoder.encode(pictures[0], grid_of(folder, pictures[0])))]
        await started(sizes)
        calls += [asyncio.create_task(encoder.encode(p, grid_of(folder, p))) for p in pictures[1:]]
        await started(sizes)
        calls[0].cancel()  # in the pass that runs
        calls[2].cancel()  # waits
        await asyncio.wait([calls[0], calls[2]])
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, False, True, False]
    assert sizes == [2, 4]
    assert len(await encoder.encode(pictures[0], grid_of(folder, pictures[0]))) > 0


async def test_a_pass_that_fails_takes_nobody_else_with_it(
    tiny: Tiny, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, other = tiny(), picture(), picture(41, 30)
    encoder = encoder_of(folder)

    def fail(squares: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(encoder._runner, "_vision", fail)
        results = await asyncio.gather(
            *(encoder.encode(p, grid_of(folder, p)) for p in (data, other)), return_exceptions=True
        )
    assert [str(r) for r in results] == ["out of memory"] * 2
    assert_close(
        await encoder.encode(data, grid_of(folder, data)),
        alone(folder, data, grid_of(folder, data)),
    )


async def test_embeddings_that_are_no_numbers_fail_their_picture_and_are_not_kept(
    tiny: Tiny, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass, two pictures; the second square of the second one comes out as NaN."""
    folder, data, other = tiny(), picture(), picture(41, 30)
    encoder = encoder_of(folder, batch_wait_ms=1000)
    vision = encoder._runner._vision

    def spoil(squares: torch.Tensor) -> torch.Tensor:
        rows = vision(squares).clone()
        rows[-1, 0, 0] = torch.nan
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(encoder._runner, "_vision", spoil)
        good, bad = await asyncio.gather(
            *(encoder.encode(p, grid_of(folder, p)) for p in (data, other)), return_exceptions=True
        )
    assert isinstance(bad, EngineError)
    assert not isinstance(good, BaseException)
    assert_close(good, alone(folder, data, grid_of(folder, data)))
    again = await encoder.encode(other, grid_of(folder, other))
    assert_close(again, alone(folder, other, grid_of(folder, other)))


async def test_pixels_past_the_limit_are_never_decoded(tiny: Tiny, picture: Draw) -> None:
    folder, data = tiny(), picture(100, 100)
    config = ServeConfig.model_validate({"model": str(folder), "limits": {"max_image_pixels": 99}})
    encoder = VisionEncoder(config.resolve(0))
    with pytest.raises(MediaError, match="10,000 pixels, the limit is 99"):
        await encoder.encode(data, grid_of(folder, data))


async def test_it_reports_the_tiles_on_hand_and_how_fast_they_go(tiny: Tiny, picture: Draw) -> None:
    folder = tiny()
    pictures = [picture(*size) for size in ((60, 40), (61, 40), (62, 40))]
    encoder = encoder_of(folder)
    assert encoder.record_autoscaling_stats() == {"tiles": 0, "use": 0, "tiles_per_s": 0}
    with held(encoder) as sizes:
        calls = [
            asyncio.create_task(encoder.encode(data, grid_of(folder, data))) for data in pictures
        ]
        await started(sizes)
        assert encoder.record_autoscaling_stats()["tiles"] == 3 * 2  # with their overviews
    await asyncio.gather(*calls)
    stats = encoder.record_autoscaling_stats()
    assert stats["tiles"] == 0
    assert stats["use"] > 0
    assert stats["tiles_per_s"] > 0
