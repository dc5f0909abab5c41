"""Kernels run in Triton's interpreter where there is no GPU.

Functions of Triton ask for it when they are defined, its own (`tl.sum`) too, and another library
may have imported Triton by now: those modules are read once more.
"""

import importlib
import os
from importlib.util import find_spec

import torch

if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("triton.language.standard", "triton.language"):
        importlib.reload(importlib.import_module(name))
