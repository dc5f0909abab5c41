"""What passes between ingress, decoder and encoder; plain data, cheap to pickle, no torch."""

import hashlib
import struct
from array import array
from dataclasses import dataclass, field
from typing import Literal

from xc_ray.errors import XcRayError
from xc_ray.prompt.tiles import Grid


@dataclass(frozen=True)
class Picture:
    """One picture of a request: its file bytes and the grid that its header gave.

    `where` is the path of its URL in the request, for messages. `salt` is the request's.
    """

    data: bytes
    grid: Grid
    where: str = "image"
    salt: str = ""

    def digest(self) -> bytes:
        """A name for what the picture becomes, under its salt: of its bytes and its grid.

        Takes about a millisecond for a megabyte, without the interpreter's lock.
        """
        g = self.grid
        places = (g.rows, g.cols, *g.content, *g.offset, *g.canvas)
        salt = self.salt.encode()
        # Of one size, in front, with all lengths: different pictures never spell the same.
        digest = hashlib.sha256(struct.pack("<10q", len(self.data), len(salt), *places) + salt)
        digest.update(self.data)
        return digest.digest()


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; meanings as of `engine.sequence.SamplingParams`.

    `ignore_eos`: no stop ids, the answer runs to `max_tokens`.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logprobs: int | None = None
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerateRequest:
    """One chat request for the decoder.

    `ids` hold virtual image ids; `pictures` are in the order of the ids. `adapter` is a reference
    as the request has it (empty: the base alone); of an alias with two versions a caller with the
    same `sticky` always gets the same one. `key` is whose turn it is when requests wait: the name
    of the caller's key; where there are no keys a digest of what it sent for one, empty for
    nothing. `sees` are the adapters that the caller may be told of, None for all. What the caches
    keep of a request is shared with those of the same `salt`.
    """

    request_id: str
    ids: array  # type: ignore[type-arg]  # of "i"; array is generic in stubs only
    sampling: Sampling
    pictures: tuple[Picture, ...] = ()
    num_choices: int = 1
    adapter: str = ""
    sticky: str = ""
    key: str = ""
    sees: frozenset[str] | None = None
    salt: str = ""

    @property
    def num_bytes(self) -> int:
        """About what it takes as a message."""
        return self.ids.itemsize * len(self.ids) + sum(len(p.data) for p in self.pictures)


@dataclass(slots=True)
class Tokens:
    """New ids of one choice; several steps may be joined into one item.

    `logprobs` has one (log-probability, ((id, log-probability), ...)) an id if asked for;
    `num_cached` counts tokens of the prompt that needed no prefill. In the first message `adapter`
    is the version that answers: `NAME@VERSION`, empty for the base.
    """

    index: int
    ids: list[int]
    num_generated: int
    finish_reason: str | None = None
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    num_cached: int = 0
    adapter: str = ""


@dataclass(frozen=True)
class Notice:
    """What a decoder says where tokens are expected: why there are none, or how full it is.

    Requests of the same key, with pictures if this one has any, are refused by it for `closed_s`
    seconds from now on. An error that is raised instead costs both sides many times as much.
    """

    decoder: str
    error: XcRayError | None = None
    closed_s: float = 0.0


Where = Literal["device", "host", ""]


@dataclass(frozen=True)
class VersionState:
    """An adapter's version on one decoder: where it is loaded, or why it could not be."""

    name: str
    version: int
    digest: str
    created: float  # seconds since 1970
    where: Where = ""
    error: str = ""


@dataclass(frozen=True)
class AliasState:
    """An alias on one decoder: shares by version as the registry says, and as they are served.

    `serving` is empty before the first request; `error` says why the two differ.
    """

    name: str
    alias: str
    targets: tuple[tuple[int, float], ...]
    serving: tuple[tuple[int, float], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class DecoderState:
    """What one decoder knows of adapters; `problems` are sentences that clients may read.

    `base` is the digest of what is served, None until it is known.
    """

    replica: str
    base: str | None = None
    versions: tuple[VersionState, ...] = ()
    aliases: tuple[AliasState, ...] = ()
    problems: tuple[str, ...] = ()
