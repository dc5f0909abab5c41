"""HTTP ingress: /v1/chat/completions, /v1/models, /healthz, /readyz; SSE; errors -> statuses."""

import asyncio
import logging
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from ray.exceptions import TaskCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from xc_ray.config import ServeConfig
from xc_ray.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    NotFound,
    RequestTooLarge,
    Unavailable,
    XcRayError,
)
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.registry.reference import ModelName, Reference
from xc_ray.serve.admission import KeyLimits, Permit
from xc_ray.serve.answering import Answer, Patience
from xc_ray.serve.answers import ChatCompletion, ModelCard, ModelList
from xc_ray.serve.auth import Caller, KeyWatch, anybody
from xc_ray.serve.background import Background
from xc_ray.serve.cards import OWNER, card_of, cards_of, problems_of
from xc_ray.serve.door import DOOR
from xc_ray.serve.exposure import CLOSED, is_public, served_host, tell_exposure
from xc_ray.serve.guard import Guard, caller_of, known_caller
from xc_ray.serve.held import HeldBytes, Holding
from xc_ray.serve.intake import Intake
from xc_ray.serve.messages import DecoderState, GenerateRequest, Notice
from xc_ray.serve.observe import IngressMetrics, join_logs
from xc_ray.serve.openapi import chat_body, errors
from xc_ray.serve.protocol import (
    ChatCompletionRequest,
    parse_chat_request,
)
from xc_ray.serve.record import Record, outcome_of
from xc_ray.serve.redaction import redact
from xc_ray.serve.refusals import refusal

logger = logging.getLogger("ray.serve")

READY_TIMEOUT_S = 10.0
# All decoders are asked at once what they know of adapters. Ray gives all of the answers or none:
# while one hangs, what they said the time before is told.
STATES_TIMEOUT_S = 3.0
# By gRPC tokens cost Serve less than through Ray's object store, but it refuses more than 4 MiB.
MAX_VALUE_BYTES = 2 << 20
CLIENT_CLOSED_REQUEST = 499  # nginx's, for logs
EVENT_STREAM = "text/event-stream"


class Ingress:
    """Lets in, takes in (`Intake`), holds to allowances and asks a decoder; text out of tokens.

    Serve asks `__serve_build_asgi_app__` for its routes once the replica stands (`make_api`).
    `host` tells the address that Serve listens on.
    """

    def __init__(
        self,
        config: ServeConfig,
        model: XComposerConfig,
        tokenizer: Tokenizer,
        decoder: DeploymentHandle[Any],
        host: Callable[[], str | None] = served_host,
    ) -> None:
        redact(logger)
        join_logs()
        self._config = config
        self._tokenizer = tokenizer
        self._intake = Intake(config, model, tokenizer)
        self._keys = KeyWatch(Path(config.keys)) if config.keys else None
        address = host()
        tell_exposure(address, has_keys=self._keys is not None, insecure=config.insecure)
        self._closed = not (self._keys or config.insecure) and is_public(address)
        self._metrics = IngressMetrics()
        self._key_limits = KeyLimits(config.limits.per_key, refused=self._key_refused)
        self._held = HeldBytes(config.limits.max_held_bytes)
        self._decoder = decoder
        self._by_value = decoder.options(stream=True, _by_reference=False).generate
        self._by_store = decoder.options(stream=True, _by_reference=True).generate
        self._created = int(time.time())
        self._asking: asyncio.Task[list[DecoderState]] | None = None
        self._said: list[DecoderState] = []

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What goes on beside requests, from the start to the end: the keys are followed."""
        following = Background().start(self._keys.follow()) if self._keys else None
        try:
            yield
        finally:
            if following is not None:
                following.cancel()

    def admit(self, authorization: str | None) -> Caller:
        """Whoever sends such a header.

        Raises:
            Unauthenticated: there are keys, and it holds none of them.
            Unavailable: there are none, and anybody could come.
        """
        if self._keys is not None:
            return self._keys.ring.caller(authorization)
        if self._closed:
            raise Unavailable(CLOSED, code="no_keys")
        return anybody(authorization)

    def turned_away(self, error: XcRayError) -> None:
        """A request was refused for its key, before any route saw it."""
        self._metrics.ended(*outcome_of(error))

    def _key_refused(self, limit: str, key: str) -> None:
        # Without a key file a key is whatever somebody sent: there is no end to them.
        self._metrics.key_refused(limit, key if self._keys is not None else "")

    async def healthz(self) -> dict[str, str]:
        """The ingress itself is alive."""
        return {"status": "ok"}

    async def readyz(self, request: Request) -> Response:
        """200 once a decoder has generated a token for this very call, else 503.

        What is wrong with adapters is for those who may see them all.
        """
        if self._closed:
            return JSONResponse({"status": "not ready", "reason": CLOSED}, status_code=503)
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._decoder.ready.remote()
        except Exception as e:  # noqa: BLE001 - no replica, a failed one, no answer: not ready
            logger.warning("not ready: %r", e)
            return JSONResponse({"status": "not ready"}, status_code=503)
        caller = known_caller(request)
        asks = caller is not None and caller.is_admin
        problems = problems_of(await self._states()) if asks else []
        return JSONResponse({"status": "ready"} | ({"problems": problems} if problems else {}))

    async def models(self, request: Request) -> ModelList:
        """The served base, and those of its adapters in the registry that the caller sees."""
        return ModelList(data=await self._cards(caller_of(request)))

    async def model(self, request: Request, name: str) -> ModelCard:
        """One model's card: of the base, an adapter, or one of its versions and aliases."""
        caller = caller_of(request)
        adapter = self._adapter(name)
        caller.check_sees(adapter.name if adapter else None)
        return card_of(await self._cards(caller), name, adapter)

    async def _cards(self, caller: Caller) -> list[ModelCard]:
        return cards_of(self._card(), await self._states(), caller.sees)

    def _card(self) -> ModelCard:
        return ModelCard(
            id=self._config.public_name,
            created=self._created,
            owned_by=OWNER,
            max_model_len=self._intake.max_model_len,
        )

    async def _states(self) -> list[DecoderState]:
        """What each decoder knows of adapters; those who ask at the same time share the answers."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_decoders())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def _asked(self, _: asyncio.Task[list[DecoderState]]) -> None:
        self._asking = None

    async def _ask_decoders(self) -> list[DecoderState]:
        try:
            found = await self._decoder.broadcast("adapters").results_async(
                timeout_s=STATES_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            logger.warning("a decoder does not say what it knows of adapters")
            return self._said
        except Exception as e:  # noqa: BLE001 - no replica: the base is still known
            logger.warning("no decoder says what it knows of adapters: %r", e)
            return []
        states = [state for state in found if isinstance(state, DecoderState)]
        if len(states) < len(found):
            logger.warning("%d of %d decoders did not answer", len(found) - len(states), len(found))
        self._said = sorted(states, key=lambda state: state.replica)
        return self._said

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or streamed (OpenAI's format)."""
        record, held = Record(self._metrics), self._held.request()
        try:
            return await self._chat(request, record, held)
        except BaseException as e:
            held.end()
            record.end(e)
            raise

    async def _chat(self, request: Request, record: Record, held: Holding) -> Response:
        caller = caller_of(request)
        chat = parse_chat_request(await self._body(request, held))
        adapter = self._adapter(chat.model)
        caller.check_chat(adapter.name if adapter else None)
        DOOR.check(caller.name, bool(chat.images))
        permit = self._key_limits.begin(caller.name, caller.allowance)
        try:
            answer = await self._start(chat, adapter, caller, permit, record, held)
        except BaseException:
            permit.end()
            raise
        streams = chat.stream
        del chat  # its pictures in base64 would stay for as long as the answer takes
        if streams:
            await answer.begin()
            return _EventStream(answer)
        return Response((await answer.whole()).model_dump_json(), media_type="application/json")

    async def _body(self, request: Request, held: Holding) -> bytes:
        limits = self._config.limits
        try:
            async with asyncio.timeout(limits.max_body_s):
                return await _read_body(request, limits.max_request_bytes, held)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request body was not complete after {limits.max_body_s:g} s; "
                "send smaller images, or their URLs",
                code="request_timeout",
            ) from None

    def _adapter(self, model: str) -> Reference | None:
        """The adapter that a model's name asks for.

        Raises:
            NotFound: the base is not the one that is served here.
            InvalidRequest: the base is, and what follows is no reference.
        """
        base = self._config.public_name
        if model == base:
            return None
        try:
            name = ModelName.parse(model)
            if name.base == base:
                return name.adapter
        except InvalidRequest:
            if model.startswith((f"{base}:", f"{base}@")):
                raise
        raise NotFound(
            f"model {model[:80]!r} is not served here; this is {base!r}",
            param="model",
            code="model_not_found",
        )

    async def _start(
        self,
        chat: ChatCompletionRequest,
        adapter: Reference | None,
        caller: Caller,
        permit: Permit,
        record: Record,
        held: Holding,
    ) -> Answer:
        """Everything until the decoder is asked."""
        patience = self._patience(chat)
        salt = caller.name if self._config.decoder.prefix_cache_per_key else ""
        order = await self._intake.take(chat, salt, held)
        prompt, most = order.prompt, chat.n * order.room
        permit.charge(tokens=len(prompt.ids) + most, tiles=order.tiles)
        request = GenerateRequest(
            secrets.token_hex(12),
            array("i", prompt.ids),
            order.sampling,
            tuple(order.pictures),
            chat.n,
            str(adapter) if adapter else "",
            _sticky(chat.user, caller.name) if adapter else "",
            caller.name,
            None if caller.is_admin else caller.adapters,
            salt,
        )
        route = await asyncio.to_thread(self._intake.route, chat, prompt, request)
        # `remote` is typed for both kinds of call; `stream=True` above makes it a generator's.
        generate = self._by_value if request.num_bytes <= MAX_VALUE_BYTES else self._by_store
        call: Any = partial(generate.remote, request, route=route)
        name = self._config.public_name

        def ended(num_generated: int) -> None:
            permit.end(unused_tokens=most - num_generated)
            held.end()

        def noticed(notice: Notice) -> None:
            if notice.closed_s:
                DOOR.close(notice.decoder, request.key, bool(request.pictures), notice.closed_s)

        asked = chat.model_copy(update={"messages": []})
        return Answer(
            name, self._tokenizer, asked, prompt, request, call, patience, record, ended, noticed
        )

    def _patience(self, chat: ChatCompletionRequest) -> Patience:
        longest = self._config.limits.max_request_s
        if chat.timeout_s is not None and chat.timeout_s > longest:
            raise InvalidRequest(
                f"timeout_s is {chat.timeout_s:g}, the limit here is {longest:g}",
                param="timeout_s",
                code="invalid_value",
            )
        return Patience(chat.timeout_s or longest, self._config.limits.heartbeat_s)


class _EventStream(StreamingResponse):
    """An answer's events; it is closed also if the client left before the first was asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type=EVENT_STREAM)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def _sticky(user: str | None, key: str) -> str:
    """Whom an alias with two versions gives the same one: a user, a key's holder, or nobody."""
    if user is not None:
        return f"user {user}"
    return f"key {key}" if key else secrets.token_hex(12)


async def _read_body(request: Request, max_bytes: int, held: Holding) -> bytes:
    """The body, refused as soon as it is known to be too large, or too much beside the others."""
    message = f"the request body is larger than {max_bytes:,} bytes; send fewer or smaller images"
    declared = request.headers.get("content-length", "0")
    expected = int(declared) if declared.isdigit() else 0
    if expected > max_bytes:
        raise RequestTooLarge(message, code="request_too_large")
    held.check(expected)
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > max_bytes:
            raise RequestTooLarge(message, code="request_too_large")
        held.take(len(chunk))
        body += chunk
    return bytes(body)


def make_api(ingress: Ingress) -> FastAPI:
    """The routes of one ingress, and errors in OpenAI's form whatever raised them."""
    api = FastAPI(
        title="xc_ray",
        docs_url=None,
        redoc_url=None,
        lifespan=lambda _: ingress.running(),
        exception_handlers={
            XcRayError: _on_error,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
    )
    api.add_middleware(Guard, admit=ingress.admit, refused=ingress.turned_away)
    api.get("/healthz")(ingress.healthz)
    api.get("/readyz", responses={503: {"description": "Not ready"}})(ingress.readyz)
    key = [Security(HTTPBearer(auto_error=False))]  # for the document; the guard has asked by then
    closed = (401, 403, 503)
    api.get("/v1/models", responses=errors(*closed), dependencies=key)(ingress.models)
    api.get("/v1/models/{name:path}", responses=errors(400, 404, *closed), dependencies=key)(
        ingress.model
    )
    api.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=errors(400, 404, 408, 413, 429, 500, *closed),
        dependencies=key,
        openapi_extra={"requestBody": chat_body()},
    )(ingress.chat)
    return api


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, XcRayError)
    return refusal(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # Only what can be printed: a path may hold line breaks, and what turns the reading direction.
    path = quote(request.scope["path"], safe="/:@")[:80]
    message = f"{error.detail}: {request.method} {path}"
    failure = NotFound(message) if error.status_code == 404 else InvalidRequest(message)
    return refusal(failure, error.status_code)


async def _on_bug(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, TaskCancelledError):  # the client has left; nobody reads this
        return JSONResponse(None, status_code=CLIENT_CLOSED_REQUEST)
    logger.error("unexpected error", exc_info=error)
    failure = EngineError("the server failed on this request; its log says why")
    return refusal(failure)
