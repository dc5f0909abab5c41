"""Every metric by name and unit; Ray exports them with deployment, replica and application.

Tags hold versions and aliases of the registry only, never what a request says: their number is
bounded by what was published.
"""

from collections.abc import Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

LOAD_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


SQUARES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]


class EncoderMetrics:
    """What one vision encoder does, and what its cache of embeddings spares it."""

    def __init__(self) -> None:
        self._pictures = Counter(
            "xc_ray_encoder_pictures",
            "Pictures asked for, by result: hit, miss, or joined to an encoding under way.",
            tag_keys=("result",),
        )
        self._cache_bytes = Gauge(
            "xc_ray_encoder_cache_bytes", "Host memory that kept embeddings take."
        )
        self._evictions = Counter(
            "xc_ray_encoder_cache_evictions", "Embeddings that left the cache for want of room."
        )
        self._pass_squares = Histogram(
            "xc_ray_encoder_pass_squares",
            "Squares in one pass of the tower, of all pictures.",
            boundaries=SQUARES,
        )
        self._pass_seconds = Counter(
            "xc_ray_encoder_pass_seconds", "Time that passes of the tower took, in seconds."
        )

    def picture(self, result: str) -> None:
        """A picture was asked for: hit, miss or joined."""
        self._pictures.inc(tags={"result": result})

    def cache_bytes(self, size: int) -> None:
        """What the kept embeddings take now."""
        self._cache_bytes.set(size)

    def evicted(self) -> None:
        """Embeddings left the cache for want of room."""
        self._evictions.inc()

    def ran(self, num_squares: int, seconds: float) -> None:
        """A pass of the tower has run."""
        self._pass_squares.observe(num_squares)
        self._pass_seconds.inc(seconds)


class AdapterMetrics:
    """What happens to the adapters of one decoder."""

    def __init__(self) -> None:
        self._loads = Counter(
            "xc_ray_adapter_loads",
            "Adapters brought into host memory, by result: ok, failed.",
            tag_keys=("result",),
        )
        self._load_seconds = Histogram(
            "xc_ray_adapter_load_seconds",
            "From the store or this machine's cache into host memory, in seconds.",
            boundaries=LOAD_SECONDS,
        )
        self._host_evictions = Counter(
            "xc_ray_adapter_host_evictions", "Adapters that left host memory for want of room."
        )
        self._host_bytes = Gauge("xc_ray_adapter_host_bytes", "Host memory that adapters take.")
        self._slot_loads = Counter("xc_ray_adapter_slot_loads", "Copies into device slots.")
        self._slot_evictions = Counter(
            "xc_ray_adapter_slot_evictions", "Adapters that left a device slot for another."
        )
        self._slot_reloads = Counter(
            "xc_ray_adapter_slot_reloads",
            "Adapters back in a slot soon after they left one: more are in use than slots.",
        )
        self._polls = Counter(
            "xc_ray_registry_polls", "Reads of the registry, by result: ok, failed.", ("result",)
        )
        self._switches = Counter(
            "xc_ray_adapter_alias_switches",
            "Moves of an alias, by result: ok, or failed where the old version stays.",
            tag_keys=("result",),
        )
        self._behind = Gauge(
            "xc_ray_adapter_aliases_behind",
            "Aliases that serve something else than the registry says.",
        )
        self._alias_share = Gauge(
            "xc_ray_adapter_alias_share",
            "Share of an alias's requests that a version gets here, 0 to 1.",
            tag_keys=("adapter", "alias", "version"),  # type: ignore[arg-type]  # any length
        )
        self._requests = Counter(
            "xc_ray_adapter_requests",
            "Requests that have ended, by version.",
            tag_keys=("adapter", "version"),  # type: ignore[arg-type]  # any length
        )
        self._tokens = Counter(
            "xc_ray_adapter_generated_tokens",
            "Tokens generated, by version.",
            tag_keys=("adapter", "version"),  # type: ignore[arg-type]  # any length
        )
        self._slots = (0, 0, 0)

    def load(self, seconds: float | None) -> None:
        """An adapter came into host memory, or could not (None)."""
        self._loads.inc(tags={"result": _result(seconds is not None)})
        if seconds is not None:
            self._load_seconds.observe(seconds)

    def host_eviction(self) -> None:
        """An adapter left host memory for want of room."""
        self._host_evictions.inc()

    def host_bytes(self, size: int) -> None:
        """What the adapters in host memory take now."""
        self._host_bytes.set(size)

    def slots(self, loads: int, evictions: int, reloads: int) -> None:
        """The engine's counts since its start; they only grow."""
        counters = (self._slot_loads, self._slot_evictions, self._slot_reloads)
        now = (loads, evictions, reloads)
        for counter, new, old in zip(counters, now, self._slots, strict=True):
            if new > old:
                counter.inc(new - old)
        self._slots = now

    def poll(self, ok: bool) -> None:
        """The registry was read, or could not be."""
        self._polls.inc(tags={"result": _result(ok)})

    def switch(self, ok: bool) -> None:
        """An alias was moved here, or could not be."""
        self._switches.inc(tags={"result": _result(ok)})

    def behind(self, count: int) -> None:
        """How many aliases serve something else than the registry says."""
        self._behind.set(count)

    def alias(
        self, adapter: str, alias: str, before: Mapping[int, float], now: Mapping[int, float]
    ) -> None:
        """The shares of an alias's versions before and from now on."""
        for version in {**before, **now}:
            tags = {"adapter": adapter, "alias": alias, "version": str(version)}
            self._alias_share.set(now.get(version, 0.0), tags=tags)

    def request(self, adapter: str, version: int, tokens: int) -> None:
        """A request with an adapter has ended."""
        tags = {"adapter": adapter, "version": str(version)}
        self._requests.inc(tags=tags)
        if tokens:
            self._tokens.inc(tokens, tags=tags)


def _result(ok: bool) -> str:
    return "ok" if ok else "failed"


class RoutingMetrics:
    """Where an ingress sends requests; the decoder's own cache says what was really held."""

    def __init__(self) -> None:
        self._requests = Counter(
            "xc_ray_routing_requests",
            "Requests sent to a decoder that is known to hold their beginning, or not: yes, no.",
            tag_keys=("held",),
        )
        self._held_tokens = Counter(
            "xc_ray_routing_held_tokens", "Prompt tokens that were known to be held there."
        )
        self._outstanding = Gauge(
            "xc_ray_routing_outstanding_tokens",
            "Prompt and answer tokens of the requests that an ingress has under way.",
        )

    def routed(self, held_tokens: int) -> None:
        """A request went to a decoder that holds so many of its tokens."""
        self._requests.inc(tags={"held": "yes" if held_tokens else "no"})
        if held_tokens:
            self._held_tokens.inc(held_tokens)

    def outstanding(self, tokens: int) -> None:
        """What is under way now."""
        self._outstanding.set(tokens)
