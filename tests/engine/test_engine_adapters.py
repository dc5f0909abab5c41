"""Requests with adapters among others: each answer is the one that its adapter alone would give."""

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import peft_model
from tests.engine.traffic import (
    GREEDY,
    PARTS,
    VOCAB,
    Answer,
    Greedy,
    Request,
    SlowLoads,
    Watch,
    add,
    answer_of,
    collect,
    made_adapter,
    request,
    run,
    text,
)
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import FinishReason
from xc_ray.engine.slots import SlotStats
from xc_ray.model.adapter import Adapter, load_adapter
from xc_ray.model.config import Variant
from xc_ray.model.decoder import Decoder

Load = Callable[..., Decoder]
Tiny = Callable[[Variant], Path]


def engine_of(
    decoder: Decoder,
    slots: int = 2,
    *,
    cache: int = 600,
    seqs: int = 8,
    budget: int = 16,
    block_size: int = 4,
    **options: Any,
) -> Engine:
    config = EngineConfig(
        min(100, cache), cache, seqs, budget, block_size, max_loras=slots, **options
    )
    return Engine(decoder, config)


def ids_of(decoder: Decoder, it: Request) -> list[int]:
    return Greedy(decoder)(it)[0]


# The same as peft

LORAS: dict[str, dict[str, Any]] = {
    "all five": {"r": 4},
    "rsLoRA": {"r": 9, "use_rslora": True, "lora_alpha": 5, "target_modules": ["wqkv", "w2"]},
    "one map": {"r": 64, "lora_alpha": 160, "target_modules": ["wo"]},
    "patterns": {
        "r": 3,
        "rank_pattern": {"feed_forward.w1": 17, r"model\.layers\.1\.attention\.w.+": 1},
        "alpha_pattern": {"w3": 1.5},
    },
}


def generated(model: Any, it: Request) -> list[int]:
    """The ids that transformers' greedy `generate` gives."""
    ids = torch.tensor([it.ids])
    marks = (ids >= VOCAB).long()
    embed = model.get_input_embeddings()
    x = embed(ids.clamp(max=VOCAB - 1)).detach()
    if it.rows is not None:
        x[marks == 1] = it.rows.to(x.dtype)
    out = model.generate(
        inputs_embeds=x,
        mm_token_type_ids=marks,
        max_new_tokens=it.params.max_tokens,
        do_sample=False,
        eos_token_id=[VOCAB],  # nobody chooses it
    )
    result: list[int] = out[0].tolist()
    return result


# peft 0.21 asks for an attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_rows_of_any_mix_are_those_of_pefts_model_of_one_adapter(
    tiny: Tiny, load: Load, tmp_path: Path
) -> None:
    """In float32, each request against a real peft model that holds its adapter alone."""
    decoder = load(dtype=torch.float32)
    adapters: dict[str, Adapter | None] = {"base": None}
    expected: dict[str, list[int]] = {}
    prompts = {
        "text": request(text(40, 13), max_tokens=9),
        "image": request(text(41, 3), PARTS[6], text(42, 4), max_tokens=7),
        "image last": request(text(43, 6), PARTS[4], max_tokens=6),
    }
    for seed, (name, options) in enumerate(LORAS.items()):
        model = peft_model(tiny("2.5"), seed, **options).float()
        model.save_pretrained(tmp_path / name)
        adapters[name] = load_adapter(
            tmp_path / name, decoder.config, digest=name, dtype=torch.float32
        )
        for kind, it in prompts.items():
            expected[f"{name}, {kind}"] = generated(model, it)
    with model.disable_adapter():
        for kind, it in prompts.items():
            expected[f"base, {kind}"] = generated(model, it)

    greedy, compared = Greedy(decoder), 0
    for budget, slots, overlap in ((64, 4, True), (5, 2, False), (3, 3, True), (16, 1, True)):
        engine = engine_of(decoder, slots, budget=budget, seqs=9, overlap=overlap)
        watch = Watch(engine)
        requests = {
            f"{name}, {kind}": replace(it, adapter=adapter)
            for kind, it in prompts.items()
            for name, adapter in adapters.items()
        }
        for name, it in requests.items():
            add(engine, name, it)
        answers = run(engine)
        watch.check_idle()
        for name, it in requests.items():
            # Where two ids are as good, float32 may choose either.
            leads = greedy(it)[2]
            sure = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(leads))
            assert answers[name].ids[:sure] == expected[name][:sure], name
            compared += sure
    assert compared > 0.9 * 4 * sum(map(len, expected.values()))
    for kind in prompts:
        assert len({tuple(ids) for name, ids in expected.items() if name.endswith(kind)}) == 5


# The prefix cache


def test_only_requests_of_one_adapter_share_blocks(load: Load) -> None:
    decoder = load()
    red, blue = made_adapter(decoder, 1), made_adapter(decoder, 2)
    renamed = replace(red, digest="sha256:another")
    it = request(text(50, 21), max_tokens=5)
    engine = engine_of(decoder, 3, block_size=4)
    cached = []
    for adapter in (None, red, blue, renamed, None, red, blue, renamed):
        answer = answer_of(engine, mine := replace(it, adapter=adapter))
        assert answer.ids == ids_of(decoder, mine)
        cached.append(answer.num_cached)
    assert cached == [0, 0, 0, 0, 20, 20, 20, 20]


def test_a_further_turn_with_the_adapter_finds_what_it_said(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1)
    it = request(text(51, 10), PARTS[4], adapter=made_adapter(decoder, 1), max_tokens=9)
    first = answer_of(engine, it)
    further = replace(it, ids=[*it.ids, *first.ids, *text(52, 3)])
    again = answer_of(engine, further)
    assert again.num_cached == (len(it.ids) + len(first.ids) - 1) // 4 * 4
    assert again.ids == ids_of(decoder, further)
    base = answer_of(engine, replace(further, adapter=None))
    assert base.num_cached == 0


def test_blocks_outlive_the_adapters_slot(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1)
    it = request(text(53, 13), adapter=made_adapter(decoder, 1))
    answer_of(engine, it)
    answer_of(engine, replace(it, adapter=made_adapter(decoder, 2)))
    again = answer_of(engine, it)
    assert again.num_cached == 12
    assert again.ids == ids_of(decoder, it)
    assert engine.adapter_stats == SlotStats(num_loads=3, num_evictions=2, num_reloads=1)


# More adapters than slots


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_more_adapters_than_slots_all_get_their_turn(
    slots: int, overlap: bool, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = load()
    adapters = [made_adapter(decoder, seed, 3 * seed + 1) for seed in range(6)]
    engine = engine_of(decoder, slots, overlap=overlap)
    watch = Watch(engine)
    requests = {
        f"{i}.{n}": request(text(60 + n, 6 + n), adapter=adapters[i])
        for n in range(3)
        for i in range(6)
    }
    requests["base"] = request(text(66, 9))
    for name, it in requests.items():
        add(engine, name, it)
    assert engine.num_waiting == len(requests)
    with caplog.at_level(logging.WARNING):
        answers = run(engine)
    greedy = Greedy(decoder)
    assert {n: a.ids for n, a in answers.items()} == {
        n: greedy(it)[0] for n, it in requests.items()
    }
    watch.check_idle()
    stats = engine.adapter_stats
    assert len(engine.adapters) == slots
    assert stats.num_loads == stats.num_evictions + slots
    assert len(caplog.records) == (stats.num_reloads > 0)


def test_adapters_in_slots_are_told_with_the_steps(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 2)
    assert engine.adapters == ()
    assert engine.adapter_stats == SlotStats()
    plain = Engine(decoder, EngineConfig(64, 64))
    assert (plain.adapters, plain.adapter_stats) == ((), SlotStats())
    for seed, resident in ((1, {1}), (2, {1, 2}), (1, {1, 2}), (3, {1, 3})):
        answer_of(engine, request(text(1, 4), adapter=made_adapter(decoder, seed)))
        assert set(engine.adapters) == {f"sha256:{i}" for i in resident}
    assert engine.adapter_stats == SlotStats(num_loads=3, num_evictions=1, num_reloads=0)


def test_base_requests_overtake_those_that_wait_for_a_slot(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1)
    answers: dict[str, Answer] = {}
    add(engine, "first", request(text(70, 5), adapter=made_adapter(decoder, 1), max_tokens=20))
    collect(engine.step(), answers)
    add(engine, "other", request(text(71, 5), adapter=made_adapter(decoder, 2)))
    add(engine, "same", request(text(72, 5), adapter=made_adapter(decoder, 1)))
    add(engine, "base", request(text(73, 5)))
    while "other" not in answers:
        collect(engine.step(), answers)
    assert answers["first"].reason is FinishReason.LENGTH
    assert answers["base"].reason is FinishReason.LENGTH
    assert "same" not in answers, "it overtook one that waits for the slot"
    run(engine, answers)
    assert answers["same"].reason is FinishReason.LENGTH


def test_a_stream_of_one_adapter_does_not_starve_another(load: Load) -> None:
    """It waits for the ten before it alone: three rounds of four lanes, of 7 steps each."""
    decoder = load()
    engine = engine_of(decoder, 1, seqs=4)
    first, second = made_adapter(decoder, 1), made_adapter(decoder, 2)
    answers: dict[str, Answer] = {}
    for step in range(40):
        add(engine, f"{step}", request(text(step, 3), adapter=first, max_tokens=6))
        if step == 10:
            add(engine, "it", request(text(3, 3), adapter=second, max_tokens=6))
        collect(engine.step(), answers)
        if "it" in answers:
            break
    assert "it" in answers
    assert step <= 3 * 7 + 4


# Loads that take long


@pytest.mark.parametrize("overlap", [False, True])
def test_running_requests_get_a_token_a_step_while_an_adapter_loads(
    overlap: bool, load: Load
) -> None:
    decoder = load()
    engine = engine_of(decoder, 2, overlap=overlap)
    slow = SlowLoads(engine, 0)
    watch = Watch(engine)
    requests = {
        "base": request(text(80, 5), max_tokens=30),
        "red": request(text(81, 5), adapter=made_adapter(decoder, 1), max_tokens=30),
        "blue": request(text(82, 5), adapter=made_adapter(decoder, 2), max_tokens=8),
        "late": request(text(83, 5), max_tokens=4),
    }
    answers: dict[str, Answer] = {}
    for name in ("base", "red"):
        add(engine, name, requests[name])
    for _ in range(3):
        collect(engine.step(), answers)
    slow.steps = 15
    for name in ("blue", "late"):
        add(engine, name, requests[name])
    for number in range(15):
        before = {name: len(answers[name].ids) for name in ("base", "red")}
        collect(engine.step(), answers)
        for name, count in before.items():
            assert len(answers[name].ids) == count + 1, f"{name} got nothing in step {number}"
        assert "blue" not in answers
    assert answers["late"].reason is FinishReason.LENGTH
    run(engine, answers)
    greedy = Greedy(decoder)
    assert {n: a.ids for n, a in answers.items()} == {
        n: greedy(it)[0] for n, it in requests.items()
    }
    watch.check_idle()


def test_an_adapter_loads_while_its_request_waits_for_a_lane(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1, seqs=1)
    SlowLoads(engine, 5)
    adapter = made_adapter(decoder, 1)
    answers: dict[str, Answer] = {}
    add(engine, "base", request(text(84, 5), max_tokens=12))
    add(engine, "it", request(text(85, 5), adapter=adapter))
    add(engine, "more", request(text(86, 5)))
    for _ in range(3):
        collect(engine.step(), answers)
    assert engine.adapters == (adapter.digest,)
    while answers.get("base", Answer()).reason is None:
        collect(engine.step(), answers)
    while engine.num_running == 0:
        collect(engine.step(), answers)
    collect(engine.step(), answers)
    assert "it" in answers, "the slot was ready, and nobody overtakes without a reason"
    run(engine, answers)


def test_an_engine_with_nothing_else_to_do_waits_for_the_load(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1)
    SlowLoads(engine, 4)
    it = request(text(87, 5), adapter=made_adapter(decoder, 1))
    add(engine, "it", it)
    for _ in range(4):
        assert engine.step() == []
        assert engine.has_work
    assert run(engine)["it"].ids == ids_of(decoder, it)


def test_a_load_that_nobody_waits_for_any_more_is_no_work(load: Load) -> None:
    """Else the engine would spin until the image of the other request comes."""
    decoder = load()
    engine = engine_of(decoder, 1, overlap=False)
    SlowLoads(engine, 2)
    picture = request(PARTS[6], text(88, 3))
    add(engine, "image", picture, late=True)
    add(engine, "it", request(text(89, 3), adapter=made_adapter(decoder, 1)))
    engine.step()
    engine.abort("it")
    for _ in range(6):
        engine.step()
    assert not engine.has_work
    engine.supply("image", 0, picture.pictures[0].embeddings)
    assert run(engine)["image"].ids == ids_of(decoder, picture)


# Requests that end early, or begin again


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
@pytest.mark.parametrize("lag", [0, 4])
def test_an_aborted_request_gives_its_slot_back(steps: int, lag: int, load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1)
    SlowLoads(engine, lag)
    watch = Watch(engine)
    answers: dict[str, Answer] = {}
    add(engine, "gone", request(text(90, 5), adapter=made_adapter(decoder, 1), max_tokens=60))
    it = request(text(91, 5), adapter=made_adapter(decoder, 2))
    add(engine, "it", it)
    for _ in range(steps):
        collect(engine.step(), answers)
    engine.abort("gone")
    run(engine, answers)
    assert answers["gone"].reason is FinishReason.ABORT
    assert answers["it"].ids == ids_of(decoder, it)
    assert engine.adapters == ("sha256:2",)
    watch.check_idle()


def test_a_failed_step_gives_its_slots_back(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 1)
    watch = Watch(engine)
    picture = torch.full((2, 32), float("nan"), dtype=torch.float64)
    packed = engine.pack(made_adapter(decoder, 1))
    engine.add("bad", [1, VOCAB, VOCAB + 1], GREEDY, [picture], packed)
    it = request(text(92, 5), adapter=made_adapter(decoder, 2))
    add(engine, "it", it)
    answers = run(engine)
    assert answers["bad"].reason is FinishReason.ERROR
    assert answers["it"].ids == ids_of(decoder, it)
    watch.check_idle()


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_requests_find_their_adapter_again(overlap: bool, load: Load) -> None:
    decoder = load()
    adapters = [made_adapter(decoder, seed) for seed in range(3)]
    engine = engine_of(decoder, 2, cache=48, seqs=6, overlap=overlap, prefix_cache=False)
    watch = Watch(engine)
    requests = {
        f"{n}": request(text(100 + n, 5), adapter=[None, *adapters][n % 4], max_tokens=14)
        for n in range(12)
    }
    moved: dict[str, set[int]] = {name: set() for name in requests}
    answers: dict[str, Answer] = {}
    for name, it in requests.items():
        add(engine, name, it)
    while engine.has_work:
        collect(engine.step(), answers)
        for s in engine._scheduler.running:
            moved[s.request_id].add(s.slot)
    greedy = Greedy(decoder)
    assert {n: a.ids for n, a in answers.items()} == {
        n: greedy(it)[0] for n, it in requests.items()
    }
    assert engine.num_preemptions > 3
    watch.check_idle()


def test_nobody_holds_the_host_copy_when_the_request_has_ended(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 2)
    packed = engine.pack(made_adapter(decoder, 1))
    engine.add("a", [1, 2, 3], GREEDY, (), packed)
    held = weakref.ref(packed)
    del packed
    run(engine)
    gc.collect()
    assert held() is None
    assert engine.adapters == ("sha256:1",)


def test_one_adapter_packed_twice_takes_one_slot(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, 2)
    it = request(text(110, 6), adapter=made_adapter(decoder, 1))
    for name in "abc":
        add(engine, name, it)  # packs it anew
    answers = run(engine)
    assert [a.ids for a in answers.values()] == [ids_of(decoder, it)] * 3
    assert engine.adapter_stats.num_loads == 1
    assert sorted(a.num_cached for a in answers.values()) == [0, 4, 4]
