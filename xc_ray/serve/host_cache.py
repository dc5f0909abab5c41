"""Adapters in host memory, by digest: loaded once for all who ask, kept by last use.

All but the load itself happens on the event loop. Who takes an adapter holds it until the Hold is
given back: what is held never leaves, even past the limit.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from xc_ray.engine.lora import PackedAdapter
from xc_ray.errors import InvalidRequest, RegistryError, XcRayError
from xc_ray.registry.manifest import Manifest
from xc_ray.serve.observe import AdapterMetrics

logger = logging.getLogger("ray.serve")

# Who failed is not tried again at once: after so long, and twice as long each time.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


@dataclass
class _Entry:
    packed: PackedAdapter
    holds: int = 0
    retired: bool = False


@dataclass(frozen=True)
class _Failure:
    error: XcRayError
    pause_s: float
    until: float


class Hold:
    """A version in use; `packed` stays in memory until `release`."""

    def __init__(self, cache: "HostCache", manifest: Manifest, packed: PackedAdapter) -> None:
        self.manifest = manifest
        self.packed = packed
        self._cache: HostCache | None = cache

    def release(self) -> None:
        """Gives it back; a second time does nothing."""
        cache, self._cache = self._cache, None
        if cache is not None:
            cache._give_back(self.packed.digest)


class HostCache:
    """`load` brings a version into host memory, in a thread; errors that it raises are public."""

    def __init__(
        self,
        load: Callable[[Manifest], PackedAdapter],
        max_bytes: int,
        *,
        threads: Executor,
        metrics: AdapterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._threads = threads
        self._metrics = metrics
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the last one was used last
        self._loading: dict[str, asyncio.Task[_Entry]] = {}
        self._failures: dict[str, _Failure] = {}

    async def take(self, manifest: Manifest) -> Hold:
        """The version's adapter, from memory or loaded; it stays until the Hold is given back.

        Raises:
            XcRayError: it cannot be loaded, or could not a moment ago.
        """
        digest = manifest.digest
        entry = self._entries.get(digest)
        if entry is None:
            # Whoever leaves, the others and the next ones still want it.
            entry = await asyncio.shield(self._loading.get(digest) or self._start(manifest))
            entry = self._entries.setdefault(digest, entry)  # it may have been evicted since
        entry.holds += 1
        entry.retired = False
        self._entries.move_to_end(digest)
        return Hold(self, manifest, entry.packed)

    def has(self, digest: str) -> bool:
        """Whether it is in memory."""
        return digest in self._entries

    def failure(self, digest: str) -> str:
        """Why it could not be loaded when that was tried last; empty if it could."""
        found = self._failures.get(digest)
        return found.error.message if found else ""

    def retire(self, digest: str) -> None:
        """Nothing points at it any more: it leaves when nobody holds it."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.retired = True
            self._drop_if_done(digest)

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters in memory."""
        return sum(entry.packed.nbytes for entry in self._entries.values())

    def _give_back(self, digest: str) -> None:
        self._entries[digest].holds -= 1
        self._drop_if_done(digest)
        self._make_room()

    def _drop_if_done(self, digest: str) -> None:
        entry = self._entries[digest]
        if entry.retired and not entry.holds:
            del self._entries[digest]
            self._metrics.host_bytes(self.num_bytes)

    def _make_room(self) -> None:
        excess = self.num_bytes - self._max_bytes
        for digest in [d for d, e in self._entries.items() if not e.holds]:
            if excess <= 0:
                break
            excess -= self._entries.pop(digest).packed.nbytes
            self._metrics.host_eviction()
        self._metrics.host_bytes(self.num_bytes)

    def _start(self, manifest: Manifest) -> asyncio.Task[_Entry]:
        failed = self._failures.get(manifest.digest)
        if failed is not None and self._clock() < failed.until:
            raise again(failed.error)
        task = asyncio.create_task(self._bring(manifest))
        self._loading[manifest.digest] = task
        # Should all who wait leave, nobody else asks for its error.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _bring(self, manifest: Manifest) -> _Entry:
        digest, started = manifest.digest, time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            packed = await loop.run_in_executor(self._threads, self._load, manifest)
        except Exception as e:
            error = self._failed(manifest, e)
            raise error from e
        finally:
            del self._loading[digest]
        self._failures.pop(digest, None)
        seconds = time.monotonic() - started
        self._metrics.load(seconds)
        logger.info("adapter %s@%d loaded in %.3f s", manifest.name, manifest.version, seconds)
        entry = self._entries[digest] = _Entry(packed)
        # Not this one: somebody is about to hold it.
        entry.holds += 1
        self._make_room()
        entry.holds -= 1
        return entry

    def _failed(self, manifest: Manifest, error: Exception) -> XcRayError:
        self._metrics.load(None)
        before = self._failures.get(manifest.digest)
        pause = min(before.pause_s * 2, LONGEST_PAUSE_S) if before else FIRST_PAUSE_S
        known = isinstance(error, XcRayError)
        logger.warning(
            "adapter %s@%d cannot be loaded, next try in %.0f s: %s",
            manifest.name,
            manifest.version,
            pause,
            error,
            exc_info=None if known else error,
        )
        public = public_error(manifest, error)
        self._failures[manifest.digest] = _Failure(public, pause, self._clock() + pause)
        return again(public)


def public_error(manifest: Manifest, error: Exception) -> XcRayError:
    """What clients are told of a load that failed: no place of the store, no path."""
    name = f"adapter '{manifest.name}@{manifest.version}'"
    if isinstance(error, InvalidRequest):  # it was written for them
        return InvalidRequest(f"{name}: {error.message}", param="model", code="adapter_unusable")
    return RegistryError(
        f"{name} cannot be loaded now: the registry does not give its files whole; try again "
        "later, or name another version",
        param="model",
        code="adapter_unavailable",
    )


def again(error: XcRayError) -> XcRayError:
    """A copy to raise: one that was raised holds on to the frames that it passed."""
    return type(error)(error.message, param=error.param, code=error.code)
