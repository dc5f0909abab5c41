"""The engine on a GPU: graph equals eager, overlap changes nothing, bf16 stays near fp32.

The CPU siblings of these tests are in tests/engine; kernels are in tests/engine/kernels.
"""

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.gpu.test_adapters import adapter
from xc_ray.engine import kernels as package
from xc_ray.engine.config import EngineConfig, KVCacheDtype
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import FinishReason, Image, SamplingParams
from xc_ray.model.attention import DenseAttend
from xc_ray.model.xcomposer import packed_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("tiles"),
]

LIMITS = EngineConfig(512, 4096, 6, max_prefill_tokens=48, block_size=16)
VOCAB = 1024
FP8_ERROR = 0.2


def requests(count: int = 9) -> dict[str, tuple[list[int], int, int]]:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 150, (count,), generator=generator).tolist()
    return {
        str(i): (torch.randint(3, VOCAB, (n,), generator=generator).tolist(), 5 + 3 * i, i % 3)
        for i, n in enumerate(sizes)
    }


def params_of(max_tokens: int, *, sampled: bool) -> SamplingParams:
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=7)
    if not sampled:
        return greedy
    return replace(greedy, temperature=0.8, top_p=0.9, repetition_penalty=1.1)


def answers(engine: Engine, *, sampled: bool, with_images: bool = True) -> dict[str, list[int]]:
    """All requests at once, some with an image: ids of each."""
    width = engine.decoder.config.decoder.hidden_size
    for name, (ids, length, kind) in requests().items():
        images = []
        if kind == 1 and with_images:
            rows = torch.randn(40, width, generator=torch.Generator().manual_seed(len(ids)))
            images = [Image(40, bytes([len(ids)]), rows.to(engine.decoder.dtype))]
            ids = [*ids[:3], *range(VOCAB, VOCAB + 40), *ids[3:]]
        engine.add(name, ids, params_of(length, sampled=sampled and kind > 0), images)
    got: dict[str, list[int]] = {name: [] for name in requests()}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            got[output.request_id] += output.ids
    assert engine.kv_usage == 0
    return got


@pytest.mark.parametrize("sampled", [False, True])
def test_fp32_tokens_are_those_of_the_cpu(decoders, sampled: bool):
    cpu = answers(Engine(decoders("cpu", torch.float32), LIMITS), sampled=sampled)
    gpu = answers(Engine(decoders("cuda", torch.float32), LIMITS), sampled=sampled)
    # Sums in another order may turn a near tie: whole answers agree but for one in nine.
    assert sum(cpu[n] == gpu[n] for n in cpu) >= len(cpu) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampled", [False, True])
def test_graphs_change_nothing(decoders, dtype: torch.dtype, sampled: bool):
    decoder = decoders("cuda", dtype)
    # Batches of the sizes that are captured, so that both run the same kernels on the same rows.
    limits = replace(LIMITS, overlap=False)
    with_graphs = Engine(decoder, limits)
    eager = Engine(decoder, replace(limits, cuda_graphs=False))
    for count in (1, 2, 4):
        got = []
        for engine in (with_graphs, eager):
            for name, (ids, _, kind) in list(requests().items())[:count]:
                engine.add(name, ids[:16], params_of(20, sampled=sampled and kind > 0))
            answer: dict[str, list[int]] = {}
            while engine.has_work:
                for output in engine.step():
                    answer.setdefault(output.request_id, []).extend(output.ids)
            got.append(answer)
        assert got[0] == got[1]


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_logits_of_a_graph_are_those_of_the_eager_step_to_the_bit(decoders, size: int):
    engine = Engine(decoders("cuda", torch.bfloat16), LIMITS)
    runner, graphs = engine._runner, engine._graphs
    assert graphs is not None
    runner.tables[:size] = torch.arange(size * 32, device="cuda").view(size, 32).int()
    runner.cache.keys.normal_(generator=torch.Generator("cuda").manual_seed(1))
    runner.cache.values.normal_(generator=torch.Generator("cuda").manual_seed(2))
    runner.last[:size] = torch.arange(5, 5 + size, device="cuda")
    lanes = torch.arange(size, device="cuda")
    positions = torch.tensor([3, 100, 511, 16, 15, 64], device="cuda")[:size]
    captured = graphs.logits(lanes, positions).clone()
    eager = runner.decode(lanes, positions, runner.tables.shape[1])
    assert torch.equal(captured, eager)


def test_overlap_and_prefix_cache_change_no_greedy_token(decoders):
    decoder = decoders("cuda", torch.float32)
    base = answers(Engine(decoder, LIMITS), sampled=False)
    for change in ({"overlap": False}, {"prefix_cache": False}, {"max_prefill_tokens": 512}):
        other = answers(Engine(decoder, replace(LIMITS, **change)), sampled=False)
        assert sum(base[n] == other[n] for n in base) >= len(base) - 1


def test_a_second_turn_finds_the_first_in_the_cache(decoders):
    engine = Engine(decoders("cuda", torch.bfloat16), LIMITS)
    ids = list(range(5, 105))
    for extra, cached in (([], 0), ([7, 8, 9], 96)):
        engine.add("r", [*ids, *extra], SamplingParams(max_tokens=3, temperature=0.0))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert outputs[-1].num_cached == cached


def test_bad_embeddings_end_their_request_alone(decoders):
    engine = Engine(decoders("cuda", torch.bfloat16), LIMITS)
    rows = torch.full((40, 256), float("nan"), dtype=torch.bfloat16)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    engine.add("bad", [1, *range(VOCAB, VOCAB + 40), 2], params, [Image(40, b"x", rows)])
    engine.add("good", [1, 2, 3], params)
    ends = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                ends[output.request_id] = output.finish_reason
    assert ends == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH}
    assert engine.failure is None


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_bf16_logits_are_within_their_tolerance_of_fp32(
    decoders, kv: KVCacheDtype, monkeypatch: pytest.MonkeyPatch
):
    """An fp32 model of the same bf16 weights is the reference.

    What bf16 itself costs is the error of the plain dense forward pass in bf16. The engine rounds
    at the same places or fewer, in other sums, so its error is another draw of the same size: half
    as much again bounds it. An fp8 cache adds a relative error of up to 2^-4 to each number of keys
    and values; FP8_ERROR only says that the logits are still these logits. A tighter bound, for the
    tiny model, is in tests/engine/test_runner.py.
    """
    half = decoders("cuda", torch.bfloat16)
    exact = decoders("cuda", torch.float32)
    exact.load_state_dict(half.state_dict())
    limits = replace(LIMITS, kv_cache_dtype=kv)
    engines = [Engine(half, limits), Engine(exact, replace(LIMITS))]
    ids = torch.randint(3, VOCAB, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    seen: list[torch.Tensor] = []
    for engine in engines:
        rows: list[torch.Tensor] = []
        engine.add("r", ids, SamplingParams(max_tokens=2, temperature=0.0))
        original = engine._choose

        def spy(sampling, logits, *rest, original=original, rows=rows):
            rows.append(logits.float().clone())
            return original(sampling, logits, *rest)

        monkeypatch.setattr(engine, "_choose", spy)
        while not rows:
            engine.step()
        seen.append(rows[0][0])
    with torch.inference_mode():
        x, _ = half.embed(torch.tensor(ids, device="cuda"))
        rope = packed_rope(half.config, [200], x.device)
        plain = half.logits(half(x, rope, DenseAttend([200])))[-1]
    rounding = relative(plain, seen[1])
    error = relative(seen[0], seen[1])
    bound = 1.5 * rounding if kv == "auto" else FP8_ERROR
    assert error < bound, f"{error} of the engine, {rounding} of bf16 itself"


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def kernels() -> list[Any]:
    """Triton's functions of all the engine's kernels."""
    triton = pytest.importorskip("triton")
    names = [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]
    functions = [f for name in names for f in vars(importlib.import_module(name)).values()]
    return list({id(f): f for f in functions if isinstance(f, triton.JITFunction)}.values())


def binaries() -> set[str]:
    """What has been compiled, or read from Triton's cache on the disk, in this process."""
    return {
        f"{kernel.__name__}: {key}"
        for kernel in kernels()
        for compiled, *_ in kernel.device_caches.values()
        for key in compiled
    }


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_no_step_compiles_a_kernel_that_start_up_did_not(decoders, *, graphs: bool):
    """Steps of every mix: chunks beside any number of decoding rows, pictures, adapters."""
    for kernel in kernels():
        kernel.device_caches.clear()  # of the engines before this one
    limits = EngineConfig(
        512, 24_576, 96, max_prefill_tokens=300, block_size=16, cuda_graphs=graphs, max_loras=2
    )
    engine = Engine(decoders("cuda", torch.bfloat16), limits)
    ready = binaries()
    assert any("_decode" in name for name in ready)
    packed = [engine.pack(adapter(engine.decoder.config, i)) for i in range(2)]
    generator = torch.Generator().manual_seed(11)
    ends = 0
    for step in range(400):
        for i in range(int(torch.randint(0, 3, (1,), generator=generator)) if step < 250 else 0):
            size, length, kind = torch.randint(1, 120, (3,), generator=generator).tolist()
            ids = torch.randint(3, VOCAB, (size,), generator=generator).tolist()
            images = []
            for n in (40, 7)[: kind % 3]:
                rows = torch.randn(n, 256, generator=generator).to(torch.bfloat16)
                images.append(Image(n, bytes([step % 256, i, n]), rows))
                first = VOCAB + 40 * (len(images) - 1)
                ids += [*range(first, first + n), 5]
            own = (None, None, *packed)[kind % 4]
            sampled = params_of(length, sampled=step % 2 == 0)
            if kind % 5 == 0:
                sampled = replace(sampled, logprobs=3, logit_bias=((7, 1.5),))
            engine.add(f"{step} {i}", ids, sampled, images, own)
        outputs = engine.step()
        assert not [o.error for o in outputs if o.error]
        ends += sum(o.finish_reason is not None for o in outputs)
    assert ends > 200
    assert sorted(binaries() - ready) == []
