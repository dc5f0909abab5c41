"""An error of ours as the answer to an HTTP request: OpenAI's body, status, headers."""

import math

from fastapi.responses import JSONResponse

from xc_ray.errors import DeadlineExceeded, Overloaded, Unauthenticated, XcRayError
from xc_ray.serve.answers import error_body


def refusal(error: XcRayError, status: int | None = None) -> JSONResponse:
    """The answer; `status` in place of the family's."""
    return JSONResponse(
        error_body(error).model_dump(),
        status_code=error.status if status is None else status,
        headers=_headers(error),
    )


def _headers(error: XcRayError) -> dict[str, str]:
    """When a client may come again, in whole seconds, and whether that makes sense at all."""
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    # A header of OpenAI's: its clients try every 408 again.
    return {"x-should-retry": "false"} if isinstance(error, DeadlineExceeded) else {}
