"""Which adapter is in which device slot: load, pin, evict by last use; plain data, no torch.

A slot holds one adapter. It is pinned by the running sequences that use it, and given to another
adapter once nobody does. Sequences whose adapter is not there wait, and others may overtake them;
so that they wait for a bounded time, the slot used longest ago takes no sequence that came later
until the first of them has had it.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from xc_ray.engine.sequence import Sequence

logger = logging.getLogger(__name__)

# With more adapters in use than slots each load throws out what is needed again. Loads of adapters
# that were thrown out less than this before are counted, and tell of it at most this often.
THRASH_S = 10.0


@dataclass
class SlotStats:
    """Counts since the start: adapters loaded, thrown out, and loaded again within `THRASH_S`."""

    num_loads: int = 0
    num_evictions: int = 0
    num_reloads: int = 0


@dataclass
class _Slot:
    digest: str | None = None  # the host copy belongs to those who use it
    pins: int = 0
    last_use: int = 0  # when it was loaded, a sequence with it started, or the last one left
    loaded: bool = False


class AdapterSlots:
    """The slots of one engine; `load` starts a copy into a slot, `loaded` says whether it ended."""

    def __init__(
        self,
        num_slots: int,
        load: Callable[[int, Any], None],
        loaded: Callable[[int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = SlotStats()
        self._slots = [_Slot() for _ in range(num_slots)]
        self._by_digest: dict[str, int] = {}
        self._load = load
        self._loaded = loaded
        self._clock = clock
        self._uses = 0
        self._ready: set[str] = set()
        self._evicted: dict[str, float] = {}  # when adapters were thrown out
        self._told = float("-inf")

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters in slots, those that still load included."""
        return tuple(self._by_digest)

    @property
    def loading(self) -> tuple[int, ...]:
        """Slots whose copy has not ended."""
        return tuple(i for i, s in enumerate(self._slots) if s.digest is not None and not s.loaded)

    def prepare(self, waiting: Iterable[Sequence]) -> None:
        """Gives slots to the adapters of waiting sequences, in the order they came; once a step.

        After it `ready` tells who may start. A preempted sequence waits again where it stood: if
        it went before those whom it overtook, these might wait for ever.
        """
        for place in self.loading:
            self._slots[place].loaded = self._loaded(place)
        self._ready = set()
        kept: set[int] = set()  # of those before, or to be given up for those before
        seen: set[str] = set()
        users = [s for s in waiting if s.adapter is not None]
        for sequence in sorted(users, key=lambda s: s.arrival):
            adapter = sequence.adapter
            if adapter.digest in seen:
                continue
            seen.add(adapter.digest)
            number = self._by_digest.get(adapter.digest)
            if number in kept:
                continue  # it drains for somebody before
            if number is None:
                number = self._give(adapter, kept)
            if number is not None:
                kept.add(number)
                slot = self._slots[number]
                if slot.loaded and slot.digest == adapter.digest:
                    self._ready.add(adapter.digest)
            if len(kept) == len(self._slots):
                return

    def ready(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence may start, as far as its adapter goes."""
        return sequence.adapter is None or sequence.adapter.digest in self._ready

    def pin(self, sequence: Sequence) -> None:
        """Holds the slot of a sequence that starts."""
        if sequence.adapter is not None:
            sequence.slot = self._by_digest[sequence.adapter.digest]
            self._slots[sequence.slot].pins += 1
            self._touch(sequence.slot)

    def unpin(self, sequence: Sequence) -> None:
        """Gives it back."""
        if sequence.slot >= 0:
            slot = self._slots[sequence.slot]
            assert slot.pins > 0, "a slot was given back twice"
            slot.pins -= 1
            # Not before: a slot that drains for somebody would go to the end of the line.
            if not slot.pins:
                self._touch(sequence.slot)
            sequence.slot = -1

    def _give(self, adapter: Any, kept: set[int]) -> int | None:
        """A slot for the adapter: one it loads into, or one that is to drain for it; or None."""
        open_to_it = [i for i in range(len(self._slots)) if i not in kept]
        if not open_to_it:
            return None
        loading = self.loading
        free = [i for i in open_to_it if not self._slots[i].pins and i not in loading]
        number = min(free or open_to_it, key=lambda i: self._slots[i].last_use)
        if not free:
            return number  # it is in use, or still being written
        slot = self._slots[number]
        if slot.digest is not None:
            self._evict(slot.digest)
        self._slots[number] = _Slot(adapter.digest)
        self._by_digest[adapter.digest] = number
        self._touch(number)
        self._count_load(adapter.digest)
        self._load(number, adapter)
        self._slots[number].loaded = self._loaded(number)
        return number

    def _evict(self, digest: str) -> None:
        del self._by_digest[digest]
        now = self._clock()
        self._evicted = {d: t for d, t in self._evicted.items() if now - t < THRASH_S}
        self._evicted[digest] = now
        self.stats.num_evictions += 1

    def _count_load(self, digest: str) -> None:
        self.stats.num_loads += 1
        now = self._clock()
        if now - self._evicted.pop(digest, float("-inf")) >= THRASH_S:
            return
        self.stats.num_reloads += 1
        if now - self._told >= THRASH_S:
            self._told = now
            logger.warning(
                "more adapters are in use than the %d slots hold: %d were loaded again within "
                "%.0f s of leaving, since the start; raise the number of slots",
                len(self._slots),
                self.stats.num_reloads,
                THRASH_S,
            )

    def _touch(self, number: int) -> None:
        self._uses += 1
        self._slots[number].last_use = self._uses
