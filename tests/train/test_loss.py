"""The loss in chunks against its meaning, with its gradient, its memory and its bounds."""

import pytest
import torch
from torch.nn import functional as F

from xc_ray.train.data import IGNORED
from xc_ray.train.loss import head_loss, supervised_loss


def draw(rows: int, vocab: int = 301, width: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 23])
def test_chunks_give_the_loss_and_gradient_of_all_logits_at_once(rows: int) -> None:
    hidden, weight, targets = draw(rows)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = head_loss(ours, weight, targets, chunk_rows=8)
    wanted = F.cross_entropy(plain @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    (loss * 0.37).backward()
    (wanted * 0.37).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_it_is_the_mean_of_the_meaning_times_the_number_of_learnt_tokens() -> None:
    hidden, weight, ids = draw(12)
    labels = ids.clone()
    labels[[0, 1, 5, 6]] = IGNORED
    learnt = (labels[1:] != IGNORED).nonzero().squeeze(1)
    total = head_loss(hidden[learnt], weight, labels[learnt + 1])
    torch.testing.assert_close(
        total / len(learnt), supervised_loss(hidden @ weight.T, labels), check_dtype=False
    )


def test_no_more_than_a_chunk_of_logits_is_ever_held() -> None:
    """Products are watched: with 4,096 rows none has more rows than a chunk."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    hidden, weight, targets = draw(4096, vocab=1000)
    with Watch():
        head_loss(hidden.requires_grad_(), weight, targets, chunk_rows=128).backward()
    assert max(seen) <= 128 * 1000
    assert 128 * 1000 in seen


def test_low_precision_sums_in_float32() -> None:
    hidden, weight, targets = draw(64)
    half = head_loss(hidden.bfloat16(), weight.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half.double(),
        head_loss(hidden.bfloat16().double(), weight.bfloat16().double(), targets),
        rtol=1e-2,
        atol=0,
    )


def test_probabilities_of_low_precision_logits_are_not_rounded_again() -> None:
    hidden, weight, targets = (t.bfloat16() if t.is_floating_point() else t for t in draw(64))
    logits = F.linear(hidden, weight).float()
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(head_loss(hidden, weight, targets), wanted)
