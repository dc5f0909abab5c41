"""Metrics of a decoder that also remember what they are told."""

from xc_ray.serve.observe import DecoderMetrics


class RecordedDecoderMetrics(DecoderMetrics):
    """`steps` as (sequences, tokens prefilled), the engine's `states`, and who waited."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []
        self.seconds = 0.0
        self.states: list[tuple[float, int, int, int]] = []
        self.waiting: list[int] = []
        self.waits: list[float] = []

    def step(self, num_sequences: int, num_prefilled: int, seconds: float) -> None:
        self.steps.append((num_sequences, num_prefilled))
        self.seconds += seconds
        super().step(num_sequences, num_prefilled, seconds)

    def state(self, kv_use: float, running: int, waiting: int, preemptions: int) -> None:
        self.states.append((kv_use, running, waiting, preemptions))
        super().state(kv_use, running, waiting, preemptions)

    def queued(self, num_sequences: int) -> None:
        self.waiting.append(num_sequences)
        super().queued(num_sequences)

    def let_in(self, seconds: float) -> None:
        self.waits.append(seconds)
        super().let_in(seconds)
