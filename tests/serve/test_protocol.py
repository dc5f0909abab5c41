"""The wire format, the way in: which requests are taken, and how others are refused."""

import base64
import json
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai.types.chat as openai_chat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import completion_create_params

from xc_ray.errors import InvalidRequest
from xc_ray.serve.answers import AssistantMessage
from xc_ray.serve.protocol import (
    MAX_LOGIT_BIASES,
    ChatCompletionRequest,
    ImagePart,
    Message,
    TextPart,
    parse_chat_request,
)

DATA_URL = "data:image/png;base64," + base64.b64encode(bytes(600)).decode()


def user(content: Any = "hello") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "hi") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any = "be brief") -> dict[str, Any]:
    return {"role": "system", "content": content}


def text(content: str = "look") -> dict[str, Any]:
    return {"type": "text", "text": content}


def image(url: Any = "http://h/a.png", **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages) or [user()]} | fields


def parse(request: Any) -> ChatCompletionRequest:
    return parse_chat_request(json.dumps(request).encode())


def outcome(raw: bytes) -> InvalidRequest | None:
    try:
        parse_chat_request(raw)
    except InvalidRequest as error:
        return error
    return None


def refusal(request: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(request if isinstance(request, bytes) else json.dumps(request).encode())
    assert caught.value.message.isprintable()  # one line, and nothing that could forge another
    return caught.value


class TestFields:
    def test_what_is_left_out_is_left_to_the_family(self) -> None:
        request = parse(body())
        assert (request.model, request.stream, request.n) == ("m", False, 1)
        assert (request.stop, request.logprobs, request.top_logprobs) == ([], False, None)
        assert request.temperature is request.top_p is request.top_k is request.seed is None
        assert request.presence_penalty is request.frequency_penalty is None
        assert request.repetition_penalty is request.output_limit is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", 0),
            ("temperature", 2),
            ("temperature", 0.7),
            ("top_p", 1),
            ("top_p", 1e-9),
            ("top_k", 1),
            ("top_k", 0),
            ("min_p", 0),
            ("min_p", 1),
            ("min_tokens", 0),
            ("min_tokens", 2**31 - 1),
            ("ignore_eos", True),
            ("seed", -(2**63)),
            ("seed", 2**63 - 1),
            ("n", 8),
            ("stop", []),
            ("stop", ["a", "b", "c", "d"]),
            ("max_tokens", 1),
            ("max_completion_tokens", 2**31 - 1),
            ("presence_penalty", -2),
            ("frequency_penalty", 2),
            ("repetition_penalty", 10),
            ("repetition_penalty", 0.01),
            ("logprobs", True),
            ("user", "somebody"),
            ("modalities", ["text"]),
            ("stream", True),
        ],
    )
    def test_a_value_within_its_bounds_is_taken(self, field: str, value: object) -> None:
        assert getattr(parse(body(**{field: value})), field) == value

    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            ("model", "", "must have at least 1 character"),
            ("model", "m" * 513, "must have at most 512 characters"),
            ("temperature", -0.1, "must be greater than or equal to 0, got -0.1"),
            ("temperature", 2.1, "must be less than or equal to 2, got 2.1"),
            ("top_p", 0, "must be greater than 0, got 0"),
            ("top_p", 1.01, "must be less than or equal to 1"),
            ("top_k", -2, "must be greater than or equal to -1"),
            ("min_p", -0.1, "must be greater than or equal to 0, got -0.1"),
            ("min_p", 1.1, "must be less than or equal to 1, got 1.1"),
            ("min_tokens", -1, "must be greater than or equal to 0, got -1"),
            ("min_tokens", 2**31, "must be less than or equal to 2147483647"),
            ("logit_bias", [5], "must be an object, {token id: bias}, got a list of 1"),
            ("seed", 2**63, "must be less than or equal to 9223372036854775807"),
            ("n", 0, "must be greater than or equal to 1"),
            ("n", 9, "must be less than or equal to 8"),
            ("max_tokens", 0, "must be greater than or equal to 1"),
            ("max_completion_tokens", 2**31, "must be less than or equal to 2147483647"),
            ("presence_penalty", 2.5, "must be less than or equal to 2"),
            ("frequency_penalty", -2.5, "must be greater than or equal to -2"),
            ("repetition_penalty", 0, "must be greater than 0"),
            ("repetition_penalty", 11, "must be less than or equal to 10"),
            ("top_logprobs", 21, "must be less than or equal to 20"),
            ("stop", "", "must be made of strings with at least one character"),
            ("stop", ["a", ""], "must be made of strings with at least one character"),
            ("stop", ["a", None], "must be made of strings with at least one character"),
            (
                "stop",
                list("abcde"),
                "must be a string or a list of up to 4 strings, got a list of 5",
            ),
            ("stop", 5, "must be a string or a list of up to 4 strings, got 5"),
            ("messages", [], "must have at least 1 item, got a list of 0"),
        ],
    )
    def test_a_value_out_of_bounds_is_refused(self, field: str, value: object, says: str) -> None:
        error = refusal(body(**{field: value}))
        assert error.message.startswith(f"{field} {says}")
        assert (error.param, error.code) == (field, "invalid_value")

    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            ("model", 5, "must be a valid string, got 5"),
            ("messages", {}, "must be a valid list, got an object"),
            ("temperature", "1", 'must be a valid number, got "1"'),
            ("temperature", True, "must be a valid number, got true"),
            ("max_tokens", 1.0, "must be a valid integer, got 1.0"),
            ("max_tokens", True, "must be a valid integer, got true"),
            ("n", "2", 'must be a valid integer, got "2"'),
            ("min_tokens", 1.5, "must be a valid integer, got 1.5"),
            ("min_p", "0", 'must be a valid number, got "0"'),
            ("ignore_eos", 1, "must be a valid boolean, got 1"),
            ("stream", 1, "must be a valid boolean, got 1"),
            ("stream", "true", 'must be a valid boolean, got "true"'),
            ("stream_options", True, "must be an object, got true"),
            ("user", 5, "must be a valid string, got 5"),
        ],
    )
    def test_a_value_of_the_wrong_type_is_not_converted(
        self, field: str, value: object, says: str
    ) -> None:
        error = refusal(body(**{field: value}))
        assert error.message == f"{field} {says}"
        assert (error.param, error.code) == (field, "invalid_type")

    @pytest.mark.parametrize("number", ["1e999", "-1e999"])
    def test_a_number_past_all_floats_is_refused(self, number: str) -> None:
        raw = json.dumps(body(temperature=0)).replace(
            '"temperature": 0', f'"temperature": {number}'
        )
        assert refusal(raw.encode()).param == "temperature"

    def test_an_integer_may_stand_for_a_float_and_becomes_one(self) -> None:
        assert isinstance(parse(body(temperature=1)).temperature, float)

    @pytest.mark.parametrize("off", [-1, 0])
    def test_both_ways_to_turn_top_k_off_are_stored_as_zero(self, off: int) -> None:
        assert parse(body(top_k=off)).top_k == 0

    def test_a_single_stop_string_becomes_a_list(self) -> None:
        assert parse(body(stop="###")).stop == ["###"]

    def test_every_optional_field_may_be_null(self) -> None:
        fields = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
        assert parse(body(**dict.fromkeys(fields))) == parse(body())

    @pytest.mark.parametrize("field", ["model", "messages"])
    def test_a_required_field_is_missed_when_absent_and_when_null(self, field: str) -> None:
        absent = {name: value for name, value in body().items() if name != field}
        for request in (absent, body(**{field: None})):
            error = refusal(request)
            assert error.message == f"{field} is required"
            assert (error.param, error.code) == (field, "missing_required_parameter")

    @pytest.mark.parametrize(
        "format", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]
    )
    def test_text_is_the_only_response_format(self, format: dict[str, Any]) -> None:
        assert parse(body(response_format={"type": "text"})).response_format is not None
        assert (refusal(body(response_format=format)).param or "").startswith("response_format.")

    @pytest.mark.parametrize("modalities", [["text", "audio"], ["audio"], []])
    def test_text_is_the_only_modality(self, modalities: list[str]) -> None:
        assert (refusal(body(modalities=modalities)).param or "").startswith("modalities")


class TestFieldsTogether:
    def test_either_name_of_the_output_limit_counts(self) -> None:
        assert parse(body(max_tokens=5)).output_limit == 5
        assert parse(body(max_completion_tokens=6)).output_limit == 6
        assert parse(body(max_tokens=7, max_completion_tokens=7)).output_limit == 7

    def test_two_output_limits_that_differ_are_refused(self) -> None:
        error = refusal(body(max_tokens=5, max_completion_tokens=6))
        assert error.message == ("max_tokens is 5 and max_completion_tokens is 6; send one of them")
        assert error.param == "max_completion_tokens"

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_an_answer_may_be_as_long_as_it_must(self, name: str) -> None:
        assert parse(body(**{"min_tokens": 5, name: 5})).min_tokens == 5
        error = refusal(body(**{"min_tokens": 6, name: 5}))
        assert error.message == "min_tokens is 6 and max_tokens is 5; lower min_tokens"
        assert (error.param, error.code) == ("min_tokens", "invalid_value")

    def test_top_logprobs_need_logprobs(self) -> None:
        assert parse(body(logprobs=True, top_logprobs=20)).top_logprobs == 20
        for fields in ({"top_logprobs": 2}, {"top_logprobs": 2, "logprobs": False}):
            error = refusal(body(**fields))
            assert error.message == "top_logprobs needs logprobs to be true"
            assert error.param == "top_logprobs"

    def test_stream_options_need_a_stream(self) -> None:
        options = {"include_usage": True}
        assert parse(body(stream=True, stream_options=options)).include_usage
        assert not parse(body(stream=True, stream_options={})).include_usage
        assert not parse(body(stream=True)).include_usage
        error = refusal(body(stream_options=options))
        assert error.message == "stream_options needs stream to be true"
        assert error.param == "stream_options"


class TestLogitBias:
    def test_ids_are_strings_as_json_has_them(self) -> None:
        biases = parse(body(logit_bias={"5": -100, "0": 100, "1023": 0.5})).logit_bias
        assert biases == {5: -100.0, 0: 100.0, 1023: 0.5}
        assert all(isinstance(bias, float) for bias in biases.values())

    def test_without_it_there_is_none(self) -> None:
        assert parse(body()).logit_bias == parse(body(logit_bias={})).logit_bias == {}

    @pytest.mark.parametrize(
        "key", ["a", "", "-1", "1.0", "05", " 5", "\u0665", "1" * 11, "x\ny", "\u202e", DATA_URL]
    )
    def test_what_is_no_token_id_is_named(self, key: str) -> None:
        error = refusal(body(logit_bias={"5": 1, key: 1}))
        assert error.message.startswith("logit_bias names ")
        assert error.message.endswith(", expected a token id as a string")
        assert len(error.message) < 160
        assert "AAAA" not in error.message
        assert (error.param, error.code) == ("logit_bias", "invalid_value")

    @pytest.mark.parametrize(
        ("bias", "shown"),
        [(100.5, "100.5"), (-101, "-101"), ("1", '"1"'), (True, "true"), (None, "null"), ([], "")],
    )
    def test_a_bias_out_of_bounds_is_told_with_its_id(self, bias: object, shown: str) -> None:
        error = refusal(body(logit_bias={"5": 1, "77": bias}))
        assert error.message.startswith(f"logit_bias of 77 is {shown}")
        assert error.message.endswith(", expected a number from -100 to 100")
        assert (error.param, error.code) == ("logit_bias", "invalid_value")

    def test_a_number_past_all_floats_is_refused(self) -> None:
        raw = json.dumps(body(logit_bias={"5": 0})).replace('"5": 0', '"5": 1e999')
        assert refusal(raw.encode()).param == "logit_bias"

    def test_there_may_be_so_many_and_no_more(self) -> None:
        most = {str(i): 1 for i in range(MAX_LOGIT_BIASES)}
        assert len(parse(body(logit_bias=most)).logit_bias) == MAX_LOGIT_BIASES
        error = refusal(body(logit_bias=most | {"5000": 1}))
        assert error.message == "logit_bias has 1,025 entries, the limit is 1,024"


class TestNames:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("tools", []),
            ("tool_choice", "none"),
            ("functions", [{}]),
            ("audio", {"voice": "alloy"}),
            ("best_of", 1),
            ("num_beams", 3),
            ("store", False),
        ],
    )
    def test_a_field_that_nothing_acts_on_is_refused_by_its_name(
        self, field: str, value: object
    ) -> None:
        error = refusal(body(**{field: value}))
        assert error.message == f"{field} is not supported by this server; leave it out"
        assert (error.param, error.code) == (field, "unsupported_parameter")

    def test_it_may_be_null(self) -> None:
        assert parse(body(tools=None, functions=None)) == parse(body())

    def test_every_field_of_the_openai_client_is_known_as_taken_or_refused(self) -> None:
        params = completion_create_params.CompletionCreateParamsBase.__annotations__
        assert parse(body(**dict.fromkeys(set(params) - {"model", "messages"}))) == parse(body())

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("temprature", "temperature"), ("max_token", "max_tokens"), ("topk", "top_k")],
    )
    def test_an_unknown_field_is_refused_with_the_nearest_name(
        self, name: str, nearest: str
    ) -> None:
        for value in (1, None):
            error = refusal(body(**{name: value}))
            assert error.message == f"{name} is not a known field; did you mean {nearest}?"
            assert (error.param, error.code) == (name, "unknown_parameter")

    def test_an_unknown_field_like_no_other_is_answered_with_all_names(self) -> None:
        error = refusal(body(user({"xyzzy": 1}), xyzzy=1))
        assert "; known are model, messages, stream, " in error.message

    @pytest.mark.parametrize(
        ("request_body", "param"),
        [
            (body(user() | {"contents": "x"}), "messages[0].contents"),
            (body(user([text() | {"txt": 1}])), "messages[0].content[0].txt"),
            (body(user([text(), image(detial="low")])), "messages[0].content[1].image_url.detial"),
            (body(stream=True, stream_options={"usage": True}), "stream_options.usage"),
            (body(response_format={"type": "text", "typ": 1}), "response_format.typ"),
        ],
    )
    def test_an_unknown_field_is_found_at_every_depth(
        self, request_body: dict[str, Any], param: str
    ) -> None:
        error = refusal(request_body)
        assert (error.param, error.code) == (param, "unknown_parameter")

    @pytest.mark.parametrize(
        "name", ["a" * 1000, "", "a\nb", "\u202e", "{problem}", "a.b", DATA_URL]
    )
    def test_an_odd_name_makes_a_short_and_readable_message(self, name: str) -> None:
        error = refusal(body(**{name: 1}))
        assert len(error.param or "") <= 80
        assert "AAAA" not in error.message
        assert "is not a known field" in error.message


class TestMessages:
    def test_text_becomes_one_part(self) -> None:
        message = parse(body(user("hello"))).messages[0]
        assert message == Message(role="user", content=[TextPart(type="text", text="hello")])

    def test_parts_keep_their_order(self) -> None:
        (message,) = parse(body(user([text("a"), image(), text("b"), image()]))).messages
        kinds = [type(part) for part in message.content]
        assert kinds == [TextPart, ImagePart, TextPart, ImagePart]

    def test_images_come_with_the_path_of_their_url(self) -> None:
        request = parse(
            body(user([text(), image("http://h/1")]), assistant(), user([image("http://h/2")]))
        )
        assert [(path, i.url) for path, i in request.images] == [
            ("messages[0].content[1].image_url.url", "http://h/1"),
            ("messages[2].content[0].image_url.url", "http://h/2"),
        ]

    def test_detail_and_max_tiles_are_read_per_image(self) -> None:
        content = [image(), image(detail="low"), image(detail="high", max_tiles=55)]
        images = [i for _, i in parse(body(user(content))).images]
        assert [(i.detail, i.max_tiles) for i in images] == [
            ("auto", None),
            ("low", None),
            ("high", 55),
        ]

    def test_developer_is_read_as_system(self) -> None:
        request = parse(body({"role": "developer", "content": "be brief"}, user()))
        assert [m.role for m in request.messages] == ["system", "user"]

    def test_an_empty_system_message_stands_for_no_system_text(self) -> None:
        assert parse(body(system(""), user())).messages[0].empty

    def test_an_answer_of_the_openai_client_can_be_sent_back(self) -> None:
        answer = openai_chat.ChatCompletionMessage(role="assistant", content="hi")
        for dumped in (answer.model_dump(), answer.model_dump() | {"annotations": []}):
            assert parse(body(user(), dumped, user())).messages[1].role == "assistant"

    def test_our_own_answer_can_be_sent_back(self) -> None:
        dumped = AssistantMessage(content="hi").model_dump()
        assert parse(body(user(), dumped, user())).messages[1].role == "assistant"

    @pytest.mark.parametrize(
        ("part", "param", "says"),
        [
            ("look", "", 'must be an object of type "text" or "image_url", got "look"'),
            (5, "", 'must be an object of type "text" or "image_url", got 5'),
            ({}, "", 'must be an object of type "text" or "image_url", got an object'),
            ({"type": {}}, "", 'must be an object of type "text" or "image_url", got an object'),
            (
                {"type": "input_audio", "input_audio": {}},
                "",
                'must be an object of type "text" or "image_url", got an object of type '
                '"input_audio"',
            ),
            ({"type": "text"}, ".text", "is required"),
            ({"type": "text", "text": 5}, ".text", "must be a valid string, got 5"),
            ({"type": "image_url"}, ".image_url", "is required"),
            (
                {"type": "image_url", "image_url": "http://h/a.png"},
                ".image_url",
                'must be an object, {"url": ...}, got "http://h/a.png"',
            ),
            (
                {"type": "image_url", "image_url": DATA_URL},
                ".image_url",
                'must be an object, {"url": ...}, got a string of 822 characters',
            ),
            (image(5), ".image_url.url", "must be a valid string, got 5"),
            (image(""), ".image_url.url", 'must have at least 1 character, got ""'),
            (
                image(detail="ultra"),
                ".image_url.detail",
                'must be "auto", "low" or "high", got "ultra"',
            ),
            (
                image(max_tiles=0),
                ".image_url.max_tiles",
                "must be greater than or equal to 1, got 0",
            ),
            (
                image(max_tiles=56),
                ".image_url.max_tiles",
                "must be less than or equal to 55, got 56",
            ),
        ],
    )
    def test_a_wrong_part_is_named_by_its_path(self, part: object, param: str, says: str) -> None:
        error = refusal(body(user(), assistant(), user([text(), part])))
        path = f"messages[2].content[1]{param}"
        assert (error.message, error.param) == (f"{path} {says}", path)

    @pytest.mark.parametrize(
        ("message", "param", "says"),
        [
            (5, "", "must be an object, got 5"),
            ({"role": "user"}, ".content", "is required"),
            (user(None), ".content", "is required"),
            (user(5), ".content", "must be a string or a list of parts, got 5"),
            ({"content": "x"}, ".role", "is required"),
            (
                {"role": "tool", "content": "x"},
                ".role",
                'must be "system", "user" or "assistant", got "tool"',
            ),
            (user() | {"name": "Ann"}, ".name", "is not supported by this server; leave it out"),
            (
                assistant() | {"tool_calls": [{}]},
                ".tool_calls",
                "is not supported by this server; leave it out",
            ),
        ],
    )
    def test_a_wrong_message_is_named_by_its_index(
        self, message: object, param: str, says: str
    ) -> None:
        error = refusal(body(system(), message))
        path = f"messages[1]{param}"
        assert (error.message, error.param) == (f"{path} {says}", path)

    @pytest.mark.parametrize("content", ["", [], [text("")], [text(""), text("")]])
    def test_an_empty_message_is_refused(self, content: object) -> None:
        for messages in ([user(content)], [user(), assistant(content), user()]):
            error = refusal(body(*messages))
            index = len(messages) // 2
            assert error.param == f"messages[{index}].content"
            assert error.message.startswith(f"messages[{index}] is empty; a message needs text")

    def test_an_image_alone_is_a_message(self) -> None:
        assert not parse(body(user([image()]))).messages[0].empty
        assert not parse(body(user([text(""), image()]))).messages[0].empty

    @pytest.mark.parametrize(
        ("messages", "where", "role"),
        [
            ([system([text(), image()]), user()], "messages[0].content[1]", "system"),
            ([user(), assistant([image()]), user()], "messages[1].content[0]", "assistant"),
        ],
    )
    def test_an_image_of_anybody_but_the_user_is_refused(
        self, messages: list[Any], where: str, role: str
    ) -> None:
        error = refusal(body(*messages))
        assert error.param == where
        assert f'has role "{role}" and an image; only "user" may have one' in error.message


class TestOrder:
    @pytest.mark.parametrize(
        "messages",
        [
            [user()],
            [system(), user()],
            [user(), assistant(), user()],
            [system(), user(), assistant(), user(), assistant(), user()],
        ],
    )
    def test_system_first_then_user_and_assistant_in_turn(self, messages: list[Any]) -> None:
        assert len(parse(body(*messages)).messages) == len(messages)

    @pytest.mark.parametrize(
        ("messages", "index", "role", "expected"),
        [
            ([assistant(), user()], 0, "assistant", "user"),
            ([system(), assistant()], 1, "assistant", "user"),
            ([user(), user()], 1, "user", "assistant"),
            ([user(), assistant(), assistant()], 2, "assistant", "user"),
            ([system(), system(), user()], 1, "system", "user"),
            ([user(), system(), user()], 1, "system", "assistant"),
            ([user(), assistant(), {"role": "developer", "content": "x"}], 2, "system", "user"),
        ],
    )
    def test_a_message_out_of_turn_is_named(
        self, messages: list[Any], index: int, role: str, expected: str
    ) -> None:
        error = refusal(body(*messages))
        assert error.param == f"messages[{index}].role"
        assert error.message.startswith(
            f'messages[{index}] has role "{role}", expected "{expected}": one system message first'
        )

    @pytest.mark.parametrize("messages", [[system()], [user(), assistant()]])
    def test_the_last_message_is_a_users(self, messages: list[Any]) -> None:
        error = refusal(body(*messages))
        last = len(messages) - 1
        assert error.param == f"messages[{last}].role"
        assert error.message.startswith(f"messages[{last}], the last, has role ")
        assert error.message.endswith("end with a user message")


class TestBody:
    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"nonsense",
            b'{"model": "m",}',
            b"{} {}",
            b"\xef\xbb\xbf{}",
            b'{"model": "\xff"}',
            b'{"model": "\xed\xa0\x80"}',
            b'{"model": "\\ud800"}',
            b'{"model": "\\udc00x"}',
            b'{"\\ud800": 1}',
            b'{"model": "m", "temperature": NaN}',
            b'{"model": "m", "temperature": -Infinity}',
            b'{"seed": ' + b"9" * 10_000 + b"}",
            "{}".encode("utf-16"),
        ],
    )
    def test_what_is_not_json_is_refused(self, raw: bytes) -> None:
        error = refusal(raw)
        assert error.message.startswith("the body is not valid JSON: ")
        assert error.code == "invalid_json"

    @pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":[{"content":['])
    def test_deep_nesting_is_refused_and_does_not_recurse(self, opening: bytes) -> None:
        assert refusal(opening * 10**6).code == "invalid_json"

    @pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"x"'])
    def test_json_that_is_no_object_is_refused(self, raw: bytes) -> None:
        error = refusal(raw)
        assert error.message.startswith("the body must be a JSON object, got ")
        assert error.code == "invalid_type"

    def test_the_schema_for_the_documentation_can_be_made(self) -> None:
        schema = ChatCompletionRequest.model_json_schema()
        assert schema["required"] == ["model", "messages"]
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) == set(ChatCompletionRequest.model_fields)

    def test_of_a_name_given_twice_the_last_counts(self) -> None:
        raw = json.dumps(body(n=2))[:-1] + ', "n": 3}'
        assert parse_chat_request(raw.encode()).n == 3

    def test_a_surrogate_pair_is_one_character(self) -> None:
        raw = json.dumps(body(user("😀")), ensure_ascii=True)
        part = parse_chat_request(raw.encode()).messages[0].content[0]
        assert part == TextPart(type="text", text="😀")

    def test_several_errors_are_counted_and_the_first_is_told(self) -> None:
        error = refusal(body(temperature=3, top_p=2, n=9))
        assert error.message == ("temperature must be less than or equal to 2, got 3 (and 2 more)")
        assert error.param == "temperature"

    def test_a_long_value_is_shortened(self) -> None:
        error = refusal(body(response_format={"type": "x" * 1000}))
        assert error.message == f'response_format.type must be "text", got "{"x" * 78}…'

    def test_a_long_number_is_shortened(self) -> None:
        error = refusal(f'{{"model": "m", "messages": [], "n": {"9" * 4300}}}'.encode())
        assert len(error.message) < 200
        raw = json.dumps(body()).replace('"m"', '"m", "n": ' + "9" * 4300)
        assert refusal(raw.encode()).message.endswith("9" * 79 + "…")

    @pytest.mark.parametrize("odd", ["a\nb", "\x00", "\u2028", "\x85", "\u202e", "\x1b[31m"])
    def test_no_character_of_a_value_can_break_the_line(self, odd: str) -> None:
        error = refusal(body({"role": odd, "content": "x"}))  # `refusal` checks it
        assert "\\u" in error.message or "\\n" in error.message

    @pytest.mark.parametrize(
        "make",
        [
            lambda url: body(user([image(detail=url)])),
            lambda url: body(user([url])),
            lambda url: body(user([{"type": url}])),
            lambda url: body({"role": url, "content": "x"}),
            lambda url: body(stop=5, model="", user=[url]),
            lambda url: body(n=url),
            lambda url: body(n=f"see {url}"),
            lambda url: body(n=url.upper()),
            lambda url: [url],
            lambda url: url,
        ],
    )
    def test_a_data_url_is_in_no_message(self, make: Callable[[str], Any]) -> None:
        error = refusal(make(DATA_URL))
        assert "AAAA" not in error.message + (error.param or "")

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"messages": [' + b"5," * 10**5 * 3 + b"5]}",
            b'{"messages": [{"role": "user", "content": [' + b"5," * 10**5 * 3 + b"5]}]}",
            b'{"modalities": [' + b"5," * 10**5 * 3 + b"5]}",
            b'{"stop": [' + b"5," * 10**5 * 3 + b"5]}",
            b"{" + b",".join(b'"a%d": 1' % i for i in range(10**5 * 3)) + b"}",
        ],
    )
    def test_many_errors_take_little_longer_than_reading_them(self, raw: bytes) -> None:
        """Listing every error of such a body took seconds, in which nobody else was served."""
        start = time.process_time()
        json.loads(raw)
        reading = time.process_time() - start
        start = time.process_time()
        refusal(raw)
        assert time.process_time() - start < 3 * reading + 0.2

    def test_the_error_survives_the_way_between_processes(self) -> None:
        error = refusal(body(temperature=3))
        copy = pickle.loads(pickle.dumps(error))
        assert (copy.message, copy.param, copy.code) == (error.message, error.param, error.code)

    @given(st.binary(max_size=200))
    def test_whatever_the_bytes_the_only_error_is_an_invalid_request(self, raw: bytes) -> None:
        with pytest.raises(InvalidRequest):
            parse_chat_request(raw)

    names = st.sampled_from([*ChatCompletionRequest.model_fields, "tools", "url", "text", "role"])
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=10)
        | st.sampled_from(["user", "assistant", "system", "text", "image_url", "auto"]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["role", "content", "type", "text", "image_url", "url"])
                | st.text(max_size=5),
                inner,
                max_size=4,
            )
        ),
        max_leaves=15,
    )

    # The first value takes a while to make where the machine has other work.
    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(st.dictionaries(names, values, max_size=6), st.booleans())
    def test_whatever_the_json_the_only_error_is_an_invalid_request(
        self, fields: dict[str, Any], complete: bool
    ) -> None:
        request = (body() | fields) if complete else fields
        error = outcome(json.dumps(request).encode())
        if error is not None:
            assert error.message.isprintable()
            assert len(error.message) < 500


def test_the_docs_tell_of_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    told = set(re.findall(r"`(\w+)[.\w]*`", page))
    assert {*ChatCompletionRequest.model_fields} <= told
