"""AdamW (1711.05101) for a model in bf16: its weights are kept in float32, and rounded for use."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xc_ray.model.weights import published_name

BETAS = (0.9, 0.98)
MODEL = "model."  # names of what is the model, in `network.Student`


class Masters:
    """Float32 copies of a model's parameters, the optimizer's side of them, and their state."""

    def __init__(self, model: nn.Module, *, weight_decay: float) -> None:
        self.names, self.used = zip(*model.named_parameters(), strict=True)
        self.exact: list[Tensor] = [p.detach().float().clone() for p in self.used]
        self.gradients = [torch.zeros_like(exact) for exact in self.exact]
        for exact, gradient in zip(self.exact, self.gradients, strict=True):
            exact.requires_grad_().grad = gradient
        matrices = [p for p in self.exact if p.dim() >= 2]
        others = [p for p in self.exact if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=BETAS,
            fused=self.used[0].is_cuda,
        )

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        """Takes the model's gradients, over all ranks; gives their norm before it was clipped."""
        # None: no row of the batch went through it, as PLoRA's in the last layer.
        new = [torch.zeros_like(u) if u.grad is None else u.grad for u in self.used]
        torch._foreach_copy_(self.gradients, new)
        for used in self.used:
            used.grad = None
        if dist.is_initialized():  # each rank's is of its own samples
            flat = torch.cat([g.flatten() for g in self.gradients])
            dist.all_reduce(flat)
            parts = flat.split([g.numel() for g in self.gradients])
            summed = [p.view_as(g) for p, g in zip(parts, self.gradients, strict=True)]
            torch._foreach_copy_(self.gradients, summed)
        norm = nn.utils.clip_grad_norm_(self.exact, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        torch._foreach_copy_(list(self.used), self.exact)
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a run goes on from, on the CPU: weights exact, the two moments in bf16."""
        state = {}
        for name, exact in zip(self.names, self.exact, strict=True):
            own = self.optimizer.state[exact]
            state[f"weight.{name}"] = exact.detach().cpu()
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key}.{name}"] = own.get(key, torch.zeros_like(exact)).bfloat16().cpu()
        return state

    def published(self) -> dict[str, Tensor]:
        """The model's weights in bf16 as a checkpoint has them."""
        return {
            published_name(name.removeprefix(MODEL)): exact.detach().bfloat16().cpu()
            for name, exact in zip(self.names, self.exact, strict=True)
            if name.startswith(MODEL)
        }

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Goes on from `state` after `step` steps."""
        with torch.no_grad():
            for name, exact in zip(self.names, self.exact, strict=True):
                exact.copy_(state[f"weight.{name}"])
                self.optimizer.state[exact] = {
                    "step": torch.tensor(float(step), device=_step_device(exact)),
                    **{
                        key: state[f"{key}.{name}"].to(exact.device, torch.float32)
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
            torch._foreach_copy_(list(self.used), self.exact)


def _step_device(parameter: Tensor) -> torch.device:
    """Where AdamW wants its counter: beside the parameter if it is fused."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")
