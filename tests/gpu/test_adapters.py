"""Adapters on a GPU: graph equals eager, tokens are the CPU's, bf16 stays near fp32.

The CPU siblings of these tests are tests/engine/test_lora.py and tests/engine/test_slots.py.
"""

from dataclasses import replace

import pytest
import torch

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import LINEARS
from xc_ray.engine.sequence import Image, SamplingParams
from xc_ray.model.adapter import Adapter, LoraPair
from xc_ray.model.config import XComposerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("tiles"),
]

VOCAB = 1024
RANKS = (8, 16, 33, 64)
LIMITS = EngineConfig(
    512, 4096, 8, max_prefill_tokens=96, block_size=16, max_loras=len(RANKS), max_lora_rank=64
)


def adapter(config: XComposerConfig, number: int) -> Adapter:
    """One of the ranks above, on four of the five linear maps or on all."""
    generator = torch.Generator().manual_seed(number)
    rank = RANKS[number]
    pairs = {
        (layer, name): LoraPair(
            torch.randn(rank, config.linear_shapes[name][1], generator=generator) * 0.3,
            torch.randn(config.linear_shapes[name][0], rank, generator=generator) * 0.3,
            0.5 / rank,
        )
        for layer in range(config.decoder.num_hidden_layers)
        for name in LINEARS[number % 2 :]
    }
    return Adapter(f"adapter {number}", rank, pairs)


def answers(
    engine: Engine, count: int, *, adapters: bool = True, at_once: bool = True
) -> list[list[int]]:
    """Greedy answers to `count` prompts; number i uses adapter i mod 5, the fifth is the base."""
    packed = [engine.pack(adapter(engine.decoder.config, i)) for i in range(len(RANKS))]
    generator = torch.Generator().manual_seed(3)
    got: dict[str, list[int]] = {}
    for i in range(count):
        size = int(torch.randint(1, 120, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (size,), generator=generator).tolist()
        images = []
        if i % 3 == 1:
            rows = torch.randn(40, engine.decoder.config.decoder.hidden_size, generator=generator)
            images = [Image(40, bytes([i]), rows.to(engine.decoder.dtype))]
            ids = [*ids[:3], *range(VOCAB, VOCAB + 40), *ids[3:]]
        params = SamplingParams(max_tokens=6 + 3 * i, temperature=0)
        own = packed[i % 5] if adapters and i % 5 < len(RANKS) else None
        engine.add(str(i), ids, params, images, own)
        got[str(i)] = []
        if not at_once:
            collect(engine, got)
    collect(engine, got)
    return list(got.values())


def collect(engine: Engine, got: dict[str, list[int]]) -> None:
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            got[output.request_id] += output.ids


def test_fp32_tokens_are_those_of_the_cpu(decoders):
    cpu = answers(Engine(decoders("cpu", torch.float32), LIMITS), 12)
    gpu = answers(Engine(decoders("cuda", torch.float32), LIMITS), 12)
    base = answers(Engine(decoders("cuda", torch.float32), LIMITS), 12, adapters=False)
    # Sums in another order may turn a near tie.
    assert sum(a == b for a, b in zip(cpu, gpu, strict=True)) >= 11
    assert sum(a == b for a, b in zip(base, gpu, strict=True)) <= 4  # adapters do change answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_change_nothing(decoders, dtype: torch.dtype):
    decoder = decoders("cuda", dtype)
    limits = replace(LIMITS, overlap=False)
    eager = answers(Engine(decoder, replace(limits, cuda_graphs=False)), 4)
    assert answers(Engine(decoder, limits), 4) == eager


def test_overlap_changes_nothing(decoders):
    decoder = decoders("cuda", torch.bfloat16)
    limits = replace(LIMITS, max_num_seqs=4)
    assert answers(Engine(decoder, limits), 4) == answers(
        Engine(decoder, replace(limits, overlap=False)), 4
    )


def test_fewer_slots_than_adapters_give_the_same_answers(decoders):
    decoder = decoders("cuda", torch.float32)
    all_there = answers(Engine(decoder, LIMITS), 12)
    engine = Engine(decoder, replace(LIMITS, max_loras=2))
    assert sum(a == b for a, b in zip(answers(engine, 12), all_there, strict=True)) >= 11
    assert engine.adapter_stats.num_evictions > 0


def test_bf16_tokens_alone_and_in_a_batch_mostly_agree(decoders):
    decoder = decoders("cuda", torch.bfloat16)
    alone = answers(Engine(decoder, LIMITS), 8, at_once=False)
    batch = answers(Engine(decoder, LIMITS), 8)
    # Products of another number of rows round otherwise; a wrong adapter changes all answers.
    firsts = [a[:3] == b[:3] for a, b in zip(alone, batch, strict=True)]
    assert sum(firsts) >= 6


def test_a_load_waits_for_the_steps_that_read_the_slot(decoders):
    decoder = decoders("cuda", torch.float32)
    engine = Engine(decoder, replace(LIMITS, max_loras=1))
    packed = [engine.pack(adapter(decoder.config, i)) for i in range(3)]
    for round_ in range(4):
        for i, one in enumerate(packed):
            params = SamplingParams(max_tokens=9, temperature=0)
            engine.add(f"{round_} {i}", [5, 6, 7 + i], params, adapter=one)
    got: dict[str, list[int]] = {f"{r} {i}": [] for r in range(4) for i in range(3)}
    collect(engine, got)
    for i in range(3):
        assert len({tuple(got[f"{r} {i}"]) for r in range(4)}) == 1
