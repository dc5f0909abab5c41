"""Which squares go through the tower next: passes shared by pictures. No torch, no Ray, no threads.

A picture is a number of squares, told when its request comes and encodable once it is read. A pass
takes up to `max_squares` of them, whosever they are. Half of a pass goes to the oldest pictures, so
that each ends within a time that later ones cannot change; the other half to those with the fewest
squares left, so that a small picture does not wait for all of a large one.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Squares `first` to `first + count` of one picture, as a part of a pass."""

    key: int
    first: int
    count: int


@dataclass
class _Picture:
    key: int
    num_squares: int
    taken: int = 0
    done: int = 0
    ready_at: float | None = None  # None while it is being read

    @property
    def left(self) -> int:
        return self.num_squares - self.taken


class SquareBatcher:
    """Pictures by key, oldest first; whoever uses it says when one comes, is ready and leaves.

    A pass starts when it is full or when nobody else is being read; else it waits for those, up to
    `max_wait_s` after its oldest picture was ready.
    """

    def __init__(
        self,
        max_squares: int,
        max_wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_squares = max_squares
        self.max_wait_s = max_wait_s
        self._clock = clock
        self._pictures: dict[int, _Picture] = {}  # in order of arrival
        self._next_key = 0
        self._num_passes = 0
        self._running = 0

    def expect(self, num_squares: int) -> int:
        """A picture has come and is being read; returns its key."""
        key = self._next_key
        self._next_key += 1
        self._pictures[key] = _Picture(key, num_squares)
        return key

    def ready(self, key: int) -> None:
        """Its squares may be taken from now on."""
        self._pictures[key].ready_at = self._clock()

    def drop(self, key: int) -> None:
        """It leaves, whatever it had left; one that has left already may be dropped again."""
        self._pictures.pop(key, None)

    def wait_s(self) -> float | None:
        """Seconds until the next pass should start, 0 for now; None if no square is ready."""
        ready = self._ready()
        if not ready:
            return None
        coming = any(p.ready_at is None for p in self._pictures.values())
        if not coming or sum(p.left for p in ready) >= self.max_squares:
            return 0.0
        oldest = min(p.ready_at for p in ready if p.ready_at is not None)
        return max(0.0, oldest + self.max_wait_s - self._clock())

    def take(self) -> list[Piece]:
        """The next pass: full if so many squares are ready, one piece a picture, oldest first."""
        ready = self._ready()
        # An odd square goes to the oldest and to the smallest by turns.
        for_oldest = (self.max_squares + 1 - self._num_passes % 2) // 2
        self._num_passes += 1
        counts = {p.key: 0 for p in ready}
        unused = _give(ready, counts, for_oldest)
        by_size = sorted(ready, key=lambda p: p.left)
        _give(by_size, counts, self.max_squares - for_oldest + unused)
        pieces = [Piece(p.key, p.taken, counts[p.key]) for p in ready if counts[p.key]]
        for piece in pieces:
            self._pictures[piece.key].taken += piece.count
            self._running += piece.count
        return pieces

    def ended(self, pieces: Iterable[Piece]) -> list[int]:
        """A pass has ended; returns the keys of the pictures that are whole now."""
        whole = []
        for piece in pieces:
            self._running -= piece.count
            picture = self._pictures.get(piece.key)
            if picture is None:  # left meanwhile
                continue
            picture.done += piece.count
            if picture.done == picture.num_squares:
                whole.append(piece.key)
        return whole

    @property
    def waiting_squares(self) -> int:
        """Squares that are in no pass yet, those of pictures being read included."""
        return sum(p.left for p in self._pictures.values())

    @property
    def running_squares(self) -> int:
        """Squares in passes that have not ended."""
        return self._running

    def _ready(self) -> list[_Picture]:
        return [p for p in self._pictures.values() if p.ready_at is not None and p.left]


def _give(pictures: Iterable[_Picture], counts: dict[int, int], room: int) -> int:
    """Raises the pictures' counts in turn while there is room; returns the room that is left."""
    for picture in pictures:
        count = min(room, picture.left - counts[picture.key])
        counts[picture.key] += count
        room -= count
    return room
