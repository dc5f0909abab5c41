"""Who may be worked on: rates of one caller, and a gate with a bounded, fair queue behind it.

    request ──> KeyLimits (ingress): rates a minute ──> Gate (decoder): room now, a wait, or 429

Pure: no Ray, no HTTP, and the clock is handed in. Everything runs on one event loop.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from xc_ray.config import Allowance
from xc_ray.errors import InvalidRequest, Overloaded

MINUTE_S: Final = 60.0
RATE_MEMORY_S: Final = 20.0  # how far back a gate remembers what it let through
MAX_RETRY_S: Final = 60.0
UNKNOWN_S: Final = 0.1  # until a place is free, before anything has passed
MAX_IDLE_KEYS: Final = 10_000
MAX_IDLE_LINES: Final = 64

Clock = Callable[[], float]


@dataclass(eq=False)
class Entry:
    """A request at a gate; `need` is its share of the gate's scarcest room, 0 to 1."""

    key: str
    amounts: tuple[float, ...]
    need: float
    turn: asyncio.Future[None] | None = None  # while it waits


@dataclass(eq=False)
class _Line:
    """Those of one key that wait, and how far this key has been served (virtual time)."""

    served: float
    entries: deque[Entry] = field(default_factory=deque)
    backlog: float = 0.0


class Gate:
    """Lets requests in while what they need fits into `room`; the others wait, a line a key.

    `room` has an amount of each kind (sequences, tokens). Lines get equal shares of what is let
    through, measured by a request's scarcest amount (start-time fair queuing; dominant resource
    fairness), so that a key that sends much delays itself. A newcomer that would wait longer than
    `max_wait_s`, at the rate of the last seconds, is refused at once, and so is one that finds
    `max_waiting` others.
    """

    def __init__(
        self,
        room: Mapping[str, float],
        *,
        max_waiting: int,
        max_wait_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._kinds = tuple(room)
        self._room = tuple(float(amount) for amount in room.values())
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._inside = [0.0] * len(self._room)
        self._num_inside = 0
        self._num_waiting = 0
        self._lines: dict[str, _Line] = {}
        self._served = 0.0  # virtual time: of the line that was served last
        self._rate = Rate(RATE_MEMORY_S, clock)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return self._num_waiting

    def check(self, key: str, **amounts: float) -> None:
        """Refuses as `ask` would, and takes nothing.

        Raises:
            Overloaded: as of `ask`.
        """
        entry = self._entry(key, amounts)
        if self._num_waiting or not self._fits(entry):
            self._check(entry)

    def ask(self, key: str, **amounts: float) -> Entry:
        """Takes room, or a place among those that wait (see `wait`), until `leave`.

        Raises:
            Overloaded: the wait would be too long; says for how long to stay away.
        """
        self.check(key, **amounts)
        return self.line_up(key, **amounts)

    def line_up(self, key: str, **amounts: float) -> Entry:
        """`ask` for whoever is refused no more."""
        entry = self._entry(key, amounts)
        if not self._num_waiting and self._fits(entry):
            self._let_in(entry)
            return entry
        entry.turn = asyncio.get_running_loop().create_future()
        self._wait(entry)
        return entry

    async def wait(self, entry: Entry) -> None:
        """Until there is room; whoever is cancelled meanwhile is to `leave`, too."""
        if entry.turn is not None:
            await entry.turn

    def leave(self, entry: Entry) -> None:
        """Gives back what a request took, be it room or a place among those that wait."""
        turn = entry.turn
        if turn is not None and (turn.cancelled() or not turn.done()):
            turn.cancel()
            self._forget(entry)
            return
        self._num_inside -= 1
        for i, amount in enumerate(entry.amounts):
            self._inside[i] -= amount
        self._serve()

    def give_back(self, entry: Entry, **amounts: float) -> None:
        """Takes less from now on, never less than nothing."""
        less = [
            min(amounts.get(k, 0.0), a) for k, a in zip(self._kinds, entry.amounts, strict=True)
        ]
        self._inside = [a - b for a, b in zip(self._inside, less, strict=True)]
        entry.amounts = tuple(a - b for a, b in zip(entry.amounts, less, strict=True))
        self._serve()

    def closed_s(self, key: str, **amounts: float) -> float:
        """Seconds for which such a request will be refused, by what is known now; 0: it is not."""
        entry = self._entry(key, amounts)
        if not self._num_waiting and self._fits(entry):
            return 0.0
        seconds = self._wait_of(entry) - self._max_wait_s
        if self._is_full_for(key):
            rate = self._rate.value
            seconds = max(seconds, entry.need / rate if rate else UNKNOWN_S)
        return max(0.0, seconds)

    def _entry(self, key: str, amounts: Mapping[str, float]) -> Entry:
        # More than there is room for goes in alone.
        fitting = tuple(
            min(amounts[k], most) for k, most in zip(self._kinds, self._room, strict=True)
        )
        need = max(a / most for a, most in zip(fitting, self._room, strict=True))
        return Entry(key, fitting, need)

    def _fits(self, entry: Entry) -> bool:
        pairs = zip(self._inside, entry.amounts, self._room, strict=True)
        return not self._num_inside or all(a + b <= most + 1e-9 for a, b, most in pairs)

    def _check(self, entry: Entry) -> None:
        wait = self._wait_of(entry)
        if wait > self._max_wait_s:
            raise _overloaded(
                f"too much is waiting: this request would begin in about {wait:.0f} s, and nobody "
                f"waits longer than {self._max_wait_s:g} s; try again later",
                wait - self._max_wait_s,
            )
        if self._is_full_for(entry.key):
            raise _overloaded(
                f"{self._num_waiting} requests are waiting, the most that may; try again later",
                wait or 1.0,
            )

    def _is_full_for(self, key: str) -> bool:
        """A key with less than its share of the places finds one up to twice as many."""
        if self._num_waiting < self._max_waiting:
            return False
        line = self._lines.get(key)
        own = len(line.entries) if line else 0
        num_lines = sum(1 for other in self._lines.values() if other.entries) + (own == 0)
        full = self._num_waiting >= 2 * self._max_waiting
        return full or own >= max(1, self._max_waiting // num_lines)

    def _wait_of(self, entry: Entry) -> float:
        """Seconds until a newcomer would be let in; 0 if nothing is known of the rate yet."""
        rate = self._rate.value
        if not rate or (not self._num_waiting and self._fits(entry)):
            return 0.0
        line = self._lines.get(entry.key)
        own = (line.backlog if line else 0.0) + entry.need
        # Until its own line has been served so far, each other one gets no more than as much.
        others = sum(
            min(other.backlog, own) for key, other in self._lines.items() if key != entry.key
        )
        return (own + others) / rate

    def _wait(self, entry: Entry) -> None:
        if not self._num_waiting:
            self._rate.begin()
        if len(self._lines) > 2 * self._num_waiting + MAX_IDLE_LINES:
            self._lines = {
                k: x for k, x in self._lines.items() if x.entries or x.served > self._served
            }
        line = self._lines.get(entry.key)
        if line is None:
            line = self._lines[entry.key] = _Line(self._served)
        elif not line.entries:
            line.served = max(line.served, self._served)  # nobody saves turns up
        line.entries.append(entry)
        line.backlog += entry.need
        self._num_waiting += 1

    def _forget(self, entry: Entry) -> None:
        line = self._lines.get(entry.key)
        if line is None or entry not in line.entries:
            return  # `_serve` has seen that it gave up
        line.entries.remove(entry)
        self._gone(entry, line)
        self._serve()  # it may have stood in the way of those behind it

    def _gone(self, entry: Entry, line: _Line) -> None:
        line.backlog = line.backlog - entry.need if line.entries else 0.0
        self._num_waiting -= 1
        if not self._num_waiting:
            self._rate.end()
            self._lines.clear()  # nobody waits: all are equal again

    def _serve(self) -> None:
        """Lets in whoever is next, in the order of the lines, as long as there is room."""
        while self._num_waiting:
            line = min((x for x in self._lines.values() if x.entries), key=lambda x: x.served)
            entry = line.entries[0]
            assert entry.turn is not None
            if entry.turn.cancelled():
                line.entries.popleft()
                self._gone(entry, line)
                continue
            if not self._fits(entry):
                return
            line.entries.popleft()
            self._served = line.served
            line.served += entry.need
            self._rate.add(entry.need)
            self._gone(entry, line)
            self._let_in(entry)
            entry.turn.set_result(None)

    def _let_in(self, entry: Entry) -> None:
        self._num_inside += 1
        for i, amount in enumerate(entry.amounts):
            self._inside[i] += amount


class Rate:
    """What passes a second while somebody waits; what lies `memory_s` back counts a third."""

    def __init__(self, memory_s: float, clock: Clock) -> None:
        self._memory_s = memory_s
        self._clock = clock
        self._passed = 0.0
        self._busy_s = 0.0
        self._since: float | None = None  # when the time was last counted, while it runs

    def begin(self) -> None:
        """From now on somebody waits."""
        self._since = self._clock()

    def end(self) -> None:
        """Nobody waits any more."""
        self._count()
        self._since = None

    def add(self, amount: float) -> None:
        """Something passed."""
        self._count()
        self._passed += amount

    @property
    def value(self) -> float:
        """A second; 0 before anything passed."""
        self._count()
        return self._passed / self._busy_s if self._busy_s > 0 else 0.0

    def _count(self) -> None:
        if self._since is None:
            return
        now = self._clock()
        elapsed, self._since = now - self._since, now
        fade = math.exp(-elapsed / self._memory_s)
        self._passed *= fade
        # The integral of the same fading over the time that passed.
        self._busy_s = self._busy_s * fade + self._memory_s * (1 - fade)


def _overloaded(message: str, seconds: float) -> Overloaded:
    return Overloaded(message, code="overloaded", retry_after_s=min(MAX_RETRY_S, max(1.0, seconds)))


@dataclass
class _Bucket:
    """A token bucket: a minute's amount at most, refilled evenly."""

    amount: float  # a minute, and what it holds
    left: float
    updated: float

    def refill(self, now: float) -> None:
        """What the time since the last look brings."""
        gained = (now - self.updated) * self.amount / MINUTE_S
        self.left, self.updated = min(self.amount, self.left + gained), now

    def wait_s(self, amount: float) -> float:
        """Seconds until there is so much."""
        return max(0.0, (amount - self.left) * MINUTE_S / self.amount)


class _Usage:
    """What one key has used lately, and runs now."""

    def __init__(self, key: str, allowed: Allowance, now: float) -> None:
        self.key = key
        self.running = 0
        self.allow(allowed, now)

    def allow(self, allowed: Allowance, now: float) -> None:
        """Holds it to another allowance from now on; what runs is counted on."""
        self.allowed = allowed
        amounts = {
            "requests": allowed.requests_per_minute,
            "tokens": allowed.tokens_per_minute,
            "tiles": allowed.tiles_per_minute,
        }
        self.buckets = {
            kind: _Bucket(amount, amount, now) for kind, amount in amounts.items() if amount
        }

    @property
    def idle(self) -> bool:
        """Whether forgetting it changes nothing."""
        return not self.running and all(b.left >= b.amount for b in self.buckets.values())


class Permit:
    """A request that counts as running until `end`; then what it did not use is given back."""

    def __init__(self, limits: "KeyLimits", usage: _Usage) -> None:
        self._limits = limits
        self._usage = usage
        self._ended = False

    def charge(self, *, tokens: int, tiles: int) -> None:
        """Takes the price, all of it or nothing.

        Raises:
            Overloaded: there is not so much left this minute; says when there is.
            InvalidRequest: there never is.
        """
        self._limits.take(self._usage, {"tokens": tokens, "tiles": tiles})

    def end(self, *, unused_tokens: int = 0) -> None:
        """The request has ended; at most once."""
        if self._ended:
            return
        self._ended = True
        self._usage.running -= 1
        bucket = self._usage.buckets.get("tokens")
        if bucket is not None:
            bucket.left = min(bucket.amount, bucket.left + unused_tokens)


class KeyLimits:
    """Holds every key to one allowance, or to its own; `refused` hears the limit and the key."""

    def __init__(
        self,
        allowed: Allowance,
        *,
        refused: Callable[[str, str], None] = lambda limit, key: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._allowed = allowed
        self._refused = refused
        self._clock = clock
        self._usages: OrderedDict[str, _Usage] = OrderedDict()  # least lately used first

    def begin(self, key: str, own: Allowance | None = None) -> Permit:
        """Counts a request of `key`, which may have an allowance of its own.

        Raises:
            Overloaded: too many run, or there were too many this minute.
        """
        allowed = self._allowed if own is None else own
        usage = self._usage(key, allowed)
        most = allowed.concurrent
        if most is not None and usage.running >= most:
            self._refused("concurrent", key)
            raise Overloaded(
                f"{usage.running} requests of this key are running, {most} may; "
                "wait until one has ended",
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        self.take(usage, {"requests": 1})
        usage.running += 1
        return Permit(self, usage)

    def take(self, usage: _Usage, amounts: Mapping[str, float]) -> None:
        """Takes all amounts, or raises as `Permit.charge` says and takes none."""
        now = self._clock()
        taken = [(usage.buckets[k], k, a) for k, a in amounts.items() if k in usage.buckets]
        for bucket, kind, amount in taken:
            bucket.refill(now)
            if amount > bucket.amount:
                self._refused(kind, usage.key)
                raise InvalidRequest(
                    f"the request takes {amount:,.0f} {kind} and a key may use "
                    f"{bucket.amount:,.0f} a minute; ask for less",
                    code="rate_limit_too_small",
                )
        wait, kind = max(((b.wait_s(a), k) for b, k, a in taken), default=(0.0, ""))
        if wait > 0:
            self._refused(kind, usage.key)
            raise Overloaded(
                f"this key has used its {kind} of this minute; try again in {math.ceil(wait)} s",
                code="rate_limit_exceeded",
                retry_after_s=wait,
            )
        for bucket, _, amount in taken:
            bucket.left -= amount

    def _usage(self, key: str, allowed: Allowance) -> _Usage:
        now = self._clock()
        usage = self._usages.pop(key, None) or _Usage(key, allowed, now)
        if usage.allowed != allowed:
            usage.allow(allowed, now)
        self._usages[key] = usage
        if len(self._usages) > MAX_IDLE_KEYS:
            self._forget_idle(now)
        return usage

    def _forget_idle(self, now: float) -> None:
        """Drops the keys, least lately used first, of which nothing has to be known."""
        for key, usage in list(self._usages.items())[: MAX_IDLE_KEYS // 10]:
            for bucket in usage.buckets.values():
                bucket.refill(now)
            if usage.idle:
                del self._usages[key]
