"""Every metric by name and unit; Ray exports them with deployment, replica and application.

Tags hold our own words, names of the key file, and versions and aliases of the registry, never what
a request says: their number is bounded by what we wrote and what was published.

Nothing is told for each token: a step, a message or a request at most.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from ray.serve.context import _get_internal_replica_context
from ray.serve.metrics import Counter, Gauge, Histogram

LOAD_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
WAIT_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0]
INTERVAL_SECONDS = [0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0]
SQUARES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
SEQUENCES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
STATE_S: Final = 1.0  # at most so often the engine's state is told; Ray reports every 10 s


def join_logs() -> None:
    """What the package logs outside of `serve` goes where this replica's own lines go.

    Serve gives handlers to its logger alone, in the form that `logging_config` asks for. In a
    replica only: elsewhere the process is not a deployment's own.
    """
    if _get_internal_replica_context() is None:
        return
    logging.getLogger("xc_ray").parent = logging.getLogger("ray.serve")


class IngressMetrics:
    """Chat requests as their clients see them."""

    def __init__(self) -> None:
        self._requests = Counter(
            "xc_ray_requests",
            "Chat requests that ended, and all that had no key, by outcome and error code.",
            tag_keys=("outcome", "code"),  # type: ignore[arg-type]  # any length
        )
        self._open = Gauge("xc_ray_open_requests", "Chat requests that came and have not ended.")
        self._first_token = Histogram(
            "xc_ray_first_token_seconds",
            "From a request's arrival to the first tokens of its answer, in seconds.",
            boundaries=WAIT_SECONDS,
        )
        self._token_interval = Histogram(
            "xc_ray_token_interval_seconds",
            "Mean time between two tokens of an answer, in seconds; one value for each answer.",
            boundaries=INTERVAL_SECONDS,
        )
        self._prompt_tokens = Counter("xc_ray_prompt_tokens", "Prompt tokens of answers.")
        self._image_tokens = Counter(
            "xc_ray_image_tokens", "Those of them that stand for pictures."
        )
        self._cached_tokens = Counter(
            "xc_ray_cached_tokens", "Those of them that a decoder's cache held."
        )
        self._generated_tokens = Counter("xc_ray_generated_tokens", "Tokens of answers.")
        self._tiles = Counter("xc_ray_tiles", "Tiles of the pictures of answered requests.")
        self._key_refusals = Counter(
            "xc_ray_key_refusals",
            "Requests beyond a key's allowance, by limit: requests, tokens, tiles, concurrent; "
            "by key where there is a key file.",
            tag_keys=("limit", "key"),  # type: ignore[arg-type]  # any length
        )
        self._num_open = 0

    def opened(self) -> None:
        """A request has come."""
        self._num_open += 1
        self._open.set(self._num_open)

    def closed(self, outcome: str, code: str) -> None:
        """A request that was opened has ended."""
        self._num_open -= 1
        self._open.set(self._num_open)
        self.ended(outcome, code)

    def ended(self, outcome: str, code: str) -> None:
        """A request has ended, opened or not."""
        self._requests.inc(tags={"outcome": outcome, "code": code})

    def first_token(self, seconds: float) -> None:
        """The first tokens of an answer came after so long."""
        self._first_token.observe(seconds)

    def token_interval(self, seconds: float) -> None:
        """An answer's tokens came so far apart."""
        self._token_interval.observe(seconds)

    def answered(self, *, prompt: int, image: int, cached: int, generated: int, tiles: int) -> None:
        """What an answer took, whole or not."""
        told = (
            (self._prompt_tokens, prompt),
            (self._image_tokens, image),
            (self._cached_tokens, cached),
            (self._generated_tokens, generated),
            (self._tiles, tiles),
        )
        for counter, amount in told:
            if amount:
                counter.inc(amount)

    def key_refused(self, limit: str, key: str) -> None:
        """A request was more than a key may; `key` is its name in the key file, or empty."""
        self._key_refusals.inc(tags={"limit": limit, "key": key})


class DecoderMetrics:
    """What one decoder's engine does, and what waits in front of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kv_use = Gauge(
            "xc_ray_kv_use", "Share of the key/value cache that running requests hold, 0 to 1."
        )
        self._running = Gauge(
            "xc_ray_running_sequences", "Sequences with room in the cache, in prefill or decode."
        )
        self._waiting = Gauge(
            "xc_ray_waiting_sequences", "Sequences in the engine that wait for room in the cache."
        )
        self._queued = Gauge(
            "xc_ray_queued_sequences", "Sequences that wait at the gates before the engine."
        )
        self._queue_seconds = Histogram(
            "xc_ray_queue_seconds",
            "Time that a request which was let in waited at the gates, in seconds.",
            boundaries=WAIT_SECONDS,
        )
        self._step_sequences = Histogram(
            "xc_ray_step_sequences", "Sequences in one step of the engine.", boundaries=SEQUENCES
        )
        self._step_seconds = Counter(
            "xc_ray_step_seconds", "Time that steps of the engine took, in seconds."
        )
        self._prefilled_tokens = Counter(
            "xc_ray_prefilled_tokens", "Prompt tokens computed, those of preempted requests again."
        )
        self._preemptions = Counter(
            "xc_ray_preemptions", "Times a running request gave its room in the cache up."
        )
        self._num_preemptions = 0
        self._next_state = float("-inf")

    def step(self, num_sequences: int, num_prefilled: int, seconds: float) -> None:
        """The engine ran a step. From its thread."""
        if num_sequences:
            self._step_sequences.observe(num_sequences)
        if seconds:  # Ray refuses to add nothing
            self._step_seconds.inc(seconds)
        if num_prefilled:
            self._prefilled_tokens.inc(num_prefilled)

    def is_due(self) -> bool:
        """Whether the engine's state was last told long enough ago."""
        return self._clock() >= self._next_state

    def state(self, kv_use: float, running: int, waiting: int, preemptions: int) -> None:
        """The engine now; preemptions since its start, which only grow. From its thread."""
        self._next_state = self._clock() + STATE_S
        self._kv_use.set(kv_use)
        self._running.set(running)
        self._waiting.set(waiting)
        if preemptions > self._num_preemptions:
            self._preemptions.inc(preemptions - self._num_preemptions)
            self._num_preemptions = preemptions

    def queued(self, num_sequences: int) -> None:
        """So many wait at the gates now."""
        self._queued.set(num_sequences)

    def let_in(self, seconds: float) -> None:
        """A request that waited so long was let in."""
        self._queue_seconds.observe(seconds)


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
