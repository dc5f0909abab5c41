"""Who comes in: every request is somebody's before any route, known or not, sees it."""

from collections.abc import Callable
from typing import Final, TypeAlias

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from xc_ray.errors import XcRayError
from xc_ray.serve.auth import Caller
from xc_ray.serve.refusals import refusal

# Probes have no keys. They are told who asked, too, if anybody is known.
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})

Admit: TypeAlias = Callable[[str | None], Caller]


class Guard:
    """An ASGI application in front of another: asks `admit` about each Authorization header.

    Outside of all routes, so that what is added later, generated (/openapi.json) or unknown is
    behind it as well. Refuses before the body is read, and tells `refused` why.
    """

    def __init__(
        self, app: ASGIApp, admit: Admit, refused: Callable[[XcRayError], None] = lambda _: None
    ) -> None:
        self._app = app
        self._admit = admit
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] == "websocket":  # there are none
            await WebSocketClose()(scope, receive, send)
            return
        if scope["type"] == "http":
            caller = None
            try:
                caller = self._admit(Headers(scope=scope).get("authorization"))
            except XcRayError as e:
                if _path(scope) not in OPEN_PATHS:
                    self._refused(e)
                    await refusal(e)(scope, receive, send)
                    return
            # A scope of its own: a server may share the state of its lifespan between requests.
            scope = {**scope, "state": {**scope.get("state", {}), "caller": caller}}
        await self._app(scope, receive, send)


def known_caller(request: Request) -> Caller | None:
    """Who sent a request; None where the guard lets in whoever comes."""
    caller: Caller | None = request.state.caller
    return caller


def caller_of(request: Request) -> Caller:
    """Who sent a request to a route that wants to know."""
    caller = known_caller(request)
    assert caller is not None, "the guard has let it in"
    return caller


def _path(scope: Scope) -> str:
    """The path as routes see it: without the application's prefix."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path == root:
        return ""
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
