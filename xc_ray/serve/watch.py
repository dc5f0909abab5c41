"""The registry as a decoder sees it: read again and again, in a thread.

What was read last stays while the store fails.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor

from xc_ray.registry.aliases import AliasLog
from xc_ray.registry.manifest import Target
from xc_ray.registry.snapshot import Snapshot, take_snapshot
from xc_ray.registry.store import ObjectStore
from xc_ray.serve.background import Background
from xc_ray.serve.observe import AdapterMetrics

logger = logging.getLogger("ray.serve")

JITTER = 0.2  # of the poll interval, so that many decoders do not read at the same moment
# A name that is not known makes the registry be read at once, but no more often than this.
LOOK_AGAIN_S = 0.5
LOOK_LIMIT_S = 10.0  # and nobody waits longer for it


class Source:
    """The registry as the watch reads it; blocking calls, for threads."""

    def __init__(self, store: ObjectStore, exists: Callable[[], bool] = lambda: True) -> None:
        self.store = store
        self._exists = exists

    def read(self, previous: Snapshot | None) -> Snapshot:
        """All of it; empty where nobody has made it yet."""
        return take_snapshot(self.store, previous) if self._exists() else Snapshot()

    def earlier(self, name: str, alias: str) -> list[tuple[Target, ...]]:
        """Where an alias pointed before its newest entry, newest first."""
        entries = AliasLog(self.store, name, alias).entries()
        return [entry.targets for entry in reversed(entries[:-1])]


class RegistryWatch:
    """`snapshot` is what was read last; `changed` is called on the event loop when it was."""

    def __init__(
        self,
        source: Source,
        changed: Callable[[], None],
        *,
        threads: Executor,
        metrics: AdapterMetrics,
        poll_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.snapshot = Snapshot()
        self.begun = False  # whether it was ever read
        self.failure = ""  # why it could not be read last
        self._source = source
        self._changed = changed
        self._threads = threads
        self._metrics = metrics
        self._poll_s = poll_s
        self._clock = clock
        self._background = Background()
        self._looking: asyncio.Task[None] | None = None
        self._looked = float("-inf")

    def start(self) -> None:
        """Reads from now on."""
        self._background.start(self._run())

    async def refresh(self) -> None:
        """Reads the registry now; one reading for all who ask. A failure is kept, not raised."""
        if self._looking is None:
            self._looking = self._background.start(self._read())
        await asyncio.shield(self._looking)

    async def look_again(self) -> None:
        """Reads the registry soon, because of a name that is not known."""
        try:
            async with asyncio.timeout(LOOK_LIMIT_S):
                if self._looking is None:
                    await asyncio.sleep(max(0.0, self._looked + LOOK_AGAIN_S - self._clock()))
                await self.refresh()
        except TimeoutError:
            logger.warning("the registry has not answered for %.0f s", LOOK_LIMIT_S)

    async def _run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(self._poll_s * random.uniform(1 - JITTER, 1 + JITTER))

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        previous = self.snapshot if self.begun else None
        try:
            snapshot = await loop.run_in_executor(self._threads, self._source.read, previous)
        except Exception as e:  # noqa: BLE001 - whatever it is, what is known is served on
            self._metrics.poll(ok=False)
            if str(e) != self.failure:
                logger.warning("the registry cannot be read, what is known stays: %s", e)
            self.failure = str(e) or type(e).__name__
            return
        finally:
            self._looked = self._clock()
            self._looking = None
        self._metrics.poll(ok=True)
        if self.failure:
            logger.info("the registry can be read again")
        for problem in set(snapshot.problems) - set(self.snapshot.problems):
            logger.warning("the registry: %s", problem)
        self.snapshot, self.failure, self.begun = snapshot, "", True
        self._changed()
