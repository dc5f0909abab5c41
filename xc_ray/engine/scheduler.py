"""Who runs this step, with how many tokens: decode first, then prompts in order of arrival."""

from collections import deque

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.sequence import Sequence, SequenceStatus, Work
from xc_ray.engine.slot_ranges import SlotRanges


class Scheduler:
    """First come, first served: a request starts once its whole prompt and answer fit the cache."""

    def __init__(self, config: EngineConfig, ranges: SlotRanges) -> None:
        self.config = config
        self.ranges = ranges
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._lanes = list(range(config.max_num_seqs - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Work], list[Sequence]]:
        """The work of one step, and the sequences that start with it."""
        started = self._admit()
        work = [Work(s, s.next_ids(1)) for s in self.running if not s.prefilling]
        budget = self.config.max_prefill_tokens
        for sequence in self.running:
            if sequence.prefilling and budget > 0:
                ids = sequence.next_ids(budget)
                budget -= len(ids)
                work.append(Work(sequence, ids))
        return work, started

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands, and gives its room back."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self.ranges.free(sequence.start, sequence.rope_length)
            self._lanes.append(sequence.lane)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _admit(self) -> list[Sequence]:
        started = []
        while self.waiting and self._lanes:
            sequence = self.waiting[0]
            start = self.ranges.allocate(sequence.rope_length)
            if start is None:
                break  # nobody overtakes: a long prompt is not starved by short ones
            self.waiting.popleft()
            sequence.start, sequence.lane = start, self._lanes.pop()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            started.append(sequence)
        return started
