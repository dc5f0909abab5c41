import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.local_http import Asked, CutOff, Reply, json_reply, serving
from xc_ray.client import Server, data_uri, sse_data
from xc_ray.errors import InvalidRequest, MediaError, XcRayError
from xc_ray.serve.answers import (
    SSE_DONE,
    AssistantMessage,
    ChatCompletion,
    Choice,
    ChunkWriter,
    Usage,
    error_body,
)
from xc_ray.serve.protocol import parse_chat_request
from xc_ray.terminal import RULE, ChatOptions, History, Terminal

EVENTS = {"content-type": "text/event-stream"}


@dataclass
class ChatServer:
    """The stand-in: takes what the real server takes, says `pieces`, or what `override` says."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    pieces: list[str] = field(default_factory=lambda: ["two ", "wörds ", "图\u2028."])
    override: Callable[[Asked], Reply | None] = lambda asked: None

    @property
    def requests(self) -> list[Any]:
        return [asked.json for asked in self.asked if asked.method == "POST"]

    def answer(self, asked: Asked) -> Reply:
        reply = self.override(asked)
        if reply is not None:
            return reply
        if (asked.method, asked.path) == ("GET", "/v1/models"):
            return json_reply({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})
        if (asked.method, asked.path) != ("POST", "/v1/chat/completions"):
            return json_reply({"error": {"message": f"no route {asked.path}"}}, 404)
        try:
            request = parse_chat_request(asked.body)
        except InvalidRequest as e:
            return Reply(error_body(e).model_dump_json().encode(), e.status)
        return Reply(self.events(), headers=EVENTS) if request.stream else self.whole()

    def events(self) -> Iterator[bytes]:
        write = ChunkWriter("id", 1, "first")
        yield write.start()
        for piece in self.pieces:
            yield write.step(piece)
        yield write.step("", finish_reason="stop")
        yield SSE_DONE

    def whole(self) -> Reply:
        message = AssistantMessage(content="".join(self.pieces))
        choice = Choice(index=0, message=message, finish_reason="stop")
        answer = ChatCompletion(
            id="id", created=1, model="first", choices=[choice], usage=Usage.count(1, 2)
        )
        return Reply(answer.model_dump_json().encode())


@pytest.fixture
def stand_in() -> Iterator[ChatServer]:
    chat_server = ChatServer()
    with serving(chat_server.answer) as served:
        chat_server.url, chat_server.asked = served.url, served.asked
        yield chat_server


def session(server: Server, *lines: str) -> tuple[str, str, History]:
    out, err = io.StringIO(), io.StringIO()
    stdin = io.StringIO("".join(line + "\n" for line in lines))
    terminal = Terminal(server, server.live, stdin, out, err)
    terminal.run()
    return out.getvalue(), err.getvalue(), terminal.history


def on_post(reply: Reply) -> Callable[[Asked], Reply | None]:
    return lambda asked: reply if asked.method == "POST" else None


# ---------------------------------------------------------------- requests and answers


@pytest.mark.parametrize("live", [True, False])
def test_an_answer_is_printed_as_a_local_one_is(live, stand_in):
    server = Server.connect(stand_in.url, ChatOptions(), live=live)
    out, err, history = session(server, "hi")
    assert (out, err) == (f"<<< two wörds 图\u2028.\n{RULE}\n<<< \n", "")
    assert history == [("hi", "two wörds 图\u2028.")]
    assert [r["stream"] for r in stand_in.requests] == [live]


def test_pieces_come_with_the_history_so_far(stand_in):
    stand_in.pieces = ["a", "", "b"]
    server = Server.connect(stand_in.url, ChatOptions())
    before = [("q", "r")]
    expected = [("a", [*before, ("x", "a")]), ("b", [*before, ("x", "ab")])]
    assert list(server.stream("x", before)) == expected
    assert before == [("q", "r")]


def test_every_turn_sends_the_conversation_so_far(stand_in):
    stand_in.pieces = ["yes"]
    session(Server.connect(stand_in.url, ChatOptions()), "one", "two")
    assert stand_in.requests[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two"},
    ]


def test_what_is_not_given_is_left_to_the_server(stand_in):
    session(Server.connect(stand_in.url, ChatOptions()), "hi")
    assert stand_in.requests == [
        {"model": "first", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    ]


def test_options_go_into_the_request(stand_in):
    options = ChatOptions(
        system="Be brief.",
        stop=["END"],
        sampling={
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "repetition_penalty": 1.1,
            "seed": 3,
            "max_tokens": 9,
        },
    )
    _, err, _ = session(Server.connect(stand_in.url, options), "hi")
    assert err == "", "the server's own parser takes it"
    [request] = stand_in.requests
    assert request.pop("messages")[0] == {"role": "system", "content": "Be brief."}
    assert request == {"model": "first", "stream": True, "stop": ["END"], **options.sampling}


def test_an_empty_system_text_is_sent_for_it_means_none(stand_in):
    session(Server.connect(stand_in.url, ChatOptions(system="")), "hi")
    assert stand_in.requests[0]["messages"][0] == {"role": "system", "content": ""}


@pytest.mark.parametrize(
    ("file_format", "kind"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif")]
)
def test_a_local_file_goes_as_a_data_uri_typed_by_its_content(
    file_format, kind, stand_in, picture, tmp_path
):
    data = picture(file_format=file_format)
    path = tmp_path / "any name.xyz"
    path.write_bytes(data)
    server = Server.connect(stand_in.url, ChatOptions(max_tiles=4))
    _, err, _ = session(server, f"See <img>{path}</img> here <img>HTTP://host/b.png</img>")
    assert err == ""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    assert stand_in.requests[0]["messages"][0]["content"] == [
        {"type": "text", "text": "See "},
        {"type": "image_url", "image_url": {"url": uri, "max_tiles": 4}},
        {"type": "text", "text": " here "},
        {"type": "image_url", "image_url": {"url": "HTTP://host/b.png", "max_tiles": 4}},
    ]


def test_pictures_of_earlier_turns_are_sent_again(stand_in, picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    session(Server.connect(stand_in.url, ChatOptions()), f"<img>{path}</img>What?", "And now?")
    first, second = (request["messages"] for request in stand_in.requests)
    assert second[0] == first[0]
    assert first[0]["content"][0] == {
        "type": "image_url",
        "image_url": {"url": data_uri(str(path))},
    }
    assert second[2]["content"] == "And now?"


def test_a_data_uri_in_a_query_goes_as_it_is(stand_in):
    session(Server.connect(stand_in.url, ChatOptions()), "<img>data:image/png;base64,AA==</img>")
    assert stand_in.requests[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", r"cannot send the picture '.*a\.png': the 5 bytes are not an image of a known"),
        (b"", r"cannot send the picture '.*a\.png': the image is empty \(0 bytes\)"),
        (None, r"cannot read the picture '.*a\.png': No such file or directory"),
    ],
)
def test_a_file_that_is_no_picture_is_never_sent(content, message, stand_in, tmp_path):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    server = Server.connect(stand_in.url, ChatOptions())
    _, err, history = session(server, f"<img>{path}</img>What?", "hi")
    assert re.fullmatch(rf"xc-ray: {message}[^\n]*\n", err)
    assert [q for q, _ in history] == ["hi"]
    assert len(stand_in.requests) == 1


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.png", "a\0b.png", ".", "x" * 5000])
def test_an_impossible_path_is_one_error(path):
    with pytest.raises(MediaError, match=r"cannot read the picture") as caught:
        data_uri(path)
    assert len(str(caught.value)) < 300


def test_text_that_is_no_unicode_is_told_before_it_is_sent(stand_in):
    server = Server.connect(stand_in.url, ChatOptions())
    _, err, history = session(server, "a\udc80b")
    assert err == "xc-ray: the text is not valid Unicode; type it again\n"
    assert (history, stand_in.requests) == ([], [])


# ---------------------------------------------------------------- connecting


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_with_v1_or_not(suffix, stand_in):
    server = Server.connect(stand_in.url + suffix, ChatOptions())
    assert session(server, "hi")[1] == ""
    assert [asked.path for asked in stand_in.asked] == ["/v1/models", "/v1/chat/completions"]


def test_the_model_is_the_one_asked_for_or_the_servers_first(stand_in):
    assert Server.connect(stand_in.url, ChatOptions()).model == "first"
    assert Server.connect(stand_in.url, ChatOptions(), model="second").model == "second"


def test_the_key_goes_with_every_request(stand_in):
    session(Server.connect(stand_in.url, ChatOptions(), api_key="s3cret"), "hi")
    assert [a.headers["authorization"] for a in stand_in.asked] == ["Bearer s3cret"] * 2
    session(Server.connect(stand_in.url, ChatOptions()), "hi")
    assert "authorization" not in stand_in.asked[-1].headers


def test_a_dead_server_is_one_line_at_the_start(stand_in):
    with serving(lambda asked: Reply()) as gone:
        pass
    for model in (None, "m"):
        with pytest.raises(XcRayError, match=rf"^cannot reach the server at {gone.url}/v1: .+"):
            Server.connect(gone.url, ChatOptions(), model=model)


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://127.0.0.1:99999", "ftp://host", f"http://{300 * 'h'}"]
)
def test_an_url_that_leads_nowhere_is_one_line(url):
    with pytest.raises(XcRayError, match=r"^cannot reach the server at"):
        Server.connect(url, ChatOptions())


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_no_header_can_carry_is_one_line(key, stand_in):
    with pytest.raises(XcRayError, match=r"^the key holds characters that no header can carry$"):
        Server.connect(stand_in.url, ChatOptions(), api_key=key)
    assert stand_in.asked == []


def test_a_server_does_not_show_its_key():
    assert "s3cret" not in repr(Server("http://h/v1", "m", ChatOptions(), "s3cret"))


@pytest.mark.parametrize("model", [None, "m"])
def test_a_refused_key_is_told_at_the_start(model, stand_in):
    stand_in.override = lambda asked: json_reply({"error": {"message": "no such key"}}, 401)
    with pytest.raises(XcRayError, match=r"^the server: no such key$"):
        Server.connect(stand_in.url, ChatOptions(), model=model)


def test_a_named_model_needs_no_list_of_models(stand_in):
    stand_in.override = lambda asked: Reply(b"", 404) if asked.method == "GET" else None
    assert session(Server.connect(stand_in.url, ChatOptions(), model="m"), "hi")[1] == ""
    with pytest.raises(XcRayError, match=r"^the server: HTTP 404 Not Found$"):
        Server.connect(stand_in.url, ChatOptions())


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": [{}]}', b'{"data": [3]}', b"\xff"])
def test_what_is_no_chat_server_is_one_line(body, stand_in):
    stand_in.override = lambda asked: Reply(body)
    with pytest.raises(XcRayError, match=r"does not answer as an OpenAI-compatible one"):
        Server.connect(stand_in.url, ChatOptions())


def test_a_server_without_models_is_one_line(stand_in):
    stand_in.override = lambda asked: json_reply({"object": "list", "data": []})
    with pytest.raises(XcRayError, match=r"serves no model$"):
        Server.connect(stand_in.url, ChatOptions())


# ---------------------------------------------------------------- answers that fail


def failing(stand_in: ChatServer, reply: Reply, *, live: bool = True) -> str:
    """The one line of a question that fails, in a session that goes on with its history."""
    stand_in.pieces = ["fine"]
    server = Server.connect(stand_in.url, ChatOptions(), live=live)
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(server, live, io.StringIO("one\n"), out, err)
    terminal.run()
    stand_in.override = on_post(reply)
    terminal.stdin = io.StringIO("two\n")
    terminal.run()
    assert terminal.history == [("one", "fine")]
    stand_in.override = lambda asked: None
    terminal.stdin = io.StringIO("three\n")
    terminal.run()
    assert terminal.history == [("one", "fine"), ("three", "fine")]
    [line] = err.getvalue().splitlines()
    return line


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"error": {"message": "the prompt takes\n 9 tokens"}}, "the prompt takes 9 tokens"),
        (404, {"error": {"message": "no model 'x'", "code": None}}, "no model 'x'"),
        (429, {"error": "slow down"}, "slow down"),
        (400, {"object": "error", "message": "flat"}, "flat"),
        (500, {"detail": []}, "HTTP 500 Internal Server Error"),
        (307, {}, "HTTP 307 Temporary Redirect"),
    ],
)
def test_a_refusal_is_the_message_of_its_body(status, body, told, live, stand_in):
    line = failing(stand_in, json_reply(body, status), live=live)
    assert line == f"xc-ray: the server: {told}"


def test_a_refusal_without_json_is_its_status(stand_in):
    line = failing(stand_in, Reply(b"<html>bad gateway</html>", 502))
    assert line == "xc-ray: the server: HTTP 502 Bad Gateway"


def test_an_unknown_model_is_what_the_server_says_of_it(stand_in):
    stand_in.override = on_post(json_reply({"error": {"message": "no model 'nope'"}}, 404))
    server = Server.connect(stand_in.url, ChatOptions(), model="nope")
    assert session(server, "hi")[1:] == ("xc-ray: the server: no model 'nope'\n", [])


def test_an_error_event_is_the_end_of_the_answer(stand_in):
    def events() -> Iterator[bytes]:
        yield b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
        yield b'data: {"error": {"message": "the engine failed", "code": null}}\n\n'

    line = failing(stand_in, Reply(events(), headers=EVENTS))
    assert line == "xc-ray: the server: the engine failed"


BROKEN_OFF = "xc-ray: the server's answer broke off before its end; ask again"


@pytest.mark.parametrize("cut", [False, True], ids=["no DONE", "connection dropped"])
def test_an_answer_without_its_end_is_none(cut, stand_in):
    def events() -> Iterator[bytes]:
        yield b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
        yield b"data: [DONE]"  # an event ends with an empty line
        if cut:
            raise CutOff

    assert failing(stand_in, Reply(events(), headers=EVENTS)) == BROKEN_OFF


def test_a_whole_answer_that_is_cut_is_none(stand_in):
    cut = Reply(b'{"choices": [', headers={"content-length": "500", "connection": "close"})
    assert failing(stand_in, cut, live=False) == BROKEN_OFF


@pytest.mark.parametrize(
    "data", ["{", "[]", "7", '{"choices": 7}', '{"choices": [{}]}', '{"choices": [{"delta": 7}]}']
)
def test_events_that_are_no_completion_are_one_line(data, stand_in):
    line = failing(stand_in, Reply(f"data: {data}\n\n".encode(), headers=EVENTS))
    assert "does not answer as an OpenAI-compatible one" in line


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"x": 1}]}'])
def test_a_body_that_is_no_completion_is_one_line(body, stand_in):
    assert "does not answer as an OpenAI" in failing(stand_in, Reply(body), live=False)


def test_a_server_that_dies_in_the_session_is_one_line(stand_in):
    with serving(stand_in.answer) as dying:
        server = Server.connect(dying.url, ChatOptions())
    _, err, history = session(server, "hi", "hi")
    line = f"xc-ray: cannot reach the server at {dying.url}/v1: "
    assert [shown.startswith(line) for shown in err.splitlines()] == [True, True]
    assert history == []


def test_a_closed_answer_closes_its_stream(stand_in):
    def events() -> Iterator[bytes]:
        while True:
            yield b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'

    with serving(lambda asked: Reply(events(), headers=EVENTS)) as served:
        pieces = Server(f"{served.url}/v1", "m", ChatOptions()).stream("go on", [])
        assert next(pieces) == ("word ", [("go on", "word ")])
        pieces.close()
        assert served.client_left.wait(20)


# ---------------------------------------------------------------- server-sent events


def event(content: str | None) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': {'content': content}}]})}\n\n".encode()


def test_chunks_without_text_add_nothing(stand_in):
    usage = b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n'
    bare = b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
    body = bare + event(None) + event("") + event("x") + usage + b"data: [DONE]\n\n"
    stand_in.override = on_post(Reply(body, headers=EVENTS))
    assert session(Server.connect(stand_in.url, ChatOptions()), "hi")[2] == [("hi", "x")]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_whole_however_the_bytes_are_cut(size):
    stream = (
        ": a comment\n\ndata: one\n\nevent: x\nid: 7\ndata:two\r\n\r\n"
        "data: three\ndata:  3\n\n\n\ndata: \u2028é\n\ndata: cut"
    ).encode()
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    expected = [b"one", b"two", b"three\n 3", "\u2028é".encode()]
    assert list(sse_data(chunks)) == expected
