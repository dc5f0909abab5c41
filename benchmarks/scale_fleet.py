"""A deployment in scale_simulation.py: its replicas, and Serve's autoscaling around a policy.

What Serve 2.60 does (`ray/serve/_private/autoscaling_state.py`, `autoscaling_policy.py`): each
replica's reports are averaged over the look-back period, the policy is asked, its wish is rounded
up, must hold for a delay without a break, and is cut to the bounds. From zero a request wakes one
replica at once. Serve asks each 0.1 s; here the policy is asked when replicas report, because
nothing new is known between.
"""

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

REPORT_S = 2.0  # RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S

Policy = Callable[[Any], tuple[float, dict[str, Any]]]


class Replica(Protocol):
    """What a fleet knows of its replicas."""

    number: int

    def read_load(self, now: float) -> Any: ...

    def idle(self, now: float) -> bool: ...


R = TypeVar("R", bound=Replica)


class OngoingPolicy:
    """Serve's default: requests that run or wait, over a target for each replica."""

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        if not ctx.current_num_replicas:
            return ctx.target_num_replicas, {}
        return ctx.total_num_requests / self.target, {}


@dataclass
class Scaling:
    """`autoscaling_config`; without a policy the size is fixed."""

    policy: Policy | None = None
    least: int = 1
    most: int = 1
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    to_zero_delay_s: float = 900.0
    look_back_s: float = 15.0
    state: dict[str, Any] = field(default_factory=dict)
    _since: float | None = None  # for how long it has wanted the same way
    _upwards: bool = False

    def decide(self, ctx: Any) -> int:
        """The target from now on."""
        assert self.policy is not None
        target = int(ctx.target_num_replicas)
        if not ctx.current_num_replicas and ctx.total_num_requests > 0:
            return self._bound(max(1, target))
        wish, self.state = self.policy(ctx)
        wanted = math.ceil(wish)
        if not ctx.current_num_replicas and wanted > 0:
            return self._bound(wanted)
        return self._bound(self.after_delay(wanted, target, ctx.current_time))

    def after_delay(self, wanted: int, target: int, now: float) -> int:
        """`wanted` once it has been on the same side of the target for long enough."""
        if wanted == target:
            self._since = None
            return target
        if self._since is None or self._upwards != (wanted > target):
            self._since, self._upwards = now, wanted > target
        delay_s = self.upscale_delay_s if self._upwards else self.downscale_delay_s
        if not self._upwards and target == 1:
            delay_s = self.to_zero_delay_s
        elif not self._upwards:
            wanted = max(1, wanted)  # to zero from one only
        if now - self._since + 1e-6 < delay_s:
            return target
        self._since = None
        return wanted

    def _bound(self, number: int) -> int:
        return max(self.least, min(self.most, number))


class Fleet(Generic[R]):
    """The replicas of one deployment: starting, running, and draining."""

    def __init__(
        self,
        make: Callable[[int, float], R],
        num_replicas: int,
        start_s: float,
        scaling: Scaling,
        num_metrics: int,
    ) -> None:
        self.running: list[R] = []
        self.ongoing = 0  # requests that are here or wait for a replica
        self.gpu_s = 0.0
        self.most_running = num_replicas
        self._make, self._start_s, self._scaling = make, start_s, scaling
        self._starting: deque[float] = deque()
        self._draining: list[R] = []
        self._born: dict[int, float] = {}
        self._count = 0
        self._target = num_replicas
        window = max(1, round(scaling.look_back_s / REPORT_S))
        self._requests: deque[int] = deque(maxlen=window)
        # The last reports of each replica that runs, in a row of its own.
        most = max(num_replicas, scaling.most)
        self._reports = np.zeros((most, window, num_metrics))
        self._num_reports = np.zeros(most, dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._free_rows = list(range(most))
        for _ in range(num_replicas):
            self._run(0.0)

    def pick(self, random_: random.Random, load: Callable[[R], float]) -> R:
        """The less loaded of two, as Serve's handles route."""
        running = self.running
        a = running[int(random_.random() * len(running))]
        b = running[int(random_.random() * len(running))]
        return a if load(a) <= load(b) else b

    def tick(self, now: float) -> bool:
        """Replicas report, and the size follows; whether the first ones run since now."""
        self.gpu_s += REPORT_S * (len(self.running) + len(self._starting) + len(self._draining))
        none = not self.running
        while self._starting and self._starting[0] <= now:
            self._starting.popleft()
            self._run(now)
        self._draining = [r for r in self._draining if not r.idle(now)]
        self._requests.append(self.ongoing)
        if self._scaling.policy is not None:
            self._resize(self._scaling.decide(self._context(now)), now)
        self.most_running = max(self.most_running, len(self.running))
        return none and bool(self.running)

    def _run(self, now: float) -> None:
        self._count += 1
        replica = self._make(self._count, now)
        self.running.append(replica)
        self._born[self._count] = now
        self._rows[self._count] = row = self._free_rows.pop()
        self._reports[row], self._num_reports[row] = 0, 0

    def _resize(self, target: int, now: float) -> None:
        self._target = target
        while len(self.running) + len(self._starting) < target:
            self._starting.append(now + self._start_s)
        while len(self.running) + len(self._starting) > target:
            if self._starting:
                self._starting.pop()
                continue
            replica = self.running.pop()
            self._draining.append(replica)
            del self._born[replica.number]
            self._free_rows.append(self._rows.pop(replica.number))

    def _context(self, now: float) -> Any:
        running = [r.number for r in self.running]
        told = [r.number for r in self.running if now - self._born[r.number] >= REPORT_S or not now]
        means = self._means(now, set(told))
        requests = sum(self._requests) / len(self._requests)
        queued = float(self.ongoing) if not running else 0.0
        stamp = [SimpleNamespace(timestamp=now)]
        return SimpleNamespace(
            current_num_replicas=len(running),
            target_num_replicas=self._target,
            running_replicas=running,
            total_num_requests=requests if running else max(requests, queued),
            total_queued_requests=queued,
            total_running_requests=max(0.0, requests - queued),
            aggregated_metrics=means,
            raw_metrics={name: dict.fromkeys(told, stamp) for name in means},
            policy_state=self._scaling.state,
            current_time=now,
        )

    def _means(self, now: float, told: set[int]) -> dict[str, dict[int, float]]:
        loads = [(r.number, r.read_load(now)) for r in self.running if r.number in told]
        if not loads:
            return {}
        numbers = [number for number, _ in loads]
        rows = np.array([self._rows[number] for number in numbers])
        window = self._reports.shape[1]
        self._reports[rows, self._num_reports[rows] % window] = [load for _, load in loads]
        self._num_reports[rows] += 1
        means = self._reports[rows].sum(1) / np.minimum(self._num_reports[rows], window)[:, None]
        return {
            name: dict(zip(numbers, means[:, i].tolist(), strict=True))
            for i, name in enumerate(loads[0][1]._fields)
        }
