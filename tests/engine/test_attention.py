import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import attention as reference
from xc_ray.demo.make import tiny_config
from xc_ray.engine.attention import PagedAttend, Rows, Span, key_slots, plain_paged_decode
from xc_ray.engine.config import EngineConfig, KVCacheDtype
from xc_ray.engine.kv_cache import KVCache

CONFIG = tiny_config("2.5").decoder
HEADS, KV_HEADS, SIZE = 4, 2, 8
LAYER = 1


def rows_of(length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(length, heads, SIZE, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def cache_of(num_blocks: int, block_size: int, dtype: KVCacheDtype = "auto") -> KVCache:
    limits = EngineConfig(
        10_000, num_blocks * block_size, block_size=block_size, kv_cache_dtype=dtype
    )
    cache = KVCache(CONFIG, limits, device=torch.device("cpu"), dtype=torch.float64)
    if dtype == "auto":
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))  # what an earlier request left behind
    return cache


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4),
    block_size=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_decoding_rows_and_chunks_attend_each_to_its_own_past(
    chunks: list[list[int]], block_size: int, seed: int
) -> None:
    """Each inner list are the chunks of one sequence, one token is decoded like a chunk.

    Step i runs chunk i of all that have one; blocks lie anywhere, lanes in another order.
    """
    lengths = [sum(sizes) for sizes in chunks]
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in lengths]
    cache = cache_of(sum(counts) + 2, block_size)
    places = torch.randperm(sum(counts) + 2, generator=generator)
    lanes = torch.randperm(len(chunks), generator=generator).tolist()
    tables = torch.full((len(chunks), max(counts) + 1), cache.spare, dtype=torch.int32)
    for lane, blocks in zip(lanes, places.split([*counts, 2]), strict=False):
        tables[lane, : len(blocks)] = blocks
    sequences = [rows_of(n, generator) for n in lengths]
    outs: list[list[Tensor]] = [[] for _ in chunks]
    for step in range(max(map(len, chunks))):
        running = [i for i, sizes in enumerate(chunks) if step < len(sizes)]
        past = {i: sum(chunks[i][:step]) for i in running}
        decoding = [i for i in running if past[i] and chunks[i][step] == 1]
        order = [*decoding, *(i for i in running if i not in decoding)]
        positions = {i: torch.arange(past[i], past[i] + chunks[i][step]) for i in order}
        slots = torch.cat(
            [
                tables[lanes[i], positions[i] // block_size] * block_size
                + positions[i] % block_size
                for i in order
            ]
        ).long()
        spans = tuple(
            Span(
                past[i],
                chunks[i][step],
                tables[lanes[i], : -(-(past[i] + chunks[i][step]) // block_size)]
                if past[i]
                else None,
            )
            for i in order[len(decoding) :]
        )
        longest = max((past[i] + 1 for i in decoding), default=0)
        rows = Rows(
            slots,
            len(decoding),
            torch.tensor([lanes[i] for i in decoding], dtype=torch.int64),
            torch.tensor([past[i] for i in decoding], dtype=torch.int64),
            tables,
            -(-longest // block_size),
            spans,
        )
        parts = [[t[positions[i]] for t in sequences[i]] for i in order]
        q, k, v = (torch.cat(t) for t in zip(*parts, strict=True))
        out = PagedAttend(cache, rows)(LAYER, q, k, v)
        for i, part in zip(order, out.split([chunks[i][step] for i in order]), strict=True):
            outs[i].append(part)
    for (q, k, v), ours in zip(sequences, outs, strict=True):
        torch.testing.assert_close(torch.cat(ours), reference.causal_attention(q, k, v))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    block_size=st.integers(1, 5),
    kind=st.sampled_from(["auto", "fp8"]),
    seed=st.integers(0, 5),
)
def test_keys_of_several_sequences_picked_at_once_are_those_read_one_by_one(
    lengths: list[int], block_size: int, kind: KVCacheDtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in lengths]
    cache = cache_of(sum(counts), block_size, kind)
    places = torch.randperm(sum(counts), generator=generator)
    lanes = torch.randperm(len(lengths), generator=generator)
    tables = torch.full((len(lengths), max(counts)), cache.spare, dtype=torch.int32)
    everything = torch.arange(sum(counts) * block_size)
    stored = torch.randn(2, len(everything), KV_HEADS, SIZE, generator=generator).double()
    cache.write(LAYER, everything, *stored)
    for lane, blocks in zip(lanes, places.split(counts), strict=True):
        tables[lane, : len(blocks)] = blocks
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    slots = key_slots(tables, lanes, ends, sum(lengths), block_size)
    read = [
        cache.read(LAYER, tables[lane, :count].long(), length)
        for lane, count, length in zip(lanes, counts, lengths, strict=True)
    ]
    for ours, theirs in zip(cache.pick(LAYER, slots), zip(*read, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=0)


def test_a_first_chunk_reads_nothing_back() -> None:
    """In an 8-bit cache too its own keys are those that it computed."""
    cache = cache_of(4, 4, "fp8")
    q, k, v = rows_of(5, torch.Generator().manual_seed(0))
    nobody = torch.empty(0, dtype=torch.int64)
    tables = torch.arange(2, dtype=torch.int32)[None]
    rows = Rows(torch.arange(5), 0, nobody, nobody, tables, 0, (Span(0, 5, None),))
    out = PagedAttend(cache, rows)(LAYER, q, k, v)
    torch.testing.assert_close(out, reference.causal_attention(q, k, v))


@pytest.mark.parametrize("lengths", [[1], [4, 9, 1], [12, 12]])
def test_one_query_a_sequence_sees_the_first_tokens_of_its_blocks(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(lengths), HEADS, SIZE, dtype=torch.float64, generator=generator)
    keys, values = torch.randn(
        2, len(lengths), 3, 4, KV_HEADS, SIZE, dtype=torch.float64, generator=generator
    )
    out = plain_paged_decode(q, keys, values, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        k, v = (t[i].flatten(0, 1)[:length] for t in (keys, values))
        torch.testing.assert_close(out[i : i + 1], reference.causal_attention(q[i : i + 1], k, v))


def test_what_stands_behind_the_end_counts_for_nothing_whatever_it_is() -> None:
    generator = torch.Generator().manual_seed(1)
    q, keys, values = (
        torch.randn(2, *shape, SIZE, dtype=torch.float64, generator=generator)
        for shape in ((HEADS,), (3, 4, KV_HEADS), (3, 4, KV_HEADS))
    )
    lengths = torch.tensor([3, 9])
    clean = plain_paged_decode(q, keys, values, lengths)
    for value in (float("nan"), float("inf")):
        for tensor in (keys, values):
            for i, length in enumerate(lengths.tolist()):
                tensor[i].flatten(0, 1)[length:] = value
        assert torch.equal(plain_paged_decode(q, keys, values, lengths), clean)
