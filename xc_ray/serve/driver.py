"""One engine in a thread of its own: a stream of tokens on the event loop for each request."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.sequence import FinishReason, Image, SamplingParams, StepOutput
from xc_ray.errors import EngineError
from xc_ray.serve.messages import Tokens
from xc_ray.serve.observe import DecoderMetrics
from xc_ray.serve.scale import DecoderLoad
from xc_ray.serve.signals import WorkMeter

logger = logging.getLogger("ray.serve")

# A step that takes this long hangs: the longest honest one is a prefill chunk, well under a second
# on a GPU.
HUNG_STEP_S = 60.0

# Up to a few sequences a token never waits.
UNDELAYED_SEQUENCES = 4


@dataclass(frozen=True)
class Pace:
    """Seconds between a stream's messages: `message_s` a sequence that runs, `longest_s` at most.

    A message costs the processes of Serve time, however many tokens it holds.
    """

    message_s: float
    longest_s: float

    def interval(self, num_running: int) -> float:
        """Seconds between two messages of one stream while so many sequences run."""
        return min(max(0, num_running - UNDELAYED_SEQUENCES) * self.message_s, self.longest_s)


# With the Python proxy a message takes twice what it takes behind HAProxy, or more. Its pace leaves
# time for requests, above all for those that are refused.
PYTHON_PROXY_PACE = Pace(0.004, 0.5)
HAPROXY_PACE = Pace(0.001, 0.25)


def serve_pace() -> Pace:
    """For the proxy that Serve was started with; it tells its replicas by their environment."""
    return HAPROXY_PACE if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else PYTHON_PROXY_PACE


@dataclass(eq=False)
class TokenStream:
    """One request's way out of the engine: an item a choice, joined until a message is due.

    `interval` gives the seconds between two messages; the first tokens and the end of a choice do
    not wait for it. `on_missing` is called on the event loop with the engine id of a choice and the
    images that it cannot go on without.
    """

    engine_ids: list[str]
    interval: Callable[[], float]
    on_missing: Callable[[str, tuple[int, ...]], None] | None = None
    _new: dict[int, Tokens] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)
    _silent: set[int] = field(default_factory=set)  # choices that nothing has come from yet
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _urgent: asyncio.Event = field(default_factory=asyncio.Event)
    _sent: float = float("-inf")  # when the last message left
    _error: Exception | None = None

    def __post_init__(self) -> None:
        self._open = set(range(len(self.engine_ids)))
        self._silent = set(self._open)

    @property
    def begun(self) -> bool:
        """Whether every choice has brought something."""
        return not self._silent

    @property
    def finished(self) -> bool:
        """Whether every choice has ended and been read."""
        return not self._open and not self._new and self._error is None

    async def next(self) -> list[Tokens]:
        """What has arrived since the last call; waits for something, and until a message is due.

        Raises:
            Exception: the one that `fail` was given.
        """
        await self._arrived.wait()
        pause = self._sent + self.interval() - time.monotonic()
        if pause > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._urgent.wait()
        if self._error is not None:
            raise self._error
        self._arrived.clear()
        self._urgent.clear()
        self._sent = time.monotonic()
        items, self._new = list(self._new.values()), {}
        return items

    def put(self, output: StepOutput, index: int) -> None:
        """Joins one step's output of a choice to what waits."""
        waiting = self._new.get(index)
        if waiting is None:
            self._new[index] = waiting = Tokens(index, [], 0)
        waiting.ids += output.ids
        waiting.logprobs += [(p.logprob, p.top) for p in output.logprobs]
        waiting.num_generated = output.num_generated
        waiting.num_cached = max(waiting.num_cached, output.num_cached)
        if output.finish_reason is not None:
            waiting.finish_reason = output.finish_reason.value
            self._open.discard(index)
        if output.finish_reason is not None or index in self._silent:
            self._urgent.set()
        self._silent.discard(index)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error; of several the first one counts."""
        self._error = self._error or error
        self._urgent.set()
        self._arrived.set()


class EngineDriver:
    """Runs an engine's steps in a thread; the outputs of each reach the event loop in one call.

    That thread makes the engine, too: libraries have handles, and workspaces on the device, for
    each thread (cuBLAS on an H100: 32 MiB for every stream).
    """

    def __init__(self, make: Callable[[], Engine], metrics: DecoderMetrics, pace: Pace) -> None:
        """Returns once the engine is made, and raises what that raised."""
        self._pace = pace
        self._metrics = metrics
        self._loop = asyncio.get_event_loop()
        self._streams: dict[str, tuple[TokenStream, int]] = {}
        self._wake = threading.Event()
        self._step_started: float | None = None
        self._failure: Exception | None = None
        self._count = 0
        self._watchers: set[asyncio.Future[int]] = set()
        made: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make, made), name="engine", daemon=True
        )
        self._thread.start()
        self._engine = engine = made.result()
        # A quarter of a step's prompt tokens shows how fast they go; few hide in a decode step.
        self._prefill = WorkMeter(full=engine.config.max_prefill_tokens / 4)

    @property
    def engine(self) -> Engine:
        """The engine; its thread alone calls `step`."""
        return self._engine

    def open(self, num_choices: int, name: str = "request") -> TokenStream:
        """A stream with an engine id for each choice, which begins with `name`; on the event loop.

        Raises:
            EngineError: the engine failed or hangs.
        """
        self.check()
        self._count += 1
        # The count: a name alone may come again.
        ids = [f"{name}.{self._count}.{i}" for i in range(num_choices)]
        stream = TokenStream(ids, lambda: self._pace.interval(self._engine.num_running))
        self._streams.update({e: (stream, i) for i, e in enumerate(ids)})
        return stream

    def add(
        self,
        engine_id: str,
        ids: Sequence[int],
        params: SamplingParams,
        images: Sequence[Image],
        adapter: PackedAdapter | None = None,
        salt: bytes = b"",
    ) -> None:
        """Queues one choice unless its stream is closed; from any thread."""
        if engine_id not in self._streams:
            return
        self._engine.add(engine_id, ids, params, images, adapter, salt)
        if engine_id not in self._streams:  # closed meanwhile, when there was nothing to abort
            self._engine.abort(engine_id)
        self._wake.set()

    def supply(self, engine_id: str, index: int, embeddings: Tensor) -> None:
        """Brings the embeddings of a choice's image; from any thread."""
        self._engine.supply(engine_id, index, embeddings)
        self._wake.set()

    def close(self, stream: TokenStream) -> None:
        """Forgets a stream; what of it still runs is aborted. On the event loop."""
        for engine_id in stream.engine_ids:
            self._streams.pop(engine_id, None)
            if not stream.finished:
                self._engine.abort(engine_id)
        self._wake.set()

    def read_load(self) -> DecoderLoad:
        """The engine's load since the last reading, for autoscaling. On the event loop."""
        engine = self._engine
        return DecoderLoad(
            kv_use=engine.kv_usage,
            lane_use=(engine.num_running + engine.num_waiting) / engine.config.max_num_seqs,
            prefill_use=self._prefill.read_use(),
            waiting_tokens=float(engine.waiting_prompt_tokens),
            prefill_tokens_per_s=self._prefill.rate,
        )

    async def next_tokens(self) -> int:
        """How many tokens the next step brings, whoever they are for. On the event loop."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watchers.add(future)
        try:
            return await future
        finally:
            self._watchers.discard(future)

    def check(self) -> None:
        """Asks whether the engine works; if not, every open stream ends. On the event loop.

        Raises:
            EngineError: the engine failed, or a step hangs.
        """
        message = self._fault()
        if message is not None:
            self._fail()
            raise EngineError(message)

    def _fault(self) -> str | None:
        """What is wrong with the engine, without its inside: clients read it."""
        if self._failure is not None:
            return "the engine failed; try again later"
        started = self._step_started
        if started is not None and time.monotonic() - started > HUNG_STEP_S:
            return f"an engine step has not ended for {HUNG_STEP_S:.0f} s; try again later"
        return None

    def _run(self, make: Callable[[], Engine], made: Future[Engine]) -> None:
        try:
            engine = make()
        except BaseException as e:  # noqa: BLE001 - the constructor raises it
            made.set_exception(e)
            return
        made.set_result(engine)
        self._step_on()

    def _step_on(self) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                while self._engine.has_work:
                    self._step_started = started = time.monotonic()
                    prefilled = self._engine.num_prefilled
                    outputs = self._engine.step()
                    self._step_started = None
                    self._note(self._engine.num_prefilled - prefilled, time.monotonic() - started)
                    if outputs:
                        self._loop.call_soon_threadsafe(self._deliver, outputs)
                    if self._engine.failure is not None:
                        # Nobody knows which request it was, nor what the device still holds.
                        raise EngineError(self._engine.failure)
        except Exception as e:
            logger.exception("the engine failed")
            self._failure = e
            self._loop.call_soon_threadsafe(self._fail)

    def _note(self, num_prefilled: int, seconds: float) -> None:
        """A step has ended; with nothing to follow, its state is that of the pause."""
        engine, metrics = self._engine, self._metrics
        self._prefill.add(num_prefilled, seconds)
        metrics.step(engine.num_stepped, num_prefilled, seconds)
        if not engine.has_work or metrics.is_due():
            metrics.state(
                engine.kv_usage, engine.num_running, engine.num_waiting, engine.num_preemptions
            )

    def _deliver(self, outputs: list[StepOutput]) -> None:
        num_tokens = sum(len(output.ids) for output in outputs)
        if num_tokens:
            for future in self._watchers:
                if not future.done():
                    future.set_result(num_tokens)
        for output in outputs:
            entry = self._streams.get(output.request_id)
            if entry is not None:  # None: closed meanwhile
                self._hand_on(output, *entry)

    def _hand_on(self, output: StepOutput, stream: TokenStream, index: int) -> None:
        if output.finish_reason is FinishReason.ERROR:
            logger.error("the engine failed on request %s: %s", output.request_id, output.error)
            stream.fail(EngineError("the engine failed on this request; try again"))
        elif output.ids or output.finish_reason is not None:
            stream.put(output, index)
        if output.missing_images:
            assert stream.on_missing is not None, "images are added without anybody to bring them"
            stream.on_missing(output.request_id, output.missing_images)

    def _fail(self) -> None:
        message = self._fault()
        assert message is not None
        for stream, _ in self._streams.values():
            stream.fail(EngineError(message))
