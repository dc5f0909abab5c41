"""SamplingParams, Sequence and what a step gives back; plain data, no torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from xc_ray.errors import InvalidRequest

GREEDY_TEMPERATURE = 1e-5  # at or below this the most likely token is taken
MAX_LOGPROBS = 20


_WHOLE = ("max_tokens", "top_k", "seed", "logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words; `abort` is never sent to a client."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class SequenceStatus(StrEnum):
    """A sequence waits for room, runs (prefill, then decode), and is finished."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one sequence are chosen.

    Order: penalties over the generated ids (as the originals do for prompts with pictures: the
    prompt is not penalised), temperature, top_k (0: off), top_p. The random draw depends on (seed,
    position) only. `logprobs` asks for the log-probabilities of the chosen token and of that many
    top ones, of the model's own distribution before penalties and temperature.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None

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
            ("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
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
    that one included; `num_cached` are prompt tokens that needed no prefill.
    """

    request_id: str
    ids: tuple[int, ...]
    num_generated: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached: int = 0


@dataclass(eq=False)
class Sequence:
    """One request inside the engine.

    `image_embeddings` is opaque here: the rows of the virtual ids, in order.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    image_embeddings: Any = None
    generated: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0  # tokens whose keys and values are in the cache
    lane: int = -1  # row of per-sequence device state
    start: int = -1  # first slot of its range of the cache

    @property
    def rope_length(self) -> int:
        """The length that fixes the rope base, from admission to the end."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens so far, of prompt and answer."""
        return len(self.prompt) + len(self.generated)

    @property
    def prefilling(self) -> bool:
        """Whether a part of the prompt is not in the cache yet."""
        return self.num_computed < len(self.prompt)

    def next_ids(self, budget: int) -> list[int]:
        """Ids of the next forward step: at most `budget` of the prompt, or the last token."""
        if self.prefilling:
            return self.prompt[self.num_computed : self.num_computed + budget]
        return self.generated[-1:]


@dataclass(frozen=True)
class Work:
    """One sequence's share of a step."""

    sequence: Sequence
    ids: list[int]

    @property
    def samples(self) -> bool:
        """Whether this step ends with a new token (the last chunk of a prompt, or decode)."""
        seq = self.sequence
        return not seq.prefilling or seq.num_computed + len(self.ids) == len(seq.prompt)


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
