"""The device of a replica and the byte budget that its share of a GPU means."""

import os
from dataclasses import dataclass

import torch

from xc_ray.config import Share
from xc_ray.plan import CONTEXT_BYTES, budget_of


@dataclass(frozen=True)
class Device:
    """`cuda` or `cpu`, the dtype there, and `budget`: bytes that the share declares (0 on CPU)."""

    name: str
    dtype: torch.dtype
    budget: int = 0

    @classmethod
    def of_replica(cls, dtype: str, share: Share) -> "Device":
        """The device for a resolved `num_gpus`: 0 is the CPU, a fraction that part of one GPU."""
        assert share != "auto", "shares are resolved in build()"
        if not share:
            # Ray sets OMP_NUM_THREADS=1 for fractions of a CPU; a small model needs the cores.
            torch.set_num_threads(os.cpu_count() or 1)
            return cls("cpu", _dtype(dtype, torch.float32))
        total = torch.cuda.get_device_properties(0).total_memory
        return cls("cuda", _dtype(dtype, torch.bfloat16), budget_of(share, total))

    @property
    def on_gpu(self) -> bool:
        """Whether the replica has a share of a GPU, and with it a budget."""
        return self.name == "cuda"

    def enforce(self, outside: int = CONTEXT_BYTES) -> None:
        """Makes torch's allocator fail past the budget, less `outside`, which it does not see."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, self.budget - outside) / total)

    def __str__(self) -> str:
        share = f" with {self.budget / 1e9:.1f} GB" if self.on_gpu else ""
        return f"{self.name}{share} in {str(self.dtype).removeprefix('torch.')}"


def _dtype(name: str, default: torch.dtype) -> torch.dtype:
    return default if name == "auto" else getattr(torch, name)
