"""Host tensors on their way to a GPU in parts; smaller ones travel in test_adapters.py."""

from functools import partial

import pytest
import torch

from xc_ray.engine import carrier
from xc_ray.engine.carrier import Carrier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_parts_arrive_whole_and_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "BUFFER_BYTES", 1024)
    device = torch.device("cuda", 0)
    to_gpu = Carrier(device)
    sources = [torch.randn(n).to(torch.bfloat16) for n in (1, 512, 513, 10_000)]
    targets = [torch.zeros_like(s, device=device) for s in sources]
    after: list[int] = []
    copies = [
        to_gpu.start(s, t, partial(after.append, len(s)))
        for s, t in zip(sources, targets, strict=True)
    ]
    for copy, source, target in zip(copies, sources, targets, strict=True):
        copy.result()
        assert torch.equal(target.cpu(), source)
    assert after == [1, 512, 513, 10_000]
