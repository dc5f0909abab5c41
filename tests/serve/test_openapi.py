"""What the OpenAPI document says is so: requests made from it, and others, are never a 500."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings

from tests.serve.handles import LocalHandle
from xc_ray.config import ServeConfig
from xc_ray.keys import digest_of
from xc_ray.model.layout import read_layout
from xc_ray.prompt.tokenizer import load_tokenizer
from xc_ray.serve.ingress import Ingress, make_api
from xc_ray.serve.messages import DecoderState, GenerateRequest, Tokens
from xc_ray.serve.prefixes import Route

# Not at the top: an environment made before it was in the `test` extra still runs the rest.
schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.checks")
openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")
modes = pytest.importorskip("schemathesis.generation.modes").GenerationMode

Tiny = Callable[..., Path]
KEY = "a key of the test"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


class Decoder:
    """Answers everybody with one token."""

    async def ready(self) -> int:
        return 1

    async def adapters(self) -> DecoderState:
        return DecoderState("r1")

    async def generate(self, request: GenerateRequest, route: Route) -> AsyncIterator[list[Tokens]]:
        await asyncio.sleep(0)
        yield [Tokens(i, [300], 1, "stop") for i in range(request.num_choices)]


@pytest.fixture
def api(tiny: Tiny, tmp_path: Path) -> FastAPI:
    """With keys: requests hold one that may chat, or none."""
    folder, keys = tiny(), tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "team", "sha256": digest_of(KEY)}]}))
    # No name that is made up shall be looked up.
    media: dict[str, Any] = {"allow_hosts": []}
    args = {"model": str(folder), "served_model_name": "tiny", "media": media, "keys": str(keys)}
    ingress = Ingress(
        ServeConfig.model_validate(args).resolve(0),
        read_layout(folder).config,
        load_tokenizer(folder, 1024),
        LocalHandle(Decoder()),  # type: ignore[arg-type]
        lambda: "127.0.0.1",
    )
    return make_api(ingress)


def test_the_body_of_a_chat_is_told_without_references(api: FastAPI) -> None:
    document = api.openapi()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert "$ref" not in str(schema)
    assert set(schema["required"]) == {"model", "messages"}


@pytest.mark.parametrize("headers", [WITH_KEY, {}], ids=["key", "no key"])
@pytest.mark.parametrize(
    ("path", "method", "mode", "count"),
    [
        ("/v1/chat/completions", "POST", modes.POSITIVE, 60),
        ("/v1/chat/completions", "POST", modes.NEGATIVE, 60),  # what the document does not allow
        ("/v1/models/{name}", "GET", modes.POSITIVE, 60),
        ("/v1/models", "GET", modes.POSITIVE, 3),
        ("/healthz", "GET", modes.POSITIVE, 3),
        ("/readyz", "GET", modes.POSITIVE, 3),
    ],
)
def test_whatever_is_sent_is_answered_as_the_document_says(
    api: FastAPI, path: str, method: str, mode: Any, count: int, headers: dict[str, str]
) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", api, headers=WITH_KEY)
    operation = document[path][method]

    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def every(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, headers=headers)

    every()
