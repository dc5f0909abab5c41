"""One conversation of a data set on its way from a file to a step: what each stage hands the next.

formats: a JSON value       -> Conversation   what it says, in one form whatever its format
preflight: a Conversation   -> CheckedRow     ids, labels and grids; every picture opened once
store: CheckedRows          -> one file       that every worker reads
"""

from dataclasses import dataclass
from typing import TypeAlias

from xc_ray.prompt.chat import Message
from xc_ray.prompt.tiles import Grid
from xc_ray.train.data import Example

PictureSource: TypeAlias = str | bytes  # a path, a URL, an address in object storage; or file bytes


@dataclass(frozen=True)
class Conversation:
    """Messages whose slots are numbered in reading order; `pictures[i]` fills slot i."""

    messages: tuple[Message, ...]
    pictures: tuple[PictureSource, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a row stands: the data set as its owner names it, and the row's number, from 1.

    In JSON Lines the number is the line's.
    """

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


@dataclass(frozen=True)
class Picture:
    """One picture of a checked row: its bytes' sha256 (hex), and its grid under the transform.

    `source` is absolute (a path, a URL or an address in object storage), or "" if the bytes have no
    address of their own and travel as `data`.
    """

    source: str
    digest: str
    grid: Grid
    data: bytes | None = None


@dataclass(frozen=True)
class CheckedRow:
    """A row that can be trained on; `part` is the index of its data set in the configuration.

    `conversation` is what was encoded: after `cut_history`, without the turns that were cut.
    `example.spans[k].image` indexes `pictures`.
    """

    place: Place
    part: int
    conversation: Conversation
    example: Example
    pictures: tuple[Picture, ...] = ()
