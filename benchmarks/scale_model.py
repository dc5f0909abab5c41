"""How long a replica takes: the service times behind scale_simulation.py, and where they are from.

All from RESULTS.md ("The engine", "Real scale"): the 7B shape of 2.5 on one NVIDIA H200, a GPU for
each replica. A step of a decoder is the products of its batch, and its cache read once; while
prompts are computed a step holds a chunk of them, and everybody else gets one token a chunk. What
lies between two events of a replica has a constant pace, so that it is computed, not stepped
through.
"""

import heapq
from bisect import bisect_left
from collections import deque
from typing import NamedTuple

from xc_ray.serve.scale import DecoderLoad, EncoderLoad

# "A decode step against the memory limit": 4.13, 4.89, 6.50, 13.0 and 15.6 ms for 1, 8, 32, 128
# sequences at 2k tokens and 256 at 1k, less their keys and values at the 4.25 TB/s stated there.
BATCHES = (1, 8, 32, 128, 256)
BASE_STEP_S = (4.07e-3, 4.39e-3, 4.48e-3, 4.92e-3, 7.52e-3)
KV_S_PER_TOKEN = 131_072 / 4.25e12
# "Prefill", chunks of 4,096: 225.7 ms for 8,192 tokens of text, 244.5 with half of them image rows.
TEXT_S_PER_TOKEN = 225.7e-3 / 8192
IMAGE_S_PER_TOKEN = TEXT_S_PER_TOKEN + (244.5e-3 - 225.7e-3) / 4096
CHUNK = 4096
# "Second turn over the same HD image": 24 tiles and their overview through tower and projector.
SQUARE_S = 89.8e-3 / 25
# `xc-ray plan --variant 2.5 --device-gb 141 --decoder-share 1`; lanes are decoder.max_num_seqs.
KV_TOKENS = 937_291
LANES = 64
# "Real scale", "An alias moved": `serve run` to ready took 41.5 to 55 s, Ray's own start included.
DECODER_START_S = 45.0
ENCODER_START_S = 20.0  # not measured apart: 4 % of the weights, and no graphs to capture


class Kind(NamedTuple):
    """A sort of request; squares are tiles and overviews."""

    share: float
    text: int
    image_tokens: int = 0
    squares: int = 0

    @property
    def prefill_s(self) -> float:
        return self.text * TEXT_S_PER_TOKEN + self.image_tokens * IMAGE_S_PER_TOKEN


# A house that reads documents: text, a page in high definition, a photo of six tiles, five of them.
MIX = (
    Kind(0.2, 800),
    Kind(0.4, 100, 10_101, 25),
    Kind(0.2, 100, 2_861, 7),
    Kind(0.2, 200, 14_305, 35),
)
MEAN_OUTPUT = 250


class Request:
    """One request, and when what happened to it (seconds)."""

    __slots__ = ("admitted", "arrived", "decoder", "first", "kind", "last", "output", "pictured")

    def __init__(self, arrived: float, kind: Kind, output: int) -> None:
        self.arrived, self.kind, self.output = arrived, kind, output
        self.first = self.last = 0.0
        self.admitted, self.pictured = False, kind.squares == 0
        self.decoder: Decoder | None = None

    @property
    def room(self) -> int:
        """Tokens of the cache that it takes, as if its answer were there from the start."""
        return self.kind.text + self.kind.image_tokens + self.output

    @property
    def interval_s(self) -> float:
        return (self.last - self.first) / (self.output - 1) if self.output > 1 else 0.0


def _base_step_s(batch: int) -> float:
    i = min(max(bisect_left(BATCHES, batch), 1), len(BATCHES) - 1)
    (x0, x1), (y0, y1) = BATCHES[i - 1 : i + 1], BASE_STEP_S[i - 1 : i + 1]
    return y0 + (y1 - y0) * (batch - x0) / (x1 - x0)


STEP_S = [0.0, *(_base_step_s(b) for b in range(1, LANES + 1))]
CHUNK_S = CHUNK * IMAGE_S_PER_TOKEN


class Decoder:
    """One decoder: prompts one after the other, answers side by side.

    `paces` are tokens that each answer has got; an answer ends when the pace reaches its mark.
    """

    def __init__(self, number: int, now: float) -> None:
        self.number = number
        self.ongoing = 0
        self.free_lanes, self.free_kv = LANES, KV_TOKENS
        self.waiting: deque[Request] = deque()  # for a lane or for room
        self.prompts: deque[tuple[float, Request]] = deque()  # when each is computed
        self.prefill_until = now
        self.due = float("inf")  # when its next event is
        self._pace, self._at = 0.0, now
        self._answers: list[tuple[float, int, Request]] = []  # a heap, by mark
        self._count = 0
        self._work = self._work_read = 0.0
        self._read_at = now

    def take(self, request: Request, now: float) -> None:
        """A request comes; without pictures, or with pictures on their way."""
        self.ongoing += 1
        request.decoder = self
        self.waiting.append(request)
        self._admit(now)

    def give(self, request: Request, now: float) -> None:
        """The request's pictures come."""
        request.pictured = True
        if request.admitted:
            self._prefill(request, now)

    def run(self, now: float) -> list[Request]:
        """What is due by now happens; the requests that end."""
        self._advance(now)
        while self.prompts and self.prompts[0][0] <= now:
            _, request = self.prompts.popleft()
            request.first = now
            self._count += 1
            mark = self._pace + request.output - 1
            heapq.heappush(self._answers, (mark, self._count, request))
        ended = []
        while self._answers and self._answers[0][0] <= self._pace + 1e-6:
            request = heapq.heappop(self._answers)[2]
            request.last = now
            self.ongoing -= 1
            self.free_lanes += 1
            self.free_kv += request.room
            ended.append(request)
        if ended:
            self._admit(now)
        return ended

    def idle(self, now: float) -> bool:
        """Whether it may end."""
        return not self.ongoing

    def next_event(self) -> float:
        """When something will be due, if nothing comes before."""
        due = self.prompts[0][0] if self.prompts else float("inf")
        if not self._answers:
            return due
        need = max(0.0, self._answers[0][0] - self._pace)
        step_s = self._step_s()
        busy_s = max(0.0, self.prefill_until - self._at)
        slow = busy_s / (CHUNK_S + step_s)
        if need <= slow:
            return min(due, self._at + need * (CHUNK_S + step_s))
        return min(due, self._at + busy_s + (need - slow) * step_s)

    def read_load(self, now: float) -> DecoderLoad:
        """As `EngineDriver.read_load`, since the last reading."""
        backlog_s = max(0.0, self.prefill_until - now)
        work, passed = self._work - backlog_s, max(1e-9, now - self._read_at)
        use = (work - self._work_read) / passed
        self._work_read, self._read_at = work, now
        held = sum(r.kind.prefill_s for r in self.waiting if r.pictured)
        return DecoderLoad(
            kv_use=1 - self.free_kv / KV_TOKENS,
            lane_use=(LANES - self.free_lanes + len(self.waiting)) / LANES,
            prefill_use=use,
            waiting_tokens=(backlog_s + held) / IMAGE_S_PER_TOKEN,
            prefill_tokens_per_s=1 / IMAGE_S_PER_TOKEN if self._work else 0.0,
        )

    def _admit(self, now: float) -> None:
        while self.waiting and self.free_lanes and self.waiting[0].room <= self.free_kv:
            request = self.waiting.popleft()
            self.free_lanes -= 1
            self.free_kv -= request.room
            request.admitted = True
            if request.pictured:
                self._prefill(request, now)

    def _prefill(self, request: Request, now: float) -> None:
        self._advance(now)
        self.prefill_until = max(self.prefill_until, now) + request.kind.prefill_s
        self._work += request.kind.prefill_s
        self.prompts.append((self.prefill_until, request))

    def _advance(self, now: float) -> None:
        if self._answers:
            step_s = self._step_s()
            busy_s = min(max(0.0, self.prefill_until - self._at), now - self._at)
            self._pace += busy_s / (CHUNK_S + step_s) + (now - self._at - busy_s) / step_s
        self._at = now

    def _step_s(self) -> float:
        return STEP_S[len(self._answers)] + (KV_TOKENS - self.free_kv) * KV_S_PER_TOKEN


class Encoder:
    """One encoder: pictures one after the other."""

    def __init__(self, number: int, now: float) -> None:
        self.number = number
        self.free_at = now
        self._work = self._work_read = 0.0
        self._read_at = now

    def take(self, squares: int, now: float) -> float:
        """When these pictures will be encoded."""
        seconds = squares * SQUARE_S
        self.free_at = max(self.free_at, now) + seconds
        self._work += seconds
        return self.free_at

    def idle(self, now: float) -> bool:
        """Whether it may end."""
        return self.free_at <= now

    def read_load(self, now: float) -> EncoderLoad:
        """As `TileMeter.read`, since the last reading."""
        backlog_s = max(0.0, self.free_at - now)
        work, passed = self._work - backlog_s, max(1e-9, now - self._read_at)
        use = (work - self._work_read) / passed
        self._work_read, self._read_at = work, now
        return EncoderLoad(backlog_s / SQUARE_S, use, 1 / SQUARE_S if self._work else 0.0)
