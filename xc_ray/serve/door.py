"""What an ingress knows of decoders that are full, so that it refuses at once what they would.

A decoder that refuses a request, or lets one wait, says for how long it will refuse others like it
(`messages.Notice`). To ask it again meanwhile would cost the request's tokenizing, its pictures'
decoding and the way there, on machines that are busy: refusals would take from answers.

One a process, as Serve makes the router that knows the decoders.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final

from xc_ray.errors import Overloaded

# An estimate that is wrong costs no more than this.
MAX_CLOSED_S: Final = 1.0
MAX_KEYS: Final = 10_000


class Door:
    """Who is refused at the door: a key's requests, those with pictures apart from the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._decoders: frozenset[str] = frozenset()
        self._until: dict[tuple[str, bool], dict[str, float]] = {}

    def set_decoders(self, names: Iterable[str]) -> None:
        """Those that there are; from any thread."""
        self._decoders = frozenset(names)

    def close(self, decoder: str, key: str, pictures: bool, seconds: float) -> None:
        """A decoder will refuse such requests for so long."""
        if len(self._until) >= MAX_KEYS and (key, pictures) not in self._until:
            self._until.clear()  # all of it is over in a second anyway
        until = self._until.setdefault((key, pictures), {})
        until[decoder] = self._clock() + min(seconds, MAX_CLOSED_S)

    def check(self, key: str, pictures: bool) -> None:
        """Refuses a request that every decoder would.

        Raises:
            Overloaded: says for how long to stay away.
        """
        until, decoders = self._until.get((key, pictures)), self._decoders
        if until is None or not decoders:
            return
        left = min(until.get(name, 0.0) for name in decoders) - self._clock()
        if left <= 0:
            return
        raise Overloaded(
            "too much is waiting on every decoder; try again later",
            code="overloaded",
            retry_after_s=max(1.0, left),
        )


DOOR: Final = Door()
