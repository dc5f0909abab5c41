"""One step of the optimizer over all ranks; every rank makes the same collective calls.

Those are the gradients' (DDP's, in the last pass of the step) and one of the loss. How many passes
a rank has, and what is in them, changes nothing: one without rows makes a pass of two tokens that
counts for nothing. The loss is divided by the learnt tokens of the whole step, which every rank
knows from the plan, so that the number of ranks and of passes does not change it. Everything a step
draws comes from (seed, step, rank): a resumed run needs no state of any generator.
"""

import contextlib
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xc_ray.errors import DataError
from xc_ray.model.config import XComposerConfig
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.train.data import IGNORED
from xc_ray.train.network import Learner, Pack, embed_pictures, lora_parameters
from xc_ray.train.plan import PackRows, Plan
from xc_ray.train.schedule import learning_rate
from xc_ray.train.store import RowStore

SHOWN_ROWS = 20


@dataclass(frozen=True)
class Ranks:
    """This process among all; `control` is a group through the hosts' memories, None if alone."""

    rank: int = 0
    world: int = 1
    control: Any = None


@dataclass(frozen=True)
class Done:
    """A finished step over all ranks; `loss` is per learnt token, `stop` whether anybody asked."""

    loss: float
    grad_norm: float
    learning_rate: float
    conversations: int
    tokens: int
    learnt: int
    stop: bool


class Stepper:
    """The learner's LoRA and its optimizer, step by step; `doing(what, step)` hears of each part.

    Parameters are those of rank 0 on every rank. Without an encoder it takes packs of text alone.
    """

    def __init__(
        self,
        learner: Learner,
        encoder: ImageEncoder | None,
        plan: Plan,
        store: RowStore,
        ranks: Ranks,
        doing: Callable[[str, int], None] = lambda what, step: None,
    ) -> None:
        self.learner, self.encoder, self.plan, self.store = learner, encoder, plan, store
        self.ranks, self.doing = ranks, doing
        self.options = plan.options
        self.device = learner.decoder.device
        self.parameters = list(lora_parameters(learner.decoder).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.parallel: nn.Module = learner
        if ranks.world > 1:
            for parameter in self.parameters:  # the same by their seed; this makes it certain
                dist.broadcast(parameter.data, 0)
            # What is frozen came from the same file: there is nothing to send.
            self.parallel = DistributedDataParallel(
                learner, init_sync=False, gradient_as_bucket_view=True
            )

    def mine(self, step: int) -> list[PackRows]:
        """The rows of this rank's passes."""
        return self.plan.share(self.plan.rows(step), self.ranks.world)[self.ranks.rank]

    def step(self, number: int, packs: Iterator[Pack], *, stop: bool = False) -> Done:
        """Takes this rank's packs of a step, counted from 0, from `packs`.

        Raises:
            DataError: the loss is no number; nothing was changed. Every rank raises it.
        """
        rows = self.plan.rows(number)
        learnt = int(self.plan.sizes.learnt[rows].sum())
        rate = learning_rate(self.options, number, self.plan.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(self.options.seed, number, self.ranks.rank))
        self.optimizer.zero_grad(set_to_none=True)
        total = self._passes(number, packs, learnt)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.doing("exchanging gradients", number)
        loss, stopping = self._sum(total, stop)
        self.doing("updating", number)
        grad_norm = norm.item()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise self._not_finite(number, rows, loss, grad_norm)
        self.optimizer.step()
        tokens = int(self.plan.sizes.tokens[rows].sum())
        return Done(loss / learnt, grad_norm, rate, len(rows), tokens, learnt, stopping > 0)

    def _passes(self, number: int, packs: Iterator[Pack], learnt: int) -> Tensor:
        """Forward and backward of this rank's passes: the sum of their losses."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = len(self.mine(number))
        # DDP divides the sum of the ranks' gradients by their number.
        scale = self.ranks.world / learnt
        for one in range(max(count, 1)):
            self.doing("reading data", number)
            pack = next(packs) if count else empty_pack(self.learner.decoder.config)
            pack = pack.to(self.device)
            self.doing(f"computing pass {one + 1} of {count}", number)
            last = one == max(count, 1) - 1
            with self._alone(last):
                loss: Tensor = self.parallel(pack, self._embed(pack))
                if last:
                    self.doing("exchanging gradients", number)
                (loss * (scale if count else 0.0)).backward()
            if count:
                total += loss.detach()
        return total

    def _embed(self, pack: Pack) -> Tensor | None:
        if not pack.canvases:
            return None
        assert self.encoder is not None, "pictures in a step of text alone"
        return embed_pictures(self.encoder, pack)

    def _alone(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged in the backward of a step's last pass only."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[Any] = self.parallel.no_sync()
        return no_sync

    def _sum(self, total: Tensor, stop: bool) -> tuple[float, float]:
        both = torch.tensor([total.item(), float(stop)], dtype=torch.float64)
        if self.ranks.world > 1:
            dist.all_reduce(both, group=self.ranks.control)
        loss, stopping = both.tolist()
        return loss, stopping

    def _not_finite(self, number: int, rows: list[int], loss: float, norm: float) -> DataError:
        places = ", ".join(str(self.store.place(row)) for row in rows[:SHOWN_ROWS])
        more = f", and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        return DataError(
            f"step {number + 1}: the loss is {loss:g} and the gradients' norm {norm:g}; nothing of "
            f"this step was kept. Its rows: {places}{more}. Lower learning_rate, or look at the "
            "rows"
        )


def empty_pack(config: XComposerConfig) -> Pack:
    """Two tokens of text, for a rank that has no rows in a step."""
    ids = torch.tensor([config.tokens.bos, config.tokens.eos])
    labels = torch.tensor([IGNORED, config.tokens.eos])
    return Pack.of(ids, labels, [2], [], config.decoder.vocab_size)


def step_seed(seed: int, step: int, rank: int) -> int:
    """SplitMix64 of the three: seeds of neighbours are not alike."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank + 1) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def peak_memory(device: torch.device) -> int:
    """Bytes: torch's own on a GPU, the process's on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
