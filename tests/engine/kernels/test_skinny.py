import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine.kernels import skinny
from xc_ray.engine.kernels.skinny import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VECTOR = Tile("vector", 8, 16, num_stages=1, num_warps=4)
MATRIX = Tile("matrix", 16, 16, num_stages=2, num_warps=4)
SPLIT = Tile("matrix", 16, 16, num_stages=2, num_warps=4, split_k=3)
BOXES = Tile("matrix", 16, 32, num_stages=2, num_warps=4, boxes=True)
PRECISION = {torch.float32: 1e-5, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    precision = PRECISION[y.dtype]
    torch.testing.assert_close(y, expected, rtol=precision, atol=10 * precision)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tile", [VECTOR, MATRIX, SPLIT, BOXES])
def test_every_kind_of_tile_multiplies(tile: Tile, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = random(3, 72, dtype=dtype), random(40, 72, dtype=dtype, seed=1)
    bias = random(40, dtype=dtype, seed=2) if with_bias else None
    y = skinny.launch(tile, x, weight, bias=bias)
    assert_close(y, skinny.plain_linear(x, weight, bias))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("tile", [VECTOR, MATRIX, BOXES])
def test_every_kind_of_tile_gates(tile: Tile, dtype: torch.dtype) -> None:
    x = random(3, 72, dtype=dtype)
    w1, w3 = random(40, 72, dtype=dtype, seed=1), random(40, 72, dtype=dtype, seed=2)
    assert_close(skinny.launch(tile, x, w1, w3), skinny.plain_gated(x, w1, w3))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("tile", [VECTOR, MATRIX, SPLIT, BOXES])
def test_every_kind_of_tile_adds_to_what_is_there(tile: Tile, dtype: torch.dtype) -> None:
    x, weight = random(3, 72, dtype=dtype), random(40, 72, dtype=dtype, seed=1)
    residual = random(3, 40, dtype=dtype, seed=2)
    expected = residual + skinny.plain_linear(x, weight)
    y = skinny.launch(tile, x, weight, out=residual, add=True)
    assert y is residual
    assert_close(y, expected)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 17),
    n=st.integers(1, 50),
    k=st.integers(1, 70),
    tile=st.sampled_from([VECTOR, MATRIX, SPLIT]),
)
def test_sizes_need_not_divide(rows: int, n: int, k: int, tile: Tile) -> None:
    rows = min(rows, skinny.MAX_VECTOR_ROWS) if tile.kind == "vector" else rows
    x, weight = random(rows, k), random(n, k, seed=1)
    assert_close(skinny.launch(tile, x, weight), skinny.plain_linear(x, weight))


@pytest.mark.parametrize("rows", range(1, 18))
def test_the_tile_of_the_rows_is_taken(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {(n, 48, b): VECTOR if b == 1 else MATRIX for n in (37, 74) for b in (1, 2, 4, 8, 16)}
    monkeypatch.setattr(skinny, "TILES", tiles)  # at 17 rows there is none: plain
    x, w1, w3 = random(rows, 48), random(37, 48, seed=1), random(37, 48, seed=2)
    assert_close(skinny.linear(x, w1), skinny.plain_linear(x, w1))
    assert_close(skinny.gated(x, w1, w3), skinny.plain_gated(x, w1, w3))


@pytest.mark.parametrize("tile", [VECTOR, MATRIX, SPLIT, BOXES])
def test_a_row_does_not_depend_on_the_others_and_every_run_is_the_same(tile: Tile) -> None:
    x, weight = random(4, 64), random(40, 64, seed=1)
    y = skinny.launch(tile, x, weight)
    other = x.clone()
    other[1:] = float("nan")
    assert torch.equal(y, skinny.launch(tile, x, weight))
    assert torch.equal(y[0], skinny.launch(tile, other, weight)[0])


def test_split_products_leave_their_counters_as_they_found_them() -> None:
    counters = skinny.make_counters(DEVICE)
    for seed in range(3):
        x, weight = random(5, 96, seed=seed), random(40, 96, seed=seed + 1)
        assert_close(skinny.launch(SPLIT, x, weight, counters=counters), x @ weight.T)
        assert not counters.any()


def test_more_parts_than_steps_of_k_add_nothing() -> None:
    x, weight = random(2, 16), random(20, 16, seed=1)
    assert_close(skinny.launch(SPLIT, x, weight), x @ weight.T)


def test_cublas_takes_what_the_table_leaves_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "TILES", {(40, 64, 4): None, (80, 64, 4): None, (40, 64, 8): SPLIT})
    assert skinny.choose(40, 64, 3) is None
    assert skinny.choose(40, 64, 5) == SPLIT
    assert skinny.choose(40, 64, skinny.MAX_ROWS + 1) is None
    x, weight, bias = random(3, 64), random(40, 64, seed=1), random(40, seed=2)
    assert_close(skinny.gated(x, weight, weight), skinny.plain_gated(x, weight, weight))
    assert_close(skinny.linear(x, weight, bias), skinny.plain_linear(x, weight, bias))


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_result_can_be_given_a_place(
    rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skinny, "TILES", {(40, 64, 4): None, (40, 64, 8): SPLIT})
    x, weight = random(rows, 64), random(40, 64, seed=1)
    bias = random(40, seed=2) if with_bias else None
    out = torch.empty(rows, 40, device=DEVICE)
    assert skinny.linear(x, weight, bias, out=out) is out
    assert_close(out, skinny.plain_linear(x, weight, bias))
