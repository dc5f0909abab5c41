"""Requests, what happens to them step by step, and what must hold at every step."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.generate import greedy
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.scheduler import Schedule
from xc_ray.engine.sequence import FinishReason, Image, SamplingParams, StepOutput
from xc_ray.engine.sequence import Sequence as Running
from xc_ray.model.adapter import Adapter, AdapterOps, LoraPair, adapted_modules
from xc_ray.model.config import PLORA_LINEARS, DecoderConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import PLAIN, Ops

VOCAB, WIDTH = 1024, 32
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@dataclass(frozen=True, eq=False)
class Picture:
    """Rows of an image, and the name that blocks of the cache are shared by."""

    embeddings: Tensor
    digest: bytes = b""

    def image(self, *, late: bool = False) -> Image:
        return Image(len(self.embeddings), self.digest, None if late else self.embeddings)


def picture(seed: int, num_rows: int, digest: bytes = b"") -> Picture:
    generator = torch.Generator().manual_seed(seed)
    return Picture(torch.randn(num_rows, WIDTH, dtype=torch.float64, generator=generator), digest)


@dataclass(frozen=True)
class Request:
    ids: list[int]
    params: SamplingParams = GREEDY
    pictures: tuple[Picture, ...] = ()
    adapter: Adapter | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Requests of one key have one answer."""
        digest = self.adapter.digest if self.adapter is not None else None
        return tuple(self.ids), self.params, self.pictures, digest

    @property
    def rows(self) -> Tensor | None:
        return torch.cat([p.embeddings for p in self.pictures]) if self.pictures else None

    def images(self, *, late: bool = False) -> list[Image]:
        return [p.image(late=late) for p in self.pictures]


def request(
    *parts: Iterable[int] | Picture, adapter: Adapter | None = None, **params: object
) -> Request:
    """A greedy prompt of texts and pictures in this order."""
    ids: list[int] = []
    pictures: list[Picture] = []
    row = VOCAB
    for part in parts:
        if isinstance(part, Picture):
            pictures.append(part)
            ids += range(row, row + len(part.embeddings))
            row += len(part.embeddings)
        else:
            ids += part
    return Request(ids, replace(GREEDY, **params), tuple(pictures), adapter)  # type: ignore[arg-type]  # any of its fields


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(f"text {seed} {length}")
    return [rng.randrange(VOCAB) for _ in range(length)]


def made_adapter(
    decoder: Decoder,
    seed: int,
    rank: int | Mapping[str, int] = 4,
    *,
    scaling: float = 1.0,
    layers: Iterable[int] | None = None,
) -> Adapter:
    """A random adapter that changes most answers; `rank` of every linear map, or by its name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = decoder.config.linear_shapes
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(PLORA_LINEARS, rank)
    pairs = {}
    for layer in range(len(decoder.model.layers)) if layers is None else layers:
        for name, r in ranks.items():
            out, size = shapes[name]
            a, b = (
                torch.randn(*shape, dtype=torch.float64, generator=generator)
                for shape in ((r, size), (out, r))
            )
            pairs[layer, name] = LoraPair(a * size**-0.5, b * 0.5 * r**-0.5, scaling)
    return Adapter(f"sha256:{seed}", max(ranks.values()), pairs)


def scaled(decoder: Decoder, limit: int) -> Decoder:
    """The decoder with another position limit; the weights are shared."""
    d: DecoderConfig = replace(decoder.config.decoder, max_position_embeddings=limit)
    with torch.device("meta"):
        other = Decoder(replace(decoder.config, decoder=d))
    other.load_state_dict(decoder.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


# Answers


@dataclass
class Answer:
    """Everything an engine gave for one request."""

    ids: list[int] = field(default_factory=list)
    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def num_cached(self) -> int:
        return self.outputs[-1].num_cached

    @property
    def asked(self) -> list[int]:
        return [i for o in self.outputs for i in o.missing_images]


def collect(outputs: list[StepOutput], answers: dict[str, Answer]) -> None:
    for output in outputs:
        answer = answers.setdefault(output.request_id, Answer())
        assert answer.reason is None, "an output after the end"
        answer.ids += output.ids
        answer.outputs.append(output)
        counted = output.num_generated - (output.finish_reason is FinishReason.STOP)
        assert counted == len(answer.ids)


def run(engine: Engine, answers: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """Steps until there is no work left."""
    answers = {} if answers is None else answers
    for _ in range(5000):
        if not engine.has_work:
            return answers
        collect(engine.step(), answers)
    raise AssertionError("the engine still has work after 5,000 steps")


def add(engine: Engine, name: str, it: Request, *, late: bool = False) -> None:
    packed = engine.pack(it.adapter) if it.adapter is not None else None
    engine.add(name, it.ids, it.params, it.images(late=late), packed)


def answer_of(engine: Engine, it: Request) -> Answer:
    add(engine, "one", it)
    return run(engine)["one"]


def dense_ops(decoder: Decoder, adapter: Adapter | None) -> Ops:
    """One adapter on every row."""
    return PLAIN if adapter is None else AdapterOps(adapted_modules(decoder, adapter))


class Greedy:
    """Answers of the dense form without a cache, each computed once."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._known: dict[object, tuple[list[int], FinishReason, list[float]]] = {}

    def __call__(self, it: Request) -> tuple[list[int], FinishReason, list[float]]:
        """The ids, why they end, and by how much each best logit led."""
        if it.key not in self._known:
            ops = dense_ops(self.decoder, it.adapter)
            self._known[it.key] = greedy(self.decoder, it.ids, it.params, it.rows, ops)
        return self._known[it.key]


# What must hold at every step


class SlowLoads:
    """Loads of adapters that take so many steps; until then their slots hold NaN."""

    def __init__(self, engine: Engine, steps: int) -> None:
        assert engine._slots is not None
        assert engine._runner.lora is not None
        self.pool, self.steps = engine._runner.lora, steps
        self.left: dict[int, tuple[int, PackedAdapter]] = {}
        engine._slots._load, engine._slots._loaded = self.load, self.loaded  # a seam

    def load(self, slot: int, adapter: PackedAdapter) -> None:
        assert slot not in self.left, "a slot is overwritten while it is being written"
        nan = torch.full_like(adapter.data, float("nan"))
        self.pool.load(slot, replace(adapter, data=nan))
        self.left[slot] = self.steps, adapter

    def loaded(self, slot: int) -> bool:
        if slot in self.left:
            steps, adapter = self.left[slot]
            if steps:
                self.left[slot] = steps - 1, adapter
                return False
            del self.left[slot]
            self.pool.load(slot, adapter)
        return True


class Watch:
    """Checks every schedule of an engine: the budget, the order, and who writes which block."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.blocks = engine, engine._blocks
        self.scheduler = engine._scheduler
        self.names_given: set[int] = set()  # blocks named since the last schedule began
        self.num_steps = 0
        self._schedule, self._name = self.scheduler.schedule, self.blocks.name
        self.scheduler.schedule = self.schedule  # type: ignore[method-assign]  # a seam
        self.blocks.name = self.name  # type: ignore[method-assign]  # a seam

    def name(self, block: int, name: bytes) -> None:
        if name not in self.blocks._named and block not in self.blocks._names:
            self.names_given.add(block)
        self._name(block, name)

    def schedule(self) -> Schedule:
        self.num_steps += 1
        self.names_given.clear()
        decoding = [s for s in self.scheduler.running if not s.prefilling]
        plan = self._schedule()
        self.check_plan(plan, decoding)
        self.check_blocks()
        self.check_slots()
        return plan

    def check_plan(self, plan: Schedule, decoding: list[Running]) -> None:
        config = self.engine.config
        flags = [w.decode for w in plan.work]
        assert flags == sorted(flags, reverse=True), "decoding rows come first"
        assert len({id(w.sequence) for w in plan.work}) == len(plan.work)
        prompts = [w for w in plan.work if not w.decode]
        assert sum(w.stop - w.start for w in prompts) <= config.max_prefill_tokens
        assert all(w.stop - w.start == 1 for w in plan.work if w.decode)
        planned = {id(w.sequence) for w in plan.work}
        for sequence in decoding:
            given_up = sequence not in self.scheduler.running or sequence in plan.started
            ended = len(sequence.generated) + sequence.in_flight >= sequence.max_generated
            assert id(sequence) in planned or given_up or ended, "decoding waits for nobody"
        for w in plan.work:
            for place in range(w.start, w.stop):
                block = w.sequence.blocks[place // config.block_size]
                own = block not in self.blocks._names or block in self.names_given
                assert own, "a block that others can share is written again"
            for start, image in zip(w.sequence.image_starts, w.sequence.images, strict=True):
                computed = w.start < start + image.num_rows and start < w.stop
                assert not computed or image.embeddings is not None

    def check_blocks(self) -> None:
        blocks, running = self.blocks, self.scheduler.running
        held = [block for s in running for block in s.blocks]
        assert [held.count(b) for b in range(blocks.num_blocks)] == blocks._holders
        for s in running:
            assert len(set(s.blocks)) == len(s.blocks)
        owners: dict[int, Running] = {}
        for s in running:
            for block in s.blocks[s.num_shared :]:
                assert block not in owners, "a block of one was given to another"
                owners[block] = s
        assert sorted([*blocks._free, *blocks._kept, *set(held)]) == list(range(blocks.num_blocks))
        assert {b: n for n, b in blocks._named.items()} == blocks._names
        assert not set(blocks._free) & blocks._names.keys()
        assert set(blocks._kept) <= blocks._names.keys()
        lanes = [s.lane for s in running]
        assert sorted([*lanes, *self.scheduler._lanes]) == list(
            range(self.engine.config.max_num_seqs)
        )
        for name, owner in self.scheduler._coming.items():
            assert owner in running
            assert name in owner.block_hashes

    def check_slots(self) -> None:
        """Who runs has its adapter in a slot that is pinned for it, and holds what it should."""
        slots, running = self.engine._slots, self.scheduler.running
        used = [s.slot for s in running if s.adapter is not None]
        assert all(s.slot == -1 for s in running if s.adapter is None)
        assert all(s.slot == -1 for s in self.scheduler.waiting)
        if slots is None:
            assert not used
            return
        assert [s.pins for s in slots._slots] == [used.count(i) for i in range(len(slots._slots))]
        digests = [s.digest for s in slots._slots]
        assert {d: i for i, d in enumerate(digests) if d is not None} == slots._by_digest
        assert sorted(self.engine.adapters) == sorted(d for d in digests if d is not None)
        for s in running:
            if s.adapter is not None:
                assert digests[s.slot] == s.adapter.digest
                assert s.slot not in slots.loading
                assert self.engine._runner.lora is not None
                row = self.engine._runner.lora.slots.pool[s.slot]
                assert torch.equal(row[: len(s.adapter.data)], s.adapter.data)

    def check_idle(self) -> None:
        """All is finished: everything is there again."""
        assert not self.engine.has_work
        assert self.engine.kv_usage == 0
        assert (self.engine.num_running, self.engine.num_waiting) == (0, 0)
        assert self.blocks.num_available == self.blocks.num_blocks
        assert self.blocks._holders == [0] * self.blocks.num_blocks
        assert not self.engine._sequences
        assert not self.engine._ids
        assert not self.scheduler._coming
        self.check_blocks()
        self.check_slots()


# Schedules


@dataclass(frozen=True)
class Arrival:
    """A request, how it comes, and whether it goes early."""

    parts: tuple[int, ...]  # of PARTS
    params: int  # of the list that the test gives
    copies: int
    wait: int  # steps behind the one before
    supplied: int | None  # steps from being asked for embeddings to giving them; None: at once
    aborted: int | None  # steps from arrival
    turns: int  # further turns, each behind the answer of the last
    adapter: int | None = None  # of the list that the test gives


# Few texts and pictures, so that many requests begin alike. The first two pictures differ in their
# content and digest alone, the last has no digest.
PARTS: tuple[list[int] | Picture, ...] = (
    text(0, 9),
    text(1, 4),
    text(2, 1),
    text(3, 17),
    picture(1, 5, b"red"),
    picture(2, 5, b"blue"),
    picture(3, 11, b"large"),
    picture(4, 3),
)


@dataclass(frozen=True)
class Traffic:
    arrivals: tuple[Arrival, ...]
    block_size: int
    budget: int
    seqs: int
    room: float  # of the cache, over what the longest request needs
    overlap: bool
    prefix_cache: bool
    slots: int = 0
    load_steps: int = 0  # how long it takes to load an adapter


def traffic(
    *, num_params: int, max_arrivals: int = 6, num_adapters: int = 0
) -> st.SearchStrategy[Traffic]:
    arrival = st.builds(
        Arrival,
        parts=st.tuples(st.sampled_from([0, 0, 0, 4, 3]), st.integers(4, 7)).flatmap(
            lambda head: st.one_of(
                st.just(head[:1]),
                st.lists(st.integers(0, len(PARTS) - 1), max_size=3).map(
                    lambda tail: (*head, *tail)
                ),
            )
        ),
        params=st.integers(0, num_params - 1),
        copies=st.sampled_from([1, 1, 1, 2, 3]),
        wait=st.integers(0, 6),
        supplied=st.none() | st.integers(0, 4),
        aborted=st.none() | st.none() | st.integers(0, 15),
        turns=st.sampled_from([0, 0, 1, 2]),
        adapter=st.none() | st.integers(0, num_adapters - 1) if num_adapters else st.none(),
    )
    return st.builds(
        Traffic,
        arrivals=st.lists(arrival, min_size=1, max_size=max_arrivals).map(tuple),
        block_size=st.sampled_from([1, 2, 3, 4, 8, 16]),
        budget=st.integers(1, 40),
        seqs=st.integers(1, 6),
        room=st.sampled_from([1.0, 1.0, 1.3, 2.0, 4.0]),
        overlap=st.booleans(),
        prefix_cache=st.sampled_from([True, True, False]),
        slots=st.sampled_from([1, *range(1, num_adapters + 1)]) if num_adapters else st.just(0),
        load_steps=st.sampled_from([0, 0, 1, 3]) if num_adapters else st.just(0),
    )


def request_of(
    arrival: Arrival, params: Sequence[SamplingParams], adapters: Sequence[Adapter] = ()
) -> Request:
    made = request(*(PARTS[i] for i in arrival.parts))
    adapter = adapters[arrival.adapter] if arrival.adapter is not None else None
    return replace(made, params=params[arrival.params], adapter=adapter)


def longer(it: Request, answer: list[int]) -> Request:
    """The next turn: the prompt, its answer, and three ids more."""
    return replace(it, ids=[*it.ids, *answer, *text(len(answer), 3)])


@dataclass
class Player:
    """Plays traffic to an engine; every answer that was not aborted is `expected`'s."""

    engine: Engine
    expected: Callable[[Request], tuple[list[int], FinishReason]]
    adapters: Sequence[Adapter] = ()
    requests: dict[str, Request] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    num_cached: int = 0
    _due: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    _turns: dict[str, int] = field(default_factory=dict)
    _supplied: dict[str, int | None] = field(default_factory=dict)
    _now: int = 0

    def play(self, arrivals: Sequence[Arrival], params: Sequence[SamplingParams]) -> None:
        watch = Watch(self.engine)
        at = 0
        for number, arrival in enumerate(arrivals):
            at += arrival.wait
            self._due.append((at, lambda n=number, a=arrival: self._arrive(n, a, params)))  # type: ignore[misc]  # defaults bind now
        for self._now in range(20_000):
            due = [call for when, call in self._due if when <= self._now]
            self._due = [(when, call) for when, call in self._due if when > self._now]
            for call in due:
                call()
            if self.engine.has_work:
                self._take(self.engine.step())
            elif not self._due:
                break
        assert not self.engine.has_work, "the engine still has work after 20,000 steps"
        watch.check_idle()
        self.check()

    def check(self) -> None:
        assert self.engine.failure is None
        for name, it in self.requests.items():
            ids, reason = self.expected(it)
            answer = self.answers.get(name, Answer())
            if name in self.aborted and answer.reason is FinishReason.ABORT:
                assert answer.ids == ids[: len(answer.ids)], name
                continue
            assert (answer.ids, answer.reason) == (ids, reason), name
            again = len(answer.asked) > len(set(answer.asked))
            assert not again or self.engine.num_preemptions, "embeddings were asked for twice"
            late = self._supplied[name] is not None
            assert late or not answer.asked
            assert self.engine.config.prefix_cache or answer.num_cached == 0
            assert answer.num_cached < len(it.ids)

    def _arrive(self, number: int, arrival: Arrival, params: Sequence[SamplingParams]) -> None:
        for copy in range(arrival.copies):
            name = f"{number}.{copy}"
            self._add(name, request_of(arrival, params, self.adapters), arrival.supplied)
            self._turns[name] = arrival.turns
            if arrival.aborted is not None:
                self.aborted.add(name)
                when = self._now + 1 + arrival.aborted
                self._due.append((when, lambda n=name: self.engine.abort(n)))  # type: ignore[misc]  # as above

    def _add(self, name: str, it: Request, supplied: int | None) -> None:
        self.requests[name], self._supplied[name] = it, supplied
        add(self.engine, name, it, late=supplied is not None)

    def _take(self, outputs: list[StepOutput]) -> None:
        collect(outputs, self.answers)
        for output in outputs:
            name = output.request_id
            self.num_cached += output.num_cached if output.finish_reason else 0
            for index in output.missing_images:
                delay = self._supplied[name]
                assert delay is not None
                rows = self.requests[name].pictures[index].embeddings
                self._due.append(
                    (
                        self._now + delay,
                        lambda n=name, i=index, e=rows: self.engine.supply(n, i, e),  # type: ignore[misc]  # as above
                    )
                )
            ended = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            if ended and self._turns.get(name, 0):
                further = f"{name}+"
                self._add(
                    further,
                    longer(self.requests[name], self.answers[name].ids),
                    self._supplied[name],
                )
                self._turns[further] = self._turns[name] - 1


def config_of(it: Traffic, params: Sequence[SamplingParams]) -> EngineConfig:
    """Limits that the traffic's longest request just fits into, times its `room`."""
    longest = max(
        len(request_of(replace(a, adapter=None), params).ids)
        + params[a.params].max_tokens
        + a.turns * (params[a.params].max_tokens + 3)
        for a in it.arrivals
    )
    return EngineConfig(
        max_model_len=longest,
        kv_cache_tokens=math.ceil(longest * it.room),
        max_num_seqs=it.seqs,
        max_prefill_tokens=it.budget,
        block_size=it.block_size,
        prefix_cache=it.prefix_cache,
        overlap=it.overlap,
        max_loras=it.slots,
    )
