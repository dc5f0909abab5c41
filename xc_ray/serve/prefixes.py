"""What a router has to know of a request: names of its beginnings, its price and its adapter.

A beginning has a name that chains over all that the prefix cache goes by: ids, digests of pictures,
the adapter, the salt. Requests with a name in common can share what a decoder computed up to there.
"""

import hashlib
import itertools
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xc_ray.prompt.sequence import Prompt

KEY_BYTES = 8
BLOCK_TOKENS = 64  # the cache shares whole blocks only: what is shorter cannot be shared
PIECE_TOKENS = 512  # long texts are cut, so that a common first part is seen
MAX_KEYS = 32


@dataclass(frozen=True)
class Route:
    """One request as a router sees it, in a few hundred bytes.

    `keys` name its beginnings, the shortest first, and `lengths` are their tokens; both empty:
    there is nothing to share. `tokens` is the price, of prompt and answers; `adapter` a reference
    as the request has it.
    """

    keys: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    tokens: int = 0
    adapter: str = ""


def route_of(
    prompt: Prompt,
    digests: Sequence[bytes],
    *,
    start_of_turn: int,
    system: bool,
    answer_tokens: int,
    adapter: str = "",
    salt: str = "",
) -> Route:
    """The route of a prompt with these pictures (a digest each) and an answer of up to so many ids.

    Beginnings end behind each picture and each turn, and every PIECE_TOKENS of text in between.
    With `system` the first turn is the system's: it names nothing, because everybody has it and
    nobody shall be drawn to the decoder that had it first. Of very many the first and last are
    kept.
    """
    tokens = len(prompt.ids) + answer_tokens
    ends = _ends(prompt, start_of_turn, system)
    if len(ends) > MAX_KEYS:
        ends = ends[: MAX_KEYS // 2] + ends[-MAX_KEYS // 2 :]
    keys = _keys(prompt, digests, ends, adapter.encode(), salt.encode())
    return Route(tuple(keys), tuple(ends), tokens, adapter)


def key_of(data: bytes) -> int:
    """A name of KEY_BYTES that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=KEY_BYTES).digest(), "little")


def _ends(prompt: Prompt, start_of_turn: int, system: bool) -> list[int]:
    """Where beginnings end, in order; none lies inside a picture."""
    turns = list(_places(prompt.ids, start_of_turn))
    first = next(iter(turns[system:]), 0)
    pictures = {s.start: s.start + s.length for s in prompt.spans if s.start >= first}
    stops = sorted({*turns, *pictures, *pictures.values(), len(prompt.ids)})
    ends: set[int] = set()
    for here, there in itertools.pairwise([first, *(s for s in stops if s > first)]):
        if here not in pictures:
            ends.update(range(here + PIECE_TOKENS, there, PIECE_TOKENS))
        if there in turns or here in pictures:
            ends.add(there)
    return sorted(end for end in ends if end >= BLOCK_TOKENS)


def _places(ids: list[int], wanted: int) -> Iterator[int]:
    place = -1
    for _ in range(ids.count(wanted)):
        place = ids.index(wanted, place + 1)
        yield place


def _keys(
    prompt: Prompt, digests: Sequence[bytes], ends: Sequence[int], adapter: bytes, salt: bytes
) -> Iterator[int]:
    # Every part has a fixed size or its length in front, wherever beginnings end: different ones
    # never spell the same bytes.
    ids = hashlib.blake2b()
    rest = hashlib.blake2b(struct.pack("<qq", len(adapter), len(salt)) + adapter + salt)
    starts = [(span.start, digests[span.image]) for span in prompt.spans]
    for here, there in itertools.pairwise([0, *ends]):
        ids.update(array("i", prompt.ids[here:there]).tobytes())
        for start, digest in starts:
            if here <= start < there:
                rest.update(struct.pack("<qq", start, len(digest)) + digest)
        yield key_of(ids.digest() + rest.digest())
