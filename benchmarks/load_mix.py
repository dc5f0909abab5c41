"""What is asked and when: arrivals, prompts, pictures, lengths, models and keys, from a seed.

Request `i` of row `r` is a function of the mix and (seed, r, i) alone; arrivals come from another
random stream. All rows share their system prompts and the pool of pictures.

A picture that is not from the pool is one of the pool's with another comment in its JPEG file: no
cache that goes by the bytes knows it, and none has to be drawn for every request.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import UnionType
from typing import Any, Generic, TypeVar

from load_client import Request

from xc_ray.demo.drawn.drawing import draw_scene
from xc_ray.demo.drawn.layout import Limits
from xc_ray.demo.drawn.scenes import figures_scene

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_WORDS = 4096
JPEG_START = b"\xff\xd8"
# With it, start and comment are 18 bytes: base64 of the rest does not depend on them.
COMMENT_BYTES = 12
QUALITY = 85
# What each may be, and the least of a number.
TRACE_FIELDS: Mapping[str, tuple[type | UnionType, int]] = {
    "at": (int | float, 0),
    "input_tokens": (int, 1),
    "output_tokens": (int, 1),
    "images": (int, 0),
    "adapter": (str, 0),
    "key": (str, 0),
}

T = TypeVar("T")


@dataclass(frozen=True)
class Weighted(Generic[T]):
    """Values with their shares."""

    values: tuple[T, ...]
    weights: tuple[float, ...]

    def draw(self, random: Random) -> T:
        """One of them."""
        return random.choices(self.values, self.weights)[0]


@dataclass(frozen=True)
class Length:
    """Tokens: always `mean`, or lognormal with that mean; `sigma` is that of the logarithm."""

    mean: float
    sigma: float = 0.0

    def __str__(self) -> str:
        return f"lognormal:{self.mean:g}:{self.sigma:g}" if self.sigma else f"{self.mean:g}"

    def draw(self, random: Random) -> int:
        """At least one token."""
        if not self.sigma:
            return max(1, round(self.mean))
        drawn = random.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return max(1, round(drawn))


@dataclass(frozen=True)
class Arrival:
    """When a request is due, in seconds, and what a trace says of it."""

    at: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    images: int | None = None
    adapter: str | None = None
    key: str | None = None


def poisson(rate: float, seconds: float, seed: int, row: int) -> list[Arrival]:
    """Arrivals at `rate` a second, independent of each other, before `seconds`."""
    random = Random(f"{seed} arrivals {row}")
    arrivals, at = [], random.expovariate(rate)
    while at < seconds:
        arrivals.append(Arrival(at))
        at += random.expovariate(rate)
    return arrivals


def read_trace(path: Path, seconds: float | None) -> list[Arrival]:
    """The arrivals of a JSON Lines file, those before `seconds` if given, in order.

    Raises:
        SystemExit: a line that is not understood, with its number.
    """
    arrivals = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            arrivals.append(_arrival(line, f"{path}, line {number}"))
    kept = [a for a in arrivals if seconds is None or a.at < seconds]
    return sorted(kept, key=lambda a: a.at)


def _arrival(line: str, where: str) -> Arrival:
    try:
        fields = json.loads(line)
    except ValueError as e:
        raise SystemExit(f"{where}: not JSON: {e}") from None
    if not isinstance(fields, dict) or "at" not in fields or fields.keys() - TRACE_FIELDS.keys():
        known = ", ".join(TRACE_FIELDS)
        raise SystemExit(f"{where}: expected an object with `at`; known fields are {known}")
    for name, value in fields.items():
        kind, least = TRACE_FIELDS[name]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (isinstance(value, int | float) and value < least):
            raise SystemExit(f"{where}: {name} is {value!r}; see --help")
    return Arrival(**fields)


@dataclass(frozen=True)
class Mix:
    """What requests are made of.

    `input` counts the user's text alone, without pictures; `repeated` is the share of pictures that
    come as they are from the pool of `pool` pictures of each size.
    """

    models: Weighted[str]
    keys: Weighted[str] | None = None
    images: Weighted[int] = Weighted((0,), (1.0,))
    sizes: Weighted[tuple[int, int]] = Weighted(((560, 560),), (1.0,))
    repeated: float = 0.0
    pool: int = 8
    detail: str = "auto"
    input: Length = Length(128)
    output: Length = Length(64)
    system_prompts: int = 0
    system_tokens: int = 64
    ignore_eos: bool = False
    streamed: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Drawer:
    """Draws the requests of a mix: its pictures and system prompts are made once, by `of`."""

    mix: Mix
    tokens_a_word: float
    words: tuple[str, ...] = field(repr=False)
    system: tuple[str, ...] = field(repr=False)
    pictures: Mapping[tuple[int, int], Sequence[bytes]] = field(repr=False)

    @classmethod
    def of(cls, mix: Mix, tokens_a_word: float) -> "Drawer":
        """Draws and encodes what requests share."""
        random = Random(f"{mix.seed} words")
        words = tuple(
            "".join(random.choices(LETTERS, k=random.randint(3, 7))) for _ in range(NUM_WORDS)
        )
        system = tuple(
            _text(random, words, mix.system_tokens / tokens_a_word)
            for _ in range(mix.system_prompts)
        )
        pictures = {
            size: [picture(size, Random(f"{mix.seed} picture {size} {i}")) for i in range(mix.pool)]
            for size in mix.sizes.values
        }
        return cls(mix, tokens_a_word, words, system, pictures)

    def requests(self, arrivals: Sequence[Arrival], row: int) -> list[Request]:
        """One request for each arrival."""
        return [
            self.request(arrival, Random(f"{self.mix.seed} {row} {i}"))
            for i, arrival in enumerate(arrivals)
        ]

    def request(self, arrival: Arrival, random: Random) -> Request:
        """The request of an arrival; what the arrival says takes precedence."""
        mix = self.mix
        model = mix.models.draw(random)
        key = None if mix.keys is None else mix.keys.draw(random)
        num_images = mix.images.draw(random)
        input_tokens, output_tokens = mix.input.draw(random), mix.output.draw(random)
        stream = random.random() < mix.streamed
        system = random.choice(self.system) if self.system else None
        if arrival.adapter is not None:
            model = f"{model.split(':', 1)[0]}:{arrival.adapter}"
        if arrival.images is not None:
            num_images = arrival.images
        if arrival.input_tokens is not None:
            input_tokens = arrival.input_tokens
        text = _text(random, self.words, input_tokens / self.tokens_a_word)
        options = body_options(arrival.output_tokens or output_tokens, mix.ignore_eos, stream)
        pieces = [_head(model, options, system).encode()]
        for _ in range(num_images):
            pieces += self._picture(random)
        pieces.append(f'{{"type":"text","text":{json.dumps(text)}}}]}}]}}'.encode())
        return Request(arrival.at, tuple(pieces), model, arrival.key or key, stream)

    def _picture(self, random: Random) -> list[bytes]:
        """A part of a message, in pieces."""
        drawn = random.choice(self.pictures[self.mix.sizes.draw(random)])
        mark = random.randbytes(COMMENT_BYTES)
        if random.random() < self.mix.repeated:
            mark = bytes(COMMENT_BYTES)
        start = JPEG_START + b"\xff\xfe" + (2 + COMMENT_BYTES).to_bytes(2) + mark
        url = b"data:image/jpeg;base64," + base64.b64encode(start)
        head = b'{"type":"image_url","image_url":{"url":"' + url
        return [head, drawn, f'","detail":"{self.mix.detail}"}}}},'.encode()]


def picture(size: tuple[int, int], random: Random) -> bytes:
    """Figures on a picture of `size` (width, height) as JPEG in base64, without its start."""
    image = draw_scene(figures_scene(random, Limits()), random).convert("RGB").resize(size)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return base64.b64encode(out.getvalue().removeprefix(JPEG_START))


def body_options(max_tokens: int, ignore_eos: bool, stream: bool) -> dict[str, Any]:
    """The fields of a request beside model and messages; greedy, as long as told."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
    if ignore_eos:
        options |= {"ignore_eos": True, "min_tokens": max_tokens}
    if stream:
        options |= {"stream": True, "stream_options": {"include_usage": True}}
    return options


def _head(model: str, options: dict[str, Any], system: str | None) -> str:
    """A body up to the first part of the user's message."""
    fields = json.dumps({"model": model, **options}, separators=(",", ":"))[:-1]
    first = "" if system is None else f'{{"role":"system","content":{json.dumps(system)}}},'
    return f'{fields},"messages":[{first}{{"role":"user","content":['


def _text(random: Random, words: Sequence[str], num: float) -> str:
    return " ".join(random.choices(words, k=max(1, round(num))))
