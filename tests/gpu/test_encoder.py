"""Passes of the tower on a GPU: every form and attention gives the rows of the CPU.

The CPU siblings are tests/model/test_fast_vision.py and tests/serve/test_encoder.py.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from xc_ray.config import EncoderOptions
from xc_ray.demo.make import save_random, tiny_config
from xc_ray.model.fast_vision import Attention, FastVision, PassGraphs
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.tiles import Grid
from xc_ray.serve.square_runner import SquareRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Load = Callable[[str, torch.dtype], ImageEncoder]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A small tower with heads of 64, which every attention takes."""
    tiny = tiny_config("2.5")
    vision = replace(
        tiny.vision, hidden_size=128, intermediate_size=256, num_attention_heads=2, image_size=112
    )
    folder = tmp_path_factory.mktemp("encoder")
    save_random(folder, replace(tiny, vision=vision))

    def load(device: str, dtype: torch.dtype) -> ImageEncoder:
        return Checkpoint.open(folder).load_vision(device=device, dtype=dtype)

    return load


@pytest.fixture(scope="module")
def squares() -> Tensor:
    return torch.randn(5, 3, 112, 112, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def expected(encoders: Load, squares: Tensor) -> Tensor:
    return FastVision(encoders("cpu", torch.float32))(squares)


def assert_close(rows: Tensor, want: Tensor) -> None:
    """As near as bf16 is: a few thousandths of the spread."""
    error = (rows.float().cpu() - want).abs()
    assert error.mean() < 0.02 * want.std()
    assert error.max() < 0.2 * want.std()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["auto", "default", "cudnn", "flash", "efficient", "math"])
def test_rows_in_bf16_are_close_to_the_cpu(
    attention: Attention, compiled: bool, encoders: Load, squares: Tensor
):
    fast = FastVision(encoders("cuda", torch.bfloat16), attention=attention, compiled=compiled)
    with torch.inference_mode():
        for part in squares.split(2):  # two sizes
            assert_close(fast(part.cuda().bfloat16()), expected(encoders, part))


def test_rows_in_fp32_are_those_of_the_cpu(encoders: Load, squares: Tensor):
    fast = FastVision(encoders("cuda", torch.float32))
    with torch.inference_mode():
        rows = fast(squares.cuda()).cpu()
    torch.testing.assert_close(rows, expected(encoders, squares), atol=1e-4, rtol=1e-4)


def test_a_graph_replays_its_size_and_leaves_earlier_rows_alone(encoders: Load, squares: Tensor):
    fast = FastVision(encoders("cuda", torch.bfloat16))
    graphs = PassGraphs(fast, [1, 4])
    graphs.capture()
    assert [graphs.can_use(n) for n in (1, 2, 4, 5)] == [True, False, True, False]
    on_gpu = squares.cuda().bfloat16()
    first, second = graphs.replay(on_gpu[:4]), graphs.replay(on_gpu[1:])
    with torch.inference_mode():
        assert_close(first, fast(on_gpu[:4]).float().cpu())
        assert_close(second, fast(on_gpu[1:]).float().cpu())


@pytest.mark.parametrize(
    "options",
    [{}, {"compile_tower": True}, {"cuda_graphs": True}],
    ids=["plain", "compiled", "graphs"],
)
def test_pictures_split_over_passes_are_those_of_the_plain_encoder(
    options: dict[str, bool], encoders: Load
):
    """Two pictures share passes of four squares; results are collected after the next has begun."""
    runner = SquareRunner(
        encoders("cuda", torch.bfloat16), EncoderOptions(max_squares=4, **options)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (224, 336, 3), np.uint8)
    grids = [Grid(2, 3, (336, 224), (0, 0), (336, 224)), Grid(1, 1, (112, 112), (0, 0), (112, 112))]
    canvases = [pixels, pixels[:112, :112]]
    one, two = (runner.tile(c, g) for c, g in zip(canvases, grids, strict=True))
    launched = [
        runner.launch(parts) for parts in ([(one, 0, 2), (two, 0, 2)], [(one, 2, 4)], [(one, 6, 1)])
    ]
    for done in launched:
        runner.collect(done)
    with torch.inference_mode():
        want = encoders("cpu", torch.float32)([torch.from_numpy(c.copy()) for c in canvases])
    for picture, embeddings in zip((one, two), want, strict=True):
        made = torch.from_numpy(picture.placement.embeddings).view(torch.bfloat16)
        assert made.shape == embeddings.shape
        assert_close(made, embeddings)
