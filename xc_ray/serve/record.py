"""One chat request from its arrival to its end, however it ends: counted, timed, and told once."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray.exceptions import TaskCancelledError
from starlette.requests import ClientDisconnect

from xc_ray.errors import DeadlineExceeded, Overloaded, Unavailable, XcRayError
from xc_ray.serve.observe import IngressMetrics

logger = logging.getLogger("ray.serve")


class ClientLeft(Exception):
    """The client did not wait for the end."""


@dataclass(frozen=True)
class Amounts:
    """Tokens of an answer, tiles of its pictures; image and cached tokens are of the prompt."""

    prompt: int = 0
    image: int = 0
    cached: int = 0
    generated: int = 0
    tiles: int = 0


NOTHING = Amounts()


class Record:
    """Open from its making to `end`; `name` is for the log. On the event loop."""

    def __init__(
        self, metrics: IngressMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = "a request"
        self._metrics = metrics
        self._clock = clock
        self._came = clock()
        self._first = self._last = (0.0, 0)  # a time, and how many tokens there were
        self._begun = self._ended = False
        metrics.opened()

    def note(self, num_tokens: int) -> None:
        """A message came; the longest choice has so many tokens now."""
        self._last = (self._clock(), num_tokens)
        if not self._begun:
            self._begun = True
            self._first = self._last
            self._metrics.first_token(self._last[0] - self._came)

    def end(self, error: BaseException | None = None, amounts: Amounts = NOTHING) -> None:
        """The request has ended, well or by an error; what is said a second time is not heard."""
        if self._ended:
            return
        self._ended = True
        outcome, code = outcome_of(error)
        self._metrics.closed(outcome, code)
        if self._begun:
            self._tell_answer(amounts)
        logger.info(
            "%s: %s after %.3f s; %d prompt tokens (%d cached), %d generated",
            self.name,
            f"{outcome} ({code})" if code else outcome,
            self._clock() - self._came,
            amounts.prompt,
            amounts.cached,
            amounts.generated,
        )

    def _tell_answer(self, amounts: Amounts) -> None:
        self._metrics.answered(
            prompt=amounts.prompt,
            image=amounts.image,
            cached=amounts.cached,
            generated=amounts.generated,
            tiles=amounts.tiles,
        )
        (first, at_first), (last, in_all) = self._first, self._last
        if in_all > at_first:
            self._metrics.token_interval((last - first) / (in_all - at_first))


def outcome_of(error: BaseException | None) -> tuple[str, str]:
    """One word for how a request ended, and the error's code if it was refused."""
    match error:
        case None:
            return "ok", ""
        case asyncio.CancelledError() | ClientLeft() | ClientDisconnect() | TaskCancelledError():
            return "client_left", ""
        case Overloaded():
            limited = error.code == "rate_limit_exceeded"
            return ("rate_limited" if limited else "overloaded"), ""
        case DeadlineExceeded():
            return "deadline", ""
        case Unavailable():
            return ("replica_lost" if error.code == "replica_lost" else "unavailable"), ""
        case XcRayError() if error.status < 500:
            return "refused", error.code or str(error.status)
    return "error", ""
