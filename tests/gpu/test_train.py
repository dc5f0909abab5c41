"""Training on a GPU: fused operations and variable-length attention against the plain ones.

The CPU siblings are tests/train/test_network.py and test_step.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xc_ray.config import LoraOptions
from xc_ray.model.attention import DenseAttend, VarlenAttend
from xc_ray.model.decoder import Decoder
from xc_ray.train.data import IGNORED
from xc_ray.train.network import (
    FusedLoraOps,
    Learner,
    LoraOps,
    Pack,
    add_lora,
    attention,
    lora_parameters,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # torch's compiler warns of torch's own parts (torch.jit, `.grad` of what is no leaf), and as
    # errors its warnings end the compilation.
    pytest.mark.filterwarnings("default"),
]

VOCAB = 1024
LENGTHS = (70, 130, 64)


def packed(decoder: Decoder, *, pictures: bool) -> tuple[Pack, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCAB, (sum(LENGTHS),), generator=generator)
    rows = None
    if pictures:
        ids[80:120] = torch.arange(VOCAB, VOCAB + 40)
        width = decoder.config.decoder.hidden_size
        rows = torch.randn(40, width, generator=generator).to(decoder.device, decoder.dtype)
    labels = ids.clone()
    starts = [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]
    for start in starts:
        labels[start : start + 12] = IGNORED
    labels[ids >= VOCAB] = IGNORED
    return Pack.of(ids, labels, LENGTHS, [], VOCAB).to(decoder.device), rows


def trained(decoder: Decoder) -> Decoder:
    add_lora(decoder, LoraOptions(rank=8, alpha=16, dropout=0.0), seed=0)
    generator = torch.Generator(device=decoder.device).manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(0, 0.05, generator=generator)
    return decoder


def learnt(
    decoder: Decoder, ops: LoraOps, *, recompute: bool, pictures: bool
) -> tuple[Tensor, Tensor]:
    """The loss and all gradients, on the CPU in float64."""
    pack, rows = packed(decoder, pictures=pictures)
    loss = Learner(decoder, ops, recompute=recompute).train()(pack, rows)
    loss.backward()
    found = []
    for parameter in lora_parameters(decoder).values():
        assert parameter.grad is not None
        found.append(parameter.grad.double().flatten().cpu())
        parameter.grad = None
    return loss.detach().double().cpu(), torch.cat(found)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_operations_are_the_plain_ones(
    decoders: Callable[[str, torch.dtype], Decoder], pictures: bool, recompute: bool
) -> None:
    decoder = trained(decoders("cuda", torch.float32))
    plain, slope = learnt(decoder, LoraOps(), recompute=False, pictures=pictures)
    fused, fused_slope = learnt(decoder, FusedLoraOps(), recompute=recompute, pictures=pictures)
    assert abs(fused / plain - 1) < 1e-5
    assert apart(fused_slope, slope) < 1e-3


@pytest.mark.parametrize("pictures", [False, True])
def test_bf16_is_as_near_to_float32_fused_as_it_is_plain(
    decoders: Callable[[str, torch.dtype], Decoder], pictures: bool
) -> None:
    """The fixture's weights make rounding grow from layer to layer, more than a real model's."""
    exact = trained(decoders("cuda", torch.float32))
    _, slope = learnt(exact, LoraOps(), recompute=False, pictures=pictures)
    half = trained(decoders("cuda", torch.bfloat16))
    _, plain = learnt(half, LoraOps(), recompute=False, pictures=pictures)
    _, fused = learnt(half, FusedLoraOps(), recompute=True, pictures=pictures)
    assert apart(fused, slope) < 1.5 * apart(plain, slope)


def test_one_call_for_all_sequences_is_one_call_each() -> None:
    """Outputs and gradients of grouped heads, against float32."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 64) for heads in (8, 2, 2, 8)]
    q, k, v, upward = (torch.randn(s, device="cuda", generator=generator) for s in shapes)

    def run(attend: VarlenAttend | DenseAttend, dtype: torch.dtype) -> list[Tensor]:
        given = [t.detach().to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        out = attend(0, *given)
        out.backward(upward.to(dtype))
        return [out.detach().float(), *(t.grad.float() for t in given if t.grad is not None)]

    exact = run(DenseAttend(LENGTHS), torch.float32)
    packed = run(VarlenAttend(LENGTHS, q.device), torch.bfloat16)
    assert [apart(*pair) < 0.01 for pair in zip(packed, exact, strict=True)] == [True] * 4


def test_packed_sequences_attend_in_one_call_and_only_to_themselves(
    decoders: Callable[[str, torch.dtype], Decoder],
) -> None:
    decoder = trained(decoders("cuda", torch.bfloat16))
    pack, _ = packed(decoder, pictures=False)
    x = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    assert isinstance(attention(pack.lengths, x), VarlenAttend)
    learner = Learner(decoder, FusedLoraOps(), recompute=False).eval()
    with torch.no_grad():
        together = learner(pack, None)
        alone = torch.zeros((), device="cuda")
        for start, length in zip((0, 70, 200), LENGTHS, strict=True):
            rows = slice(start, start + length)
            labels = torch.full_like(pack.ids, IGNORED)
            labels[pack.wanted + 1] = pack.targets
            one = Pack.of(pack.ids[rows].cpu(), labels[rows].cpu(), [length], [], VOCAB)
            alone += learner(one.to(decoder.device), None)
    torch.testing.assert_close(together, alone, rtol=5e-3, atol=0)


def test_the_head_never_holds_all_logits(decoders: Callable[[str, torch.dtype], Decoder]) -> None:
    """Sixteen times the tokens, and the loss's own memory grows by their hidden states alone."""
    from xc_ray.train.loss import head_loss

    weight = torch.randn(92_544, 256, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for rows in (512, 8192):
        hidden = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(92_544, (rows,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_loss(hidden, weight, targets).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - 2 * hidden.nbytes)
    assert peaks[1] < peaks[0] + (64 << 20)
