"""Decoder deployment: drives one Engine, streams tokens, aborts when the client has gone."""

import asyncio
import logging
import threading
import time
import warnings
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from xc_ray.config import ServeConfig
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import SamplingParams, StepOutput
from xc_ray.errors import EngineError, MediaError
from xc_ray.hub import resolve_model
from xc_ray.model.config import XComposerConfig
from xc_ray.model.weights import Checkpoint
from xc_ray.plan import CPU_CACHE_REQUESTS, decoder_plan, engine_limits
from xc_ray.serve.device import Device
from xc_ray.serve.messages import GenerateRequest, Picture, Sampling, Tokens

logger = logging.getLogger("ray.serve")

# A step that takes this long hangs: the longest honest one is a prefill chunk, well under a second
# on a GPU.
HUNG_STEP_S = 60.0


class Decoder:
    """One language model behind an engine of its own thread.

    `generate` fetches the pictures' embeddings from the encoder (by reference: they go through the
    object store and nobody else holds them), then yields lists of `Tokens`.
    """

    def __init__(self, config: ServeConfig, encoder: DeploymentHandle[Any]) -> None:
        device = Device.of_replica(config.dtype, config.decoder.num_gpus)
        started = time.monotonic()
        checkpoint = Checkpoint.open(resolve_model(config.model))
        limits = engine_config(config, checkpoint.config, device)
        decoder = checkpoint.load_decoder(device=device.name, dtype=device.dtype)
        loaded = time.monotonic() - started
        self._dtype = device.dtype
        self._stop_token_ids = checkpoint.config.stop_token_ids
        self._bos = checkpoint.config.tokens.bos
        self._encoder = encoder.options(_by_reference=True)
        self._driver = EngineDriver(Engine(decoder, limits))
        logger.info(
            "decoder ready: %s on %s, %s, loaded in %.1f s",
            config.public_name,
            device,
            limits,
            loaded,
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Tokens]]:
        """New tokens of every choice, joined over the steps that passed since the last item.

        Raises:
            MediaError: a picture is damaged.
            InvalidRequest: the engine refuses the prompt.
            EngineError: the engine failed.
        """
        embeddings = await self._embeddings(request)
        stream = self._driver.open(request.num_choices)
        try:
            await asyncio.to_thread(self._add, stream, request, embeddings)
            del embeddings
            while not stream.finished:
                yield await stream.next()
        finally:
            self._driver.close(stream)

    async def ready(self) -> int:
        """New tokens, at least one: the proof that this replica answers.

        A token of its own, or of anybody that is served meanwhile.
        """
        own = asyncio.create_task(self._own_token())
        others = asyncio.create_task(self._driver.next_tokens())
        done, rest = await asyncio.wait({own, others}, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        return done.pop().result()

    async def _own_token(self) -> int:
        sampling = Sampling(1, 0.0, 0, 1.0, 0.0, 0.0, 1.0, 0)
        request = GenerateRequest("ready", array("i", [self._bos]), sampling)
        return sum([t.num_generated async for batch in self.generate(request) for t in batch])

    def check_health(self) -> None:
        """Serve's health check.

        Raises:
            EngineError: the engine's thread died, or a step hangs.
        """
        self._driver.check()

    async def _embeddings(self, request: GenerateRequest) -> list[torch.Tensor]:
        return list(await asyncio.gather(*map(self._embedding, request.pictures)))

    async def _embedding(self, picture: Picture) -> torch.Tensor:
        try:
            array = await self._encoder.encode.remote(picture.data, picture.grid)
        except RayTaskError as e:
            bad, where = e.cause, picture.where
            if isinstance(bad, MediaError):
                message = f"{where}: {bad.message}"
                raise MediaError(message, param=where, code=bad.code) from None
            raise
        return _from_array(array, self._dtype)

    def _add(
        self, stream: "TokenStream", request: GenerateRequest, embeddings: list[torch.Tensor]
    ) -> None:
        params = SamplingParams(stop_token_ids=self._stop_token_ids, **asdict(request.sampling))
        for index, engine_id in enumerate(stream.engine_ids):
            seeded = replace(params, seed=params.seed + index)
            self._driver.add(engine_id, request.ids, seeded, embeddings)


@dataclass
class TokenStream:
    """One request's way out of the engine: an item a choice, joined while nobody reads."""

    engine_ids: list[str]
    _new: dict[int, Tokens] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _error: Exception | None = None

    def __post_init__(self) -> None:
        self._open = set(range(len(self.engine_ids)))

    @property
    def finished(self) -> bool:
        """Whether every choice has ended and been read."""
        return not self._open and not self._new and self._error is None

    async def next(self) -> list[Tokens]:
        """What has arrived since the last call; waits for something."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        items, self._new = list(self._new.values()), {}
        return items

    def put(self, output: StepOutput, index: int) -> None:
        """Joins one step's output of a choice to what waits."""
        logprobs = [(p.logprob, p.top) for p in output.logprobs]
        waiting = self._new.get(index)
        if waiting is None:
            self._new[index] = waiting = Tokens(index, [], 0, None, [], output.num_cached)
        waiting.ids += output.ids
        waiting.logprobs += logprobs
        waiting.num_generated = output.num_generated
        if output.finish_reason is not None:
            waiting.finish_reason = output.finish_reason.value
            self._open.discard(index)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error."""
        self._error = error
        self._arrived.set()


class EngineDriver:
    """Runs an engine's steps in a thread; the outputs of each reach the event loop in one call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_event_loop()
        self._streams: dict[str, tuple[TokenStream, int]] = {}
        self._wake = threading.Event()
        self._step_started: float | None = None
        self._failure: Exception | None = None
        self._count = 0
        self._watchers: list[asyncio.Future[int]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def open(self, num_choices: int) -> TokenStream:
        """A stream with an engine id for each choice; on the event loop."""
        self.check()
        self._count += 1
        stream = TokenStream([f"{self._count}.{i}" for i in range(num_choices)])
        self._streams.update({e: (stream, i) for i, e in enumerate(stream.engine_ids)})
        return stream

    def add(
        self,
        engine_id: str,
        ids: Sequence[int],
        params: SamplingParams,
        embeddings: list[torch.Tensor],
    ) -> None:
        """Queues one choice unless its stream is closed; from any thread."""
        if engine_id not in self._streams:
            return
        self._engine.add(engine_id, ids, params, embeddings)
        if engine_id not in self._streams:  # closed meanwhile, when there was nothing to abort
            self._engine.abort(engine_id)
        self._wake.set()

    def close(self, stream: TokenStream) -> None:
        """Forgets a stream; what of it still runs is aborted. On the event loop."""
        for engine_id in stream.engine_ids:
            self._streams.pop(engine_id, None)
            if not stream.finished:
                self._engine.abort(engine_id)
        self._wake.set()

    async def next_tokens(self) -> int:
        """How many tokens the next step brings, whoever they are for. On the event loop."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watchers.append(future)
        return await future

    def check(self) -> None:
        """Raises EngineError if the thread failed or a step hangs."""
        if self._failure is not None:
            raise EngineError(f"the engine stopped: {self._failure}")
        started = self._step_started
        if started is not None and time.monotonic() - started > HUNG_STEP_S:
            raise EngineError(f"an engine step has not ended for {HUNG_STEP_S:.0f} s")

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                while self._engine.has_work:
                    self._step_started = time.monotonic()
                    outputs = self._engine.step()
                    self._step_started = None
                    if outputs:
                        self._loop.call_soon_threadsafe(self._deliver, outputs)
        except Exception as e:
            logger.exception("the engine failed")
            self._failure = e
            self._loop.call_soon_threadsafe(self._fail, e)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        num_tokens = sum(len(output.ids) for output in outputs)
        if num_tokens:
            for future in self._watchers:
                if not future.done():
                    future.set_result(num_tokens)
            self._watchers.clear()
        for output in outputs:
            entry = self._streams.get(output.request_id)
            if entry is not None:  # None: closed meanwhile
                entry[0].put(output, entry[1])

    def _fail(self, error: Exception) -> None:
        for stream, _ in self._streams.values():
            stream.fail(EngineError(f"the engine failed: {type(error).__name__}"))


def engine_config(config: ServeConfig, model: XComposerConfig, device: Device) -> EngineConfig:
    """The engine's limits: what the share holds on a GPU, a few of the longest requests on CPU."""
    length = config.max_model_len or model.decoder.max_length
    wanted = config.decoder
    if not device.on_gpu:
        tokens = wanted.kv_cache_tokens or CPU_CACHE_REQUESTS * length
        return EngineConfig(length, tokens, wanted.max_num_seqs, wanted.max_prefill_tokens)
    plan = decoder_plan(
        model,
        device.budget,
        number_bytes=device.dtype.itemsize,
        max_num_seqs=wanted.max_num_seqs,
        max_prefill_tokens=wanted.max_prefill_tokens,
    )
    limits = engine_limits(
        plan,
        max_model_len=length,
        max_num_seqs=wanted.max_num_seqs,
        max_prefill_tokens=wanted.max_prefill_tokens,
        kv_cache_tokens=wanted.kv_cache_tokens,
    )
    device.enforce()
    return limits


def _from_array(a: npt.NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
    """The encoder's array as a tensor over the same memory; it is only ever read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        x = torch.from_numpy(a)
    return x.view(dtype) if a.dtype == np.uint16 else x
