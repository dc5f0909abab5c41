"""Adapters on one decoder: what a request's reference means now, loaded, and held until it ends.

The store is asked for what is not here yet: adapters that are loaded do without it.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from xc_ray.errors import NotFound, RegistryError, XcRayError
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.reference import Reference
from xc_ray.registry.resolve import PROD, choose
from xc_ray.serve.aliases import NEWEST, Aliases
from xc_ray.serve.host_cache import Hold, HostCache
from xc_ray.serve.messages import DecoderState, Tokens, VersionState, Where
from xc_ray.serve.observe import AdapterMetrics
from xc_ray.serve.served_base import ServedBase
from xc_ray.serve.watch import RegistryWatch, Source

SHOWN = 20  # of what exists, in an error


class Adapters:
    """`resident` tells the digests in device slots, `slot_counts` loads, evictions and reloads.

    All state is the event loop's.
    """

    def __init__(
        self,
        source: Source,
        base: ServedBase,
        host: HostCache,
        *,
        threads: Executor,
        metrics: AdapterMetrics,
        poll_s: float,
        resident: Callable[[], Iterable[str]] = tuple,
        slot_counts: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._host = host
        self._metrics = metrics
        self._resident = resident
        self._slot_counts = slot_counts
        self.watch = RegistryWatch(
            source, self._changed, threads=threads, metrics=metrics, poll_s=poll_s, clock=clock
        )
        self.aliases = Aliases(
            source,
            lambda: self.watch.snapshot,
            base,
            host,
            threads=threads,
            metrics=metrics,
        )

    async def take(self, text: str, sticky: str, sees: frozenset[str] | None = None) -> "Use":
        """The version that a reference means now, loaded, and held until the Use is given back.

        Raises:
            NotFound: there is none, or it belongs to another base; names what there is, of the
                adapters that the caller `sees`.
            InvalidRequest: it is no reference, or the adapter does not fit.
            RegistryError: it cannot be loaded now.
        """
        reference = Reference.parse(text)
        await self._base.known()
        if not self._knows(reference):
            await self.watch.look_again()
            if not self._knows(reference):
                raise self._unknown(reference, sees)
        manifest = await self._meant(reference, sticky)
        self._base.check(manifest)
        return Use(await self._host.take(manifest), self._metrics)

    def state(self, replica: str) -> DecoderState:
        """What is known, loaded and wrong; for /v1/models and /readyz."""
        manifests = self.watch.snapshot.manifests.values()
        resident = set(self._resident())
        versions = [self._state_of(m, resident) for m in manifests if self._base.owns(m)]
        aliases = self.aliases.states({version.name for version in versions})
        problems = tuple(self._problems())
        return DecoderState(replica, self._base.digest, tuple(versions), tuple(aliases), problems)

    def loaded(self) -> dict[str, list[str]]:
        """Adapters as NAME@VERSION: in slots of the `device`, or in `host` memory alone."""
        found: dict[str, list[str]] = {"device": [], "host": []}
        resident = set(self._resident())
        for manifest in self.watch.snapshot.manifests.values():
            state = self._state_of(manifest, resident)
            if state.where:
                found[state.where].append(f"{state.name}@{state.version}")
        return {where: sorted(labels) for where, labels in found.items()}

    def _changed(self) -> None:
        self.aliases.follow()
        self._metrics.slots(*self._slot_counts())

    def _knows(self, reference: Reference) -> bool:
        name, read = reference.name, self.watch.snapshot
        if reference.alias is not None:
            return self.aliases.wanted((name, reference.alias)) is not None
        versions = read.versions(name)
        if reference.version is not None:
            return reference.version in versions
        if reference.digest is not None:
            return any(read.manifest(name, v).digest == reference.digest for v in versions)
        return bool(versions)

    async def _meant(self, reference: Reference, sticky: str) -> Manifest:
        name = reference.name
        if reference.version is not None or reference.digest is not None:
            return self.watch.snapshot.resolve(reference)
        alias = reference.alias
        if alias is None:
            alias = PROD if self.aliases.wanted((name, PROD)) is not None else NEWEST
        serving = await self.aliases.serving((name, alias))
        # The same point for a user on all decoders, another one for each alias.
        target = choose(serving.targets, f"{name}@{alias}:{sticky}")
        return serving.manifests[target.version]

    def _unknown(self, reference: Reference, sees: frozenset[str] | None) -> XcRayError:
        asked = f"adapter {str(reference)!r}"
        if not self.watch.begun:
            return RegistryError(
                f"{asked} cannot be looked up: the registry does not answer; try again later",
                param="model",
            )
        read = self.watch.snapshot
        ours = [m for m in read.manifests.values() if self._base.owns(m)]
        ours = [m for m in ours if sees is None or m.name in sees]
        ids = [f"{m.name}@{m.version}" for m in ours]
        ids += [f"{n}@{a}" for n, a in read.aliases if any(m.name == n for m in ours)]
        ids.sort(key=lambda i: i.partition("@")[0] != reference.name)  # those of the name first
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        there = f"there are {', '.join(ids[:SHOWN])}{more}" if ids else "there are none"
        stale = "; the registry does not answer now, so newer ones are not known"
        return NotFound(
            f"{asked} of {self._base.name!r} does not exist; {there}"
            + (stale if self.watch.failure else ""),
            param="model",
            code="model_not_found",
        )

    def _problems(self) -> Iterable[str]:
        if self._base.failed:
            yield "adapters are not available: which base is served could not be told"
        if self.watch.failure:
            yield "the registry cannot be read; what is known is served on"
        if damaged := len(self.watch.snapshot.problems):
            yield f"records of the registry are damaged: {damaged}"
        yield from self.aliases.complaints()

    def _state_of(self, manifest: Manifest, resident: set[str]) -> VersionState:
        digest = manifest.digest
        where: Where = "host" if self._host.has(digest) else ""
        if digest in resident:
            where = "device"
        return VersionState(
            manifest.name,
            manifest.version,
            digest,
            manifest.created.timestamp(),
            where,
            self._host.failure(digest),
        )


@dataclass
class Use:
    """One request's version; `release` when it ends."""

    hold: Hold
    metrics: AdapterMetrics
    _generated: dict[int, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.hold.manifest.name}@{self.hold.manifest.version}"

    def note(self, batch: Sequence[Tokens]) -> None:
        """Counts a message's tokens, and writes the version into the first one."""
        first = not self._generated
        for tokens in batch:
            self._generated[tokens.index] = tokens.num_generated
            if first:
                tokens.adapter = self.label

    def release(self) -> None:
        """The request has ended."""
        manifest = self.hold.manifest
        self.metrics.request(manifest.name, manifest.version, sum(self._generated.values()))
        self.hold.release()
