"""OpenAI's chat-completions wire format, the way in: what a client may send.

    body ── parse_chat_request ──> ChatCompletionRequest, or InvalidRequest in one line

A request is checked whole and strictly. A known field that is null is absent, as OpenAI's clients
mean it. A field of OpenAI's API that this server does not act on is refused, never ignored; so is
an unknown one. Extensions: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`,
`timeout_s`, `image_url.max_tiles`.
"""

import difflib
import json
import re
from typing import Annotated, ClassVar, Final, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from xc_ray.errors import InvalidRequest

MAX_CHOICES: Final = 8
MAX_STOP_STRINGS: Final = 4  # OpenAI's limit
MAX_LOGIT_BIASES: Final = 1024  # each takes time in every step; OpenAI names no limit
MAX_LOGIT_BIAS: Final = 100  # OpenAI's bound
MAX_TILES: Final = 55  # the most tiles that the family was trained with (4KHD, 2404.06512)
SHOWN_CHARS: Final = 80  # of a caller's value in a message

_MAX_COUNT: Final = 2**31 - 1
_NAME_CODES: Final = frozenset({"unknown_parameter", "unsupported_parameter"})

# OpenAI's fields, and those of vLLM and transformers that people try, which nothing here acts on.
_UNSUPPORTED_FIELDS: Final = frozenset(
    """
    audio function_call functions metadata moderation parallel_tool_calls prediction
    prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort safety_identifier
    service_tier store tool_choice tools verbosity web_search_options

    add_generation_prompt allowed_token_ids bad_words best_of chat_template chat_template_kwargs
    continue_final_message do_sample documents early_stopping echo guided_choice guided_grammar
    guided_json guided_regex include_stop_str_in_output length_penalty max_new_tokens
    mm_processor_kwargs num_beams priority prompt prompt_logprobs
    skip_special_tokens stop_token_ids structured_outputs suffix truncate_prompt_tokens typical_p
    use_beam_search
    """.split()  # noqa: SIM905 - a list, one name to a line, would fill the page
)
# What an assistant message carries when a client sends our own answer back.
_ECHOED_FIELDS: Final = frozenset(
    {"annotations", "audio", "function_call", "refusal", "tool_calls"}
)


class _RequestModel(BaseModel):
    """Strict: no coercion, no unknown name; a null field is an absent one."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    unsupported: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _present_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        present = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    present[name] = value
            elif not cls._says_nothing(name, value):
                raise _refused_name(cls, name)
        return present

    @classmethod
    def _says_nothing(cls, name: str, value: object) -> bool:
        return name in cls.unsupported and value is None


def _problem(text: str) -> PydanticCustomError:
    # As a value: pydantic takes braces in the message itself for placeholders.
    return PydanticCustomError("invalid_value", "{problem}", {"problem": text})


class TextPart(_RequestModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_RequestModel):
    """Where a picture is, and how finely to look at it.

    `detail` is OpenAI's: `low` one tile, `auto` the family's choice, `high` its most. `max_tiles`
    (an extension) bounds the tiles of this picture and takes precedence over `detail`.
    """

    unsupported = frozenset({"format"})

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"
    max_tiles: int | None = Field(default=None, ge=1, le=MAX_TILES)

    @model_validator(mode="before")
    @classmethod
    def _not_a_plain_string(cls, data: object) -> object:
        if isinstance(data, str):
            raise _problem('must be an object, {"url": ...}')
        return data


class ImagePart(_RequestModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _part_kind(part: object) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"#{kind}" if kind in ("text", "image_url") else None


# The tags show up in the place of an error; the hash sets them apart from a caller's names.
Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ImagePart, Tag("#image_url")],
    Discriminator(
        _part_kind,
        custom_error_type="invalid_value",
        custom_error_message='must be an object of type "text" or "image_url"',
    ),
]


def _as_parts(content: object) -> object:
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    if not isinstance(content, list):
        raise _problem("must be a string or a list of parts")
    return content


class Message(_RequestModel):
    """One turn. `developer` is read as `system`; a plain string is one text part.

    Only a user's message may hold pictures (checked with the order, by the request).
    """

    unsupported = _ECHOED_FIELDS | {"name", "tool_call_id", "reasoning", "reasoning_content"}

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_as_parts)]

    @classmethod
    def _says_nothing(cls, name: str, value: object) -> bool:
        return super()._says_nothing(name, value) or (name in _ECHOED_FIELDS and value == [])

    @property
    def empty(self) -> bool:
        """Whether there is neither a character nor a picture."""
        return not any(isinstance(part, ImagePart) or part.text for part in self.content)


class StreamOptions(_RequestModel):
    """`include_usage`: one more chunk, without choices, that counts the tokens."""

    unsupported = frozenset({"include_obfuscation", "continuous_usage_stats"})

    include_usage: bool = False


class ResponseFormat(_RequestModel):
    """Plain text is the only one."""

    unsupported = frozenset({"json_schema", "schema"})

    type: Literal["text"]


def _stop_strings(stop: object) -> object:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        raise _problem(f"must be a string or a list of up to {MAX_STOP_STRINGS} strings")
    if not all(isinstance(s, str) and s for s in strings):
        raise _problem("must be made of strings with at least one character")
    return strings


def _logit_biases(biases: object) -> object:
    if not isinstance(biases, dict):
        raise _problem("must be an object, {token id: bias}")
    if len(biases) > MAX_LOGIT_BIASES:
        problem = f"logit_bias has {len(biases):,} entries, the limit is {MAX_LOGIT_BIASES:,}"
        raise _invalid("logit_bias", problem)
    for token, bias in biases.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", token):
            problem = f"logit_bias names {_described(token)}, expected a token id as a string"
            raise _invalid("logit_bias", problem)
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (number and -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS):
            problem = (
                f"logit_bias of {token} is {_described(bias)}, expected a number from "
                f"-{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
            )
            raise _invalid("logit_bias", problem)
    return {int(token): float(bias) for token, bias in biases.items()}


class ChatCompletionRequest(_RequestModel):
    """The body of `POST /v1/chat/completions`, checked.

    A sampling field left at None takes the model family's default. `user` identifies the client's
    own user: where an alias leads to two versions, a user always gets the same one. `top_k` 0 and
    -1 both mean off and are stored as 0.
    `ignore_eos`: the model's stop tokens do not end the answer.

    Raises:
        InvalidRequest: fields that are right each for itself and wrong together, or messages out of
            order. pydantic's ValidationError tells of all else; `parse_chat_request` translates it.
    """

    unsupported = _UNSUPPORTED_FIELDS

    model: str = Field(min_length=1, max_length=512)
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[
        int | None, Field(ge=-1, le=_MAX_COUNT), AfterValidator(lambda k: k and max(k, 0))
    ] = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    min_tokens: int | None = Field(default=None, ge=0, le=_MAX_COUNT)
    ignore_eos: bool = False
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_biases)] = {}
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[str], BeforeValidator(_stop_strings)] = []
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    user: str | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], FailFast()] = Field(default=["text"], min_length=1)

    @property
    def output_limit(self) -> int | None:
        """The most tokens to generate, under whichever of its two names it was sent."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def images(self) -> list[tuple[str, ImageUrl]]:
        """The pictures in reading order, each with the path of its URL in the request."""
        return [
            (f"messages[{i}].content[{j}].image_url.url", part.image_url)
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            problem = f"max_tokens is {old} and max_completion_tokens is {new}; send one of them"
            raise _invalid("max_completion_tokens", problem)
        limit = self.output_limit
        if limit is not None and (self.min_tokens or 0) > limit:
            problem = f"min_tokens is {self.min_tokens} and max_tokens is {limit}; lower min_tokens"
            raise _invalid("min_tokens", problem)
        if self.top_logprobs is not None and not self.logprobs:
            raise _invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise _invalid("stream_options", "stream_options needs stream to be true")
        _check_turns(self.messages)
        return self


def _invalid(param: str, problem: str) -> InvalidRequest:
    return InvalidRequest(problem, param=param, code="invalid_value")


def _check_turns(messages: list[Message]) -> None:
    first_turn = 1 if messages[0].role == "system" else 0
    for i, message in enumerate(messages):
        expected = "user" if (i - first_turn) % 2 == 0 else "assistant"
        if i >= first_turn and message.role != expected:
            raise _invalid(
                f"messages[{i}].role",
                f'messages[{i}] has role "{message.role}", expected "{expected}": one system '
                "message first if at all, then user and assistant in turn",
            )
        _check_content(message, f"messages[{i}]")
    if messages[-1].role != "user":
        where = f"messages[{len(messages) - 1}]"
        problem = f'{where}, the last, has role "{messages[-1].role}"; end with a user message'
        raise _invalid(f"{where}.role", problem)


def _check_content(message: Message, where: str) -> None:
    for j, part in enumerate(message.content):
        if isinstance(part, ImagePart) and message.role != "user":
            problem = f'{where} has role "{message.role}" and an image; only "user" may have one'
            raise _invalid(f"{where}.content[{j}]", problem)
    # An empty system message has a meaning: it takes the place of the family's own system text.
    if message.empty and message.role != "system":
        problem = f"{where} is empty; a message needs text or, from a user, an image"
        raise _invalid(f"{where}.content", problem)


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """The request in `body`, UTF-8 JSON as it came over the wire.

    pydantic's parser bounds nesting (200 levels) and the digits of a number (4300), and refuses
    NaN, bad UTF-8 and lone surrogates.

    Raises:
        InvalidRequest: in one line the first problem, the value (shortened, never a data URL) and
            how many more there are; `param` is the path of the field.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise InvalidRequest(f"the body is not valid JSON: {exc}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest(
            f"the body must be a JSON object, got {_described(data)}", code="invalid_type"
        )
    try:
        return ChatCompletionRequest.model_validate(data)
    except ValidationError as exc:
        raise _as_invalid_request(exc.errors(include_url=False)) from None


def _as_invalid_request(errors: list[ErrorDetails]) -> InvalidRequest:
    first = errors[0]
    param = _path(first["loc"])
    if first["type"] in _NAME_CODES:
        param = ".".join(filter(None, (param, first.get("ctx", {}).get("field"))))
        code, message = first["type"], f"{param} {first['msg']}"
    elif first["type"] == "missing":
        code, message = "missing_required_parameter", f"{param} is required"
    else:
        code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
        message = f"{param} {_must(first['msg'])}, got {_described(first['input'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InvalidRequest(message + more, param=param, code=code)


def _path(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content", "#parts", 1)` -> `messages[0].content[1]`."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("#"):
            path += f".{step}" if path else step
    return path


def _must(pydantic_message: str) -> str:
    """`Input should be a valid dictionary or instance of Message` -> `must be an object`."""
    message = re.sub(r"^\w+ should ", "must ", pydantic_message).replace("'", '"')
    message = re.sub(r"a valid dictionary or instance of \w+", "an object", message)
    return message.split(" after validation", 1)[0]


def _refused_name(model: type[_RequestModel], name: str) -> PydanticCustomError:
    shown = name if re.fullmatch(r"\w{1,64}", name) else _described(name)
    if name in model.unsupported:
        code, problem = "unsupported_parameter", "is not supported by this server; leave it out"
    else:
        near = difflib.get_close_matches(name[:64], model.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(model.model_fields)}"
        code, problem = "unknown_parameter", f"is not a known field; {hint}"
    return PydanticCustomError(code, "{problem}", {"problem": problem, "field": shown})


def _described(value: object) -> str:
    """A caller's value for a message: short, on one line, never the content of a data URL."""
    if isinstance(value, dict):
        kind = value.get("type")
        return f"an object of type {_described(kind)}" if isinstance(kind, str) else "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str) and "data:" in value.lower():
        return f"a string of {len(value)} characters"
    if isinstance(value, str):
        value = value[:SHOWN_CHARS]
    text = json.dumps(value, ensure_ascii=False, default=lambda v: type(v).__name__)
    # JSON escapes control characters but not, say, U+2028 or a right-to-left override.
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:SHOWN_CHARS])
    return text if len(text) < SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"
