"""What aliases serve on one decoder: they follow the registry, one step behind it and never ahead.

Where an alias of an adapter that is in memory here was moved, its new versions are loaded first and
then it switches. What cannot be loaded leaves the old one in its place and is tried again. An alias
that nobody uses here moves when somebody asks for it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from xc_ray.errors import RegistryError, XcRayError
from xc_ray.registry.manifest import Manifest, Target
from xc_ray.registry.snapshot import Snapshot
from xc_ray.serve.background import Background
from xc_ray.serve.host_cache import Hold, HostCache, again
from xc_ray.serve.messages import AliasState
from xc_ray.serve.observe import AdapterMetrics
from xc_ray.serve.served_base import ServedBase
from xc_ray.serve.watch import Source

logger = logging.getLogger("ray.serve")

Key = tuple[str, str]  # an adapter and its alias
NEWEST = ""  # in the place of an alias: the newest version for this base
# How many entries before an alias's newest one are tried on a decoder that never had a working one.
FALLBACKS = 3

Targets = tuple[Target, ...]


@dataclass(frozen=True)
class Serving:
    """Versions with their shares, and what they are."""

    targets: Targets
    manifests: Mapping[int, Manifest]

    @property
    def digests(self) -> set[str]:
        """Of all of them."""
        return {manifest.digest for manifest in self.manifests.values()}


@dataclass
class _Alias:
    """One alias on this decoder: what it serves, and why not what it should."""

    serving: Serving | None = None
    error: str = ""
    moving: asyncio.Task[None] | None = None
    looked_back: bool = False  # since the registry was read last


class Aliases:
    """The aliases that were asked for on this decoder; all state is the event loop's."""

    def __init__(
        self,
        source: Source,
        snapshot: Callable[[], Snapshot],
        base: ServedBase,
        host: HostCache,
        *,
        threads: Executor,
        metrics: AdapterMetrics,
    ) -> None:
        self._source = source
        self._snapshot = snapshot
        self._base = base
        self._host = host
        self._threads = threads
        self._metrics = metrics
        self._aliases: dict[Key, _Alias] = {}
        self._background = Background()

    def wanted(self, key: Key) -> Targets | None:
        """Where the registry points an alias; None if it has no such alias."""
        name, alias = key
        if alias == NEWEST:
            newest = self._versions(name)[:1]
            return tuple(Target(version=v) for v in newest) or None
        head = self._snapshot().aliases.get(key)
        return head.targets if head is not None else None

    async def serving(self, key: Key) -> Serving:
        """What an alias that exists serves here; it moves first, where nothing of it is in memory.

        Raises:
            XcRayError: the version that it points at cannot be loaded, and no other was.
        """
        alias = self._aliases.setdefault(key, _Alias())
        if self._is_behind(key) and not self._in_memory(alias):
            try:
                await asyncio.shield(self._move(key))
            except XcRayError as e:
                if alias.serving is None:
                    raise again(e) from None
        assert alias.serving is not None, "a move that is made leaves something to serve"
        return alias.serving

    def follow(self) -> None:
        """Starts to move the aliases that are in use here and point elsewhere now."""
        if self._base.digest is None:
            return
        for key, alias in self._aliases.items():
            alias.looked_back = False
            if not self._is_behind(key):
                alias.error = ""
            elif self._in_memory(alias):
                self._move(key)
        self._count_failed()

    async def settled(self) -> None:
        """Returns once no alias is on the move."""
        while moving := [a.moving for a in self._aliases.values() if a.moving is not None]:
            await asyncio.wait(moving)

    def states(self, names: Iterable[str]) -> list[AliasState]:
        """The aliases of these adapters, and all that were asked for."""
        known = {key for key in self._snapshot().aliases if key[0] in set(names)}
        known |= {key for key in self._aliases if key[1] != NEWEST}
        return [self._state(key) for key in sorted(known)]

    def complaints(self) -> Iterable[str]:
        """A sentence for each alias that does not serve what the registry says."""
        for key, alias in self._aliases.items():
            if alias.error:
                wanted = self.wanted(key)
                points = f"points at {_shown(wanted)} and " if wanted else ""
                yield f"alias {_called(key)} {points}serves {_served(alias)}: {alias.error}"

    def _versions(self, name: str) -> list[int]:
        """Newest first: those of this base, or all if none is."""
        read = self._snapshot()
        versions = read.versions(name)[::-1]
        return [v for v in versions if self._base.owns(read.manifest(name, v))] or versions

    def _is_behind(self, key: Key) -> bool:
        wanted, serving = self.wanted(key), self._aliases[key].serving
        return wanted is not None and (serving is None or serving.targets != wanted)

    def _in_memory(self, alias: _Alias) -> bool:
        return alias.serving is not None and any(map(self._host.has, alias.serving.digests))

    def _move(self, key: Key) -> asyncio.Task[None]:
        """Brings an alias to where the registry points it; one move at a time for each."""
        alias = self._aliases[key]
        if alias.moving is None:
            alias.moving = self._background.start(self._moved(key, alias))
        return alias.moving

    async def _moved(self, key: Key, alias: _Alias) -> None:
        wanted = self.wanted(key)
        try:
            assert wanted is not None, "an alias that is behind points somewhere"
            try:
                await self._switch(key, alias, wanted)
                alias.error = ""
            except XcRayError as e:
                if alias.serving is None and not alias.looked_back:
                    alias.looked_back = True
                    await self._fall_back(key, alias, wanted)
                self._tell_failure(key, alias, wanted, e)
                raise
        finally:
            alias.moving = None
            self._count_failed()

    async def _switch(self, key: Key, alias: _Alias, targets: Targets) -> None:
        """Loads all targets, then points the alias at them."""
        holds: list[Hold] = []
        try:
            for target in targets:
                manifest = self._manifest(key[0], target.version)
                self._base.check(manifest)
                holds.append(await self._host.take(manifest))
            before = alias.serving
            manifests = {hold.manifest.version: hold.manifest for hold in holds}
            alias.serving = Serving(targets, manifests)
            self._tell_switch(key, before, alias.serving)
            self._retire(before)
        finally:
            for hold in holds:
                hold.release()

    def _manifest(self, name: str, version: int) -> Manifest:
        found = self._snapshot().manifests.get((name, version))
        if found is None:
            raise RegistryError(
                f"version {version} of {name!r} is missing or damaged in the registry",
                param="model",
                code="adapter_unavailable",
            )
        return found

    async def _fall_back(self, key: Key, alias: _Alias, wanted: Targets) -> None:
        """On a decoder that has just started: what the alias served before, as far as it loads."""
        name, called = key
        loop = asyncio.get_running_loop()
        earlier: list[Targets]
        try:
            if called == NEWEST:
                earlier = [(Target(version=v),) for v in self._versions(name)]
            else:
                read = partial(self._source.earlier, name, called)
                earlier = await loop.run_in_executor(self._threads, read)
        except RegistryError as e:
            logger.warning("the log of %s cannot be read: %s", _called(key), e)
            return
        for targets in [t for t in dict.fromkeys(earlier) if t != wanted][:FALLBACKS]:
            try:
                await self._switch(key, alias, targets)
                return
            except XcRayError as e:
                logger.warning("alias %s, %s before: %s", _called(key), _shown(targets), e)

    def _retire(self, before: Serving | None) -> None:
        """Lets go of what an alias served, unless another one does."""
        if before is not None:
            kept = {d for a in self._aliases.values() if a.serving for d in a.serving.digests}
            for digest in before.digests - kept:
                self._host.retire(digest)

    def _tell_switch(self, key: Key, before: Serving | None, now: Serving) -> None:
        self._metrics.switch(ok=True)
        shares = [dict(_pairs(serving.targets)) if serving else {} for serving in (before, now)]
        self._metrics.alias(key[0], key[1] or "newest", *shares)
        if before is not None:
            moved = _shown(before.targets), _shown(now.targets)
            logger.info("alias %s moved from %s to %s", _called(key), *moved)

    def _tell_failure(self, key: Key, alias: _Alias, wanted: Targets, error: XcRayError) -> None:
        if error.message == alias.error:
            return  # as before
        alias.error = error.message
        self._metrics.switch(ok=False)
        logger.warning(
            "alias %s cannot move to %s and serves %s: %s",
            _called(key),
            _shown(wanted),
            _served(alias),
            error.message,
        )

    def _count_failed(self) -> None:
        self._metrics.behind(sum(bool(alias.error) for alias in self._aliases.values()))

    def _state(self, key: Key) -> AliasState:
        alias = self._aliases.get(key, _Alias())
        return AliasState(
            *key,
            targets=_pairs(self.wanted(key) or ()),
            serving=_pairs(alias.serving.targets) if alias.serving else (),
            error=alias.error,
        )


def _pairs(targets: Iterable[Target]) -> tuple[tuple[int, float], ...]:
    return tuple((target.version, target.weight) for target in targets)


def _shown(targets: Iterable[Target]) -> str:
    """`version 3`, or `version 3 (90%) and 4 (10%)`."""
    pairs = _pairs(targets)
    if len(pairs) == 1:
        return f"version {pairs[0][0]}"
    return "version " + " and ".join(f"{v} ({share:.0%})" for v, share in pairs)


def _served(alias: _Alias) -> str:
    return _shown(alias.serving.targets) if alias.serving else "nothing"


def _called(key: Key) -> str:
    name, alias = key
    return f"{name}@{alias}" if alias != NEWEST else f"{name} (its newest version)"
