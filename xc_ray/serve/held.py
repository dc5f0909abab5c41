"""Bytes that the requests of one ingress hold together: their bodies, and pictures it fetched.

Each request is bounded by itself (`limits.max_request_bytes`); a thousand at once are not. Whoever
finds no room is refused and comes again: to wait would hold what has arrived of it meanwhile. Only
what has arrived counts: who says that much will come, and sends nothing, takes nobody's room.
"""

from typing import Final

from xc_ray.errors import Overloaded

RETRY_S: Final = 2.0


class HeldBytes:
    """Of all requests. On the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0

    def request(self) -> "Holding":
        """One more that holds nothing yet."""
        return Holding(self)


class Holding:
    """What one request holds, until `end`."""

    def __init__(self, all_: HeldBytes) -> None:
        self._all = all_
        self._bytes = 0
        self._ended = False

    def check(self, num_bytes: int) -> None:
        """Whether there is room for so many more, of which none has come.

        Raises:
            Overloaded: there is not.
        """
        if self._all.used + num_bytes > self._all.max_bytes:
            raise Overloaded(
                f"the requests that are under way here hold {self._all.used:,} bytes of bodies and "
                f"pictures, and {self._all.max_bytes:,} is the most; try again later",
                code="overloaded",
                retry_after_s=RETRY_S,
            )

    def take(self, num_bytes: int) -> None:
        """So many more have come.

        Raises:
            Overloaded: there is no room for them.
        """
        self.check(num_bytes)
        if not self._ended:  # of a fetch that was cancelled nothing is kept
            self._all.used += num_bytes
            self._bytes += num_bytes

    def end(self) -> None:
        """Gives everything back; a second time nothing."""
        self._all.used -= self._bytes
        self._bytes, self._ended = 0, True
