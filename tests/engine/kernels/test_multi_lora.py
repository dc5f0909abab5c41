"""Adapters of many requests in one batch, against plain torch and against loops by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine.kernels import multi_lora
from xc_ray.engine.kernels.lora_layout import (
    NO_SLOT,
    Place,
    Slots,
    Tiles,
    cut,
    max_tiles,
    places,
    plain_expand,
    plain_expand_add,
    plain_expand_gated,
    plain_group,
    plain_shrink,
)
from xc_ray.engine.kernels.multi_lora import expand, expand_add, expand_gated, group, shrink

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
WQKV, WO, W1, W3, W2 = range(5)
SHAPES = [(40, 56), (40, 40), (40, 72), (40, 72), (72, 40)]  # (in, out)
LONG = [(1040, 24), (24, 1040), (520, 136), (520, 136), (136, 520)]  # K divided, many columns
RANKS = [16, 64, 32, 48]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def adapters(
    shapes: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    ranks: list[int] = RANKS,
    max_rank: int = 64,
) -> tuple[Slots, list[Place]]:
    """A slot for each rank, full of numbers; what an adapter does not take of its slot is NaN."""
    where = places(shapes)
    total = sum(a + b for a, b in shapes)
    pool = torch.full((len(ranks), max_rank * total), float("nan")).to(DEVICE, dtype)
    for slot, rank in enumerate(ranks):
        for place in where:
            for seed, matrix in enumerate(place.views(pool[slot], rank)):
                numbers = random(*matrix.shape, seed=97 * slot + 7 * place.index + seed)
                matrix.copy_(numbers * matrix.shape[1] ** -0.5)
    scalings = 0.5 + random(len(ranks), len(shapes)).abs()
    on_device = torch.tensor(ranks, dtype=torch.int32, device=DEVICE)
    return Slots(pool, on_device, scalings, max_rank), where


def own_tiles(*slots: int) -> Tiles:
    """Each row a tile."""
    return Tiles(torch.tensor(slots, dtype=torch.int32, device=DEVICE))


def assert_close(got: Tensor, want: Tensor) -> None:
    step = max(torch.finfo(got.dtype).eps, 1e-6)
    torch.testing.assert_close(got, want, rtol=4 * step, atol=8 * step)


def by_hand(x: Tensor, row_slots: list[int], slots: Slots, place: Place) -> Tensor:
    """scaling · B A x of each row, without tiles, in float64."""
    out = torch.zeros(len(x), place.out, dtype=torch.float64, device=DEVICE)
    for row, slot in enumerate(row_slots):
        if slot != NO_SLOT:
            a, b = place.views(slots.pool[slot], int(slots.ranks[slot]))
            delta = b.double() @ (a.double() @ x[row].double())
            out[row] = delta * slots.scalings[slot, place.index].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, LONG], ids=["short", "long"])
@pytest.mark.parametrize("linear", [WQKV, WO, W2])
def test_each_row_gets_the_product_of_its_own_adapter(
    linear: int, shapes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    slots, where = adapters(shapes, dtype)
    place, row_slots = where[linear], [2, 0, NO_SLOT, 1, 3, 0]
    x, y = random(6, place.size, dtype=dtype), random(6, place.out, dtype=dtype, seed=1)
    tiles = own_tiles(*row_slots)
    given_y = y.clone()
    got = expand_add(y, shrink(x, slots, tiles, place), slots, tiles, place)
    assert got is y
    low = plain_shrink(x, slots, tiles, place)
    assert_close(got, plain_expand_add(given_y.clone(), low, slots, tiles, place))
    want = given_y.double() + by_hand(x, row_slots, slots, place)
    precision = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), want, rtol=precision, atol=precision)
    assert torch.equal(got[2], given_y[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("linear", "parts"), [(WQKV, 1), (W1, 2), (W2, 1)])
def test_what_adapters_add_stands_alone_with_zeros_for_rows_without(
    linear: int, parts: int, grouped: bool, dtype: torch.dtype
) -> None:
    slots, where = adapters(LONG, dtype)
    place, row_slots = where[linear], [2, 0, NO_SLOT, 1, 3, 0, NO_SLOT]
    x = random(7, place.size, dtype=dtype)
    tiles = own_tiles(*row_slots)
    if grouped:
        tiles = group(tiles.slots, len(slots.pool))
    got = expand(shrink(x, slots, tiles, place, parts), slots, tiles, place, parts, dtype=dtype)
    low = plain_shrink(x, slots, tiles, place, parts)
    assert_close(got, plain_expand(low, slots, tiles, place, parts, dtype=dtype))
    hand = [by_hand(x, row_slots, slots, where[linear + part]) for part in range(parts)]
    precision = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), torch.cat(hand, 1), rtol=precision, atol=precision)
    assert not got[[2, 6]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, LONG], ids=["short", "long"])
def test_gates_are_the_models_with_and_without_an_adapter(
    shapes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    slots, where = adapters(shapes, dtype)
    place, row_slots = where[W1], [1, NO_SLOT, 0, 2, 3]
    x, y = random(5, place.size, dtype=dtype), random(5, 2 * place.out, dtype=dtype, seed=1)
    given_y, tiles = y.clone(), own_tiles(*row_slots)
    got = expand_gated(y, shrink(x, slots, tiles, place, 2), slots, tiles, place)
    assert torch.equal(y, given_y)
    low = plain_shrink(x, slots, tiles, place, 2)
    assert_close(got, plain_expand_gated(y, low, slots, tiles, place))
    delta = [by_hand(x, row_slots, slots, where[w]) for w in (W1, W3)]
    gate, up = (half.double() + more for half, more in zip(given_y.chunk(2, 1), delta, strict=True))
    precision = 2e-5 if dtype == torch.float32 else 3e-2
    want = F.silu(gate) * up
    torch.testing.assert_close(got.double(), want, rtol=precision, atol=precision)
    gate, up = given_y[1].chunk(2)
    assert_close(got[1], F.silu(gate) * up)


def test_what_the_second_part_holds_is_the_next_linear_maps() -> None:
    slots, where = adapters(SHAPES)
    x, tiles = random(3, 40), own_tiles(1, 1, 0)
    both = shrink(x, slots, tiles, where[W1], 2).sum(0)
    for part, linear in enumerate((W1, W3)):
        alone = shrink(x, slots, tiles, where[linear]).sum(0)
        columns = both[:, part * 64 : part * 64 + 64]
        assert torch.equal(columns[:2], alone[:2])
        assert torch.equal(columns[2, :16], alone[2, :16])


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("kernel", ["add", "gated"])
def test_rows_of_a_step_the_host_knows_are_cut_into_tiles(kernel: str, block: int) -> None:
    slots, where = adapters(LONG)
    # Decoding rows, then two chunks; the second uses the adapter of rows before it.
    runs = [(3, 1), (0, 1), (NO_SLOT, 1), (0, 1), (1, 70), (0, 37), (NO_SLOT, 20)]
    row_slots = [slot for slot, num in runs for _ in range(num)]
    tiles = cut(runs, block, DEVICE)
    own = own_tiles(*row_slots)
    place = where[W1]
    parts = 2 if kernel == "gated" else 1
    x, y = random(131, place.size), random(131, parts * place.out, seed=1)
    low, plain_low = (
        shrink(x, slots, tiles, place, parts),
        plain_shrink(x, slots, own, place, parts),
    )
    if kernel == "add":
        got = expand_add(y.clone(), low, slots, tiles, place)
        want = plain_expand_add(y.clone(), plain_low, slots, own, place)
    else:
        got = expand_gated(y, low, slots, tiles, place)
        want = plain_expand_gated(y, plain_low, slots, own, place)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_cut_tiles_hold_every_row_once_and_rows_of_one_slot() -> None:
    tiles = cut([(5, 3), (NO_SLOT, 20), (5, 40)], 16, DEVICE)
    assert [(slot, rows.tolist()) for slot, rows in tiles] == [
        (5, [0, 1, 2, *range(23, 36)]),
        (5, [*range(36, 52)]),
        (5, [*range(52, 63)]),
        (NO_SLOT, [*range(3, 19)]),
        (NO_SLOT, [*range(19, 23)]),
    ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(NO_SLOT, 4), min_size=1, max_size=70))
def test_rows_are_grouped_on_the_device_as_by_hand(row_slots: list[int]) -> None:
    on_device = torch.tensor(row_slots, dtype=torch.int32, device=DEVICE)
    got, want = group(on_device, 5), plain_group(on_device, 5)
    for field in ("slots", "first", "counts", "order"):
        found, expected = getattr(got, field), getattr(want, field)
        used = got.counts > 0 if field == "first" and got.counts is not None else slice(None)
        assert torch.equal(found[used], expected[used]), field
    held = [(slot, row) for slot, rows in got for row in rows.tolist()]
    assert sorted(held, key=lambda pair: pair[1]) == list(zip(row_slots, range(99), strict=False))
    assert all(a <= b for (a, _), (b, _) in pairwise(held))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 9))
def test_no_rows_need_more_tiles_than_that(groups: list[int], idle: int) -> None:
    rows = sum(groups) + 1
    needed = sum(-(-rows_of // 16) for rows_of in [groups[0] + 1, *groups[1:]])
    assert needed <= max_tiles(rows, len(groups) - 1 + idle) <= rows


def test_grouped_rows_get_what_they_get_alone() -> None:
    slots, where = adapters(LONG)
    row_slots = [0, 3, 0, NO_SLOT, 1, 3] * 7
    x, y = random(42, 520), random(42, 272, seed=1)
    grouped, own = group(own_tiles(*row_slots).slots, 4), own_tiles(*row_slots)
    results = []
    for tiles in (grouped, own):
        low = shrink(x, slots, tiles, where[W1], 2)
        added = expand_add(y[:, :136].clone(), low, slots, tiles, where[W1])
        results.append((added, expand_gated(y, low, slots, tiles, where[W1])))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_and_every_run_is_the_same(dtype: torch.dtype) -> None:
    slots, where = adapters(LONG, dtype)
    row_slots = torch.tensor([0, 3, 0, NO_SLOT, 1, 3] * 4, dtype=torch.int32, device=DEVICE)
    x, y = random(24, 1040, dtype=dtype), random(24, 24, dtype=dtype, seed=1)

    def run(x: Tensor, rows: slice) -> Tensor:
        tiles = group(row_slots[rows].clone(), 4)
        low = shrink(x[rows], slots, tiles, where[WQKV])
        return expand_add(y[rows].clone(), low, slots, tiles, where[WQKV])

    whole = run(x, slice(0, 24))
    assert torch.equal(whole, run(x, slice(0, 24)))
    others = x.clone()
    others[:5] = others[6:] = float("nan")
    assert torch.equal(whole[5], run(others, slice(0, 24))[5])
    for row in range(6):
        alone = slice(row, row + 1)
        assert torch.equal(whole[alone], run(x, alone))


@pytest.mark.parametrize("rank", [16, 32, 48, 64])
@pytest.mark.parametrize("block_r", [16, 32, 64])
def test_every_rank_is_whole_in_any_number_of_passes(block_r: int, rank: int) -> None:
    slots, where = adapters(SHAPES, ranks=[rank, 16])
    cut_in_passes = multi_lora.Cut(32, block_r, num_warps=4)
    x, y, tiles = random(2, 40), random(2, 144, seed=1), own_tiles(0, 1)
    place = where[W1]
    low = shrink(x, slots, tiles, place, 2, cut_in_passes)
    plain_low = plain_shrink(x, slots, tiles, place, 2)
    got = expand_gated(y, low, slots, tiles, place, cut_in_passes)
    assert_close(got, plain_expand_gated(y, plain_low, slots, tiles, place))
    low = shrink(x, slots, tiles, place, 1, cut_in_passes)
    got = expand_add(y[:, :72].clone(), low, slots, tiles, place, cut_in_passes)
    plain_low = plain_shrink(x, slots, tiles, place)
    assert_close(got, plain_expand_add(y[:, :72].clone(), plain_low, slots, tiles, place))


@pytest.mark.parametrize("max_rank", [16, 48])
def test_the_pool_may_be_made_for_smaller_ranks(max_rank: int) -> None:
    slots, where = adapters(SHAPES, ranks=[16, max_rank], max_rank=max_rank)
    x, y, tiles = random(3, 40), random(3, 56, seed=1), own_tiles(1, 0, 1)
    got = expand_add(y.clone(), shrink(x, slots, tiles, where[0]), slots, tiles, where[0])
    low = plain_shrink(x, slots, tiles, where[0])
    assert_close(got, plain_expand_add(y, low, slots, tiles, where[0]))


def test_some_columns_of_a_wider_tensor_can_be_added_to() -> None:
    slots, where = adapters(SHAPES)
    wide, x, tiles = random(3, 144), random(3, 40, seed=1), own_tiles(1, NO_SLOT, 0)
    before, half = wide.clone(), wide[:, 72:]
    want = plain_expand_add(
        half.clone(), plain_shrink(x, slots, tiles, where[W3]), slots, tiles, where[W3]
    )
    expand_add(half, shrink(x, slots, tiles, where[W3]), slots, tiles, where[W3])
    assert_close(wide[:, 72:], want)
    assert torch.equal(wide[:, :72], before[:, :72])
    assert not torch.equal(wide[:, 72:], before[:, 72:])


def test_a_batch_without_adapters_is_left_as_it_is_and_only_gated() -> None:
    slots, where = adapters(SHAPES)
    x, y = random(5, 40), random(5, 144, seed=1)
    tiles = group(own_tiles(*[NO_SLOT] * 5).slots, 4)
    place, half = where[W1], y[:, :72].clone()
    assert torch.equal(
        expand_add(half.clone(), shrink(x, slots, tiles, place), slots, tiles, place), half
    )
    gate, up = y.chunk(2, 1)
    got = expand_gated(y, shrink(x, slots, tiles, place, 2), slots, tiles, place)
    assert_close(got, F.silu(gate) * up)


def test_an_adapter_is_one_block_of_its_rank() -> None:
    where = places(SHAPES)
    block = torch.arange(16 * sum(a + b for a, b in SHAPES), dtype=torch.float32)
    found = [matrix.flatten() for place in where for matrix in place.views(block, 16)]
    assert torch.equal(torch.cat(found), block)
    assert [tuple(m.shape) for m in where[W2].views(block, 16)] == [(16, 72), (40, 16)]


def far_slot() -> None:
    """A slot that begins beyond 2**31 elements."""
    near, where = adapters([(32, 48)], torch.float16, ranks=[16, 16])
    step = 2**31 + 64
    pool = torch.empty(step + near.pool.shape[1], dtype=torch.float16, device=DEVICE)
    pool = pool.as_strided(near.pool.shape, (step, 1))
    pool.copy_(near.pool)
    x, y, tiles = random(1, 32).half(), random(1, 48, seed=1).half(), own_tiles(1)
    results = []
    for slots in (near, Slots(pool, near.ranks, near.scalings, near.max_rank)):
        low = shrink(x, slots, tiles, where[0])
        results.append(expand_add(y.clone(), low, slots, tiles, where[0]))
    assert torch.equal(*results)
    assert not torch.equal(results[0], y)


@pytest.mark.slow  # Triton's interpreter copies the pool of 4 GB for each launch
def test_a_slot_may_begin_beyond_32_bits() -> None:
    far_slot()


@pytest.mark.gpu
def test_a_slot_may_begin_beyond_32_bits_on_the_gpu() -> None:
    far_slot()


@pytest.mark.gpu
@pytest.mark.parametrize("cuts", ["plain", "early"])
def test_a_graph_serves_other_adapters_than_it_was_captured_with(
    cuts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cuts == "early":
        usual = multi_lora.DECODE
        early = (replace(c, early=True) for c in (usual.shrink, usual.add, usual.gated))
        monkeypatch.setattr(multi_lora, "DECODE", multi_lora.Cuts(*early))
    slots, where = adapters(LONG, torch.bfloat16)
    row_slots = torch.full((40,), NO_SLOT, dtype=torch.int32, device=DEVICE)
    x = random(40, 520).bfloat16()
    y = random(40, 272, seed=1).bfloat16()

    def step() -> tuple[Tensor, Tensor]:
        tiles = group(row_slots, 4)
        added = y[:, :136].clone()  # stands between the tiles and an early launch
        expand_add(added, shrink(x, slots, tiles, where[W1]), slots, tiles, where[W1])
        low = shrink(x, slots, tiles, where[W1], 2)
        return added, expand_gated(y, low, slots, tiles, where[W1])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        row_slots.copy_(torch.randint(-1, 4, (40,), generator=generator))
        graph.replay()
        tiles = own_tiles(*row_slots.tolist())
        low = plain_shrink(x, slots, tiles, where[W1])
        want = plain_expand_add(y[:, :136].clone(), low, slots, tiles, where[W1])
        assert_close(results[0], want)
        low = plain_shrink(x, slots, tiles, where[W1], 2)
        assert_close(results[1], plain_expand_gated(y, low, slots, tiles, where[W1]))
