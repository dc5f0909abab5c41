"""`pytorch_model*.bin`: tensors out of a pickle, and nothing else."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from xc_ray.errors import CheckpointError


def load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, memory-mapped; no code of the pickle runs.

    Raises:
        CheckpointError: it holds anything but named tensors.
    """
    try:
        state = torch.load(
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
        )
    except Exception as e:  # noqa: BLE001 - the unpickler raises whatever the file makes it raise
        raise CheckpointError(
            f"{path} is not a file of plain tensors: {(str(e) or type(e).__name__).splitlines()[0]}"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
    ):
        raise CheckpointError(f"{path} holds something other than named tensors")
    return state
