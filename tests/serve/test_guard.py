"""The guard in front of all routes: what passes with a key, what without, and what it hands on."""

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message

from xc_ray.errors import Unauthenticated
from xc_ray.serve.auth import Caller
from xc_ray.serve.guard import OPEN_PATHS, Guard, _path, caller_of, known_caller

HEADER = {"Authorization": "Bearer right"}


def admit(authorization: str | None) -> Caller:
    if authorization != HEADER["Authorization"]:
        raise Unauthenticated("who are you?", code="invalid_api_key")
    return Caller("a")


async def healthz(request: Request) -> JSONResponse:
    caller = known_caller(request)
    return JSONResponse({"caller": caller and caller.name})


async def whoami(request: Request) -> JSONResponse:
    return JSONResponse({"caller": caller_of(request).name, "path": request.url.path})


ROUTES = [Route("/healthz", healthz), Route("/whoami", whoami, methods=["GET", "POST"])]


@pytest.fixture
def client() -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Guard(Starlette(routes=ROUTES), admit))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_a_known_key_passes_and_the_route_hears_whose_it_is(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/whoami", headers=HEADER)
    assert response.json()["caller"] == "a"


async def test_whom_it_refuses_is_told_and_no_other() -> None:
    told: list[str | None] = []
    guard = Guard(Starlette(routes=ROUTES), admit, lambda error: told.append(error.code))
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/whoami", headers=HEADER)
        await client.get("/healthz")
        assert not told
        await client.get("/whoami")
    assert told == ["invalid_api_key"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
@pytest.mark.parametrize("path", ["/whoami", "/", "/none", "/healthz/", "//healthz", "/healthz/x"])
async def test_without_one_no_path_is_answered(
    path: str, headers: dict[str, str], client: httpx.AsyncClient
) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS", "BREW"):
        response = await client.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert method == "HEAD" or response.json()["error"] == {
            "message": "who are you?",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }


async def test_health_is_told_to_anybody_and_knows_a_key_all_the_same(
    client: httpx.AsyncClient,
) -> None:
    for headers, caller in (({}, None), ({"Authorization": "no"}, None), (HEADER, "a")):
        assert (await client.get("/healthz", headers=headers)).json() == {"caller": caller}


async def test_a_body_is_not_read_for_nobody(client: httpx.AsyncClient) -> None:
    async def never() -> Message:
        raise AssertionError("it was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/whoami", "headers": []}
    await Guard(Starlette(routes=ROUTES), admit)(scope, never, send)
    assert sent[0]["status"] == 401


async def test_websockets_are_closed(client: httpx.AsyncClient) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/healthz", "headers": []}
    await Guard(Starlette(routes=ROUTES), admit)(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_state_that_requests_share_holds_no_caller() -> None:
    shared = {"pool": 1}
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"])

    async def nothing(*_: Any) -> Any:
        return None

    headers = [(b"authorization", b"Bearer right")]
    scope = {"type": "http", "path": "/x", "headers": headers, "state": shared}
    await Guard(app, admit)(scope, nothing, nothing)
    assert seen == [{"pool": 1, "caller": Caller("a")}]
    assert shared == {"pool": 1}


async def test_below_a_prefix_the_same_paths_are_open() -> None:
    transport = httpx.ASGITransport(Guard(Starlette(routes=ROUTES), admit), root_path="/demo")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/demo/healthz")).status_code == 200
        for path in ("/demo/whoami", "/demohealthz", "/demo/demo/healthz"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/demo/whoami", headers=HEADER)).status_code == 200


PARTS = st.lists(st.sampled_from(["/", "healthz", "readyz", "a", ".", "..", "%2f"]), max_size=5)


@given(path=PARTS.map("".join), root=st.sampled_from(["", "/", "/a", "/healthz", "/healthz/a"]))
def test_what_it_takes_for_open_routes_take_for_the_same(path: str, root: str) -> None:
    scope = {"path": path, "root_path": root}
    if _path(scope) in OPEN_PATHS:
        assert get_route_path(scope) == _path(scope)
