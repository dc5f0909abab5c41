"""What differs from step to step is not compiled into a kernel.

That no step compiles one is seen on a GPU, in tests/gpu/test_engine.py; this is what it rests on.
"""

import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine import kernels as package

# Slices of a step's tensors, which begin anywhere, and numbers of rows.
STEPS = {"lanes", "positions", "slots", "rows", "num", "tiles", "first", "order"}
NAMES = [m.name for m in pkgutil.iter_modules(package.__path__)]


def launched(module: ModuleType) -> set[str]:
    """Kernels that a module launches, by name."""
    return set(re.findall(r"^ +(_\w+)\[.+\]\($", inspect.getsource(module), re.MULTILINE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu looks at what is compiled")
@pytest.mark.parametrize("name", NAMES)
def test_what_steps_differ_in_is_not_specialised(name: str) -> None:
    module = importlib.import_module(f"{package.__name__}.{name}")
    for kernel in launched(module):
        function = getattr(module, kernel)  # Triton's interpreter's
        options = ("do_not_specialize", "do_not_specialize_on_alignment")
        free = {name for option in options for name in function.kwargs[option] or ()}
        assert STEPS & set(function.arg_names) <= free, kernel


def test_the_kernels_that_are_launched_are_found() -> None:
    found = {n: launched(importlib.import_module(f"{package.__name__}.{n}")) for n in NAMES}
    assert found["paged_decode"] == {"_decode", "_join"}
    assert found["low_rank"] == {"_rows_times"}
    assert sum(map(len, found.values())) > 10
