"""Decoder deployment: streams tokens of one engine, and has the pictures encoded that it asks for.

The engine's thread and its streams are in `driver`, what adapters are called and where they come
from in `adapters`; who leaves is aborted here.
"""

import asyncio
import logging
import warnings
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import copy_context
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from xc_ray.config import ServeConfig
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.sequence import Image, SamplingParams
from xc_ray.errors import (
    EngineError,
    InvalidRequest,
    MediaError,
    NotFound,
    Overloaded,
    XcRayError,
)
from xc_ray.hub import resolve_model
from xc_ray.model.weights import Checkpoint
from xc_ray.serve.adapters import Adapters, Use
from xc_ray.serve.device import Device
from xc_ray.serve.driver import EngineDriver, TokenStream, serve_pace
from xc_ray.serve.fit import engine_config, fitting_engine
from xc_ray.serve.lobby import Guest, Lobby
from xc_ray.serve.messages import (
    DecoderState,
    GenerateRequest,
    Notice,
    Picture,
    Sampling,
    Tokens,
)
from xc_ray.serve.observe import DecoderMetrics, join_logs
from xc_ray.serve.opening import open_adapters
from xc_ray.serve.prefixes import Route
from xc_ray.serve.redaction import redact
from xc_ray.serve.startup import Startup

logger = logging.getLogger("ray.serve")

MAX_ENCODE_TRIES = 3  # of one picture, on encoders that are lost one after the other


class Decoder:
    """One language model behind an engine of its own thread.

    `generate` yields lists of `Tokens`, and errors as messages. Pictures whose rows the prefix
    cache has are never encoded; the embeddings of the others come from the encoder by reference:
    they go through the object store, and nobody else holds them.
    """

    def __init__(self, config: ServeConfig, encoder: DeploymentHandle[Any]) -> None:
        redact(logger)
        join_logs()
        startup, metrics = Startup("decoder"), DecoderMetrics()
        device = Device.of_replica(config.dtype, config.decoder.num_gpus)
        with startup.phase("model files"):
            checkpoint = Checkpoint.open(resolve_model(config.model, config.registry))
        limits = engine_config(config, checkpoint.config, device)
        with startup.phase("weights"):
            decoder = checkpoint.load_decoder(device=device.name, dtype=device.dtype)
        self._name = serve.get_replica_context().replica_tag if _in_serve() else "decoder"
        self._dtype = device.dtype
        self._config = checkpoint.config
        self._encoder = encoder.options(_by_reference=True)
        with startup.phase("engine"):
            given = config.decoder.kv_cache_tokens
            self._driver = EngineDriver(
                lambda: fitting_engine(decoder, limits, given=given), metrics, serve_pace()
            )
        engine = self._driver.engine
        self._lobby = Lobby(engine.config, config.limits, metrics)
        self._adapters: Adapters | None = None
        if limits.max_loras:
            with startup.phase("adapters"):
                self._adapters = open_adapters(config, checkpoint, engine)
            self._adapters.watch.start()
        startup.ready(f"{config.public_name} on {device}, {engine.config}")

    async def generate(
        self, request: GenerateRequest, route: Route | None = None
    ) -> AsyncIterator[list[Tokens] | Notice]:
        """New tokens of every choice, joined over the steps that passed since the last item.

        `route` is the router's (`serve/router.py`), which has chosen by it. An `XcRayError` comes
        as a `Notice`, after which nothing comes:
            MediaError: a picture is damaged.
            InvalidRequest: the engine refuses the prompt, or the adapter does not fit.
            NotFound: there is no such adapter.
            RegistryError: the adapter cannot be loaded now.
            EngineError: the engine failed.
            Overloaded: too much is waiting.
        """
        lobby, me = self._lobby, self._name
        try:
            with lobby.ask(request) as guest:
                if guest.waits and (closed_s := lobby.closed_s(request)):
                    yield Notice(me, closed_s=closed_s)
                await guest.let_in()
                async with aclosing(self._inside(request, guest)) as batches:
                    async for batch in batches:
                        yield batch
        except Overloaded as e:
            yield Notice(me, e, lobby.closed_s(request))
        except XcRayError as e:
            logger.info("%s ends with %s: %s", request.request_id, type(e).__name__, e.message)
            yield Notice(me, e)

    async def _inside(
        self, request: GenerateRequest, guest: Guest
    ) -> AsyncGenerator[list[Tokens], None]:
        logger.info(
            "%s: %d prompt tokens, %d pictures, let in after %.3f s",
            request.request_id,
            len(request.ids),
            len(request.pictures),
            guest.waited_s,
        )
        async with aclosing(self._answer(request)) as batches:
            async for batch in batches:
                guest.note(batch)
                yield batch

    async def _answer(self, request: GenerateRequest) -> AsyncGenerator[list[Tokens], None]:
        use = await self._adapter(request) if request.adapter else None
        batches = self._generate(request, use.hold.packed if use else None)
        try:
            async for batch in batches:
                if use is not None:
                    use.note(batch)
                yield batch
        finally:
            await batches.aclose()  # at once, not when the interpreter finds it
            if use is not None:
                use.release()

    async def _adapter(self, request: GenerateRequest) -> Use:
        if self._adapters is None:
            raise NotFound(
                f"adapter {request.adapter!r} is not served: adapters are off here "
                "(adapters.slots is 0, or the decoder's share has no room for one)",
                param="model",
                code="model_not_found",
            )
        return await self._adapters.take(request.adapter, request.sticky, request.sees)

    async def _generate(
        self, request: GenerateRequest, adapter: PackedAdapter | None
    ) -> AsyncGenerator[list[Tokens], None]:
        stream = self._driver.open(request.num_choices, request.request_id)
        supply = PictureSupply(request.pictures, self._encode, self._driver, stream)
        try:
            await asyncio.to_thread(self._add, stream, request, adapter)
            while not stream.finished:
                yield await stream.next()
                if stream.begun:
                    supply.release()
        finally:
            supply.close()
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
        request = GenerateRequest("ready", array("i", [self._config.tokens.bos]), sampling)
        return sum([t.num_generated async for batch in self._answer(request) for t in batch])

    async def check_health(self) -> None:
        """Serve's health check; on the event loop, because open streams hear of a fault.

        Raises:
            EngineError: the engine's thread died, or a step hangs.
        """
        self._driver.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's question for `scale.DecoderPolicy`."""
        return self._lobby.beside(self._driver.read_load())._asdict()

    async def adapters(self) -> DecoderState:
        """What this decoder knows of adapters, and where they are loaded."""
        if self._adapters is None:
            return DecoderState(self._name)
        return self._adapters.state(self._name)

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """Where adapters are loaded, for the routers; Serve asks, and tells them what is new."""
        return {} if self._adapters is None else self._adapters.loaded()

    def _add(
        self, stream: TokenStream, request: GenerateRequest, adapter: PackedAdapter | None
    ) -> None:
        sampling = asdict(request.sampling)
        ignore_eos = sampling.pop("ignore_eos")
        stop = frozenset[int]() if ignore_eos else self._config.stop_token_ids
        params = SamplingParams(stop_token_ids=stop, **sampling)
        images = [
            (self._config.image_tokens(p.grid.rows, p.grid.cols), p.digest())
            for p in request.pictures
        ]
        for index, engine_id in enumerate(stream.engine_ids):
            seeded = replace(params, seed=params.seed + index)
            own = [Image(*i) for i in images]
            self._driver.add(engine_id, request.ids, seeded, own, adapter, request.salt.encode())

    async def _encode(self, picture: Picture) -> torch.Tensor:
        """A picture's embeddings; an encoder that is lost meanwhile costs only time."""
        for _ in range(MAX_ENCODE_TRIES - 1):
            try:
                return await self._encode_once(picture)
            except RayActorError as e:
                logger.warning("an encoder was lost, another one is asked: %r", e)
        return await self._encode_once(picture)

    async def _encode_once(self, picture: Picture) -> torch.Tensor:
        # `remote` is typed for both kinds of call.
        call = cast(
            "DeploymentResponse[npt.NDArray[np.generic]]",
            self._encoder.encode.remote(picture.data, picture.grid, picture.salt),
        )
        try:
            return _from_array(await call, self._dtype)
        except asyncio.CancelledError:
            call.cancel()  # Serve passes only the end of the whole request on by itself
            raise
        except (RayTaskError, MediaError) as e:
            bad, where = getattr(e, "cause", e), picture.where
            if isinstance(bad, MediaError):
                message = f"{where}: {bad.message}"
                raise MediaError(message, param=where, code=bad.code) from None
            raise


class PictureSupply:
    """Brings one request's pictures to the engine, when it asks for them.

    A picture is encoded once for all choices; one that cannot be ends the stream. The engine asks
    from its thread, which knows of no request: the calls are made as of whoever made this.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        encode: Callable[[Picture], Awaitable[torch.Tensor]],
        driver: EngineDriver,
        stream: TokenStream,
    ) -> None:
        self._pictures = pictures
        self._encode = encode
        self._driver = driver
        self._stream = stream
        self._context = copy_context()
        self._calls: dict[int, asyncio.Future[torch.Tensor]] = {}
        stream.on_missing = self._ask

    def release(self) -> None:
        """Lets go of the embeddings: they hold room in the object store, 80 MB for a large picture.

        Should the engine ask again (for a request that it preempted), they are encoded again.
        """
        self._calls = {i: call for i, call in self._calls.items() if not call.done()}

    def close(self) -> None:
        """Nobody waits for these pictures any more."""
        for call in self._calls.values():
            call.cancel()
        self._calls.clear()

    def _ask(self, engine_id: str, images: tuple[int, ...]) -> None:
        for index in images:
            if index not in self._calls:
                self._calls[index] = self._context.run(self._begin, self._pictures[index])
            self._calls[index].add_done_callback(partial(self._bring, engine_id, index))

    def _begin(self, picture: Picture) -> asyncio.Future[torch.Tensor]:
        return asyncio.ensure_future(self._encode(picture))

    def _bring(self, engine_id: str, index: int, call: asyncio.Future[torch.Tensor]) -> None:
        if call.cancelled():
            return
        error = call.exception()
        if isinstance(error, Exception):
            self._stream.fail(error)
            return
        try:
            self._driver.supply(engine_id, index, call.result())
        except InvalidRequest as e:  # no fault of the request's: encoder and decoder disagree
            logger.error("picture %d of %s: %s", index, engine_id, e.message)
            self._stream.fail(EngineError("a picture's embeddings do not fit; try again"))


def _in_serve() -> bool:
    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


def _from_array(a: npt.NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
    """The encoder's array as a tensor over the same memory; it is only ever read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        x = torch.from_numpy(a)
    return x.view(dtype) if a.dtype == np.uint16 else x
