"""Whatever else runs, in whatever order and room, a request's answer is the one it gets alone.

`tests/engine/traffic.py` draws the requests, plays them and checks the books at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import VARIANTS
from tests.engine.traffic import (
    PARTS,
    VOCAB,
    Answer,
    Arrival,
    Greedy,
    Player,
    Request,
    SlowLoads,
    Traffic,
    Watch,
    add,
    answer_of,
    collect,
    config_of,
    made_adapter,
    request,
    scaled,
    text,
    traffic,
)
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import FinishReason, SamplingParams
from xc_ray.model.adapter import Adapter
from xc_ray.model.config import Variant
from xc_ray.model.decoder import Decoder
from xc_ray.model.hf import XComposerForCausalLM

Load = Callable[..., Decoder]

# Every fourth id ends an answer: most of them end early.
STOPS = frozenset(range(0, VOCAB, 4))
PARAMS = (
    *(SamplingParams(max_tokens=n, temperature=0) for n in (1, 24, 7)),
    SamplingParams(max_tokens=12, temperature=0, stop_token_ids=STOPS),
)
SAMPLED = (
    SamplingParams(max_tokens=6, temperature=1.0, seed=3),
    SamplingParams(
        max_tokens=9, temperature=2.0, top_p=0.9, top_k=50, seed=4, stop_token_ids=STOPS
    ),
    SamplingParams(max_tokens=7, temperature=1.3, min_p=0.01, seed=5, repetition_penalty=1.4),
    SamplingParams(max_tokens=7, temperature=0.9, seed=6, presence_penalty=1.0, logprobs=3),
    SamplingParams(
        max_tokens=9, min_tokens=4, temperature=3.0, seed=7, stop_token_ids=STOPS,
        frequency_penalty=0.5, logit_bias=((7, 3.5), (8, 4.0)),
    ),
    SamplingParams(max_tokens=5, temperature=0),
)  # fmt: skip


def check_of(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def play(
    decoder: Decoder,
    drawn: Traffic,
    params: tuple[SamplingParams, ...],
    expected: Callable[[Request], tuple[list[int], FinishReason]],
    adapters: Sequence[Adapter] = (),
) -> Player:
    player = Player(Engine(decoder, config_of(drawn, params)), expected, adapters)
    if drawn.load_steps:
        SlowLoads(player.engine, drawn.load_steps)
    player.play(drawn.arrivals, params)
    return player


def adapters_of(decoder: Decoder) -> list[Adapter]:
    """Adapters of different ranks, linear maps, layers and scalings."""
    return [
        made_adapter(decoder, 1, 4, scaling=2.0),
        made_adapter(decoder, 2, 17, scaling=0.7),
        made_adapter(decoder, 3, {"attention.wqkv": 3, "feed_forward.w2": 33}, scaling=1.5),
        made_adapter(decoder, 4, {"attention.wo": 16, "feed_forward.w3": 1}, scaling=3.0),
        made_adapter(decoder, 5, {"feed_forward.w1": 64}, scaling=2.5, layers=[1]),
    ]


@pytest.mark.parametrize(
    "max_examples", [120, pytest.param(6000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_answers_in_any_traffic_are_those_of_the_dense_form(max_examples: int, load: Load) -> None:
    greedy = Greedy(load())
    preempted = cached = 0

    @check_of(max_examples)
    @given(traffic(num_params=len(PARAMS)))
    def check(drawn: Traffic) -> None:
        nonlocal preempted, cached
        player = play(load(), drawn, PARAMS, lambda it: greedy(it)[:2])
        preempted += player.engine.num_preemptions
        cached += player.num_cached

    check()
    # The traffic is of the kind that the test is about; a tenth of what is usual.
    assert preempted > max_examples // 40
    assert cached > max_examples * 4


@pytest.mark.parametrize(
    "max_examples", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_drawn_answers_in_any_traffic_are_those_of_the_request_alone(
    max_examples: int, load: Load
) -> None:
    adapters = adapters_of(load())
    alone: dict[object, tuple[list[int], FinishReason]] = {}

    def expected(it: Request) -> tuple[list[int], FinishReason]:
        if it.key not in alone:
            slots = int(it.adapter is not None)
            plain = EngineConfig(
                200, 200, 1, 200, prefix_cache=False, overlap=False, max_loras=slots
            )
            answer = answer_of(Engine(load(), plain), it)
            assert answer.reason is not None
            alone[it.key] = answer.ids, answer.reason
        return alone[it.key]

    @check_of(max_examples)
    @given(traffic(num_params=len(SAMPLED), num_adapters=len(adapters)))
    def check(drawn: Traffic) -> None:
        play(load(), drawn, SAMPLED, expected, adapters)

    check()


def one_slot_for_all(num_adapters: int) -> Traffic:
    """Requests that take an adapter's place from the one before, again and again."""
    arrivals = [
        Arrival((0,), 0, copies=1, wait=1, supplied=None, aborted=None, turns=0, adapter=i)
        for i in [*range(num_adapters)] * 2
    ]
    return Traffic(tuple(arrivals), 4, 16, 2, 2.0, overlap=True, prefix_cache=True, slots=1)


@pytest.mark.parametrize(
    "max_examples", [80, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_answers_of_adapters_in_any_traffic_are_those_of_the_dense_form(
    max_examples: int, load: Load
) -> None:
    greedy, adapters = Greedy(load()), adapters_of(load())
    preempted = evicted = cached = mixed = 0

    @check_of(max_examples)
    @given(traffic(num_params=len(PARAMS), max_arrivals=8, num_adapters=len(adapters)))
    @example(one_slot_for_all(len(adapters)))
    def check(drawn: Traffic) -> None:
        nonlocal preempted, evicted, cached, mixed
        player = play(load(), drawn, PARAMS, lambda it: greedy(it)[:2], adapters)
        preempted += player.engine.num_preemptions
        evicted += player.engine.adapter_stats.num_evictions
        cached += player.num_cached
        mixed += len({it.adapter and it.adapter.digest for it in player.requests.values()}) > 1

    check()
    # The traffic is of the kind that the test is about; a fraction of what is usual.
    assert preempted > max_examples // 40
    assert evicted > max_examples // 40  # the example alone has them; luck may bring none
    assert cached > max_examples
    assert mixed > max_examples // 4


def test_float32_answers_are_the_dense_ones_until_two_ids_are_as_good(load: Load) -> None:
    decoder = load(dtype=torch.float32)
    greedy = Greedy(decoder)
    compared = 0

    @check_of(40)
    @given(traffic(num_params=len(PARAMS)))
    def check(drawn: Traffic) -> None:
        nonlocal compared
        drawn = replace(drawn, arrivals=tuple(replace(a, turns=0) for a in drawn.arrivals))
        player = Player(Engine(decoder, config_of(drawn, PARAMS)), lambda it: greedy(it)[:2])
        player.check = lambda: None  # type: ignore[method-assign]  # the comparison is this one
        player.play(drawn.arrivals, PARAMS)
        for name, it in player.requests.items():
            ids, reason, leads = greedy(it)
            answer = player.answers[name]
            sure = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(leads))
            if answer.reason is not FinishReason.ABORT and sure == len(leads):
                assert (answer.ids, answer.reason) == (ids, reason)
            assert answer.ids[:sure] == ids[:sure][: len(answer.ids)]
            compared += min(sure, len(answer.ids))

    check()
    assert compared > 100


# Against the published interface


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_generate(
    variant: Variant, tiny: Callable[[Variant], Path], load: Load
) -> None:
    model = XComposerForCausalLM.from_pretrained(tiny(variant), dtype=torch.float64)
    generate = Generate(model)

    @check_of(40)
    @given(traffic(num_params=3, max_arrivals=4))
    def check(drawn: Traffic) -> None:
        play(load(variant), drawn, PARAMS[:3], generate)

    check()
    assert len(generate.known) > 15


def test_answers_past_the_position_limit_are_those_of_generate(
    tiny: Callable[[Variant], Path], load: Load
) -> None:
    """Some requests stay below the limit; of the others, each has its own rope base."""
    model = XComposerForCausalLM.from_pretrained(
        tiny("2.5"), dtype=torch.float64, max_position_embeddings=16
    )
    decoder, generate = scaled(load(), 16), Generate(model)

    @check_of(40)
    @given(traffic(num_params=3, max_arrivals=4))
    def check(drawn: Traffic) -> None:
        play(decoder, drawn, PARAMS[:3], generate)

    check()
    lengths = [len(ids) + params.max_tokens for ids, params, _ in generate.known]
    assert min(lengths) <= 16 < max(lengths)


class Generate:
    """Answers of `generate` of the transformers model, each computed once."""

    def __init__(self, model: XComposerForCausalLM) -> None:
        self.model = model
        self.known: dict[Any, tuple[list[int], FinishReason]] = {}

    def __call__(self, it: Request) -> tuple[list[int], FinishReason]:
        key = (tuple(it.ids), it.params, it.pictures)
        if key not in self.known:
            ids = torch.tensor([it.ids])
            marks = (ids >= VOCAB).long()
            x = self.model.model.tok_embeddings(ids.clamp(max=VOCAB - 1)).detach()
            if it.rows is not None:
                x[marks == 1] = it.rows
            out = self.model.generate(
                inputs_embeds=x,
                mm_token_type_ids=marks,
                max_new_tokens=it.params.max_tokens,
                do_sample=False,
                eos_token_id=[VOCAB],  # nobody chooses it
            )
            self.known[key] = out[0].tolist(), FinishReason.LENGTH
        return self.known[key]


# Operations in any order


class Operations(RuleBasedStateMachine):
    """Add, supply, abort and step as they come; `Watch` checks the books at every step."""

    decoder: Decoder
    greedy: Greedy

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, Answer] = {}
        self.late: set[str] = set()
        self.missing: list[tuple[str, int]] = []
        self.aborted: set[str] = set()

    @initialize(
        blocks=st.integers(24, 60),
        block_size=st.sampled_from([2, 4]),
        seqs=st.integers(1, 4),
        budget=st.sampled_from([1, 3, 8, 30]),
        prefix_cache=st.sampled_from([True, True, False]),
        overlap=st.booleans(),
    )
    def start(
        self,
        blocks: int,
        block_size: int,
        seqs: int,
        budget: int,
        prefix_cache: bool,
        overlap: bool,
    ) -> None:
        config = EngineConfig(
            64, blocks * block_size, seqs, budget, block_size,
            prefix_cache=prefix_cache, overlap=overlap,
        )  # fmt: skip
        self.engine = Engine(self.decoder, config)
        self.watch = Watch(self.engine)

    @rule(
        parts=st.lists(st.sampled_from([0, 1, 2, 4, 5, 7]), min_size=1, max_size=3),
        params=st.sampled_from(PARAMS),
        late=st.booleans(),
    )
    def add(self, parts: list[int], params: SamplingParams, late: bool) -> None:
        it = replace(request(*(PARTS[p] for p in parts)), params=params)
        name = str(len(self.requests))
        self.requests[name] = it
        if late:
            self.late.add(name)
        add(self.engine, name, it, late=late)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.aborted.add(name)
        self.engine.abort(name)

    @precondition(lambda self: self.missing)
    @rule(data=st.data())
    def supply(self, data: st.DataObject) -> None:
        name, index = self.missing.pop(data.draw(st.integers(0, len(self.missing) - 1)))
        self.engine.supply(name, index, self.requests[name].pictures[index].embeddings)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            outputs = self.engine.step()
            collect(outputs, self.answers)
            self.missing += [(o.request_id, i) for o in outputs for i in o.missing_images]

    @invariant()
    def what_came_so_far_is_the_beginning_of_the_answer(self) -> None:
        for name, answer in self.answers.items():
            ids, reason, _ = self.greedy(self.requests[name])
            assert answer.ids == ids[: len(answer.ids)]
            ended = answer.reason in (None, FinishReason.ABORT)
            assert ended or (answer.ids, answer.reason) == (ids, reason)
            assert answer.reason is not FinishReason.ABORT or name in self.aborted

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            while self.missing:
                name, index = self.missing.pop()
                self.engine.supply(name, index, self.requests[name].pictures[index].embeddings)
            if not self.engine.has_work:
                break
            self.step(1)
        self.what_came_so_far_is_the_beginning_of_the_answer()
        assert self.engine.failure is None
        assert all(name in self.answers and self.answers[name].reason for name in self.requests)
        self.watch.check_idle()


@pytest.mark.parametrize(
    "max_examples", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_no_order_of_operations_leaks_a_block_or_gives_it_twice(
    max_examples: int, load: Load
) -> None:
    decoder, greedy = load(), Greedy(load())

    class WithModel(Operations):
        pass

    WithModel.decoder, WithModel.greedy = decoder, greedy
    run_state_machine_as_test(
        WithModel, settings=settings(check_of(max_examples), stateful_step_count=30)
    )


# The same requests at once


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_identical_requests_at_once_get_one_answer(
    overlap: bool, prefix_cache: bool, late: bool, load: Load
) -> None:
    it = replace(request(text(9, 11), PARTS[6], text(10, 6)), params=PARAMS[2])
    ids, reason, _ = Greedy(load())(it)
    config = EngineConfig(60, 400, 8, 9, block_size=4, prefix_cache=prefix_cache, overlap=overlap)
    engine = Engine(load(), config)
    watch = Watch(engine)
    for name in "abcdefgh":
        add(engine, name, it, late=late)
    answers: dict[str, Answer] = {}
    asked: list[tuple[str, int]] = []
    while engine.has_work:
        outputs = engine.step()
        collect(outputs, answers)
        new = [(o.request_id, i) for o in outputs for i in o.missing_images]
        for name, index in new:
            engine.supply(name, index, it.pictures[index].embeddings)
        asked += new
    assert answers.keys() == set("abcdefgh")
    assert all((a.ids, a.reason) == (ids, reason) for a in answers.values())
    # One computes, the others share all full blocks but the last token's.
    shared = (len(it.ids) - 1) // 4 * 4 if prefix_cache else 0
    assert sorted(a.num_cached for a in answers.values()) == [0] + [shared] * 7
    assert len(asked) == (8 if late else 0)
    watch.check_idle()
