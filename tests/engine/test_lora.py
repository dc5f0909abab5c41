"""Where an adapter's numbers lie in a slot, and what they do to the rows that use it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.engine.traffic import dense_ops, made_adapter
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import LINEARS, LoraOps, LoraPool
from xc_ray.engine.sequence import SamplingParams
from xc_ray.errors import InvalidRequest
from xc_ray.model.adapter import Adapter
from xc_ray.model.config import PLORA_LINEARS
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.plora import ImageRows

Load = Callable[..., Decoder]
Segments = Sequence[tuple[int, int, int]]


def pool_of(decoder: Decoder, slots: int = 3, **options: Any) -> LoraPool:
    return LoraPool(decoder, EngineConfig(64, 64, max_loras=slots, **options))


def loaded(pool: LoraPool, slot: int, adapter: Adapter) -> None:
    pool.load(slot, pool.pack(adapter))
    assert pool.loaded(slot)


def check_slot(pool: LoraPool, slot: int, adapter: Adapter) -> None:
    """Every linear map has the adapter's pair, zeros around it, and its scaling."""
    for key, place in pool.places.items():
        a, b = pool.pair(slot, place)
        pair = adapter.pairs.get(key)
        rank = len(pair.a) if pair is not None else 0
        assert len(a) == b.shape[1] == -(-adapter.rank // 16) * 16
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        if pair is not None:
            assert torch.equal(a[:rank], pair.a.to(a.dtype))
            assert torch.equal(b[:, :rank], pair.b.to(b.dtype))
        scaling = pool.slots.scalings[slot, place.index]
        wide = torch.promote_types(pool.dtype, torch.float32)
        assert scaling == torch.tensor(pair.scaling if pair else 0.0, dtype=wide)


# What lies where


@pytest.mark.parametrize("rank", range(1, 65))
def test_an_adapter_of_any_rank_lies_in_its_slot_padded_with_zeros(rank: int, load: Load) -> None:
    pool, adapter = pool_of(load()), made_adapter(load(), rank, rank, scaling=rank / 3)
    packed = pool.pack(adapter)
    assert packed.rank == -(-rank // 16) * 16
    assert packed.nbytes == packed.rank * pool.numel_per_rank * 8
    pool.load(1, packed)
    assert pool.loaded(1)
    check_slot(pool, 1, adapter)
    assert pool.slots.ranks.tolist() == [0, packed.rank, 0]


def test_linear_maps_lie_in_the_order_of_the_layers_a_before_b(load: Load) -> None:
    pool, adapter = pool_of(load()), made_adapter(load(), 1, 16)
    parts = []
    for layer in range(2):
        for name in LINEARS:
            pair = adapter.pairs[layer, name]
            parts += [pair.a.flatten(), pair.b.flatten()]
    packed = pool.pack(adapter)
    assert torch.equal(packed.data, torch.cat(parts))
    assert [p.index for p in pool.places.values()] == list(range(2 * len(LINEARS)))
    assert sorted(LINEARS) == sorted(PLORA_LINEARS)


RANKS: list[int | dict[str, int]] = [64, 3, 40, {"attention.wo": 64}, {"feed_forward.w2": 1}]


@pytest.mark.parametrize(
    "rank",
    [
        {"attention.wo": 5},
        {"feed_forward.w1": 64, "feed_forward.w3": 1},
        {"attention.wqkv": 1, "attention.wo": 15, "feed_forward.w2": 33},
        {name: 3 * i + 1 for i, name in enumerate(PLORA_LINEARS)},
    ],
)
def test_linear_maps_without_a_pair_or_of_lower_rank_hold_zeros(
    rank: dict[str, int], load: Load
) -> None:
    pool = pool_of(load())
    for slot, layers in enumerate([None, [0], [1]]):
        adapter = made_adapter(load(), slot, rank, scaling=0.25, layers=layers)
        loaded(pool, slot, adapter)
        check_slot(pool, slot, adapter)


def test_nothing_is_left_of_the_adapter_before(load: Load) -> None:
    pool = pool_of(load())
    for seed, rank in enumerate(RANKS):
        adapter = made_adapter(load(), seed, rank, scaling=seed + 0.5)
        loaded(pool, 1, adapter)
        check_slot(pool, 1, adapter)


def test_a_load_leaves_other_slots_alone(load: Load) -> None:
    pool = pool_of(load())
    adapters = [made_adapter(load(), seed, rank) for seed, rank in enumerate([64, 64, 64])]
    for slot in (2, 0, 1):
        loaded(pool, slot, adapters[slot])
    for slot in range(3):
        check_slot(pool, slot, adapters[slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_held_in_the_decoders_dtype_and_scalings_wider(
    dtype: torch.dtype, load: Load
) -> None:
    decoder = load(dtype=torch.float32)
    if dtype is torch.bfloat16:
        decoder = load("2.0", dtype=torch.bfloat16)
    pool, adapter = pool_of(decoder), made_adapter(decoder, 1, scaling=1 / 3)
    packed = pool.pack(adapter)
    assert packed.data.dtype == dtype
    assert packed.scalings.dtype == torch.float32
    loaded(pool, 0, adapter)
    check_slot(pool, 0, adapter)


def test_a_packed_adapter_is_a_copy(load: Load) -> None:
    pool, adapter = pool_of(load()), made_adapter(load(), 1)
    packed = pool.pack(adapter)
    before = packed.data.clone()
    for pair in adapter.pairs.values():
        pair.a.zero_()
        pair.b.zero_()
    assert torch.equal(packed.data, before)


# What is refused


def test_a_rank_above_the_limit_is_refused_even_if_padding_would_hold_it(load: Load) -> None:
    pool = pool_of(load(), max_lora_rank=17)
    loaded(pool, 0, made_adapter(load(), 1, 17))
    with pytest.raises(InvalidRequest) as caught:
        pool.pack(made_adapter(load(), 1, {"attention.wo": 18, "attention.wqkv": 2}))
    assert caught.value.message == (
        "the adapter has rank 18 and this decoder holds ranks up to 17; raise adapters.max_rank"
    )
    assert caught.value.param == "model"


def test_an_engine_without_room_for_adapters_refuses_them(load: Load) -> None:
    adapter = made_adapter(load(), 1)
    room, none = (Engine(load(), EngineConfig(64, 64, max_loras=n)) for n in (1, 0))
    for attempt in (
        lambda: none.pack(adapter),
        lambda: none.add("a", [1], SamplingParams(max_tokens=1), (), room.pack(adapter)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            attempt()
        assert caught.value.message == "this engine has no room for adapters: max_loras is 0"
        assert caught.value.param == "model"
    assert not none.has_work


# What it does to rows

T = 11
IMAGE_ROWS: tuple[ImageRows, ...] = (None, slice(2, 6), torch.tensor([0, 3, 4, 9]))
CASES: dict[str, Segments] = {
    "one row": [(1, 4, 1)],
    "all rows of one": [(2, 0, T)],
    "some without": [(0, 1, 3), (2, 6, 2)],
    "end to end": [(2, 0, 1), (0, 1, 1), (1, 2, 4), (0, 6, 5)],
    "in turns": [(0, 0, 1), (1, 1, 1), (0, 2, 1), (1, 3, 1), (2, 5, 6)],
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def module_of(decoder: Decoder, layer: int, name: str) -> nn.Module:
    return decoder.get_submodule(f"model.layers.{layer}.{name}")


def adapters_of(decoder: Decoder) -> list[Adapter]:
    return [
        made_adapter(decoder, 1, 4, scaling=2.0),
        made_adapter(decoder, 2, {"attention.wo": 20, "feed_forward.w1": 3}, scaling=0.5),
        made_adapter(decoder, 3, 64, scaling=1.5, layers=[1]),
    ]


def filled(decoder: Decoder) -> LoraPool:
    pool = pool_of(decoder)
    for slot, adapter in enumerate(adapters_of(decoder)):
        loaded(pool, slot, adapter)
    return pool


def one_by_one(
    decoder: Decoder, segments: Segments, call: Callable[[Ops], Tensor], num: int = T
) -> Tensor:
    """Each row as it comes out where all rows have its adapter."""
    adapters = adapters_of(decoder)
    of_rows: list[Adapter | None] = [None] * num
    for slot, first, rows in segments:
        of_rows[first : first + rows] = [adapters[slot]] * rows
    results = {
        a and a.digest: call(dense_ops(decoder, a)) for a in {id(a): a for a in of_rows}.values()
    }
    return torch.stack([results[a and a.digest][row] for row, a in enumerate(of_rows)])


@pytest.mark.parametrize("segments", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("rows", IMAGE_ROWS, ids=["no images", "slice", "rows"])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_row_gets_its_adapter_and_no_other(
    segments: Segments, rows: ImageRows, layer: int, load: Load
) -> None:
    decoder = load()
    ops = LoraOps(PLAIN, filled(decoder), segments)
    wqkv, wo, w1, w3, w2 = (module_of(decoder, layer, name) for name in LINEARS)
    inner = numbers(T, decoder.config.decoder.intermediate_size)
    x, residual = numbers(T, 32), numbers(T, 32, seed=1)
    for call in (
        lambda o: o.linear(wqkv, x, rows),
        lambda o: o.linear(w2, inner, rows),
        lambda o: o.linear_add(wo, x, rows, residual.clone()),
        lambda o: o.linear_add(w2, inner, rows, residual.clone()),
        lambda o: o.gated(w1, w3, x, rows),
    ):
        torch.testing.assert_close(call(ops), one_by_one(decoder, segments, call))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=1, max_size=T), st.data())
def test_rows_are_told_apart_in_any_mix(load: Load, slots: list[int], data: st.DataObject) -> None:
    decoder = load()
    segments = [(slot, row, 1) for row, slot in enumerate(slots) if slot >= 0]
    chosen = data.draw(st.lists(st.sampled_from(range(len(slots))), min_size=1, unique=True))
    wanted = [(slots[row], i, 1) for i, row in enumerate(chosen) if slots[row] >= 0]
    ops = LoraOps(PLAIN, filled(decoder), segments, wanted)
    module, x = module_of(decoder, 1, "attention.wo"), numbers(len(slots), 32)
    whole = one_by_one(decoder, segments, lambda o: o.linear(module, x, None), len(slots))
    torch.testing.assert_close(ops.linear(module, x, None), whole)
    rows = torch.tensor(chosen)
    torch.testing.assert_close(ops.of_rows(rows).linear(module, x[rows], None), whole[rows])


def test_rows_that_nobody_goes_on_with_need_no_adapter(load: Load) -> None:
    decoder = load()
    ops = LoraOps(PLAIN, filled(decoder), [(0, 0, 3)], [])
    module, x = module_of(decoder, 0, "attention.wo"), numbers(2, 32)
    narrow = ops.of_rows(torch.tensor([3, 4]))
    assert torch.equal(narrow.linear(module, x, None), PLAIN.linear(module, x, None))


class Told(Ops):
    """Says what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        self.asked.append("norm")
        return super().norm(module, x)

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        self.asked.append("linear")
        return super().linear(module, x, image_rows)

    def head(self, module: nn.Module, x: Tensor, out: Tensor | None = None) -> Tensor:
        self.asked.append("head")
        return super().head(module, x, out)

    def attention(self, *args: Any) -> Tensor:
        self.asked.append("attention")
        return super().attention(*args)


def test_all_else_is_left_to_the_ops_below(load: Load) -> None:
    decoder, told = load(), Told()
    ops = LoraOps(told, filled(decoder), [(0, 0, 2)])
    norm, x = module_of(decoder, 0, "ffn_norm"), numbers(2, 32)
    assert torch.equal(ops.norm(norm, x), norm(x))
    ops.linear(module_of(decoder, 0, "attention.wo"), x, None)
    out = torch.empty(2, 1024, dtype=torch.float64)
    assert ops.head(decoder.output, x, out) is out
    assert torch.equal(out, decoder.output(x))
    packed = numbers(2, 2, 4, 8)
    rope = (torch.ones(2, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64))
    got = ops.attention(lambda _, q, k, v: q, 0, packed, rope)
    assert torch.equal(got, packed[:, :, :2].reshape(2, 4, 8))
    assert told.asked == ["norm", "linear", "head", "attention"]


def test_x_is_not_changed(load: Load) -> None:
    decoder = load()
    ops = LoraOps(PLAIN, filled(decoder), [(0, 0, T)])
    x = numbers(T, 32)
    before = x.clone()
    w1, w3 = (module_of(decoder, 0, f"feed_forward.{name}") for name in ("w1", "w3"))
    ops.gated(w1, w3, x, None)
    assert torch.equal(x, before)


def test_scaling_counts(load: Load) -> None:
    """The same pair at two scalings: the difference to the base is as many times larger."""
    decoder, pool = load(), pool_of(load(), slots=2)
    adapter = made_adapter(decoder, 1, scaling=1.0)
    thrice = {key: replace(pair, scaling=3.0) for key, pair in adapter.pairs.items()}
    loaded(pool, 0, adapter)
    loaded(pool, 1, replace(adapter, pairs=thrice))
    module, x = module_of(decoder, 0, "attention.wqkv"), numbers(1, 32).expand(2, 32)
    base = PLAIN.linear(module, x, None)
    got = LoraOps(PLAIN, pool, [(0, 0, 1), (1, 1, 1)]).linear(module, x, None) - base
    torch.testing.assert_close(got[1], 3 * got[0])
    assert got[0].abs().min() > 1e-6
