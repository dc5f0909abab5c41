"""The loss over learnt tokens: its meaning, and a form that never holds all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xc_ray.train.data import IGNORED

# Rows of logits at a time: 512 × 92,544 in float32 are 190 MB, and the product still fills a GPU.
CHUNK_ROWS = 512


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the learnt next tokens: logits (T, V), labels (T,) -> scalar.

    The flat batch may hold several conversations: the first position of each is BOS or a picture
    and never learnt, so that nothing is predicted across a border.
    """
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED)


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum of the cross entropies of `weight` (V, C) over hidden states (S, C), targets (S,).

    The head is frozen, so that the gradient of the hidden states is all that the backward pass
    needs: it is computed with the loss, a chunk at a time, and no logits stay.
    """
    result: Tensor = _HeadLoss.apply(hidden, weight, targets, chunk_rows)  # type: ignore[no-untyped-call]  # torch's
    return result


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight).to(wide)  # (n, V)
            wanted = targets[rows, None]
            norms = logits.logsumexp(-1, keepdim=True)  # (n, 1)
            total += (norms - logits.gather(1, wanted)).sum()
            if gradient is not None:
                slope = logits.sub_(norms).exp_()  # softmax, then less 1 at the target
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
                torch.mm(slope.to(weight.dtype), weight, out=gradient[rows])
                del slope
            del logits  # before the next are made
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype), None, None, None
