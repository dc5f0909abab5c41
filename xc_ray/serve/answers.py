"""OpenAI's chat-completions wire format, the way back: what a client gets.

    answer ──> ChatCompletion      stream ──> ChunkWriter … SSE_DONE      XcRayError ──> error_body

Extensions: `prompt_tokens_details.image_tokens`, and in a model's card `max_model_len` and what
concerns adapters.
"""

import json
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from xc_ray.errors import XcRayError

MIN_LOGPROB: Final = -9999.0  # what OpenAI sends for a token of probability zero; JSON has no -inf
SSE_DONE: Final = b"data: [DONE]\n\n"
SSE_HEARTBEAT: Final = b": waiting\n\n"  # a comment: readers of events skip it

_LINE_BREAKS: Final = (("\x85", r"\u0085"), ("\u2028", r"\u2028"), ("\u2029", r"\u2029"))

FinishReason: TypeAlias = Literal["stop", "length"]
_Logprob: TypeAlias = Annotated[float, BeforeValidator(lambda p: max(p, MIN_LOGPROB))]


class _ResponseModel(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class TopLogprob(_ResponseModel):
    """A token that might have stood here; `bytes` of its text, None for a control token."""

    token: str
    logprob: _Logprob
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A generated token with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(_ResponseModel):
    """One entry per generated token."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptTokensDetails(_ResponseModel):
    """Prompt tokens that were not computed again, and those that stand for pictures."""

    cached_tokens: int = 0
    image_tokens: int = 0


class Usage(_ResponseModel):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()

    @classmethod
    def count(cls, prompt: int, completion: int, *, cached: int = 0, image: int = 0) -> Self:
        """`prompt` + `completion` tokens; `cached` and `image` are parts of the prompt."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached, image_tokens=image),
        )


class AssistantMessage(_ResponseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_ResponseModel):
    """One answer of `n`."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(_ResponseModel):
    """The answer to a request that does not stream; `created` in seconds since 1970."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(_ResponseModel):
    """What a chunk adds to a choice. What it does not add is left out, not sent as null."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class ChunkChoice(_ResponseModel):
    """A step of one choice; `finish_reason` is null until the last."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(_ResponseModel):
    """One event of a stream.

    `usage` is left out unless it is set. With `include_usage` it is null in every chunk but an
    extra last one, which has no choices.
    """

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None

    @model_serializer(mode="wrap")
    def _without_unset_usage(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if "usage" not in self.model_fields_set:
            del fields["usage"]
        return fields


class VersionShare(_ResponseModel):
    """A version of an adapter, and its share of the requests to an alias, 0 to 1."""

    version: int
    weight: float


class ModelCard(_ResponseModel):
    """A model or adapter to ask for; `max_model_len` in tokens, prompt and answer together.

    What does not apply is left out. An adapter has its base as `parent`. A version has its number,
    its digest, the `aliases` that lead to it, and where it is `loaded` (`device` or `host`, by
    decoder); an alias has `targets`, where the registry points it, what each decoder is `serving`
    for it, and number and digest where that is one version. `error` says why a version cannot be
    loaded, or an alias not be moved.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int | None = None
    parent: str | None = None
    version: int | None = None
    digest: str | None = None
    aliases: list[str] | None = None
    targets: list[VersionShare] | None = None
    serving: dict[str, list[VersionShare]] | None = None
    loaded: dict[str, str] | None = None
    error: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class ModelList(_ResponseModel):
    """The body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(_ResponseModel):
    """OpenAI's four fields of an error; the HTTP status is the exception's."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_ResponseModel):
    """The body of an answer that is not 200, and the event that ends a stream which failed."""

    error: ErrorDetail


def error_body(exc: XcRayError) -> ErrorBody:
    """What the client is told of `exc`."""
    return ErrorBody(
        error=ErrorDetail(message=exc.message, type=exc.type, param=exc.param, code=exc.code)
    )


def sse(model: BaseModel) -> bytes:
    """`model` as one server-sent event."""
    return _event(f"data: {model.model_dump_json()}\n\n")


def _event(text: str) -> bytes:
    # JSON leaves these three as they are, and clients that split lines as str.splitlines does
    # (httpx's iter_lines) break an event there. JSON escapes the others that it splits at.
    if not text.isascii():
        for char, escape in _LINE_BREAKS:
            text = text.replace(char, escape)
    return text.encode()


class ChunkWriter:
    """The events of one stream: what does not change from chunk to chunk is written once.

    The bytes are those of `sse(ChatCompletionChunk(...))`, for a fraction of its time.
    """

    _quoted = staticmethod(json.JSONEncoder(ensure_ascii=False).encode)

    def __init__(self, id: str, created: int, model: str, include_usage: bool = False) -> None:
        self._head = (
            f'data: {{"id":{self._quoted(id)},"object":"chat.completion.chunk","created":{created},'
            f'"model":{self._quoted(model)},"choices":['
        )
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def start(self, index: int = 0) -> bytes:
        """The first chunk of a choice, which names the role."""
        return self._chunk(index, '"role":"assistant","content":""', None, None)

    def step(
        self,
        content: str,
        index: int = 0,
        *,
        logprobs: ChoiceLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        """A chunk that adds `content` to a choice; its last one says why it finished."""
        # An empty delta is what OpenAI sends with a finish reason alone.
        delta = f'"content":{self._quoted(content)}' if content or not finish_reason else ""
        return self._chunk(index, delta, logprobs, finish_reason)

    def usage(self, usage: Usage) -> bytes:
        """The extra last chunk, without choices."""
        return _event(f'{self._head}],"usage":{usage.model_dump_json()}}}\n\n')

    def _chunk(
        self,
        index: int,
        delta: str,
        logprobs: ChoiceLogprobs | None,
        finish_reason: FinishReason | None,
    ) -> bytes:
        logs = "null" if logprobs is None else logprobs.model_dump_json()
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return _event(
            f'{self._head}{{"index":{index},"delta":{{{delta}}},"logprobs":{logs},'
            f'"finish_reason":{reason}}}{self._tail}'
        )
