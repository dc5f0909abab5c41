"""A registry, an engine and the adapters between them, in one process; time is moved by hand."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.adapters import write_adapter
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import PackedAdapter
from xc_ray.model.weights import Checkpoint
from xc_ray.publish import import_checkpoint
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import BaseRef, Manifest
from xc_ray.registry.registry import Registry
from xc_ray.serve.adapters import Adapters
from xc_ray.serve.host_cache import HostCache
from xc_ray.serve.messages import AliasState, VersionState
from xc_ray.serve.observe import AdapterMetrics
from xc_ray.serve.opening import bring
from xc_ray.serve.served_base import ServedBase
from xc_ray.serve.watch import Source

OTHER_BASE = BaseRef(name="other", digest="sha256:" + "0" * 64)


class RecordedMetrics(AdapterMetrics):
    """Also remembers what it is told: `said` has a line for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[Any, ...]] = []

    def load(self, seconds: float | None) -> None:
        self.said.append(("load", seconds is not None))
        super().load(seconds)

    def host_eviction(self) -> None:
        self.said.append(("host_eviction",))
        super().host_eviction()

    def poll(self, ok: bool) -> None:
        self.said.append(("poll", ok))
        super().poll(ok)

    def switch(self, ok: bool) -> None:
        self.said.append(("switch", ok))
        super().switch(ok)

    def behind(self, count: int) -> None:
        self.said.append(("behind", count))
        super().behind(count)

    def request(self, adapter: str, version: int, tokens: int) -> None:
        self.said.append(("request", adapter, version, tokens))
        super().request(adapter, version, tokens)

    def count(self, *call: Any) -> int:
        return self.said.count(call)


@dataclass
class Kit:
    """One decoder's adapters over a registry in `home`; nothing is read unless a test asks."""

    home: Path
    base: Path
    host_bytes: int = 10**9
    max_rank: int = 64
    now: float = 1000.0
    loads: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)  # loads wait until it is set
    metrics: RecordedMetrics = field(default_factory=RecordedMetrics)

    def __post_init__(self) -> None:
        self.gate.set()
        self.registry = Registry.open(str(self.home / "registry"))
        self.owner = import_checkpoint(self.base, self.registry, "base")
        self.config = Checkpoint.open(self.base).config
        decoder = Checkpoint.open(self.base).load_decoder()
        limits = EngineConfig(2048, 4096, max_loras=2, max_lora_rank=self.max_rank)
        self.engine = Engine(decoder, limits)
        self.made = 0
        self.open()

    def open(self, tell: Callable[[], str] | None = None) -> Adapters:
        """A decoder that has just started: nothing in memory, nothing known."""
        threads = ThreadPoolExecutor(4)
        self.host = HostCache(
            self._load,
            self.host_bytes,
            threads=threads,
            metrics=self.metrics,
            clock=lambda: self.now,
        )
        self.adapters = Adapters(
            Source(self.registry.store),
            ServedBase("tiny", tell or (lambda: self.owner.digest), threads),
            self.host,
            threads=threads,
            metrics=self.metrics,
            poll_s=1000,
            resident=lambda: self.engine.adapters,
            clock=lambda: self.now,
        )
        return self.adapters

    def _load(self, manifest: Manifest) -> PackedAdapter:
        self.loads.append(f"{manifest.name}@{manifest.version}")
        assert self.gate.wait(10)
        cache = LocalCache(self.home / f"cache-{self.made}")
        return bring(manifest, self.registry.store, cache, self.engine)

    def push(self, name: str = "cats", base: BaseRef | None = None, **options: Any) -> Manifest:
        """The next version of an adapter, unlike all before."""
        self.made += 1
        folder = write_adapter(
            self.home / f"adapter-{self.made}", self.config, seed=self.made, **options
        )
        owner = base or BaseRef(name=self.owner.name, digest=self.owner.digest)
        return self.registry.push(folder, name=name, kind="adapter", base=owner)

    def push_broken(self, name: str = "cats") -> Manifest:
        """A version for this base whose tensors are another base's."""
        self.made += 1
        folder = write_adapter(self.home / f"adapter-{self.made}", self.config)
        settings = (folder / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(settings.replace('"r": 4', '"r": 5'))
        owner = BaseRef(name=self.owner.name, digest=self.owner.digest)
        return self.registry.push(folder, name=name, kind="adapter", base=owner)

    def promote(self, *targets: int | tuple[int, float], alias: str = "prod") -> None:
        """Points an alias of cats at a version, or at two with weights."""
        pairs = [t if isinstance(t, tuple) else (t, 1.0) for t in targets]
        self.registry.promote("cats", pairs, alias)

    def damage(self, manifest: Manifest) -> Callable[[], None]:
        """Flips a bit of the largest blob; returns what puts it back."""
        file = max(manifest.files, key=lambda f: f.size)
        path = Path(self.registry.store.location.prefix, blob_key(file.sha256))
        sound = path.read_bytes()
        path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
        return lambda: (path.write_bytes(sound), None)[1]

    def take_away(self) -> Callable[[], None]:
        """The store fails from now on; returns what brings it back."""
        place = Path(self.registry.store.location.prefix)
        away = place.with_name("away")
        shutil.move(place, away)
        place.write_text("no folder")

        def back() -> None:
            place.unlink()
            shutil.move(away, place)

        return back

    async def poll(self) -> None:
        """What the watch does each time, and the moves that come of it."""
        await self.adapters.watch.refresh()
        await self.adapters.aliases.settled()

    async def label(self, reference: str, sticky: str = "") -> str:
        """The version that a request gets; it ends at once."""
        use = await self.adapters.take(reference, sticky)
        use.release()
        return use.label

    def alias(self, alias: str = "prod") -> AliasState:
        (found,) = [a for a in self.adapters.state("r").aliases if a.alias == alias]
        return found

    def version(self, version: int, name: str = "cats") -> VersionState:
        versions = self.adapters.state("r").versions
        (found,) = [v for v in versions if (v.name, v.version) == (name, version)]
        return found

    def problems(self) -> tuple[str, ...]:
        return self.adapters.state("r").problems

    async def moment(self) -> None:
        """Lets what is ready on the event loop happen."""
        for _ in range(5):
            await asyncio.sleep(0.01)
