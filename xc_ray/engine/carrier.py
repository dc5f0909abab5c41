"""Large host tensors to the device beside the running steps, through a little pinned memory.

Pinning as much as an adapter takes holds every launch of the process up for 50 to 75 ms (75 MB on
an H200), so that is done once, at the start. A thread fills one buffer while the other travels.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

BUFFER_BYTES = 16 << 20
NUM_BUFFERS = 2


class Carrier:
    """Copies to one GPU on a stream of its own, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            for _ in range(NUM_BUFFERS)
        ]
        self._free = [torch.cuda.Event() for _ in self._buffers]
        self._thread = ThreadPoolExecutor(1, "carrier")

    def start(self, source: Tensor, target: Tensor, then: Callable[[], None]) -> "Future[None]":
        """Copies source (n,) to target (n,) and does `then` on the same stream; done when both are.

        It waits for all that was launched on the caller's stream before.
        """
        before = torch.cuda.Event()
        before.record(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._carry, before, source, target, then)

    @torch.inference_mode()
    def _carry(
        self, before: torch.cuda.Event, source: Tensor, target: Tensor, then: Callable[[], None]
    ) -> None:
        step = BUFFER_BYTES // source.element_size()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            pairs = zip(source.split(step), target.split(step), strict=True)
            for number, (here, there) in enumerate(pairs):
                free = self._free[number % NUM_BUFFERS]
                free.synchronize()
                part = self._buffers[number % NUM_BUFFERS][: here.nbytes].view(here.dtype)
                part.copy_(here)
                there.copy_(part, non_blocking=True)
                free.record()
            then()
            self._stream.synchronize()
