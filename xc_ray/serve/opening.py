"""The adapters of a decoder, put together: its registry, this machine's cache, and its engine."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xc_ray.config import ServeConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import PackedAdapter
from xc_ray.errors import CheckpointError, InvalidRequest
from xc_ray.fingerprint import fingerprint
from xc_ray.hub import in_registry, is_there, local_cache, open_store
from xc_ray.model.adapter import load_adapter
from xc_ray.model.weights import Checkpoint
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.reference import Reference
from xc_ray.registry.store import ObjectStore
from xc_ray.serve.adapters import Adapters
from xc_ray.serve.host_cache import HostCache
from xc_ray.serve.observe import AdapterMetrics
from xc_ray.serve.served_base import ServedBase
from xc_ray.serve.watch import Source

logger = logging.getLogger("ray.serve")

# Adapters that are brought at once, and readings of the registry. Each has threads of its own: a
# store that hangs holds up nothing else.
NUM_LOADS = 4
NUM_READS = 2


def open_adapters(config: ServeConfig, checkpoint: Checkpoint, engine: Engine) -> Adapters:
    """The adapters that may be asked for on a decoder; call it on the event loop.

    Raises:
        ConfigError: `registry` is no storage setting.
    """
    store, cache = open_store(config.registry), local_cache()
    reads, metrics = ThreadPoolExecutor(NUM_READS, "registry"), AdapterMetrics()
    host = HostCache(
        lambda manifest: bring(manifest, store, cache, engine),
        int(config.adapters.host_cache_gb * 1e9),
        threads=ThreadPoolExecutor(NUM_LOADS, "adapters"),
        metrics=metrics,
    )
    folder = checkpoint.folder
    base = ServedBase(config.public_name, lambda: base_digest(config.model, folder), reads)

    def slot_counts() -> tuple[int, int, int]:
        stats = engine.adapter_stats
        return stats.num_loads, stats.num_evictions, stats.num_reloads

    return Adapters(
        Source(store, lambda: is_there(store)),
        base,
        host,
        threads=reads,
        metrics=metrics,
        poll_s=config.adapters.poll_s,
        resident=lambda: engine.adapters,
        slot_counts=slot_counts,
    )


def bring(
    manifest: Manifest, store: ObjectStore, cache: LocalCache, engine: Engine
) -> PackedAdapter:
    """A version from the store into the engine's host memory; blocks.

    Raises:
        InvalidRequest: it does not fit the base or the slots; lists why.
        RegistryError: the store fails, or gives other bytes than the manifest says.
    """
    with cache.fetch(store, manifest) as lease:
        try:
            adapter = load_adapter(
                lease.folder,
                engine.decoder.config,
                digest=manifest.digest,
                dtype=engine.decoder.dtype,
                max_rank=engine.config.max_lora_rank,
            )
        except CheckpointError as e:
            # Clients read it: what does not fit, but not where it lies.
            message = e.message.replace(f"{lease.folder}/", "").replace(str(lease.folder), "it")
            raise InvalidRequest(message) from e
    return engine.pack(adapter)


def base_digest(model: str, folder: Path) -> str:
    """What the served base is: as its reference says, or of its files, of which all are read.

    Raises:
        CheckpointError: the files are not one whole model.
    """
    if in_registry(model) and (digest := Reference.parse(model).digest):
        return digest
    started = time.monotonic()
    digest = fingerprint(folder)
    logger.info("the base is %s, told in %.1f s", digest, time.monotonic() - started)
    return digest
