import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import attention as reference
from xc_ray.demo.make import tiny_config
from xc_ray.engine.attention import CachedAttend, Span
from xc_ray.engine.kv_cache import KVCache

CONFIG = tiny_config("2.5").decoder
HEADS, KV_HEADS, SIZE = 4, 2, 8
LAYER = 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3))
def test_chunks_of_several_sequences_attend_each_to_its_own_past(chunks: list[list[int]]) -> None:
    """Each inner list are the chunks of one sequence; step i runs chunk i of all that have one."""
    lengths = [sum(sizes) for sizes in chunks]
    cache = KVCache(CONFIG, sum(lengths) + 7, device=torch.device("cpu"), dtype=torch.float64)
    cache.keys.fill_(9)
    cache.values.fill_(9)  # what an earlier request left behind
    starts = [3 + sum(lengths[:i]) for i in range(len(lengths))]
    generator = torch.Generator().manual_seed(0)
    rows = [
        tuple(
            torch.randn(n, heads, SIZE, dtype=torch.float64, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for n in lengths
    ]
    outs: list[list[torch.Tensor]] = [[] for _ in chunks]
    for step in range(max(map(len, chunks))):
        running = [i for i, sizes in enumerate(chunks) if step < len(sizes)]
        spans = [Span(starts[i], sum(chunks[i][:step]), chunks[i][step]) for i in running]
        slots = [s.start + s.num_past + j for s in spans for j in range(s.num_new)]
        parts = [
            [t[s.num_past : s.num_past + s.num_new] for t in rows[i]]
            for i, s in zip(running, spans, strict=True)
        ]
        q, k, v = (torch.cat(t) for t in zip(*parts, strict=True))
        out = CachedAttend(cache, spans, torch.tensor(slots))(LAYER, q, k, v)
        for i, part in zip(running, out.split([s.num_new for s in spans]), strict=True):
            outs[i].append(part)
    for (q, k, v), ours in zip(rows, outs, strict=True):
        torch.testing.assert_close(torch.cat(ours), reference.causal_attention(q, k, v))
