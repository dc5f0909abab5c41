"""Where requests wait before a decoder works on them: its two gates, and what they take of each.

pictures ──> gate of those that wait for embeddings ──┐
text only ────────────────────────────────────────────┴──> gate of the engine's room
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from xc_ray.config import Limits
from xc_ray.engine.config import EngineConfig
from xc_ray.serve.admission import Entry, Gate
from xc_ray.serve.messages import GenerateRequest, Tokens
from xc_ray.serve.observe import DecoderMetrics
from xc_ray.serve.scale import DecoderLoad

FIRST_GUESS_TOKENS: Final = 256.0  # of an answer, before any has ended
MEMORY_ANSWERS: Final = 64  # over which the mean length of answers is taken
# An answer may become this many times as long as the mean before it takes room that nobody gave it;
# then the engine preempts.
SPARE_LENGTH: Final = 2.0
MAX_ENCODING_TILES: Final = 256.0
# Sequences beyond what the engine runs, so that a lane that is free has its next prompt at hand.
STANDBY: Final = 1 / 8
# Prompts of so many steps may be inside without a first token: enough for encoder and decoder to
# work at the same time. More would wait in the engine, whatever `max_wait_s` says.
PROMPT_STEPS: Final = 16


class Guest:
    """One request, inside once `let_in` has returned, after `waited_s`; `note` its messages."""

    def __init__(self, lobby: "Lobby", request: GenerateRequest) -> None:
        self._lobby = lobby
        self._request = request
        self._came = time.monotonic()
        self._silent = set(range(request.num_choices))
        self._begun = False
        self.waited_s = 0.0
        self.encoding: Entry | None = None
        self.inside: Entry | None = None

    @property
    def waits(self) -> bool:
        """Whether there was no room for it as it came."""
        first = self.encoding or self.inside
        return first is not None and first.turn is not None

    async def let_in(self) -> None:
        """Waits for room."""
        with self._lobby.counted(self._request):
            if self.encoding is not None:
                await self._lobby.pictures.wait(self.encoding)
                self.inside = self._lobby.line_up(self._request)
            assert self.inside is not None
            await self._lobby.engine.wait(self.inside)
        self.waited_s = time.monotonic() - self._came
        self._lobby.metrics.let_in(self.waited_s)

    def note(self, batch: Sequence[Tokens]) -> None:
        """Learns from it: what was shared takes no room, who has begun needs no encoder."""
        if batch and not self._begun and self.inside is not None:
            self._begun = True
            self._lobby.engine.give_back(self.inside, prompt=math.inf)
        for tokens in batch:
            if tokens.index == 0 and 0 in self._silent and self.inside is not None:
                self._lobby.engine.give_back(self.inside, tokens=tokens.num_cached)
            self._silent.discard(tokens.index)
            if tokens.finish_reason is not None:
                self._lobby.learn(tokens.num_generated)
        if not self._silent:
            self.seen()

    def seen(self) -> None:
        """Its pictures need the encoder no more."""
        if self.encoding is not None:
            self._lobby.pictures.leave(self.encoding)
            self.encoding = None


class Lobby:
    """A decoder's two gates.

    Pictures that wait for the encoder hold lanes of the engine: at most half of them, and of the
    prompts that may wait for their first token, so that an encoder that is behind does not keep
    text waiting.
    """

    def __init__(self, engine: EngineConfig, limits: Limits, metrics: DecoderMetrics) -> None:
        self.metrics = metrics
        lanes = engine.max_num_seqs
        gate = partial(Gate, max_waiting=limits.max_waiting, max_wait_s=limits.max_wait_s)
        standby = max(1, round(lanes * STANDBY))
        prompt = PROMPT_STEPS * engine.max_prefill_tokens
        self.engine = gate(
            {
                "sequences": lanes + standby,
                "tokens": engine.kv_cache_tokens,
                "prompt": prompt,
            }
        )
        self.pictures = gate(
            {
                "sequences": max(1, lanes // 2),
                "tiles": MAX_ENCODING_TILES,
                "prompt": prompt / 2,
            }
        )
        self._lanes = lanes
        self._mean_tokens = FIRST_GUESS_TOKENS
        self._waiting_sequences = self._waiting_tokens = 0

    def beside(self, load: DecoderLoad) -> DecoderLoad:
        """The engine's load with those who wait here."""
        return load._replace(
            lane_use=load.lane_use + self._waiting_sequences / self._lanes,
            waiting_tokens=load.waiting_tokens + self._waiting_tokens,
        )

    @contextmanager
    def ask(self, request: GenerateRequest) -> Iterator[Guest]:
        """Takes room, or a place among those that wait, and holds it; refuses at once or never.

        Raises:
            Overloaded: the wait would be too long.
        """
        guest = Guest(self, request)
        try:
            if request.pictures:
                self.engine.check(request.key, **self._engine_amounts(request))
                amounts = self._picture_amounts(request)
                guest.encoding = self.pictures.ask(request.key, **amounts)
            else:
                guest.inside = self.engine.ask(request.key, **self._engine_amounts(request))
            yield guest
        finally:
            if guest.inside is not None:
                self.engine.leave(guest.inside)
            guest.seen()

    def line_up(self, request: GenerateRequest) -> Entry:
        """The engine's room, or a place in its line, for whoever has passed the encoder's gate."""
        return self.engine.line_up(request.key, **self._engine_amounts(request))

    def closed_s(self, request: GenerateRequest) -> float:
        """Seconds for which another request like this one will be refused; 0: it is not."""
        seconds = self.engine.closed_s(request.key, **self._engine_amounts(request))
        if request.pictures:
            pictures = self.pictures.closed_s(request.key, **self._picture_amounts(request))
            seconds = max(seconds, pictures)
        return seconds

    def _picture_amounts(self, request: GenerateRequest) -> dict[str, float]:
        tiles = sum(picture.grid.num_tiles for picture in request.pictures)
        return {"sequences": request.num_choices, "tiles": tiles, "prompt": len(request.ids)}

    def _engine_amounts(self, request: GenerateRequest) -> dict[str, float]:
        n, prompt = request.num_choices, len(request.ids)
        tokens = prompt + n * self._answer_tokens(request)
        return {"sequences": n, "tokens": tokens, "prompt": prompt}

    @contextmanager
    def counted(self, request: GenerateRequest) -> Iterator[None]:
        """Counts a request among those that wait."""
        self._count(request.num_choices, len(request.ids))
        try:
            yield
        finally:
            self._count(-request.num_choices, -len(request.ids))

    def _count(self, sequences: int, tokens: int) -> None:
        self._waiting_sequences += sequences
        self._waiting_tokens += tokens
        self.metrics.queued(self._waiting_sequences)

    def learn(self, num_tokens: int) -> None:
        """An answer has ended with so many tokens."""
        self._mean_tokens += (num_tokens - self._mean_tokens) / MEMORY_ANSWERS

    def _answer_tokens(self, request: GenerateRequest) -> float:
        return min(request.sampling.max_tokens, SPARE_LENGTH * self._mean_tokens)
