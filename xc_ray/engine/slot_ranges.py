"""Which range of the cache's slots belongs to which sequence; no torch."""


class SlotRanges:
    """First-fit allocation of contiguous ranges; neighbours merge when freed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)]  # (start, length), by start, never adjacent

    @property
    def num_free(self) -> int:
        """Free slots of all ranges together; the longest one range may be shorter."""
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int | None:
        """Start of a free range of `length` slots, None if no range is that long."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Gives a range back, exactly as allocated."""
        ranges = sorted([*self._free, (start, length)])
        merged: list[tuple[int, int]] = []
        for at, size in ranges:
            if merged and sum(merged[-1]) >= at:
                assert sum(merged[-1]) == at, "a range was freed twice"
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((at, size))
        self._free = merged
