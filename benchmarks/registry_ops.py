"""Operations per second of the registry: in a folder, and on an S3 server on this machine.

    python benchmarks/registry_ops.py
    python benchmarks/registry_ops.py --stores s3 --versions 200
    python benchmarks/registry_ops.py --stores "s3://bucket/prefix?endpoint=http://..."

First a registry of `--versions` versions under 20 names is made, each with the alias prod. On it a
watcher's first snapshot and its polls (nothing new, one new version); then, one after the other and
by 8 threads at once: push of a small adapter (a config and 64 KiB that the store does not have
yet), push of the same bytes again, promote, and resolve of an alias. The S3 server is moto, one
process in Python on the same cores: most of what is measured there is its own speed. Prints a
table, then one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from xc_ray.registry.manifest import BaseRef
from xc_ray.registry.registry import Registry

NAMES = 20
THREADS = 8
BASE = BaseRef(name="demo", digest="sha256:" + "0" * 64)
WEIGHTS_BYTES = 64 << 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--stores", nargs="+", default=["folder", "s3"], help="folder, s3 (moto), or a setting"
    )
    parser.add_argument("--versions", type=int, default=1000, help="in the registry beforehand")
    parser.add_argument("--ops", type=int, default=200, help="of each kind")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for store in args.stores:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            registry = Registry.open(setting(store, folder, stack))
            rows += measure(registry, store, folder, args.versions, args.ops)
    print(f"{'store':<8} {'operation':<34} {'threads':>7} {'per s':>9} {'median ms':>10}")
    for row in rows:
        print(
            f"{row['store'][:8]:<8} {row['operation']:<34} {row['threads']:>7} "
            f"{row['per_s']:>9.1f} {row['median_ms']:>10.2f}"
        )
    facts = {
        "benchmark": "registry_ops",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": args.versions,
        "ops": args.ops,
        "rows": rows,
    }
    print(json.dumps(facts))


def setting(store: str, folder: Path, stack: ExitStack) -> str:
    if store == "folder":
        return str(folder / "store")
    if store != "s3":
        return store
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' server
    from tests.s3_server import credentials, s3_server

    server = stack.enter_context(s3_server())
    stack.enter_context(credentials(server))
    return server.url(server.make_bucket())


def measure(
    registry: Registry, store: str, folder: Path, versions: int, ops: int
) -> list[dict[str, Any]]:
    """A row for each operation and number of threads."""
    names = [f"adapter-{number:02}" for number in range(NAMES)]
    same = adapter(folder / "same")
    fill(registry, same, names, versions)
    numbers = count()
    fresh = [adapter(folder / f"fresh-{number}") for number in range(2 * ops)]

    def push(of: Callable[[int], Path]) -> Callable[[], object]:
        def one() -> object:
            number = next(numbers)
            name = names[number % NAMES]
            return registry.push(of(number), name=name, kind="adapter", base=BASE)

        return one

    def promote() -> object:
        return registry.promote(names[next(numbers) % NAMES], [(1, 1.0)], "prod")

    def resolve() -> object:
        return registry.resolve(f"{names[next(numbers) % NAMES]}@prod")

    known = registry.snapshot()

    def poll_of_one() -> Callable[[], object]:
        registry.push(same, name=names[0], kind="adapter", base=BASE)
        return lambda: registry.snapshot(known)

    operations: dict[str, Callable[[], object]] = {
        "push, 64 KiB": push(lambda _: fresh.pop()),
        "push, the same bytes": push(lambda _: same),
        "promote": promote,
        "resolve NAME@prod": resolve,
    }
    count_ = len(registry.snapshot().manifests)
    whole = timed(registry.snapshot, 4, 1)
    rows = [row(store, f"first snapshot, {count_} versions", 1, whole)]
    known = registry.snapshot()
    polls = timed(lambda: registry.snapshot(known), max(ops // 10, 4), 1)
    rows.append(row(store, f"poll, {count_} versions, none new", 1, polls))
    polls = timed(poll_of_one(), max(ops // 10, 4), 1)
    rows.append(row(store, f"poll, {count_ + 1} versions, one new", 1, polls))
    rows += [
        row(store, name, threads, timed(operation, ops, threads))
        for name, operation in operations.items()
        for threads in (1, THREADS)
    ]
    return rows


def fill(registry: Registry, folder: Path, names: list[str], versions: int) -> None:
    def publish(name: str) -> None:
        for _ in range(max(versions // NAMES, 1)):
            registry.push(folder, name=name, kind="adapter", base=BASE)
        registry.promote(name, [(1, 1.0)], "prod")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, names))


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(WEIGHTS_BYTES))
    return folder


def timed(operation: Callable[[], object], ops: int, threads: int) -> tuple[float, list[float]]:
    """Seconds for all, and of each."""
    operation()  # warm: connections, and the proof of conditional writes

    def one(_: int) -> float:
        started = time.perf_counter()
        operation()
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        each = list(pool.map(one, range(ops - 1)))
    return time.perf_counter() - started, each


def row(
    store: str, operation: str, threads: int, took: tuple[float, list[float]]
) -> dict[str, Any]:
    total, each = took
    return {
        "store": store,
        "operation": operation,
        "threads": threads,
        "per_s": round(len(each) / total, 1),
        "median_ms": round(statistics.median(each) * 1e3, 2),
    }


if __name__ == "__main__":
    main()
