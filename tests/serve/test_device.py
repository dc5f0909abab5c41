"""The device of a replica, and the bytes that its share of a GPU means."""

from types import SimpleNamespace

import pytest
import torch

from xc_ray.plan import CONTEXT_BYTES
from xc_ray.serve.device import Device

CARD = 24_000_000_000


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU of 24 GB; gives the memory fractions that were set."""
    fractions: list[float] = []
    memory = SimpleNamespace(total_memory=CARD)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    return fractions


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_share_of_nothing_is_the_cpu_in_float32(name: str, dtype: torch.dtype) -> None:
    device = Device.of_replica(name, 0.0)
    assert device == Device("cpu", dtype, 0)
    assert not device.on_gpu
    assert str(device) == f"cpu in {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize(
    ("share", "budget"),
    [(0.25, CARD // 4), (0.85, CARD * 85 // 100), (1.0, CARD * 98 // 100), (2.0, CARD * 98 // 100)],
    ids=str,
)
def test_a_share_is_a_budget_of_one_card(card: list[float], share: float, budget: int) -> None:
    device = Device.of_replica("auto", share)
    assert device == Device("cuda", torch.bfloat16, budget)
    assert device.on_gpu
    assert str(device) == f"cuda with {budget / 1e9:.1f} GB in bfloat16"


def test_the_budget_is_enforced_less_what_the_allocator_does_not_see(card: list[float]) -> None:
    Device.of_replica("float16", 0.5).enforce()
    Device.of_replica("float16", 0.5).enforce(10**9)
    assert card == [(CARD / 2 - CONTEXT_BYTES) / CARD, (CARD / 2 - 10**9) / CARD]


def test_a_budget_below_that_leaves_nothing(card: list[float]) -> None:
    Device("cuda", torch.bfloat16, CONTEXT_BYTES // 2).enforce()
    assert card == [0.0]
