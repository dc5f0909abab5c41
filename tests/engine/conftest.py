from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xc_ray.model.config import Variant
from xc_ray.model.decoder import Decoder
from xc_ray.model.weights import Checkpoint


@pytest.fixture(scope="session")
def load(tiny: Callable[[Variant], Path]) -> Callable[..., Decoder]:
    """A function that gives a variant's decoder, in float64 unless told; nobody may change it."""
    made: dict[tuple[Variant, torch.dtype], Decoder] = {}

    def decoder(variant: Variant = "2.5", dtype: torch.dtype = torch.float64) -> Decoder:
        if (variant, dtype) not in made:
            made[variant, dtype] = Checkpoint.open(tiny(variant)).load_decoder(dtype=dtype)
        return made[variant, dtype]

    return decoder
