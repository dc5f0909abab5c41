"""Decode steps as CUDA graphs: capture one a batch size, pad a step to the next, replay.

Launching the kernels of a step one by one costs the host more time than small steps take on the
device; a graph is one launch.
"""

import torch
from torch import Tensor

from xc_ray.engine.runner import Runner

_SMALL = (1, 2, 4, 8, 16, 32)


class DecodeGraphs:
    """Graphs of `Runner.decode` and `Runner.choose` by batch size; largest first, one pool.

    Where there is room for adapters, `decode` has two of each size: steps of rows that use none do
    not pay for them.
    """

    def __init__(self, runner: Runner, max_num_seqs: int) -> None:
        self.runner = runner
        self.sizes = batch_sizes(max_num_seqs)
        device = runner.device
        # What the graphs read: the last rows of a padded batch are the padding lane's.
        self._lanes = torch.full((self.sizes[-1],), runner.padding_lane, device=device)
        self._positions = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        decoder = runner.decoder
        self._logits = torch.empty(
            self.sizes[-1],
            decoder.config.decoder.vocab_size,
            device=device,
            dtype=decoder.dtype,
        )
        self._forwards: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._choices: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def warm_up(self) -> None:
        """Runs every size once, for engines that capture none: kernels compile here.

        Nothing in the cache may be what padding must not overwrite.
        """
        for size in reversed(self.sizes):
            for adapters in self._kinds:
                self._forward(size, adapters)
            self.runner.choose(self._logits[:size], self._lanes[:size], self._positions[:size])

    def capture(self) -> None:
        """Captures all sizes; the cache must hold nothing that padding may not overwrite."""
        pool = None
        for size in reversed(self.sizes):
            lanes, positions = self._lanes[:size], self._positions[:size]
            logits = self._logits[:size]
            for adapters in self._kinds:
                # Kernels compile, and libraries take their workspaces, outside the capture.
                self._forward(size, adapters)
                torch.cuda.synchronize()
                forward = torch.cuda.CUDAGraph()
                with torch.inference_mode(), torch.cuda.graph(forward, pool=pool):
                    self._forward(size, adapters)
                pool = pool or forward.pool()
                self._forwards[size, adapters] = forward
            self.runner.choose(logits, lanes, positions)
            torch.cuda.synchronize()
            choice = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(choice, pool=pool):
                chosen = self.runner.choose(logits, lanes, positions + 1)
            self._choices[size] = choice, chosen

    @property
    def _kinds(self) -> tuple[bool, ...]:
        """Of each size: with adapters, if there is room for any, and without."""
        return (True, False) if self.runner.lora is not None else (False,)

    def _forward(self, size: int, adapters: bool) -> None:
        self.runner.decode(
            self._lanes[:size],
            self._positions[:size],
            self.runner.tables.shape[1],
            out=self._logits[:size],
            adapters=adapters,
        )

    def can_use(self, num_seqs: int) -> bool:
        """Whether a step of so many decoding sequences, and nothing else, has a graph."""
        return bool(self._forwards) and num_seqs <= self.sizes[-1]

    def padded(self, num_seqs: int) -> int:
        """The batch size of the graph that runs `num_seqs`."""
        return next(size for size in self.sizes if size >= num_seqs)

    @torch.inference_mode()
    def logits(self, lanes: Tensor, positions: Tensor, *, adapters: bool = False) -> Tensor:
        """Logits (S, V) of lanes (S,) at positions (S,); valid until the next step.

        `adapters`: whether any of these lanes has one.
        """
        num, size = len(lanes), self.padded(len(lanes))
        self._lanes[:num].copy_(lanes)
        self._positions[:num].copy_(positions)
        if num < size:
            self._lanes[num:size].fill_(self.runner.padding_lane)
            self._positions[num:size].zero_()
        self._forwards[size, adapters].replay()
        return self._logits[:num]

    @torch.inference_mode()
    def choose(self, num_seqs: int) -> Tensor:
        """Chosen ids (S,) of the logits just made; valid until the next step."""
        graph, chosen = self._choices[self.padded(num_seqs)]
        graph.replay()
        return chosen[:num_seqs]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes to capture, ascending: powers of two, then steps of 32, up to `max_num_seqs`."""
    sizes = {*_SMALL, *range(64, max_num_seqs + 32, 32)}
    return sorted({min(size, max_num_seqs) for size in sizes})
