"""A model from the registry's store to this node's disk: what share of the raw speed is reached.

    python benchmarks/registry_pull.py --gb 4
    python benchmarks/registry_pull.py --gb 2 --store "s3://bucket/prefix?endpoint=http://..."
    python benchmarks/registry_pull.py --gb 1 --moto

A synthetic checkpoint (random bytes in shards) is pushed, then fetched into an empty cache (hashed,
flushed to the disk), then fetched again (stamps only, and every byte read again). Beside it stand
the parts of that path alone: reading the store with the same ranges and throwing the bytes away,
writing files of the same sizes to the cache's disk and flushing them, SHA-256 on as many threads.

Two shares say how the fetch does: of its slowest part, which is what it could reach if the parts
did not take cores from each other, and of the parts one after the other, which is what it would
reach without any overlap. What was just pushed is in the page cache: a store in a folder is read
from memory. Prints a table, then one JSON line. `--folder` holds everything: give it the disk to be
measured.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from xc_ray.registry.cache import PARALLEL, PART_BYTES, LocalCache
from xc_ray.registry.fill import FILES_AT_ONCE
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import Manifest
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore

GB = 10**9
PARTS = ("read store", "write disk", "sha256")
BLOCK = 16 << 20
NOISE = memoryview(os.urandom(BLOCK))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--store", help="storage setting; a folder below --folder unless given")
    parser.add_argument("--moto", action="store_true", help="moto's S3 server on this machine")
    parser.add_argument("--folder", type=Path, help="where everything is written", default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=PARALLEL)
    parser.add_argument("--part-mib", type=int, default=PART_BYTES >> 20)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        store = Registry.open(args.store or start(args.moto, folder, stack))
        manifest = pushed(store, folder / "checkpoint", int(args.gb * GB), args.shards)
        runs = [measured(store.store, manifest, folder, args) for _ in range(args.runs)]
    report(args, store.store.location.scheme, manifest, runs)


def start(moto: bool, folder: Path, stack: ExitStack) -> str:
    """The setting of a store of our own."""
    if not moto:
        return str(folder / "store")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' server
    from tests.s3_server import credentials, s3_server

    server = stack.enter_context(s3_server())
    stack.enter_context(credentials(server))
    return server.url(server.make_bucket())


def pushed(registry: Registry, folder: Path, size: int, shards: int) -> Manifest:
    """A checkpoint that does not compress and shares no bytes, in the registry."""
    folder.mkdir()
    for number in range(shards):
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            left = size // shards
            file.write(left_of := os.urandom(min(64, left)))
            left -= len(left_of)
            while left > 0:
                left -= file.write(NOISE[:left])
    try:
        return registry.push(folder, name="benchmark", kind="base")
    finally:
        shutil.rmtree(folder)


def measured(
    store: ObjectStore, manifest: Manifest, folder: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Seconds of each part and of the fetches, once around."""
    part = args.part_mib << 20
    cache = LocalCache(folder / "cache", parallel=args.parallel, part_bytes=part)
    sizes = [one.size for one in manifest.files]
    found = {
        "read store": timed(lambda: read(store, manifest, args.parallel, part)),
        "write disk": timed(lambda: write(folder / "raw", sizes)),
        "sha256": timed(lambda: hash_blocks(manifest.size)),
    }
    shutil.rmtree(folder / "raw")  # before the fetch, which finds the same room
    found |= {
        "fetch, cold": timed(lambda: cache.fetch(store, manifest).close()),
        "fetch, again": timed(lambda: cache.fetch(store, manifest).close()),
        "fetch, verify": timed(lambda: cache.fetch(store, manifest, verify=True).close()),
    }
    shutil.rmtree(folder / "cache")
    return found


def timed(call: Callable[[], object]) -> float:
    os.sync()  # what others still write is not ours
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def read(store: ObjectStore, manifest: Manifest, parallel: int, part: int) -> None:
    """Every byte of the store, in ranges, thrown away."""
    ranges = [
        (blob_key(entry.sha256), start, min(start + part, entry.size))
        for entry in manifest.files
        for start in range(0, entry.size, part)
    ]
    with ThreadPoolExecutor(parallel) as pool:
        for _ in pool.map(lambda one: len(store.get_range(*one)), ranges):
            pass


def write(folder: Path, sizes: list[int]) -> None:
    """Files of these sizes to the disk, as many at once as the cache has, each flushed at its end.

    One file after the other, flushed once, is slower than the fetch: the disk then waits.
    """
    folder.mkdir()

    def one(number: int) -> None:
        with (folder / str(number)).open("wb", buffering=0) as file:
            for start in range(0, sizes[number], BLOCK):
                file.write(NOISE[: sizes[number] - start])
            os.fsync(file)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(one, range(len(sizes))))


def hash_blocks(size: int) -> None:
    """As many bytes through SHA-256, on as many threads as the cache has files at once."""

    def some(count: int) -> None:
        digest = hashlib.sha256()
        for _ in range(count):
            digest.update(NOISE)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(some, [-(-size // BLOCK // FILES_AT_ONCE)] * FILES_AT_ONCE))


def report(
    args: argparse.Namespace, scheme: str, manifest: Manifest, runs: list[dict[str, float]]
) -> None:
    gbps = {name: [round(manifest.size / run[name] / GB, 3) for run in runs] for name in runs[0]}
    middle = {name: statistics.median(values) for name, values in gbps.items()}
    slowest = min(PARTS, key=lambda name: middle[name])
    in_a_row = 1 / sum(1 / middle[name] for name in PARTS)
    print(f"{'part':>14} {'GB/s':>8} {'least':>8} {'most':>8} {'seconds':>8}")
    for name, values in gbps.items():
        seconds = statistics.median(run[name] for run in runs)
        line = f"{name:>14} {middle[name]:>8.2f} {min(values):>8.2f} {max(values):>8.2f}"
        print(f"{line} {seconds:>8.2f}")
    share = middle["fetch, cold"] / middle[slowest]
    overlap = middle["fetch, cold"] / in_a_row
    print(
        f"the cold fetch reaches {share:.0%} of its slowest part ({slowest}), "
        f"{overlap:.0%} of the parts one after the other ({in_a_row:.2f} GB/s)"
    )
    figures = {
        "benchmark": "registry_pull",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "store": scheme,
        "bytes": manifest.size,
        "shards": len(manifest.files),
        "parallel": args.parallel,
        "part_mib": args.part_mib,
        "gb_per_s": gbps,
        "slowest_part": slowest,
        "share_of_slowest_part": round(share, 3),
        "share_of_parts_in_a_row": round(overlap, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
