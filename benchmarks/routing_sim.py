"""Decoders, conversations and routers for `routing.py`, in simulated time.

The cache is the engine's own (`BlockManager`, `extend_hashes`), the choice the router's own
(`Affinity`); what a prefill and a step take is a model of one H200 with the 7B shapes
(RESULTS.md): 26 µs a prompt token, as much again for a picture's tokens in the tower, and
3.5 ms + 60 µs a running sequence for each token of an answer.
"""

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xc_ray.engine.block_manager import BlockManager, extend_hashes
from xc_ray.engine.sequence import Image, SamplingParams
from xc_ray.engine.sequence import Sequence as Running
from xc_ray.prompt.sequence import ImageSpan, Prompt
from xc_ray.serve.affinity import Affinity, Loaded
from xc_ray.serve.prefixes import BLOCK_TOKENS, Route, route_of

VOCAB, START, END = 92_544, 92_543, 92_542
PREFILL_S, ENCODE_S = 26e-6, 26e-6  # a token
STEP_S, STEP_OF_ONE_S = 3.5e-3, 60e-6
SLOTS = 4  # adapters on a decoder at once
ANSWER_LIMIT = 1024
STATS_PERIOD_S = 2.0


@dataclass
class Talk:
    """A conversation: what comes before it, and its questions and answers as ids."""

    name: str
    system: list[int]
    pictures: list[tuple[bytes, int]]  # (digest, tokens) of the first question
    turns: list[tuple[list[int], list[int]]]
    pauses_s: list[float]
    adapter: str = ""

    def prompt(self, turn: int) -> Prompt:
        """All up to a turn's question and the head of its answer."""
        ids = [1, START, *self.system, END]
        spans, row = [], VOCAB
        for number, (question, answer) in enumerate(self.turns[: turn + 1]):
            ids += [START, 5]
            for index, (_, length) in enumerate(self.pictures if number == 0 else []):
                spans.append(ImageSpan(index, len(ids), length))
                ids += range(row, row + length)
                row += length
            ids += [*question, END, START, 6]
            if number < turn:
                ids += [*answer, END]
        return Prompt(ids, tuple(spans))


@dataclass(eq=False)
class Call:
    """One turn on its way."""

    talk: Talk
    turn: int
    at_s: float
    router: int
    route: Route
    sequence: Running
    hashes: list[bytes]
    replica: str = ""
    cached: int = 0
    cacheable: int = 0


@dataclass
class Decoder:
    """One replica: its cache, its adapters and its time."""

    name: str
    num_blocks: int
    max_num_seqs: int
    blocks: BlockManager = field(init=False)
    waiting: deque[Call] = field(default_factory=deque)
    running: int = 0
    free_at_s: float = 0.0
    slots: dict[str, None] = field(default_factory=dict)  # longest unused first
    slot_loads: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks)

    @property
    def ongoing(self) -> int:
        return self.running + len(self.waiting)

    def start(self, now_s: float) -> tuple[Call, float, float] | None:
        """The first that waits, if there is room: it, and when its first and last token come."""
        if not self.waiting or self.running >= self.max_num_seqs:
            return None
        call = self.waiting[0]
        matched = self.blocks.matching(call.hashes)
        answer = call.talk.turns[call.turn][1]
        num_tokens = len(call.sequence.prompt) + len(answer)
        shared = self.blocks.share(call.hashes[:matched])
        new = self.blocks.allocate(-(-num_tokens // BLOCK_TOKENS) - matched)
        if new is None:
            self.blocks.free(shared)
            return None
        self.waiting.popleft()
        call.sequence.blocks = shared + new
        call.cached = matched * BLOCK_TOKENS
        for block, name in zip(call.sequence.blocks, call.hashes, strict=False):
            self.blocks.name(block, name)
        self.running += 1
        self.tokens += num_tokens
        self._use(call.talk.adapter)
        begin_s = max(now_s, self.free_at_s) + self._prefill_s(call)
        self.free_at_s = begin_s
        step_s = STEP_S + STEP_OF_ONE_S * self.running
        return call, begin_s, begin_s + step_s * len(answer)

    def finish(self, call: Call) -> None:
        self.running -= 1
        call.sequence.generated = call.talk.turns[call.turn][1]
        for block, name in zip(
            call.sequence.blocks, extend_hashes(call.sequence, BLOCK_TOKENS), strict=False
        ):
            self.blocks.name(block, name)
        self.blocks.free(call.sequence.blocks)

    def _prefill_s(self, call: Call) -> float:
        seconds = (len(call.sequence.prompt) - call.cached) * PREFILL_S
        for start, image in zip(call.sequence.image_starts, call.sequence.images, strict=True):
            if start + image.num_rows > call.cached:
                seconds += image.num_rows * ENCODE_S
        return seconds

    def _use(self, adapter: str) -> None:
        if not adapter:
            return
        if adapter not in self.slots:
            self.slot_loads += 1
            if len(self.slots) == SLOTS:
                del self.slots[next(iter(self.slots))]
        self.slots.pop(adapter, None)
        self.slots[adapter] = None


class PowerOfTwo:
    """Serve's default: of two at random the one with fewer requests, as both would say now."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, call: Call, decoders: Mapping[str, Decoder], loaded: Any) -> str:
        pair = self._random.sample(sorted(decoders), min(2, len(decoders)))
        return min(pair, key=lambda name: decoders[name].ongoing)

    def done(self, call: Call) -> None:
        pass

    def gone(self, alive: Mapping[str, Decoder]) -> None:
        pass


class ByAffinity:
    """The router's own choice; without `record` it goes by the hash alone."""

    def __init__(self, seed: int, record: bool = True, **options: Any) -> None:
        self._affinity = Affinity(**options)
        self._affinity._random.seed(seed)
        self._record = record

    def choose(
        self, call: Call, decoders: Mapping[str, Decoder], loaded: Mapping[str, Loaded]
    ) -> str:
        group = self._affinity.rank(call.route, decoders, loaded)[0]
        name = min(group, key=lambda name: decoders[name].ongoing)
        self._affinity.outstanding.place(_id(call), name, call.route.tokens)
        if self._record:
            self._affinity.note(call.route, name)
        return name

    def done(self, call: Call) -> None:
        self._affinity.outstanding.release(_id(call))

    def gone(self, alive: Mapping[str, Decoder]) -> None:
        self._affinity.outstanding.keep(alive)


class WithoutHash(ByAffinity):
    """By the record alone: who is new goes to the one of two with less to do."""

    def choose(
        self, call: Call, decoders: Mapping[str, Decoder], loaded: Mapping[str, Loaded]
    ) -> str:
        if not any(self._affinity.held(call.route, name) for name in decoders):
            pair = self._affinity._random.sample(sorted(decoders), min(2, len(decoders)))
            name = min(pair, key=lambda name: decoders[name].ongoing)
            self._affinity.outstanding.place(_id(call), name, call.route.tokens)
            self._affinity.note(call.route, name)
            return name
        return super().choose(call, decoders, loaded)


def _id(call: Call) -> str:
    return f"{call.talk.name}/{call.turn}"


@dataclass
class Outcome:
    """What became of all calls of a run."""

    calls: list[Call]
    first_token_s: list[float]
    tokens: Counter[str]
    slot_loads: int
    moved: int  # later turns that went elsewhere although their decoder was there
    later: int

    @property
    def hit_rate(self) -> float:
        return sum(c.cached for c in self.calls) / sum(c.cacheable for c in self.calls)

    @property
    def balance(self) -> float:
        return max(self.tokens.values()) / (sum(self.tokens.values()) / len(self.tokens))


def simulate(
    talks: Sequence[Talk],
    routers: Sequence[PowerOfTwo | ByAffinity],
    *,
    num_decoders: int = 4,
    num_blocks: int = 2048,
    max_num_seqs: int = 64,
    seed: int = 0,
    lose_at_s: float | None = None,
) -> Outcome:
    """Runs the conversations; each turn comes through a router at random.

    At `lose_at_s` the first decoder is lost with its cache, and an empty one takes its place; what
    it was doing is asked again.
    """
    return _Run(talks, routers, num_decoders, num_blocks, max_num_seqs, seed, lose_at_s).run()


class _Run:
    def __init__(
        self,
        talks: Sequence[Talk],
        routers: Sequence[PowerOfTwo | ByAffinity],
        num_decoders: int,
        num_blocks: int,
        max_num_seqs: int,
        seed: int,
        lose_at_s: float | None,
    ) -> None:
        self._routers = routers
        self._make: Callable[[str], Decoder] = lambda name: Decoder(name, num_blocks, max_num_seqs)
        names = [f"decoder{i}-{random.Random(seed + i).randbytes(4).hex()}" for i in range(10)]
        self._decoders = {name: self._make(name) for name in names[:num_decoders]}
        self._spare = names[num_decoders]
        self._all = dict(self._decoders)
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = itertools.count()
        self._seen: set[bytes] = set()
        self._loaded: dict[str, Loaded] = {}
        self._stats_at_s = 0.0
        self._last: dict[str, str] = {}
        self._under_way: set[Call] = set()
        self._outcome = Outcome([], [], Counter(), 0, 0, 0)
        at_s = 0.0
        for talk in talks:
            at_s += talk.pauses_s[0]
            self._at(at_s, lambda now, talk=talk: self._ask(talk, 0, now))
        if lose_at_s is not None:
            self._at(lose_at_s, self._lose)

    def run(self) -> Outcome:
        while self._events:
            now, _, act = heapq.heappop(self._events)
            act(now)
        for name, decoder in self._all.items():
            if name in self._decoders:
                self._outcome.tokens[name] += decoder.tokens
            self._outcome.slot_loads += decoder.slot_loads
        return self._outcome

    def _at(self, when_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._count), act))

    def _ask(self, talk: Talk, turn: int, now: float) -> None:
        prompt = talk.prompt(turn)
        digests = [digest for digest, _ in talk.pictures]
        route = route_of(
            prompt,
            digests,
            start_of_turn=START,
            system=True,
            answer_tokens=ANSWER_LIMIT,
            adapter=talk.adapter,
        )
        sequence = Running(
            _name(talk, turn),
            prompt.ids,
            SamplingParams(),
            tuple(Image(rows, digest) for digest, rows in talk.pictures),
            tuple(span.start for span in prompt.spans),
            talk.adapter.encode(),
        )
        hashes = extend_hashes(sequence, BLOCK_TOKENS)
        hashes = hashes[: (len(prompt.ids) - 1) // BLOCK_TOKENS]
        router = self._random.randrange(len(self._routers))
        call = Call(talk, turn, now, router, route, sequence, hashes)
        call.cacheable = BLOCK_TOKENS * sum(
            1 for _ in itertools.takewhile(self._seen.__contains__, hashes)
        )
        self._seen.update(hashes)
        self._outcome.calls.append(call)
        self._send(call, now)

    def _send(self, call: Call, now: float) -> None:
        if now >= self._stats_at_s:
            self._stats_at_s = now + STATS_PERIOD_S
            self._loaded = {n: Loaded(frozenset(d.slots)) for n, d in self._decoders.items()}
        name = self._routers[call.router].choose(call, self._decoders, self._loaded)
        before = self._last.get(call.talk.name)
        if before in self._decoders:
            self._outcome.later += 1
            self._outcome.moved += before != name
        self._last[call.talk.name] = call.replica = name
        self._under_way.add(call)
        self._decoders[name].waiting.append(call)
        self._start(self._decoders[name], now)

    def _start(self, decoder: Decoder, now: float) -> None:
        while (started := decoder.start(now)) is not None:
            call, first_s, end_s = started
            self._outcome.first_token_s.append(first_s - call.at_s)
            self._at(end_s, lambda now, call=call, on=decoder: self._end(call, on, now))

    def _end(self, call: Call, decoder: Decoder, now: float) -> None:
        if call not in self._under_way or self._decoders.get(call.replica) is not decoder:
            return  # its decoder was lost meanwhile
        self._under_way.remove(call)
        decoder.finish(call)
        self._seen.update(call.sequence.block_hashes)
        self._routers[call.router].done(call)
        if call.turn + 1 < len(call.talk.turns):
            pause = call.talk.pauses_s[call.turn + 1]
            self._at(now + pause, lambda now: self._ask(call.talk, call.turn + 1, now))
        self._start(decoder, now)

    def _lose(self, now: float) -> None:
        lost = next(iter(self._decoders))
        del self._decoders[lost]
        self._decoders[self._spare] = self._all[self._spare] = self._make(self._spare)
        for router in self._routers:
            router.gone(self._decoders)
        for call in [c for c in self._under_way if c.replica == lost]:
            call.sequence.blocks = []
            self._under_way.remove(call)
            self._send(call, now)


def _name(talk: Talk, turn: int) -> str:
    return f"{talk.name}/{turn}"


def talks(count: int, rate: float, seed: int = 0) -> list[Talk]:
    """So many conversations, `rate` of them a second.

    Half are about a picture (a third of those about one of 20 that others ask about, too), a tenth
    begin with a long text that many share, the others are text alone. Three system texts; half use
    one of eight adapters, some far more often than others.
    """
    source = random.Random(seed)
    return list(itertools.islice(_talks(source, rate), count))


def _talks(source: random.Random, rate: float) -> Iterator[Talk]:
    systems = [_ids(source, length) for length in (60, 200, 800)]
    popular = [(source.randbytes(32), source.choice((1041, 2521, 4001))) for _ in range(20)]
    texts = [_ids(source, 2000) for _ in range(3)]
    for number in itertools.count():
        kind = source.random()
        pictures: list[tuple[bytes, int]] = []
        before: list[int] = []
        if kind < 0.5:
            own = (source.randbytes(32), source.choice((1041, 1461, 2521, 4001, 10_101)))
            pictures = [source.choice(popular) if source.random() < 1 / 3 else own]
        elif kind < 0.6:
            before = source.choice(texts)
        turns = [
            (_ids(source, source.randint(8, 80)), _ids(source, source.randint(16, 300)))
            for _ in range(min(8, 1 + int(source.expovariate(0.5))))
        ]
        turns[0] = ([*before, *turns[0][0]], turns[0][1])
        pauses = [source.expovariate(rate), *(source.uniform(2, 20) for _ in turns)]
        adapter = ""
        if source.random() < 0.5:
            adapter = f"a{min(7, int(source.expovariate(0.6)))}@1"
        yield Talk(f"t{number}", source.choice(systems), pictures, turns, pauses, adapter)


def _ids(source: random.Random, count: int) -> list[int]:
    return source.choices(range(100, 90_000), k=count)
