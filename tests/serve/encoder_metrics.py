"""Metrics that also remember what they are told."""

from collections import Counter

from xc_ray.serve.observe import EncoderMetrics


class RecordedEncoderMetrics(EncoderMetrics):
    """`pictures` by result, sizes of `passes`, bytes and evictions of the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: Counter[str] = Counter()
        self.passes: list[int] = []
        self.num_bytes = 0
        self.evictions = 0

    def picture(self, result: str) -> None:
        self.pictures[result] += 1
        super().picture(result)

    def cache_bytes(self, size: int) -> None:
        self.num_bytes = size
        super().cache_bytes(size)

    def evicted(self) -> None:
        self.evictions += 1
        super().evicted()

    def ran(self, num_squares: int, seconds: float) -> None:
        self.passes.append(num_squares)
        super().ran(num_squares, seconds)
