"""SamplingParams, Sequence and what a step gives back; plain data, no torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from xc_ray.errors import InvalidRequest

GREEDY_TEMPERATURE = 1e-5  # at or below this the most likely token is taken
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100


_WHOLE = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words; `abort` and `error` are never sent to a client."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SequenceStatus(StrEnum):
    """A sequence waits for room, runs (prefill, then decode), and is finished."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one sequence are chosen.

    Order: `logit_bias` (pairs of id and what is added to its logit), penalties over the generated
    ids (as the originals do for prompts with pictures: the prompt is not penalised), temperature,
    top_k (0: off), top_p, min_p (0: off; times the most likely token's probability).
    The random draw depends on (seed, position) only. Stop ids cannot be chosen before `min_tokens`
    ids. `logprobs` asks for the log-probabilities of the chosen token and of that many top ones, of
    the model's own distribution before penalties, bias and temperature.
    """

    max_tokens: int = 1024
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for names, kinds, wanted in (
            (_WHOLE, int, "a whole number"),
            (_NUMBERS, (int, float), "a number"),
        ):
            for name in names:
                value = getattr(self, name)
                absent = name == "logprobs" and value is None
                if isinstance(value, bool) or not (absent or isinstance(value, kinds)):
                    raise InvalidRequest(f"{name} is {value}, expected {wanted}", param=name)
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"between 0 and max_tokens ({self.max_tokens})",
            ),
            ("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                "between 0 and 20",
            ),
        )
        for name, good, wanted in checks:
            if not good:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)}, expected {wanted}", param=name
                )
        for token, bias in self.logit_bias:
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                raise InvalidRequest(
                    f"logit_bias of id {token} is {bias}, expected between −100 and 100",
                    param="logit_bias",
                )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: the temperature is 0 or next to it."""
        return self.temperature <= GREEDY_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether any penalty differs from its neutral value, so that generated ids count."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen id, and (id, log-probability) of the most likely ones."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """What one step brought to one request.

    `ids` are the new ids without the one that ended the answer; `num_generated` counts all so far,
    that one included; `num_cached` are prompt tokens that needed no prefill. `missing_images` are
    the places, among the request's images, of those whose embeddings are needed now
    (`Engine.supply`). `error` says why when `finish_reason` is `error`.
    """

    request_id: str
    ids: tuple[int, ...]
    num_generated: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached: int = 0
    missing_images: tuple[int, ...] = ()
    error: str | None = None


@dataclass(eq=False)
class Image:
    """The rows of one image among a request's virtual ids.

    `digest` names what the embeddings were made of (image bytes and grid): blocks of the cache are
    shared by it, and never if it is empty. `embeddings` (num_rows, C) may come later, by
    `Engine.supply`, and are not needed at all where the prefix cache holds the rows.
    """

    num_rows: int
    digest: bytes = b""
    embeddings: Any = None  # a tensor; opaque here


@dataclass(eq=False)
class Sequence:
    """One request inside the engine; its images' rows count through all images in order."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    images: tuple[Image, ...] = ()
    image_starts: tuple[int, ...] = ()  # place of each image's first row in the prompt
    prefix_key: bytes = b""  # what else keys and values depend on: adapter, scaled rope base
    max_generated: int = 0  # max_tokens, or what the cache holds behind the prompt
    generated: list[int] = field(default_factory=list)
    arrival: int = 0  # how many came before it
    in_flight: int = 0  # tokens that launched steps will bring
    status: SequenceStatus = SequenceStatus.WAITING
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as known
    num_shared: int = 0  # leading blocks found in the cache
    num_named: int = 0  # leading blocks that others can share
    num_computed: int = 0  # tokens with keys and values, those of launched steps included
    num_cached: int | None = None  # prompt tokens that its first admission found in the cache
    asked: set[int] = field(default_factory=set)  # images whose embeddings were asked for
    num_unchecked: int = 0  # launched chunks whose image rows may turn out to hold NaN
    lane: int = -1  # row of per-sequence device state
    adapter: Any = None  # a PackedAdapter, whose digest is in `prefix_key`; opaque here
    slot: int = -1  # the adapter's, while it runs

    @property
    def rope_length(self) -> int:
        """The length that fixes the rope base, from admission to the end."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens so far, of prompt and answer, those in flight included."""
        return len(self.prompt) + len(self.generated) + self.in_flight

    @property
    def prefilling(self) -> bool:
        """Whether more than the last token, or an image row, is not computed yet."""
        left = self.num_tokens - self.num_computed
        if left == 1 and self.images and not self.generated and not self.in_flight:
            return self.image_starts[-1] + self.images[-1].num_rows == len(self.prompt)
        return left > 1

    def ids(self, start: int, stop: int) -> list[int]:
        """Known ids of places `start` to `stop`, of prompt and answer."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.generated[max(0, start - n) : stop - n]


@dataclass(frozen=True)
class Work:
    """One sequence's share of a step: places `start` to `stop`.

    Where `ids` is None, its one token is the one that the step before chose, which only the device
    knows.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # whether it ends with a new token: the last chunk, or decode
    decode: bool  # whether it is one token behind a computed prompt


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position) alone.

    SplitMix64 over both (Steele et al., OOPSLA 2014).
    """
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & mask
    x ^= x >> 31
    return (x >> 11) / (1 << 53)
