"""N processes publish, promote and roll back at once: on a folder, and on S3 over HTTP.

Processes of their own (`spawn`), which wait for each other before every step. What makes a step
atomic is real: in a folder the making of a hard link, on the S3 server `If-None-Match: *` (see
tests/s3_server.py for what it takes to have moto honour it under threads).
"""

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from tests.registry.folders import DEMO, adapter_folder
from tests.s3_server import S3Server
from xc_ray.errors import InvalidRequest
from xc_ray.registry.registry import Registry

PROCESSES = 5
STEPS = 8


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return str(tmp_path / "store")
    server: S3Server = request.getfixturevalue("server")
    return server.url(server.make_bucket(), "p")


def race(work: Callable[[Registry, int, Barrier], Any], url: str) -> list[Any]:
    """What each of the processes gives back."""
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(PROCESSES), spawn.Queue()
    processes = [
        spawn.Process(target=_racer, args=(work, url, number, barrier, answers))
        for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    got = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return [got[number] for number in range(PROCESSES)]


def _racer(work: Any, url: str, number: int, barrier: Barrier, answers: Any) -> None:
    answers.put((number, work(Registry.open(url), number, barrier)))


def publish(registry: Registry, number: int, barrier: Barrier) -> list[tuple[int, str]]:
    won = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(STEPS):
            source = adapter_folder(Path(folder, str(step)))
            barrier.wait(60)
            pushed = registry.push(source, name="cats", kind="adapter", base=DEMO)
            won.append((pushed.version, pushed.digest))
    return won


def promote(registry: Registry, number: int, barrier: Barrier) -> list[int]:
    written = []
    for _ in range(STEPS):
        barrier.wait(60)
        written.append(registry.promote("cats", [(number + 1, 1)], "prod").number)
    return written


def roll_back(registry: Registry, number: int, barrier: Barrier) -> list[int]:
    done = []
    for _ in range(STEPS):
        barrier.wait(60)
        try:
            done.append(registry.rollback("cats", "prod").number)
        except InvalidRequest as error:
            if "somebody else just now" not in error.message:
                raise
        barrier.wait(60)
    return done


def first_of_its_kind(registry: Registry, number: int, barrier: Barrier) -> str | None:
    kind = "adapter" if number % 2 else "base"
    with tempfile.TemporaryDirectory() as folder:
        source = adapter_folder(Path(folder, "a"))
        barrier.wait(60)
        try:
            base = DEMO if kind == "adapter" else None
            return registry.push(source, name="new", kind=kind, base=base).kind  # type: ignore[arg-type]
        except InvalidRequest:
            return None


def test_each_version_has_one_publisher_and_none_is_lost(url: str):
    won = race(publish, url)
    versions = Counter(version for mine in won for version, _ in mine)
    assert versions == dict.fromkeys(range(1, PROCESSES * STEPS + 1), 1)
    registry = Registry.open(url)
    assert registry.versions("cats") == sorted(versions)
    for mine in won:
        for version, digest in mine:
            assert registry.manifest("cats", version).digest == digest
        assert [version for version, _ in mine] == sorted(version for version, _ in mine)
    assert registry.verify() == []


def test_each_promotion_is_in_the_log_once(url: str, tmp_path: Path):
    registry = Registry.open(url)
    folder = adapter_folder(tmp_path / "a")
    for _ in range(PROCESSES):
        registry.push(folder, name="cats", kind="adapter", base=DEMO)
    written = race(promote, url)
    log = registry.log("cats", "prod")
    assert [entry.number for entry in log] == list(range(1, PROCESSES * STEPS + 1))
    for number, mine in enumerate(written):
        assert [e.number for e in log if e.targets[0].version == number + 1] == mine
    assert registry.resolve("cats@prod").version == log[-1].targets[0].version
    assert registry.verify() == []


def test_rollbacks_at_once_are_one_step_back(url: str, tmp_path: Path):
    """Each round one of them rolls back; the others are told, or came after it and go on."""
    registry = Registry.open(url)
    folder = adapter_folder(tmp_path / "a")
    rounds = PROCESSES * STEPS + 1
    registry.push(folder, name="cats", kind="adapter", base=DEMO)
    registry.push(folder, name="cats", kind="adapter", base=DEMO)
    for number in range(rounds):
        registry.promote("cats", [(number % 2 + 1, 1)], "prod")
    done = sorted(number for mine in race(roll_back, url) for number in mine)
    log = registry.log("cats", "prod")
    assert done == [entry.number for entry in log[rounds:]]
    assert len(done) >= STEPS
    assert [entry.restores for entry in log[rounds:]] == list(
        range(rounds - 1, rounds - 1 - len(done), -1)
    )
    assert registry.verify() == []


def test_name_gets_one_kind_though_two_are_published_at_once(url: str):
    kinds = {kind for kind in race(first_of_its_kind, url) if kind}
    registry = Registry.open(url)
    found = {registry.manifest("new", version).kind for version in registry.versions("new")}
    assert len(found) == 1
    assert kinds == found
