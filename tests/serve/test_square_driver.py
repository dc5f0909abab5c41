"""Passes as they are driven: shared, one behind the other, each failure its pictures' own."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.serve.encoder_metrics import RecordedEncoderMetrics
from xc_ray.serve.signals import WorkMeter
from xc_ray.serve.square_driver import SquareDriver
from xc_ray.serve.squares import SquareBatcher


@dataclass
class Drawing:
    """A picture by name; what came back for each of its squares."""

    name: str
    rows: Counter[int] = field(default_factory=Counter)


Parts = Sequence[tuple[Drawing, int, int]]


@dataclass
class Device:
    """Runs passes when the gate is open; fails those with a square of a name in `bad`."""

    bad: set[str] = field(default_factory=set)
    passes: list[dict[str, int]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    collect_gate: threading.Event = field(default_factory=threading.Event)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self.collect_gate.set()

    def launch(self, parts: Parts) -> Parts:
        self.passes.append({picture.name: count for picture, _, count in parts})
        self.told.append("launched")
        assert self.gate.wait(10)
        if self.bad & {picture.name for picture, _, _ in parts}:
            raise RuntimeError("device lost")
        return parts

    def collect(self, launched: Parts) -> None:
        assert self.collect_gate.wait(10)
        self.told.append("collected")
        for picture, first, count in launched:
            picture.rows.update(range(first, first + count))

    def driver(self, max_squares: int = 8, max_wait_s: float = 0.0) -> SquareDriver[Drawing, Parts]:
        self.metrics = RecordedEncoderMetrics()
        return SquareDriver(
            SquareBatcher(max_squares, max_wait_s), self, self.metrics, WorkMeter(max_squares / 2)
        )


def ask(
    driver: SquareDriver[Drawing, Parts], name: str, size: int, delay_s: float = 0.0
) -> asyncio.Task[Drawing]:
    async def read() -> Drawing:
        await asyncio.sleep(delay_s)
        return Drawing(name)

    return asyncio.create_task(driver.encode(size, read))


async def until(device: Device, passes: int) -> None:
    while len(device.passes) < passes:
        await asyncio.sleep(0.002)


async def test_every_square_of_every_picture_comes_back_once() -> None:
    device = Device()
    driver = device.driver()
    sizes = [1, 57, 2, 9, 9, 3]
    pictures = await asyncio.gather(*(ask(driver, str(i), n) for i, n in enumerate(sizes)))
    for picture, size in zip(pictures, sizes, strict=True):
        assert picture.rows == dict.fromkeys(range(size), 1)
    assert sum(device.metrics.passes) == sum(sizes)
    assert (driver.batcher.waiting_squares, driver.batcher.running_squares) == (0, 0)


async def test_pictures_that_came_during_a_pass_share_the_next() -> None:
    device = Device()
    driver = device.driver()
    device.gate.clear()
    calls = [ask(driver, "a", 2)]
    await until(device, 1)
    calls += [ask(driver, name, 2) for name in "bcde"]
    await asyncio.sleep(0.02)
    assert (driver.batcher.waiting_squares, driver.batcher.running_squares) == (8, 2)
    device.gate.set()
    await asyncio.gather(*calls)
    assert device.passes == [{"a": 2}, {"b": 2, "c": 2, "d": 2, "e": 2}]


async def test_a_pass_runs_while_the_one_before_is_collected_and_no_further_ahead() -> None:
    device = Device()
    driver = device.driver(max_squares=2)
    device.collect_gate.clear()
    call = ask(driver, "a", 8)
    await until(device, 2)
    await asyncio.sleep(0.05)
    assert device.told == ["launched", "launched"]
    device.collect_gate.set()
    await call
    assert device.told.count("collected") == 4


async def test_a_pass_waits_for_pictures_that_are_being_read() -> None:
    device = Device()
    driver = device.driver(max_wait_s=5.0)
    await asyncio.gather(ask(driver, "a", 2), ask(driver, "b", 2, delay_s=0.05))
    assert device.passes == [{"a": 2, "b": 2}]


@pytest.mark.parametrize("leaves", [True, False])
async def test_the_wait_ends_when_those_who_are_read_leave_or_take_too_long(leaves: bool) -> None:
    device = Device()
    driver = device.driver(max_wait_s=5.0 if leaves else 0.02)
    late = ask(driver, "late", 2, delay_s=60)
    first = ask(driver, "a", 2)
    await asyncio.sleep(0.01)
    if leaves:
        late.cancel()
    await asyncio.wait_for(first, 3)
    assert device.passes == [{"a": 2}]
    late.cancel()
    await asyncio.wait([late])
    assert driver.batcher.waiting_squares == 0


async def test_a_pass_that_fails_ends_its_pictures_and_only_those() -> None:
    """The large picture's other squares are not run any more."""
    device = Device(bad={"bad"})
    driver = device.driver(max_squares=4)
    device.gate.clear()
    calls = [ask(driver, "good", 2)]
    await until(device, 1)
    calls += [ask(driver, "large", 50), ask(driver, "bad", 2)]
    await asyncio.sleep(0.02)
    device.gate.set()
    await asyncio.wait(calls)
    assert (await calls[0]).rows == {0: 1, 1: 1}
    assert [str(call.exception()) for call in calls[1:]] == ["device lost"] * 2
    assert len(device.passes) == 2
    assert (await ask(driver, "next", 9)).rows.total() == 9
    assert (driver.batcher.waiting_squares, driver.batcher.running_squares) == (0, 0)


async def test_a_result_that_cannot_be_collected_ends_its_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    driver = device.driver()
    with monkeypatch.context() as patch:
        patch.setattr(device, "collect", lambda launched: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await ask(driver, "a", 2)
    assert (await ask(driver, "b", 2)).rows.total() == 2


async def test_who_leaves_takes_its_squares_along() -> None:
    device = Device()
    driver = device.driver(max_squares=4)
    device.gate.clear()
    running = ask(driver, "running", 9)
    await until(device, 1)
    waiting, stays = ask(driver, "waiting", 9), ask(driver, "stays", 3)
    await asyncio.sleep(0.02)
    running.cancel()
    waiting.cancel()
    await asyncio.wait([running, waiting])
    device.gate.set()
    assert (await stays).rows.total() == 3
    assert device.passes == [{"running": 4}, {"stays": 3}]
    assert (driver.batcher.waiting_squares, driver.batcher.running_squares) == (0, 0)
