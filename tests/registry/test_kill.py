"""kill -9 at a random moment of push, promote, rollback and gc, many times over.

After each kill nothing torn is to be seen, and the same command runs through. The moments come
from a seed that a failure shows; set SEED in this file to repeat one (as far as the machine does).
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.registry.folders import DEMO
from tests.s3_server import NO_PROXY, S3Server
from xc_ray.errors import InvalidRequest
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import PART_BYTES, ObjectStore

SEED = random.SystemRandom().randrange(10**6)
# Kills, and the longest time before one, s: a turn of `work` takes about a tenth of it.
ROUNDS = {"file": 24, "s3": 12}
LATEST = {"file": 0.4, "s3": 1.5}
ROUNDS_OF_ONE_STORE = 10
# Everything is old enough: nobody else publishes meanwhile.
NO_GRACE = -3600.0


def turn(registry: Registry, folder: Path, draw: random.Random) -> None:
    """One of each command: push, promote, rollback, gc."""
    (folder / "small").write_bytes(draw.randbytes(2_000))
    (folder / "parts").write_bytes(draw.randbytes(1_000) * (PART_BYTES // 1_000 + 1))
    pushed = registry.push(folder, name="cats", kind="adapter", base=DEMO)
    registry.promote("cats", [(pushed.version, 1)], "prod")
    if draw.random() < 0.3 and pushed.version > 1:
        # Where a kill left one entry only, there is nothing to roll back to.
        with contextlib.suppress(InvalidRequest):
            registry.rollback("cats", "prod")
    registry.gc(grace_s=NO_GRACE, dry_run=False)


def work(url: str, env: dict[str, str], folder: Path, seed: int, ready: Connection) -> None:
    """Turns without an end; the kill is the end."""
    os.environ.update(env)
    draw, registry = random.Random(seed), Registry.open(url)
    registry.names()
    ready.send(True)
    while True:
        turn(registry, folder, draw)


def assert_sound(registry: Registry) -> None:
    snapshot = registry.snapshot()
    assert snapshot.problems == ()
    assert registry.verify() == []
    for name in registry.names():
        for version in registry.versions(name):
            assert registry.manifest(name, version).version == version
        for alias in registry.alias_names(name):
            assert len(registry.log(name, alias)) == snapshot.aliases[name, alias].number
            registry.resolve(f"{name}@{alias}")


@pytest.mark.parametrize("kind", ["file", "s3"])
@pytest.mark.parametrize(
    "times", [1, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_kill_at_any_moment_leaves_nothing_torn(
    kind: str, times: int, tmp_path: Path, request: pytest.FixtureRequest
):
    # A server that has the modules loaded and forks: a process every few ms, none of which has
    # obstore's threads from before the fork.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["xc_ray.registry.registry"])
    draw = random.Random(SEED)
    url, versions = "", 0
    env: dict[str, str] = {}
    for number in range(ROUNDS[kind] * times):
        if number % ROUNDS_OF_ONE_STORE == 0:
            url = str(tmp_path / f"store-{number}")
            if kind == "s3":
                server: S3Server = request.getfixturevalue("server")
                url, env = server.url(server.make_bucket(), "p"), {**server.env, **NO_PROXY}
        folder = tmp_path / f"folder-{number}"
        folder.mkdir()
        here, there = forks.Pipe(duplex=False)
        process = forks.Process(target=work, args=(url, env, folder, draw.randrange(10**9), there))
        process.start()
        there.close()
        assert here.recv()
        time.sleep(draw.uniform(0, LATEST[kind]))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"seed {SEED}: it failed by itself"
        registry = Registry.open(url)
        try:
            assert_sound(registry)
            if number % 3 == 0:  # else the next round goes on from what the kill left
                turn(registry, folder, draw)
                assert_sound(registry)
                assert_nothing_is_left(registry.store)
        except Exception as error:
            raise AssertionError(f"seed {SEED}, round {number}: {error}") from error
        versions += len(registry.versions("cats")) if registry.names() else 0
    assert versions > 0


def assert_nothing_is_left(store: ObjectStore) -> None:
    """After gc: no half-written file, no probe, and no blob without a version."""
    assert Registry(store).gc(grace_s=NO_GRACE).blobs == ()
    assert store.list("probes") == []
    if store.location.scheme == "file":
        assert list(Path(store.location.prefix).rglob("*#*")) == []
