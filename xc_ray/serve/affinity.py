"""Which replica a request should go to: one that holds its beginning or adapter, within its load.

No Ray here. Routers that never speak to each other agree by rendezvous hashing (Thaler and
Ravishankar, 1998): each request ranks the replicas by hashes of its beginning with their names, so
that a lost or added replica moves its own share alone. A router's own record of what it sent where
goes before the hash. A replica with too much outstanding is passed over, as in consistent hashing
with bounded loads (1608.01350).
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xc_ray.serve.prefixes import KEY_BYTES, Route, key_of

MAX_KEYS = 32_768  # beginnings that a router remembers, some 8 MB
MAX_HOLDERS = 4  # replicas that it remembers of each


@dataclass(frozen=True)
class Loaded:
    """The adapters that a replica has, each as NAME@VERSION."""

    device: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()

    def level(self, adapter: str) -> int:
        """2 if it is in a device slot, 1 if in host memory, 0 if neither.

        An alias or a bare name means whatever the decoder says; any version of the name counts.
        """
        for level, labels in ((2, self.device), (1, self.host)):
            if any(_means(adapter, label) for label in labels):
                return level
        return 0


NOTHING_LOADED = Loaded()


class Affinity:
    """One router's knowledge, and its choice.

    A replica is passed over while it has more tokens outstanding than `load_factor` times the mean
    of all, unless that is less than `free_tokens`. The least loaded one never is.
    """

    def __init__(
        self, *, load_factor: float = 1.5, free_tokens: int = 0, max_keys: int = MAX_KEYS
    ) -> None:
        self.outstanding = Outstanding()
        self._load_factor = load_factor
        self._free_tokens = free_tokens
        self._max_keys = max_keys
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()  # longest unused first
        self._random = random.Random()

    def rank(
        self, route: Route, replicas: Collection[str], loaded: Mapping[str, Loaded] | None = None
    ) -> list[list[str]]:
        """Groups of replicas to try in turn; within a group the one with the shortest queue.

        The longest shared beginning comes first, then the adapter, then the hash. A request with
        nothing to share has two of all, at random, before the others.
        """
        if not route.keys and not route.adapter:
            names = self._random.sample(sorted(replicas), len(replicas))
            return [group for group in (names[:2], names[2:]) if group]
        order = self._preferred(route, replicas, loaded or {})
        limit = self.limit(replicas)
        busy = {name for name in order if self.outstanding.tokens(name) > limit}
        later = sorted(busy, key=lambda name: (self.outstanding.tokens(name), name))
        return [[name] for name in order if name not in busy] + [[name] for name in later]

    def limit(self, replicas: Collection[str]) -> float:
        """Outstanding tokens beyond which a replica is passed over."""
        total = sum(self.outstanding.tokens(name) for name in replicas)
        return max(self._free_tokens, self._load_factor * total / len(replicas))

    def note(self, route: Route, replica: str) -> None:
        """A replica took the request: it will hold its beginnings."""
        for key in route.keys:
            others = [name for name in self._holders.pop(key, ()) if name != replica]
            self._holders[key] = (replica, *others[: MAX_HOLDERS - 1])
        while len(self._holders) > self._max_keys:
            self._holders.popitem(last=False)

    def held(self, route: Route, replica: str) -> int:
        """Tokens of the longest beginning that is known to have gone to this replica."""
        for key, length in zip(reversed(route.keys), reversed(route.lengths), strict=True):
            if replica in self._holders.get(key, ()):
                return length
        return 0

    def _preferred(
        self, route: Route, replicas: Iterable[str], loaded: Mapping[str, Loaded]
    ) -> list[str]:
        adapter = key_of(route.adapter.encode())
        home = route.keys[0] if route.keys else adapter

        def preference(name: str) -> tuple[int, int, int]:
            level = 0
            if route.adapter:
                level = loaded.get(name, NOTHING_LOADED).level(route.adapter)
            # Where an adapter goes first is the same for all of its requests, so that few load it.
            key = home if level or not route.adapter else adapter
            return self.held(route, name), level, score(key, name)

        return sorted(replicas, key=preference, reverse=True)


@dataclass
class Outstanding:
    """Prompt and answer tokens of the requests that a router has under way, by replica."""

    _requests: dict[str, tuple[str, int]] = field(default_factory=dict)
    _tokens: Counter[str] = field(default_factory=Counter)

    def tokens(self, replica: str) -> int:
        """What a replica has of this router."""
        return self._tokens[replica]

    @property
    def total(self) -> int:
        """What all of them have."""
        return self._tokens.total()

    def place(self, request: str, replica: str, tokens: int) -> None:
        """A request goes to a replica; if it was meant for another, to this one instead."""
        self.release(request)
        self._requests[request] = (replica, tokens)
        self._tokens[replica] += tokens

    def move(self, request: str, replica: str) -> None:
        """A request that is under way went to this replica."""
        if request in self._requests:
            self.place(request, replica, self._requests[request][1])

    def release(self, request: str, replica: str | None = None) -> None:
        """A request has ended; with `replica` only if that is where it is."""
        where, tokens = self._requests.get(request, (None, 0))
        if where is not None and replica in (None, where):
            del self._requests[request]
            self._tokens[where] -= tokens

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets what went to other replicas: they are gone."""
        for request, (where, _) in tuple(self._requests.items()):
            if where not in replicas:
                self.release(request)
        for name in tuple(self._tokens):
            if name not in replicas:
                del self._tokens[name]


def score(key: int, replica: str) -> int:
    """Rendezvous weight of a replica for a key; the highest has it."""
    return key_of(key.to_bytes(KEY_BYTES, "little") + replica.encode())


def loaded_of(stats: Mapping[str, Sequence[str]]) -> Loaded:
    """What a decoder's `record_routing_stats` says."""
    return Loaded(frozenset(stats.get("device", ())), frozenset(stats.get("host", ())))


def _means(adapter: str, label: str) -> bool:
    name, _, version = adapter.partition("@")
    return label == adapter if version.isdigit() else label.partition("@")[0] == name
