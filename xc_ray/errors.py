"""Every exception this package raises, with the HTTP status of each family.

    XcRayError                500  the root: catch this to catch them all
    ├── InvalidRequest        400  what the caller sent cannot be served as it is
    │   ├── PromptTooLong     400  more tokens than the model holds
    │   ├── MediaError        400  an image that cannot be fetched or decoded
    │   └── RequestTooLarge   413  a body past the byte limit
    ├── Unauthenticated       401  no key, or none that is known here
    ├── Forbidden             403  a known key that may not do this
    ├── NotFound              404  an unknown model, route or adapter
    ├── Overloaded            429  try again later
    ├── DeadlineExceeded      408  the answer took longer than the request allows
    ├── Unavailable           503  a replica was lost, there is none, or nobody is served here
    ├── ConfigError           500  a configuration that cannot work
    ├── CheckpointError       500  a model folder that cannot be loaded
    ├── DataError             500  training data that cannot be learnt from
    ├── RegistryError         500  object storage that fails, or holds damaged objects
    └── EngineError           500  the engine failed while it worked on a request

A message says what is wrong, the value, and what to do about it. It never holds a path, an address
or a trace of the server when it answers an HTTP request: such details go to the log.
"""

from typing import Any, ClassVar


class XcRayError(Exception):
    """Root of the package's errors; `status` is the HTTP status of the family."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (Ray pickles them); keyword arguments do not survive
        # the default protocol of BaseException.
        return _rebuild, (type(self), self.message, self.param, self.code)


def _rebuild(
    cls: type[XcRayError], message: str, param: str | None, code: str | None
) -> XcRayError:
    return cls(message, param=param, code=code)


class InvalidRequest(XcRayError):
    """What the caller sent cannot be served as it is; `param` names the field."""

    status = 400
    type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the tokens asked for, exceed what the model holds."""


class MediaError(InvalidRequest):
    """An image that cannot be fetched, recognised or decoded."""


class RequestTooLarge(InvalidRequest):
    """A request body past the configured number of bytes."""

    status = 413


class Unauthenticated(XcRayError):
    """A request without a key, or with one that is not known here."""

    status = 401
    type = "invalid_request_error"


class Forbidden(XcRayError):
    """A known key that may not do what was asked."""

    status = 403
    type = "invalid_request_error"


class NotFound(XcRayError):
    """A model, route or adapter that does not exist here."""

    status = 404
    type = "invalid_request_error"


class Overloaded(XcRayError):
    """No room now; the same request may succeed in `retry_after_s` seconds (None: nobody knows)."""

    status = 429
    type = "rate_limit_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_overloaded, (self.message, self.param, self.code, self.retry_after_s)


def _rebuild_overloaded(
    message: str, param: str | None, code: str | None, retry_after_s: float | None
) -> Overloaded:
    return Overloaded(message, param=param, code=code, retry_after_s=retry_after_s)


class DeadlineExceeded(XcRayError):
    """An answer that was not complete in the time that its request allows."""

    status = 408
    type = "timeout_error"


class Unavailable(XcRayError):
    """Nothing was done, and it is safe to try again: a replica was lost, or nobody serves now."""

    status = 503


class ConfigError(XcRayError):
    """A configuration that cannot work; the message names the fields."""


class CheckpointError(XcRayError):
    """A model folder that cannot be loaded; the message lists every tensor or file at fault."""


class DataError(XcRayError):
    """Training data that cannot be learnt from.

    `report` is that of the check which found it (`train.preflight.Report`), if one did.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        report: Any = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_data_error, (self.message, self.param, self.code, self.report)


def _rebuild_data_error(
    message: str, param: str | None, code: str | None, report: Any
) -> DataError:
    return DataError(message, param=param, code=code, report=report)


class RegistryError(XcRayError):
    """Object storage failed, or holds what is damaged; the message names endpoint and object."""


class EngineError(XcRayError):
    """The engine failed while it worked on a request."""
