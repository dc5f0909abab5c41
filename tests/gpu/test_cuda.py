"""The same model on a GPU: equal to the CPU in fp32, close in bf16, within bounds of memory.

The CPU siblings of these tests are in tests/engine and tests/model.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import SamplingParams
from xc_ray.model.attention import causal_attention
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tiles import image_canvas, open_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def canvas(checkpoint: Checkpoint, data: bytes) -> torch.Tensor:
    return torch.from_numpy(image_canvas(checkpoint.config, open_image(data), 4).copy())


def greedy(
    engine: Engine, requests: dict[str, tuple[list[int], list[torch.Tensor]]]
) -> dict[str, list[int]]:
    for name, (ids, embeddings) in requests.items():
        engine.add(name, ids, SamplingParams(max_tokens=24, temperature=0.0), embeddings)
    answers: dict[str, list[int]] = {name: [] for name in requests}
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.ids
    return answers


@pytest.mark.parametrize("variant", list(FAMILIES))
def test_fp32_answers_on_the_gpu_are_those_of_the_cpu(
    variant: Variant, tiny: Callable[..., Path], picture: Callable[..., bytes]
):
    checkpoint = Checkpoint.open(tiny(variant))
    answers = []
    for device in ("cpu", "cuda"):
        model = checkpoint.load(device=device)
        with torch.inference_mode():
            embeddings = model.vision([canvas(checkpoint, picture(200, 120))])[0]
        vocab = model.config.decoder.vocab_size
        rows = list(range(vocab, vocab + len(embeddings)))
        requests = {
            "picture": ([1, 4, 9, *rows, 30, 31], [embeddings]),
            "text": ([1, *range(20, 90)], []),
            "short": ([1, 5], []),
        }
        engine = Engine(model.decoder, EngineConfig(512, 4096, 4, max_prefill_tokens=16))
        answers.append(greedy(engine, requests))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("variant", list(FAMILIES))
def test_embeddings_on_the_gpu_are_close_to_the_cpu(
    variant: Variant, tiny: Callable[..., Path], picture: Callable[..., bytes]
):
    checkpoint = Checkpoint.open(tiny(variant))
    tile = canvas(checkpoint, picture(200, 120))
    with torch.inference_mode():
        want = checkpoint.load_vision()([tile])[0]
        fp32 = checkpoint.load_vision(device="cuda")([tile])[0].cpu()
        bf16 = checkpoint.load_vision(device="cuda", dtype=torch.bfloat16)([tile])[0].cpu().float()
    assert (fp32 - want).abs().max() < 1e-4
    assert (bf16 - want).abs().max() < 0.15
    assert (bf16 - want).abs().mean() < 0.02


def test_bf16_logits_are_close_to_fp32(tiny: Callable[..., Path]):
    checkpoint = Checkpoint.open(tiny("2.5"))
    ids = torch.arange(20, 120)
    logits = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = checkpoint.load(device=device, dtype=dtype)
        with torch.inference_mode():
            hidden = model(ids.to(device), [len(ids)])
            logits.append(model.decoder.logits(hidden).cpu())
    assert (logits[0] - logits[1]).abs().mean() < 0.05


def test_a_late_chunk_of_a_long_prompt_needs_no_score_matrix():
    q = torch.randn(2048, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(16384, 8, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = causal_attention(q, k, v)
    # 32 heads × 2,048 × 16,384 scores would be 2 GB in bf16 alone.
    assert torch.cuda.max_memory_allocated() - before < 300e6
    last = causal_attention(q[-64:], k, v)
    assert torch.allclose(out[-64:].float(), last.float(), atol=2e-2)
    first = causal_attention(q[:64], k[: 16384 - 2048 + 64], v[: 16384 - 2048 + 64])
    assert torch.allclose(out[:64].float(), first.float(), atol=2e-2)
