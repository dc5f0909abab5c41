"""Chat with an OpenAI-compatible server: `Server` is the terminal's backend behind `--url`.

query, history ── messages: <img> tags -> image_url parts ──> POST /v1/chat/completions
pieces         <── text of the events ── server-sent events, up to [DONE] ─────┘
"""

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx

from xc_ray.errors import InvalidRequest, MediaError, XcRayError
from xc_ray.prompt.chat import ImageTag, split_image_tags
from xc_ray.prompt.tiles import read_header
from xc_ray.terminal import ChatOptions, History, Pieces

CONNECT_TIMEOUT_S = 10.0
SHOWN_CHARS = 200  # of a path in a message
READ_TIMEOUT_S = 600.0  # until the next piece: a queue and a long prompt may lie before the first


@dataclass(frozen=True)
class Server:
    """Answers of `model` on the server at `base` (…/v1); `live` asks for them as events."""

    interruptible: ClassVar[bool] = True
    base: str
    model: str
    options: ChatOptions
    api_key: str | None = field(default=None, repr=False)
    live: bool = True

    @classmethod
    def connect(
        cls,
        url: str,
        options: ChatOptions,
        *,
        model: str | None = None,
        api_key: str | None = None,
        live: bool = True,
    ) -> Self:
        """The server at `url`, with or without `/v1`; without `model`, the first that it serves.

        Raises:
            XcRayError: nobody answers there, the key is refused, or no model is served.
        """
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        with _one_line_errors(base):
            response = httpx.get(
                f"{base}/models", headers=_headers(api_key), timeout=CONNECT_TIMEOUT_S
            )
        # Not every server lists its models: a given name is tried with the first question.
        if response.status_code in (401, 403) or (model is None and response.status_code != 200):
            raise _refusal(response)
        if model is None:
            cards = _at(_json(response.content), "data", kind=list)
            if not cards:
                raise XcRayError(f"the server at {base} serves no model")
            model = str(_at(cards, 0, "id"))
        return cls(base, model, options, api_key, live)

    def stream(self, query: str, history: History) -> Pieces:
        """As `Backend.stream`; closing it closes the HTTP stream."""
        body = self._body(query, history)
        answer = ""
        with _one_line_errors(self.base), self._post(body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            for piece in _deltas(response.iter_bytes()) if self.live else _whole(response):
                answer += piece
                yield piece, [*history, (query, answer)]

    def _post(self, body: bytes) -> AbstractContextManager[httpx.Response]:
        return httpx.stream(
            "POST",
            f"{self.base}/chat/completions",
            content=body,
            headers={"content-type": "application/json", **_headers(self.api_key)},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        )

    def _body(self, query: str, history: History) -> bytes:
        options = self.options
        messages: list[dict[str, Any]] = []
        if options.system is not None:
            messages.append({"role": "system", "content": options.system})
        for question, answer in history:
            messages.append({"role": "user", "content": self._content(question)})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self._content(query)})
        body = {"model": self.model, "messages": messages, "stream": self.live, **options.sampling}
        if options.stop:
            body["stop"] = list(options.stop)
        try:
            return json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the text is not valid Unicode; type it again") from None

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        parts = split_image_tags(text)
        if not any(isinstance(part, ImageTag) for part in parts):
            return text
        return [
            {"type": "image_url", "image_url": self._image_url(part.source)}
            if isinstance(part, ImageTag)
            else {"type": "text", "text": part}
            for part in parts
        ]

    def _image_url(self, source: str) -> dict[str, Any]:
        has_url = source.lower().startswith(("http://", "https://", "data:"))
        image_url: dict[str, Any] = {"url": source if has_url else data_uri(source)}
        if self.options.max_tiles is not None:
            image_url["max_tiles"] = self.options.max_tiles
        return image_url


def data_uri(path: str) -> str:
    """A picture file as a data URI; its type is read from its content.

    Raises:
        MediaError: no such file, or not a picture.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as e:  # `~nobody/` and a null byte are the last two
        reason = getattr(e, "strerror", None) or e
        raise MediaError(f"cannot read the picture {path[:SHOWN_CHARS]!r}: {reason}") from None
    try:
        kind = read_header(data).format.lower()
    except MediaError as e:
        raise MediaError(f"cannot send the picture {path!r}: {e.message}") from None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def sse_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each whole server-sent event, without comments and other fields (HTML, 9.2)."""
    rest = b""
    data: list[bytes] = []
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def _deltas(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text of a completion that comes in events; an end without [DONE] is no end."""
    for data in sse_data(chunks):
        if data == b"[DONE]":
            return
        event = _json(data)
        if isinstance(event, dict) and "error" in event:
            raise XcRayError(f"the server: {_told(event) or 'an error without a message'}")
        for choice in _at(event, "choices", kind=list):
            if content := _at(choice, "delta", kind=dict).get("content"):
                yield str(content)
    raise _broken_off()


def _whole(response: httpx.Response) -> Iterator[str]:
    """The text of a completion that comes in one body."""
    yield str(_at(_json(response.read()), "choices", 0, "message", "content") or "")


def _headers(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):  # errors of httpx would quote it
        raise XcRayError("the key holds characters that no header can carry")
    return {"authorization": f"Bearer {api_key}"}


@contextmanager
def _one_line_errors(base: str) -> Iterator[None]:
    """Failures of the connection as ours."""
    try:
        yield
    except (httpx.RemoteProtocolError, httpx.ReadError):
        raise _broken_off() from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as e:
        raise XcRayError(f"cannot reach the server at {base}: {e or type(e).__name__}") from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise _not_openai() from None


def _at(body: Any, *path: str | int, kind: type[Any] = object) -> Any:
    for step in path:
        try:
            body = body[step]
        except (KeyError, IndexError, TypeError):
            raise _not_openai() from None
    if not isinstance(body, kind):
        raise _not_openai()
    return body


def _refusal(response: httpx.Response) -> XcRayError:
    try:
        told = _told(json.loads(response.content))
    except ValueError:
        told = ""
    status = f"HTTP {response.status_code} {response.reason_phrase}"
    return XcRayError(f"the server: {told or status}")


def _told(body: Any) -> str:
    """The message of an error body: OpenAI's, or the flat one of some other servers."""
    error = body.get("error") if isinstance(body, dict) else None
    for place in (error, body):
        if isinstance(place, dict) and isinstance(place.get("message"), str):
            return str(place["message"])
    return error if isinstance(error, str) else ""


def _broken_off() -> XcRayError:
    return XcRayError("the server's answer broke off before its end; ask again")


def _not_openai() -> XcRayError:
    return XcRayError("the server does not answer as an OpenAI-compatible one; is the URL right?")
