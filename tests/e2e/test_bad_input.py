"""What a server says to requests that it cannot serve, and that it answers the next one rightly."""

import io
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.serve_run import (
    RED_CIRCLE,
    ServeRun,
    ask,
    assert_error,
    assert_right,
    body,
    data_url,
    free_port,
    image,
    post,
    text_of,
    user,
)
from tests.local_http import Asked, CutOff, Reply, Served, serving
from tests.pictures import shapes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

FETCH_LIMIT_S = 2.0
ARGS = {"media": {"allow_private": ["127.0.0.0/8"], "timeout_s": FETCH_LIMIT_S}}


def drawn(width: int = 60, height: int = 40, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that claims to be this large, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + data + chunk(b"IEND", b"")


def animated(*colours: str) -> bytes:
    """A GIF: a circle in each of `colours`, one after the other."""
    files = (shapes(f"{colour} circle") for colour in colours)
    first, *more = (Image.open(io.BytesIO(file)) for file in files)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=more, duration=100)
    return out.getvalue()


@dataclass
class Bad:
    """A request, and what the server says to it: `said` are pieces of the message, in order."""

    name: str
    request: dict[str, Any]
    code: str | None
    said: tuple[str, ...]
    status: int = 400
    param: str | None = None


def with_picture(picture: bytes | str, **options: Any) -> dict[str, Any]:
    return body(image(picture, **options), "What?")


def talk(*roles: str) -> dict[str, Any]:
    return body() | {"messages": [{"role": role, "content": "hi"} for role in roles]}


PICTURE = "messages[0].content[0].image_url.url"
PICTURES = [
    Bad("not an image", with_picture(b"GIF? No."), "invalid_image", ("8 bytes are not an image",)),
    Bad("text that claims to be an image", with_picture(data_url(b"<svg/>", "svg+xml")),
        "invalid_image", ("6 bytes are not an image", "JPEG, PNG")),
    Bad("a truncated JPEG", with_picture(drawn(400, 300, "JPEG")[:2000]), "invalid_image",
        ("JPEG image of 2,000 bytes is damaged or cut short", "send it again")),
    Bad("a truncated PNG", with_picture(drawn(400, 300)[:300]), "invalid_image",
        ("PNG image of 300 bytes is damaged or cut short",)),
    Bad("an empty file", with_picture(b""), None, ("image",)),
    Bad("30,000 × 30,000 pixels", with_picture(header_of(30_000, 30_000)), "image_too_large",
        ("pixels, the limit is 89,478,485",)),
    Bad("more pixels than the limit", with_picture(header_of(10_000, 9_000)), "image_too_large",
        ("10,000 × 9,000 = 90,000,000 pixels", "89,478,485")),
    Bad("more bytes than the limit", with_picture(b"\0" * (21 << 20)), "image_too_large",
        ("larger than 20971520 bytes",)),
    Bad("another type", with_picture("data:text/html;base64,AAAA"), "invalid_image_type",
        ('"text/html", not image/*',)),
    Bad("not base64", with_picture("data:image/png;base64,!!!!"), "invalid_image_url", ("base64",)),
    Bad("a file of the server", with_picture("file:///etc/passwd"), "invalid_image_url",
        ("must begin with http://, https:// or data:",)),
    Bad("the cloud's metadata service", with_picture("http://169.254.169.254/latest/meta-data"),
        "forbidden_image_url", ("not a public address",)),
    Bad("a host without an address", with_picture("http://no-such-host.invalid/a.png"),
        "image_fetch_failed", ("cannot be resolved",)),
]  # fmt: skip
REQUESTS = [
    Bad("too many images", body(*[image(drawn())] * 33, "?"), "too_many_images",
        ("33 images", "limit is 32"), param="messages"),
    Bad("too many tokens of images", body(*[image(drawn(672, 672), max_tiles=9)] * 30, "?"),
        "context_length_exceeded",
        ("the prompt takes 20,", "for images; image 1: 673 in 9 tiles, image 2: 673 in 9 tiles",
         "image 30: 673 in 9 tiles", "the model holds 16,384", "fewer images or lower max_tiles"),
        param="messages"),
    Bad("too many tokens asked for", body(image(drawn(), detail="low"), "?", max_tokens=16_384),
        "context_length_exceeded",
        ("image 1: 145 in 1 tiles", "max_tokens 16,384", "lower max_tokens to"), param="messages"),
    Bad("too much text", body("word " * 40_000), "context_length_exceeded",
        ("the model holds 16,384", "shorten the text"), param="messages"),
    Bad("an unknown model", body("hi", model="gpt-4o"), "model_not_found", ("'gpt-4o'", "'demo'"),
        404, param="model"),
    Bad("no model", {"messages": [user("hi")]}, "missing_required_parameter",
        ("model is required",), param="model"),
    Bad("an unknown field", body("hi", temprature=1), "unknown_parameter",
        ("temprature", "did you mean temperature?"), param="temprature"),
    Bad("a field of OpenAI's that is not served", body("hi", tools=[{"type": "function"}]),
        "unsupported_parameter", ("tools is not supported",), param="tools"),
    Bad("a number as a string", body("hi", max_tokens="5"), "invalid_type", ("integer", '"5"'),
        param="max_tokens"),
    Bad("a flag as a number", body("hi", logprobs=1), "invalid_type", ("boolean", "1"),
        param="logprobs"),
    Bad("a number out of range", body("hi", temperature=3), "invalid_value",
        ("less than or equal to 2",), param="temperature"),
    Bad("zero tokens", body("hi", max_tokens=0), "invalid_value", ("greater than or equal to 1",),
        param="max_tokens"),
    Bad("min_p out of range", body("hi", min_p=1.5), "invalid_value",
        ("less than or equal to 1", "1.5"), param="min_p"),
    Bad("more tokens at least than at most", body("hi", min_tokens=9), "invalid_value",
        ("min_tokens is 9", "max_tokens is 8"), param="min_tokens"),
    Bad("more tokens at least than there are",
        body("hi", min_tokens=2000) | {"max_tokens": None}, "invalid_value",
        ("min_tokens is 2,000", "1,024 tokens", "raise max_tokens"), param="min_tokens"),
    Bad("a flag as a word", body("hi", ignore_eos="yes"), "invalid_type", ("boolean", '"yes"'),
        param="ignore_eos"),
    Bad("a bias out of range", body("hi", logit_bias={"5": 101}), "invalid_value",
        ("logit_bias of 5 is 101", "from -100 to 100"), param="logit_bias"),
    Bad("a bias of a word", body("hi", logit_bias={"tree": 1}), "invalid_value",
        ('logit_bias names "tree"', "token id"), param="logit_bias"),
    Bad("a bias beyond the vocabulary", body("hi", logit_bias={"1024": 1}), "invalid_value",
        ("token id 1024", "0 to 1023"), param="logit_bias"),
    Bad("no messages", body() | {"messages": []}, "invalid_value", ("at least 1 item",),
        param="messages"),
    Bad("messages as a string", body() | {"messages": "hi"}, "invalid_type", ("list",),
        param="messages"),
    Bad("an empty message", body(""), "invalid_value", ("messages[0] is empty",),
        param="messages[0].content"),
    Bad("the assistant first", talk("assistant", "user"), "invalid_value",
        ('messages[0] has role "assistant", expected "user"',), param="messages[0].role"),
    Bad("two users in a row", talk("user", "user"), "invalid_value",
        ('messages[1] has role "user", expected "assistant"',), param="messages[1].role"),
    Bad("the system last", talk("user", "assistant", "system"), "invalid_value",
        ('messages[2] has role "system"',), param="messages[2].role"),
    Bad("the assistant last", talk("user", "assistant"), "invalid_value",
        ("end with a user message",), param="messages[1].role"),
    Bad("an unknown role", talk("tool"), "invalid_value", ('"tool"',), param="messages[0].role"),
    Bad("an unknown part", body({"type": "input_audio"}), "invalid_value", ("image_url",),
        param="messages[0].content[0]"),
    Bad("more tiles than the limit", body(image(drawn(), max_tiles=56), "?"), "invalid_value",
        ("less than or equal to 55",), param="messages[0].content[0].image_url.max_tiles"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("bad", PICTURES + REQUESTS, ids=lambda bad: bad.name)
def test_it_is_refused_with_what_is_wrong(server: ServeRun, bad: Bad, stream: bool) -> None:
    error = assert_error(
        post(server, json=bad.request | {"stream": stream}), bad.status, bad.code, bad.said
    )
    if bad.param is not None:
        assert error["param"] == bad.param
    assert_right(server)


def test_of_several_pictures_the_bad_one_is_named(server: ServeRun) -> None:
    good, cut = image(drawn()), image(drawn(400, 300, "JPEG")[:2000])
    for bad in (image(b"no"), cut):
        error = assert_error(ask(server, good, "and", bad, good), 400, "invalid_image", ())
        assert error["param"] == "messages[0].content[2].image_url.url"
        assert error["message"].startswith("messages[0].content[2].image_url.url: ")
    assert_right(server)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{not json", "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff\xfe{}", "invalid_json"),
        (b"[]", "invalid_type"),
        (b'{"model": "demo", "messages": [], "top_p": NaN}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_body_that_is_no_json_object(server: ServeRun, content: bytes, code: str) -> None:
    assert_error(post(server, content=content), 400, code, ("body",))
    assert_right(server)


class TestLargeBodies:
    LIMIT = 64 << 20

    def test_one_with_a_length(self, server: ServeRun) -> None:
        response = post(server, content=bytes(self.LIMIT + 1))
        assert_error(response, 413, "request_too_large", ("67,108,864 bytes", "smaller images"))
        assert_right(server)

    def test_one_that_comes_in_chunks(self, server: ServeRun) -> None:
        chunks = (bytes(1 << 20) for _ in range(65))
        assert_error(post(server, content=chunks), 413, "request_too_large", ("67,108,864 bytes",))
        assert_right(server)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/models/gpt-4o", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_routes_and_methods_that_are_not_there(
    server: ServeRun, method: str, path: str, status: int
) -> None:
    assert_error(httpx.request(method, server.url + path, trust_env=False), status, None, ())
    assert_right(server)


def test_the_openai_client_raises_its_own_errors(
    server: ServeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served") as missing:
            client.chat.completions.create(**body("hi", model="gpt-4o"))
        with pytest.raises(openai.BadRequestError, match="not an image") as bad:
            client.chat.completions.create(**body(image(b"no"), "?"), stream=True)
        right = client.chat.completions.create(**body(image(RED_CIRCLE), "What is it?"))
    assert right.choices[0].message.content == "A red circle."
    assert (missing.value.code, bad.value.code) == ("model_not_found", "invalid_image")


class TestOddPicturesThatAreServed:
    def test_of_an_animation_the_first_frame_is_seen(self, server: ServeRun) -> None:
        moving = image(animated("red", "blue", "green"))
        assert text_of(ask(server, moving, "What is it?")) == "A red circle."

    @pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (1, 60_000)])
    def test_thin_ones(self, server: ServeRun, size: tuple[int, int]) -> None:
        assert text_of(ask(server, image(drawn(*size)), "?"))
        assert_right(server)

    def test_a_transparent_one_is_seen_on_white(self, server: ServeRun) -> None:
        picture = Image.open(io.BytesIO(shapes("red circle")))
        ink = picture.convert("L").point(lambda light: 0 if light == 255 else 255)
        seen = Image.new("RGBA", picture.size)  # black, were it not for its transparency
        seen.paste(picture, mask=ink)
        out = io.BytesIO()
        seen.save(out, "PNG")
        said = text_of(ask(server, image(out.getvalue()), "Describe the picture.", max_tokens=20))
        assert said == "One red circle on a white background."


@dataclass
class Pages:
    """What a server on this machine answers, by path."""

    replies: dict[str, Callable[[], Reply]] = field(default_factory=dict)

    def answer(self, asked: Asked) -> Reply:
        make = self.replies.get(asked.path)
        return make() if make else Reply(b"", 404)


def of_type(kind: str, data: bytes) -> Reply:
    return Reply(data, headers={"content-type": kind})


def cut_off() -> Iterator[bytes]:
    yield RED_CIRCLE[:50]
    raise CutOff


PAGES = Pages(
    {
        "/a.png": lambda: of_type("image/png", RED_CIRCLE),
        "/moved.png": lambda: Reply(b"", 302, {"location": "/a.png"}),
        "/loop.png": lambda: Reply(b"", 302, {"location": "/loop.png"}),
        "/inward.png": lambda: Reply(b"", 302, {"location": "http://10.0.0.1/a.png"}),
        "/page.html": lambda: of_type("text/html", b"<html>"),
        "/empty.png": lambda: of_type("image/png", b""),
        "/no.png": lambda: of_type("image/png", b"not one"),
        "/large.png": lambda: of_type("image/png", bytes((20 << 20) + 1)),
        "/cut.png": lambda: Reply(cut_off(), headers={"content-type": "image/png"}),
    }
)


@pytest.fixture(scope="module")
def web() -> Iterator[Served]:
    with serving(PAGES.answer) as served:
        yield served


class TestPicturesOverHttp:
    def test_one_at_an_allowed_private_address(self, server: ServeRun, web: Served) -> None:
        for path in ("/a.png", "/moved.png"):
            said = text_of(ask(server, image(web.url + path), "What is it?"))
            assert said == "A red circle."

    @pytest.mark.parametrize(
        ("path", "code", "said"),
        [
            ("/page.html", "invalid_image_type", ('"text/html", not image/*',)),
            ("/missing.png", "image_fetch_failed", ("status 404, expected 200",)),
            ("/empty.png", "image_fetch_failed", ("no data",)),
            ("/no.png", "invalid_image", ("7 bytes are not an image",)),
            ("/large.png", "image_too_large", ("larger than 20971520 bytes",)),
            ("/cut.png", "image_fetch_failed", ("broke off",)),
            ("/loop.png", "image_fetch_failed", ("more than 3 redirects",)),
            ("/inward.png", "forbidden_image_url", ("not a public address",)),
        ],
    )
    def test_one_that_cannot_be_had(
        self, server: ServeRun, web: Served, path: str, code: str, said: tuple[str, ...]
    ) -> None:
        response = ask(server, image(web.url + path), "What?")
        error = assert_error(response, 400, code, said)
        assert error["param"] == PICTURE
        assert_right(server)

    def test_one_where_nobody_listens(self, server: ServeRun) -> None:
        response = ask(server, image(f"http://127.0.0.1:{free_port()}/a.png"), "What?")
        assert_error(response, 400, "image_fetch_failed", ("cannot be reached",))
        assert_right(server)

    def test_one_that_never_comes(self, server: ServeRun) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
            response = ask(server, image(url), "What?")
        assert_error(response, 400, "image_fetch_timeout", ("took too long", "2 s in all"))
        assert response.elapsed.total_seconds() < FETCH_LIMIT_S + 3
        assert_right(server)
