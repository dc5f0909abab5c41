"""Tokens of one request in, text out: SSE events, or one completion.

A decoder that is lost costs a client that has got nothing yet only time: another one is asked for
the same, with the same seed. A stream that has begun ends with an error event.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from xc_ray.errors import DeadlineExceeded, EngineError, Unavailable, XcRayError
from xc_ray.prompt.sequence import Prompt
from xc_ray.prompt.tokenizer import TextStream, Tokenizer
from xc_ray.serve.answers import (
    SSE_DONE,
    SSE_HEARTBEAT,
    AssistantMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkWriter,
    TokenLogprob,
    TopLogprob,
    Usage,
    error_body,
    sse,
)
from xc_ray.serve.messages import GenerateRequest, Notice, Tokens
from xc_ray.serve.protocol import ChatCompletionRequest
from xc_ray.serve.record import Amounts, ClientLeft, Record

logger = logging.getLogger("ray.serve")

MAX_TRIES: Final = 3  # of one request, on decoders that are lost one after the other

Stream: TypeAlias = DeploymentResponseGenerator[list[Tokens] | Notice]


@dataclass(frozen=True)
class Patience:
    """Seconds that an answer may take in all, and that a stream may be silent."""

    timeout_s: float
    heartbeat_s: float


@dataclass
class _Text:
    """One choice while it grows."""

    stream: TextStream
    num_generated: int = 0
    finish_reason: str | None = None


class Answer:
    """One request at a decoder: `call` asks one, and asks another if that is lost.

    `request.seed` is set, so that a second try is the same answer. `ended` is called once, with
    the number of generated tokens, and so is `record`, with what came before; `noticed` with what
    decoders say of themselves. On the event loop.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        chat: ChatCompletionRequest,
        prompt: Prompt,
        request: GenerateRequest,
        call: Callable[[], Stream],
        patience: Patience,
        record: Record,
        ended: Callable[[int], None],
        noticed: Callable[[Notice], None],
    ) -> None:
        self._base = self._model = model
        self._tokenizer = tokenizer
        self._chat = chat
        self._prompt = prompt
        self._id = record.name = f"chatcmpl-{request.request_id}"
        self._created = int(time.time())
        self._call = call
        self._patience = patience
        self._record = record
        self._tell_ended = ended
        self._tell_noticed = noticed
        self._tiles = sum(picture.grid.num_tiles for picture in request.pictures)
        self._deadline = asyncio.get_running_loop().time() + patience.timeout_s
        self._tries = 0
        self._closed = False
        self._open()

    def _open(self) -> None:
        """Asks a decoder, for all of the answer."""
        self._tries += 1
        self._num_cached = 0
        stop, n = self._chat.stop, self._chat.n
        self._texts = [_Text(TextStream(self._tokenizer, stop)) for _ in range(n)]
        self._stream = self._call()
        self._receiving = asyncio.ensure_future(self._first())

    async def begin(self) -> None:
        """Waits for the first tokens, or for the error in their place; no longer than a heartbeat.

        Raises:
            XcRayError: what ended it before anything came.
        """
        try:
            await asyncio.wait({self._receiving}, timeout=self._patience.heartbeat_s)
        except asyncio.CancelledError:
            self.close()
            raise
        if self._receiving.done() and (error := self._receiving.exception()) is not None:
            cause = cause_of(error)
            self.close(cause)
            raise cause from error

    async def events(self) -> AsyncIterator[bytes]:
        """The SSE stream: it ends with [DONE] or an error event, never with silence."""
        try:
            async for event in self._events():
                yield event
            yield SSE_DONE
        except Exception as e:  # noqa: BLE001 - whatever it is, the client must hear of it
            logger.warning("%s broke off: %r", self._id, e)
            cause = cause_of(e)
            self.close(cause)
            yield sse(error_body(cause))
        finally:
            # Serve passes a client's leaving on to the decoder, but not if this ends first.
            self.close()

    async def _events(self) -> AsyncIterator[bytes]:
        writer: ChunkWriter | None = None
        while not self._ended:
            if not (await asyncio.wait({self._receiving}, timeout=self._patience.heartbeat_s))[0]:
                yield SSE_HEARTBEAT
                continue
            batch = self._receiving.result()
            if writer is None:
                writer = ChunkWriter(self._id, self._created, self._model, self._chat.include_usage)
                for index in range(self._chat.n):
                    yield writer.start(index)
            for index, text, logprobs, reason in self._pieces(batch):
                if text or reason or logprobs:
                    yield writer.step(text, index, logprobs=logprobs, finish_reason=reason)
            if not self._ended:
                self._receiving = asyncio.ensure_future(self._receive())
        if self._chat.include_usage:
            assert writer is not None
            yield writer.usage(self._usage())

    async def whole(self) -> ChatCompletion:
        """The completion as one object.

        Raises:
            XcRayError: what ended it.
        """
        try:
            while True:
                try:
                    return await self._whole()
                except RayActorError as e:
                    self._try_again(e)
                    self._open()
        except Exception as e:
            cause = cause_of(e)
            self.close(cause)
            raise cause from e
        finally:
            self.close()

    async def _whole(self) -> ChatCompletion:
        parts: list[list[str]] = [[] for _ in self._texts]
        logprobs: list[list[TokenLogprob]] = [[] for _ in self._texts]
        batch = await self._receiving
        while True:
            for index, text, logs, _ in self._pieces(batch):
                parts[index].append(text)
                if logs is not None:
                    logprobs[index] += logs.content
            if self._ended:
                break
            batch = await self._receive()
        choices = [
            Choice(
                index=i,
                message=AssistantMessage(content="".join(parts[i])),
                logprobs=ChoiceLogprobs(content=logprobs[i]) if self._chat.logprobs else None,
                finish_reason=text.finish_reason or "stop",
            )
            for i, text in enumerate(self._texts)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._usage(),
        )

    async def _first(self) -> list[Tokens]:
        """The first message, of another decoder if the one that was asked is lost."""
        while True:
            try:
                batch = await self._receive()
            except RayActorError as e:
                self._try_again(e)
                self._tries += 1
                self._stream = self._call()
            else:
                adapter = batch[0].adapter
                self._model = f"{self._base}:{adapter}" if adapter else self._base
                return batch

    async def _receive(self) -> list[Tokens]:
        """The next message.

        Raises:
            XcRayError: what the decoder says in its place.
            DeadlineExceeded: the time of the request is over.
            EngineError: there is none.
        """
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                while isinstance(batch := await anext(self._stream, None), Notice):
                    self._tell_noticed(batch)
                    if batch.error is not None:
                        raise batch.error
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"the answer was not complete after {self._patience.timeout_s:g} s; "
                "ask for fewer tokens, or raise timeout_s up to what the server allows",
                param="timeout_s",
                code="deadline_exceeded",
            ) from None
        if batch is None:
            raise EngineError("the answer broke off before its end")
        return batch

    def _try_again(self, error: RayActorError) -> None:
        """Raises what the client is told once there were enough tries."""
        if self._tries >= MAX_TRIES:
            raise cause_of(error) from error
        logger.warning("%s: the decoder was lost, another one is asked: %r", self._id, error)

    @property
    def _ended(self) -> bool:
        """A stop string may end an answer that the engine would go on with."""
        return all(text.finish_reason for text in self._texts)

    def close(self, error: XcRayError | None = None) -> None:
        """Ends the work, wherever it stands; again does nothing.

        Without an error an answer that is not whole is one that nobody waited for.
        """
        if self._closed:
            return
        self._closed = True
        if not self._receiving.cancel() and not self._receiving.cancelled():
            self._receiving.exception()  # nobody has to hear of it any more
        self._stream.cancel()
        usage = self._usage()
        amounts = Amounts(
            usage.prompt_tokens,
            usage.prompt_tokens_details.image_tokens,
            usage.prompt_tokens_details.cached_tokens,
            usage.completion_tokens,
            self._tiles,
        )
        self._record.end(error or (None if self._ended else ClientLeft()), amounts)
        self._tell_ended(usage.completion_tokens)

    def _pieces(self, batch: list[Tokens]) -> Iterator[tuple[int, str, ChoiceLogprobs | None, Any]]:
        """(choice, new text, log-probabilities, finish reason) of one message."""
        for tokens in batch:
            text = self._texts[tokens.index]
            if text.finish_reason is None:
                yield tokens.index, *self._piece(text, tokens)
        self._record.note(max(text.num_generated for text in self._texts))

    def _piece(self, text: _Text, tokens: Tokens) -> tuple[str, ChoiceLogprobs | None, str | None]:
        if tokens.index == 0:  # the prompt is counted once, and so is what of it was cached
            self._num_cached = max(self._num_cached, tokens.num_cached)
        text.num_generated = tokens.num_generated
        piece = text.stream.push(tokens.ids)
        if tokens.finish_reason is not None:
            piece += text.stream.finish()
            text.finish_reason = tokens.finish_reason
        if text.stream.stopped:
            text.finish_reason = "stop"
        logprobs = self._logprobs(tokens) if self._chat.logprobs else None
        return piece, logprobs, text.finish_reason

    def _logprobs(self, tokens: Tokens) -> ChoiceLogprobs:
        content = []
        for token, (logprob, top) in zip(tokens.ids, tokens.logprobs, strict=True):
            tops = [TopLogprob(**self._token(i), logprob=p) for i, p in top]
            content.append(TokenLogprob(**self._token(token), logprob=logprob, top_logprobs=tops))
        return ChoiceLogprobs(content=content)

    def _token(self, token: int) -> dict[str, Any]:
        data = self._tokenizer.bytes_of(token)
        return {"token": self._tokenizer.decode([token]), "bytes": list(data) or None}

    def _usage(self) -> Usage:
        return Usage.count(
            len(self._prompt.ids),
            sum(t.num_generated for t in self._texts),
            cached=self._num_cached,
            image=self._prompt.image_tokens,
        )


def cause_of(error: BaseException) -> XcRayError:
    """Our own error, also out of Ray's wrapping, or one line without the inside's details."""
    # What Ray raises is also of the type it wraps, but without that error's own fields.
    cause = getattr(error, "cause", error)
    if isinstance(cause, XcRayError):
        return cause
    logger.error("a replica failed", exc_info=error)
    if isinstance(error, RayActorError):
        return Unavailable(
            "the decoder that worked on this request was lost; it is safe to send it again",
            code="replica_lost",
        )
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("no decoder can be started; try again later", code="no_replica")
    return EngineError("a replica failed while it worked on this request; try again")
