"""Who runs this step, with how many tokens: decode first, then prompts within a token budget.

Admission is first come, first served, by cost: a sequence starts once the blocks of all its tokens
but the shared ones are there. When decoding runs out of blocks, the sequence that came last gives
its own up and computes them again later (recomputation, 2309.06180). A sequence whose adapter is
not on the device yet is overtaken by those that need none, or whose adapter is there.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from xc_ray.engine.block_manager import BlockManager, extend_hashes
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.sequence import Sequence, SequenceStatus, Work
from xc_ray.engine.slots import AdapterSlots

# The share of a step's prompt tokens that is kept for prompts behind the oldest, so that a long
# one and short ones both go on.
SHARE_OF_OTHERS = 0.25


@dataclass
class Schedule:
    """The work of one step, decoding sequences first.

    `started` are the sequences that take a lane with it, `missing` images whose embeddings are
    needed now.
    """

    work: list[Work] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    missing: list[tuple[Sequence, tuple[int, ...]]] = field(default_factory=list)


class Scheduler:
    """Holds the waiting and the running sequences, and with them lanes and blocks."""

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, slots: AdapterSlots | None = None
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.slots = slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self._num_added = 0
        self._lanes = list(range(config.max_num_seqs - 1, -1, -1))
        # Blocks that a running prompt will have computed soon: who begins alike waits for them.
        self._coming: dict[bytes, Sequence] = {}

    def add(self, sequence: Sequence) -> tuple[int, ...]:
        """Puts a sequence at the end of the queue; the images that the cache does not cover."""
        sequence.arrival, self._num_added = self._num_added, self._num_added + 1
        self.waiting.append(sequence)
        matched = self.blocks.matching(self._shareable(sequence))
        return _missing(sequence, matched * self.config.block_size)

    @property
    def waiting_prompt_tokens(self) -> int:
        """Tokens of prompts that are not computed, up to the first image that is missing."""
        prompts = (*self.waiting, *(s for s in tuple(self.running) if s.prefilling))
        return sum(_need(sequence) for sequence in prompts)

    def schedule(self) -> Schedule:
        """Plans a step, and takes the blocks and lanes that it needs."""
        plan = Schedule()
        for sequence in tuple(self.running):
            if sequence.status is SequenceStatus.RUNNING and not sequence.prefilling:
                self._decode(sequence, plan)
        self._admit(plan)
        self._prefill(plan)
        return plan

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Takes a sequence out, wherever it stands, and gives its room back.

        With `forget` nobody shares its blocks any more, nor those that it shared itself or gave up
        before: something in them is not sound.
        """
        if forget:
            for name in sequence.block_hashes:
                self.blocks.forget(name)
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def name_blocks(self, sequence: Sequence) -> None:
        """Lets others share the sequence's blocks that are full, computed, checked and known."""
        if sequence.num_unchecked:
            return
        size = self.config.block_size
        hashes = self._hashes(sequence)
        ready = min(len(hashes), sequence.num_computed // size)
        for i in range(sequence.num_named, ready):
            self.blocks.name(sequence.blocks[i], hashes[i])
            if self._coming.get(hashes[i]) is sequence:
                del self._coming[hashes[i]]
        sequence.num_named = max(sequence.num_named, ready)

    def _decode(self, sequence: Sequence, plan: Schedule) -> None:
        if len(sequence.generated) + sequence.in_flight >= sequence.max_generated:
            return  # its last token is on its way
        stop = sequence.num_tokens
        while not self._grow(sequence, stop):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return
        self._plan(sequence, stop, plan, decode=True)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        more = self._blocks_for(num_tokens) - len(sequence.blocks)
        if more <= 0:
            return True
        new = self.blocks.allocate(more)
        if new is None:
            return False
        sequence.blocks += new
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        for name in sequence.block_hashes[sequence.num_named :]:
            if self._coming.get(name) is sequence:
                del self._coming[name]
        self.blocks.free(sequence.blocks)
        if self.slots is not None:
            self.slots.unpin(sequence)
        self._lanes.append(sequence.lane)
        sequence.blocks, sequence.lane = [], -1
        sequence.num_named = sequence.num_shared = 0

    def _admit(self, plan: Schedule) -> None:
        budget = self.config.max_prefill_tokens
        needs = [_need(s) for s in self.running if s.prefilling]
        for sequence in self._with_adapters():
            others = sum(needs[1:])
            if sum(needs) >= budget and others >= budget * SHARE_OF_OTHERS:
                return
            # Until the tokens of its last steps are known it cannot begin anew.
            if sequence.in_flight or not self._lanes or not self._start(sequence):
                return  # nobody overtakes
            if self.waiting[0] is sequence:
                self.waiting.popleft()
            else:
                self.waiting.remove(sequence)
            plan.started.append(sequence)
            if missing := _missing(sequence, sequence.num_computed):
                plan.missing.append((sequence, missing))
            if sequence.prefilling:
                needs.append(_need(sequence))
            else:
                self._plan(sequence, sequence.num_tokens, plan, decode=True)

    def _with_adapters(self) -> list[Sequence]:
        """Waiting sequences, in order, whose adapter is there if they need one."""
        if self.slots is not None:
            # Whether or not a lane is free: adapters load meanwhile, and loads are seen to end.
            self.slots.prepare(self.waiting)
        if not self._lanes:
            return []
        return [s for s in self.waiting if self.slots is None or self.slots.ready(s)]

    def _start(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its blocks and a lane, if they are there."""
        size = self.config.block_size
        hashes = self._shareable(sequence)
        matched = self.blocks.matching(hashes)
        if matched < len(hashes):
            owner = self._coming.get(hashes[matched])
            if owner is not None and (_need(owner) or owner.num_unchecked):
                return False
        shared = self.blocks.share(hashes[:matched])
        wanted = self._blocks_for(sequence.num_tokens) - matched
        # Each running sequence may soon take a block: room for that keeps preemption rare.
        spare = len(self.running)
        new = None
        if self.blocks.num_available >= wanted + spare:
            new = self.blocks.allocate(wanted)
        if new is None:
            self.blocks.free(shared)
            return False
        sequence.blocks = shared + new
        sequence.num_shared = sequence.num_named = matched
        sequence.num_computed = matched * size
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt))
        sequence.lane = self._lanes.pop()
        if self.slots is not None:
            self.slots.pin(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        for name in hashes[matched:]:
            self._coming.setdefault(name, sequence)
        return True

    def _prefill(self, plan: Schedule) -> None:
        """Divides the token budget: the oldest prompt leaves a share to those behind it."""
        waiting = self._readable((s, _need(s)) for s in self.running if s.prefilling)
        if not waiting:
            return
        budget = self.config.max_prefill_tokens
        others = sum(need for _, need in waiting[1:])
        kept = min(others, int(budget * SHARE_OF_OTHERS))
        left = budget
        for i, (sequence, need) in enumerate(waiting):
            tokens = min(need, max(1, left - kept) if i == 0 else left)
            if not tokens:
                return
            left -= tokens
            self._plan(sequence, sequence.num_computed + tokens, plan, decode=False)

    def _readable(self, prompts: Iterable[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Prompts with something to compute, oldest first, whose earlier keys fit a step together.

        Attention of a chunk takes a copy of the keys and values before it. Those that many prompts
        share stand in the cache once, but in the copy once for each.
        """
        found, read = [], 0
        for sequence, need in prompts:
            past = sequence.num_computed
            if not need or read + past > self.config.max_sequence_tokens:
                continue
            found.append((sequence, need))
            read += past
        return found

    def _plan(self, sequence: Sequence, stop: int, plan: Schedule, *, decode: bool) -> None:
        """Adds the places up to `stop`; the device computes steps in order, so they count now."""
        samples = stop == sequence.num_tokens
        sequence.num_unchecked += _holds_images(sequence, stop)
        plan.work.append(Work(sequence, sequence.num_computed, stop, samples, decode))
        sequence.num_computed = stop
        self.name_blocks(sequence)
        if samples:
            sequence.in_flight += 1

    def _shareable(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full blocks that it may find in the cache: its last token is computed."""
        return self._hashes(sequence)[: (sequence.num_tokens - 1) // self.config.block_size]

    def _hashes(self, sequence: Sequence) -> list[bytes]:
        if not self.config.prefix_cache:
            return []
        return extend_hashes(sequence, self.config.block_size)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)


def _need(sequence: Sequence) -> int:
    """Tokens that a prefilling sequence could compute now: up to the first missing image."""
    stop = sequence.num_tokens
    for start, image in zip(sequence.image_starts, sequence.images, strict=True):
        if image.embeddings is None and start + image.num_rows > sequence.num_computed:
            stop = min(stop, start)
    return max(0, stop - sequence.num_computed)


def _holds_images(sequence: Sequence, stop: int) -> bool:
    """Whether there are image rows among the places from its computed ones up to `stop`."""
    return any(
        start < stop and sequence.num_computed < start + image.num_rows
        for start, image in zip(sequence.image_starts, sequence.images, strict=True)
    )


def _missing(sequence: Sequence, num_computed: int) -> tuple[int, ...]:
    """Images with rows from `num_computed` on that have no embeddings and were not asked for."""
    missing = tuple(
        i
        for i, (start, image) in enumerate(zip(sequence.image_starts, sequence.images, strict=True))
        if image.embeddings is None
        and start + image.num_rows > num_computed
        and i not in sequence.asked
    )
    sequence.asked.update(missing)
    return missing
