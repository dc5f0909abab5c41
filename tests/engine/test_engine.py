import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.traffic import (
    VOCAB,
    WIDTH,
    Answer,
    Picture,
    Request,
    Watch,
    add,
    answer_of,
    collect,
    picture,
    request,
    run,
    scaled,
    text,
)
from tests.reference.generate import dense_logits, greedy
from tests.reference.sampling import logprobs as reference_logprobs
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sampler import Sampler
from xc_ray.engine.sequence import (
    FinishReason,
    Image,
    SamplingParams,
    TokenLogprob,
)
from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.decoder import Decoder

Load = Callable[..., Decoder]
SIZE = 4  # of a block, unless a test says otherwise


def engine_of(
    decoder: Decoder,
    *,
    length: int = 200,
    cache: int = 400,
    seqs: int = 4,
    budget: int = 16,
    **options: Any,
) -> Engine:
    return Engine(
        decoder, EngineConfig(length, cache, seqs, budget, **{"block_size": SIZE} | options)
    )


def request_of(seed: int, *, pictures: int = 0, max_tokens: int = 8, length: int = 12) -> Request:
    """A random prompt with random pictures of one to nine rows somewhere in it."""
    rng = random.Random(seed)
    parts: list[list[int] | Picture] = [text(seed, rng.randint(1, length))]
    for number in range(pictures):
        parts.append(picture(100 * seed + number, rng.randint(1, 9)))
        parts.append(text(seed + number, rng.randint(0, length)))
    if rng.random() < 0.5 and pictures:
        parts = parts[1:]  # a picture comes first
    return request(*parts, max_tokens=max_tokens)


def expected(decoder: Decoder, it: Request) -> tuple[list[int], FinishReason]:
    ids, reason, _ = greedy(decoder, it.ids, it.params, it.rows)
    return ids, reason


def assert_is_dense(decoder: Decoder, it: Request, answer: Answer) -> None:
    assert (answer.ids, answer.reason) == expected(decoder, it)


def with_params(it: Request, **params: Any) -> Request:
    return replace(it, params=replace(it.params, **params))


# Greedy answers are those of the dense form; in company: tests/engine/test_engine_traffic.py


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_a_request_alone_is_answered_as_without_a_cache(
    variant: Variant, pictures: int, load: Load
) -> None:
    decoder = load(variant)
    for seed in range(3):
        it = request_of(seed, pictures=pictures)
        assert_is_dense(decoder, it, answer_of(engine_of(decoder), it))


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_a_prompt_in_chunks_is_answered_as_the_whole(
    budget: int, block_size: int, load: Load
) -> None:
    it = request_of(2, pictures=2)
    engine = engine_of(load(), budget=budget, block_size=block_size)
    assert_is_dense(load(), it, answer_of(engine, it))


def test_a_request_that_takes_anothers_place_finds_nothing_of_it(load: Load) -> None:
    engine = engine_of(load(), length=60, cache=60, seqs=1)
    for seed in range(4):
        it = request_of(seed, pictures=seed % 2)
        add(engine, "other", request_of(seed + 50))
        add(engine, "one", it)
        assert_is_dense(load(), it, run(engine)["one"])


def test_penalties_do_not_fall_on_what_an_earlier_request_generated(load: Load) -> None:
    it = with_params(request_of(1), repetition_penalty=1e4, logit_bias=((7, 100.0),))
    engine = engine_of(load(), seqs=1)
    for _ in range(2):
        answer = answer_of(engine, it)
        assert (answer.ids[0], answer.ids.count(7)) == (7, 1)


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(load: Load) -> None:
    """With overlap a request's first token comes a step later, and all else is as without."""
    it = request_of(1, max_tokens=4)
    came = {}
    for overlap in (False, True):
        engine = engine_of(load(), overlap=overlap)
        add(engine, "one", it)
        came[overlap] = [[i for o in engine.step() for i in o.ids] for _ in range(6)]
    assert came[False] == [*([i] for i in expected(load(), it)[0]), [], []]
    assert came[True] == [[], *came[False][:5]]


# What is shared


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_further_turn_needs_no_prefill_of_what_was_said(prefix_cache: bool, load: Load) -> None:
    engine = engine_of(load(), prefix_cache=prefix_cache)
    it = request_of(3, max_tokens=9)
    first = answer_of(engine, it)
    further = replace(it, ids=[*it.ids, *first.ids, *text(0, 5)])
    answer = answer_of(engine, further)
    assert_is_dense(load(), further, answer)
    # The answer's last token has no keys and values, unless a step was launched in vain.
    computed = len(it.ids) + len(first.ids) - 1
    assert answer.num_cached == (computed // SIZE * SIZE if prefix_cache else 0)
    assert all(o.num_cached == answer.num_cached for o in answer.outputs)


def test_a_prompt_known_to_its_last_token_computes_that_one_alone(load: Load) -> None:
    engine = engine_of(load())
    it = request(text(1, 12), max_tokens=3)
    assert answer_of(engine, it).num_cached == 0
    answer = answer_of(engine, it)
    assert answer.num_cached == 8  # 12 would leave nothing to compute
    longer = request([*it.ids, 5], max_tokens=3)
    answer = answer_of(engine, longer)
    assert answer.num_cached == 12
    assert_is_dense(load(), longer, answer)


RED, BLUE, ANONYMOUS = (picture(seed, 6, d) for seed, d in ((1, b"red"), (2, b"blue"), (3, b"")))


@pytest.mark.parametrize(
    ("second", "cached"),
    [
        (request(text(0, 5), RED, text(1, 9)), 16),
        (request(text(0, 5), RED, text(2, 9)), 8),
        (request(text(0, 5), BLUE, text(1, 9)), 4),  # as large, and another
        (request(text(0, 5), ANONYMOUS, text(1, 9)), 4),
        (request(text(0, 5), replace(RED, digest=b""), text(1, 9)), 4),
        (request(text(1, 5), RED, text(1, 9)), 0),
    ],
)
def test_images_are_shared_by_digest(second: Request, cached: int, load: Load) -> None:
    engine = engine_of(load())
    answer_of(engine, request(text(0, 5), RED, text(1, 9)))
    answer = answer_of(engine, second)
    assert answer.num_cached == cached
    assert_is_dense(load(), second, answer)


def test_a_salt_parts_what_is_shared(load: Load) -> None:
    engine = engine_of(load())
    it = request(text(0, 9), RED, text(1, 9))
    found = []
    for number, salt in enumerate((b"", b"one", b"two", b"one", b"")):
        engine.add(f"{number}", it.ids, it.params, it.images(), salt=salt)
        found.append(run(engine)[f"{number}"])
    assert [answer.num_cached for answer in found] == [0, 0, 0, 20, 20]
    for answer in found:
        assert_is_dense(load(), it, answer)


def test_an_image_without_a_digest_is_never_shared(load: Load) -> None:
    engine = engine_of(load())
    it = request(text(0, 5), ANONYMOUS, text(1, 9))
    assert [answer_of(engine, it).num_cached for _ in range(2)] == [0, 4]
    engine.add("tensor", it.ids, it.params, [ANONYMOUS.embeddings])
    answer = run(engine)["tensor"]
    assert answer.num_cached == 4
    assert_is_dense(load(), it, answer)


# The length that scales the rope


@pytest.mark.parametrize("budget", [4, 64])
def test_rope_is_scaled_by_prompt_and_max_tokens_from_the_first_token_on(
    budget: int, load: Load
) -> None:
    decoder = scaled(load(), limit=20)
    it = request_of(3, pictures=2, max_tokens=12)
    assert len(it.ids) + 12 > 20
    assert_is_dense(decoder, it, answer_of(engine_of(decoder, budget=budget), it))


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        (8, 8, 12),
        (9, 9, 12),
        (9, 10, 0),  # past the limit each length has its own base
        (3, 6, 12),  # below it there is one
        (6, 9, 0),
        (9, 6, 0),
    ],
)
def test_past_the_position_limit_only_requests_of_one_length_share(
    first: int, second: int, cached: int, load: Load
) -> None:
    decoder = scaled(load(), limit=20)
    engine = engine_of(decoder)
    prompt = text(1, 13)
    answer_of(engine, request(prompt, max_tokens=first))
    it = request(prompt, max_tokens=second)
    answer = answer_of(engine, it)
    assert answer.num_cached == cached
    assert_is_dense(decoder, it, answer)


# How an answer ends


def test_an_answer_ends_at_max_tokens_with_length(load: Load) -> None:
    answer = answer_of(engine_of(load()), request_of(1, max_tokens=5))
    assert len(answer.ids) == 5
    assert [o.num_generated for o in answer.outputs] == [1, 2, 3, 4, 5]
    assert [o.finish_reason for o in answer.outputs] == [None] * 4 + [FinishReason.LENGTH]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_an_answer_ends_at_a_stop_id_which_is_counted_and_not_given_out(
    place: int, load: Load
) -> None:
    it = request_of(1, max_tokens=5)
    whole, _ = expected(load(), it)
    assert len(set(whole)) == 5
    stop = frozenset({whole[place], 1023})
    answer = answer_of(engine_of(load()), with_params(it, stop_token_ids=stop, logprobs=0))
    assert answer.ids == whole[:place]
    last = answer.outputs[-1]
    assert (last.finish_reason, last.ids, last.logprobs) == (FinishReason.STOP, (), ())
    assert last.num_generated == place + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_no_stop_id_is_chosen_before_min_tokens(overlap: bool, load: Load) -> None:
    it = request_of(1, max_tokens=6)
    whole, _ = expected(load(), it)
    stop = frozenset({whole[1]})
    for least in range(5):
        engine = engine_of(load(), overlap=overlap)
        few = with_params(it, stop_token_ids=stop, min_tokens=least)
        answer = answer_of(engine, few)
        assert answer.ids[:1] == whole[:1]
        if least < 2:
            assert answer.ids == whole[:1]
        else:
            # The best of the others is taken, and what follows is what the model says behind it.
            second = dense_logits(load(), [*it.ids, whole[0]], None, len(it.ids) + 6)[-1]
            second = second.clone()
            second[whole[1]] = -torch.inf
            assert answer.ids[1] == int(second.argmax())
            assert len(answer.ids) >= least
            assert whole[1] not in answer.ids


@pytest.mark.parametrize("overlap", [False, True])
def test_a_cache_smaller_than_the_answer_ends_it_with_length(overlap: bool, load: Load) -> None:
    """The last token needs no room: a cache of 20 tokens ends a prompt of 13 after 8."""
    it = request_of(4, length=30, max_tokens=50)
    room = -(-len(it.ids) // SIZE) * SIZE + 8
    engine = engine_of(load(), cache=room, overlap=overlap)
    watch = Watch(engine)
    answer = answer_of(engine, it)
    assert answer.reason is FinishReason.LENGTH
    assert len(answer.ids) == room - len(it.ids) + 1
    assert answer.ids == expected(load(), it)[0][: len(answer.ids)]
    watch.check_idle()


def test_one_token_and_the_largest_request_fit_exactly(load: Load) -> None:
    engine = engine_of(load(), length=20, cache=20, seqs=1)
    assert len(answer_of(engine, request([5] * 19, max_tokens=1)).ids) == 1
    assert len(answer_of(engine, request([5], max_tokens=19)).ids) == 19


def test_a_bias_moves_the_choice_and_not_the_logprobs(load: Load) -> None:
    it = request_of(4, max_tokens=3)
    plain = answer_of(engine_of(load()), with_params(it, logprobs=5))
    biased = answer_of(engine_of(load()), with_params(it, logprobs=5, logit_bias=((7, 100.0),)))
    assert biased.ids == [7, 7, 7]
    first, second = (a.outputs[0].logprobs[0] for a in (plain, biased))
    assert first.top == second.top
    table = reference_logprobs(dense_logits(load(), it.ids, None, len(it.ids) + 3)[-1].tolist())
    assert second.logprob == pytest.approx(table[7])
    never = with_params(it, logit_bias=((plain.ids[0], -100.0),))
    assert answer_of(engine_of(load()), never).ids[0] == plain.outputs[0].logprobs[0].top[1][0]


def test_logprobs_are_the_dense_ones(load: Load) -> None:
    decoder, it = load(), request_of(4, pictures=1, max_tokens=3)
    answer = answer_of(engine_of(decoder), with_params(it, logprobs=2, presence_penalty=1.0))
    given = [p for o in answer.outputs for p in o.logprobs]
    assert len(given) == 3
    for i, logprob in enumerate(given):
        whole = dense_logits(decoder, it.ids + answer.ids[:i], it.rows, len(it.ids) + 3)
        table = reference_logprobs(whole[-1].tolist())
        assert isinstance(logprob, TokenLogprob)
        assert logprob.logprob == pytest.approx(table[answer.ids[i]])
        assert [p for _, p in logprob.top] == pytest.approx(sorted(table, reverse=True)[:2])


def test_each_request_of_a_step_gets_as_many_logprobs_as_it_asked_for(load: Load) -> None:
    engine = engine_of(load(), budget=100)
    wishes = {"a": None, "b": 0, "c": 20, "d": 3}
    for name, wish in wishes.items():
        add(engine, name, with_params(request_of(len(name), max_tokens=2), logprobs=wish))
    for name, answer in run(engine).items():
        wish = wishes[name]
        for output in answer.outputs:
            assert [len(p.top) for p in output.logprobs] == ([] if wish is None else [wish])


def test_a_drawn_answer_depends_on_its_seed_alone(load: Load) -> None:
    engine = engine_of(load(), seqs=8)
    it = request_of(1, max_tokens=8)
    hot = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.95, seed=11)
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        add(engine, name, replace(it, params=replace(hot, seed=seed)))
    add(engine, "greedy", it)
    together = run(engine)
    assert together["a"].ids == together["b"].ids != together["c"].ids
    assert answer_of(engine, replace(it, params=hot)).ids == together["a"].ids
    assert together["greedy"].ids == expected(load(), it)[0]


def test_each_token_is_drawn_for_its_own_place_in_the_sequence(load: Load) -> None:
    decoder, it = load(), request_of(1, pictures=1)
    hot = SamplingParams(max_tokens=8, temperature=3.0, seed=11)
    answer = answer_of(engine_of(decoder), replace(it, params=hot))
    sampler = Sampler(1, VOCAB, decoder.device)
    sampler.set_lanes([(0, hot, [])])
    ids = list(it.ids)
    for token in answer.ids:
        logits = dense_logits(decoder, ids, it.rows, len(it.ids) + 8)
        chosen = sampler.choose(logits[-1:], torch.tensor([0]), torch.tensor([len(ids)]))
        assert chosen.tolist() == [token]
        ids.append(token)
    assert len(answer.ids) == 8


# Embeddings that come late


def wait_for(engine: Engine, answers: dict[str, Answer]) -> list[tuple[str, int]]:
    """Steps until there is nothing to do; the images asked for meanwhile."""
    before = {name: len(a.asked) for name, a in answers.items()}
    run(engine, answers)
    return [(name, i) for name, a in answers.items() for i in a.asked[before.get(name, 0) :]]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_request_waits_for_its_images_and_the_engine_has_no_work_meanwhile(
    overlap: bool, order: list[int], load: Load
) -> None:
    engine = engine_of(load(), budget=3, overlap=overlap)
    watch = Watch(engine)
    it = request(RED, text(0, 7), BLUE, text(1, 2), max_tokens=5)
    add(engine, "one", it, late=True)
    answers: dict[str, Answer] = {}
    assert wait_for(engine, answers) == [("one", 0), ("one", 1)]
    assert engine.num_running == 1
    assert not engine.has_work
    steps = watch.num_steps
    engine.step()
    assert watch.num_steps == steps + 1  # allowed, and without effect
    assert not engine.has_work
    for index in order:
        engine.supply("one", index, it.pictures[index].embeddings)
        assert engine.has_work
        assert wait_for(engine, answers) == []
    assert_is_dense(load(), it, answers["one"])
    watch.check_idle()


def test_a_request_that_waits_for_an_image_holds_up_no_other(load: Load) -> None:
    engine = engine_of(load(), budget=4)
    first, second = request(text(3, 6), RED, text(0, 3)), request_of(5)
    add(engine, "waits", first, late=True)
    answers: dict[str, Answer] = {}
    assert wait_for(engine, answers) == [("waits", 0)]
    add(engine, "other", second)
    assert wait_for(engine, answers) == []
    assert_is_dense(load(), second, answers["other"])
    engine.supply("waits", 0, RED.embeddings)
    run(engine, answers)
    assert_is_dense(load(), first, answers["waits"])


def test_an_image_that_the_cache_covers_is_not_asked_for(load: Load) -> None:
    engine = engine_of(load())
    it = request(text(0, 5), RED, text(1, 9))
    answer_of(engine, it)
    add(engine, "again", it, late=True)
    answer = run(engine)["again"]
    assert answer.asked == []
    assert_is_dense(load(), it, answer)
    # Its rows end in the third block: of the second image's rows none is covered.
    add(engine, "more", longer := request(text(0, 5), RED, BLUE, text(1, 9)), late=True)
    answers: dict[str, Answer] = {}
    assert wait_for(engine, answers) == [("more", 0), ("more", 1)]
    for index in range(2):
        engine.supply("more", index, longer.pictures[index].embeddings)
    run(engine, answers)
    assert_is_dense(load(), longer, answers["more"])


def test_rows_that_were_covered_and_are_evicted_are_asked_for_when_they_are_needed(
    load: Load,
) -> None:
    """Covered at arrival; by the time that the request starts, another has taken their blocks."""
    engine = engine_of(load(), length=40, cache=40, seqs=1)
    it = request(text(0, 5), RED, text(1, 9), max_tokens=4)
    answer_of(engine, it)
    add(engine, "large", request(text(7, 30), max_tokens=10))
    answers: dict[str, Answer] = {}
    collect(engine.step(), answers)
    add(engine, "again", it, late=True)
    assert wait_for(engine, answers) == [("again", 0)]
    assert answers["large"].reason is FinishReason.LENGTH
    engine.supply("again", 0, RED.embeddings)
    run(engine, answers)
    assert_is_dense(load(), it, answers["again"])
    assert answers["again"].asked == [0]


def test_a_preempted_request_asks_anew_for_rows_that_were_covered(load: Load) -> None:
    """It shared its image's rows; they are gone when it comes back."""
    engine = engine_of(load(), length=60, cache=60, seqs=2)
    old = request(text(5, 9), max_tokens=50)
    it = request(RED, text(0, 3), max_tokens=30)
    answer_of(engine, replace(it, params=replace(it.params, max_tokens=1)))
    answers: dict[str, Answer] = {}
    add(engine, "old", old)
    collect(engine.step(), answers)
    add(engine, "young", it, late=True)
    assert wait_for(engine, answers) == [("young", 0)]
    assert engine.num_preemptions > 0
    assert answers["young"].ids  # it had begun without the embeddings
    engine.supply("young", 0, RED.embeddings)
    run(engine, answers)
    for name, one in (("old", old), ("young", it)):
        assert_is_dense(load(), one, answers[name])


def test_embeddings_that_came_late_are_let_go_once_computed_and_asked_for_again(
    load: Load,
) -> None:
    """They are many bytes; a preempted request whose rows were evicted needs them again."""
    engine = engine_of(load(), length=60, cache=60, seqs=2, budget=4)
    old, it = request(text(5, 9), max_tokens=50), request(RED, text(0, 3), max_tokens=30)
    answers: dict[str, Answer] = {}
    add(engine, "old", old)
    for _ in range(6):
        collect(engine.step(), answers)
    add(engine, "young", it, late=True)
    collect(engine.step(), answers)
    assert answers["young"].asked == [0]
    engine.supply("young", 0, RED.embeddings)
    image = engine._sequences["young"].images[0]
    held = []
    for _ in range(4):
        collect(engine.step(), answers)
        held.append(image.embeddings is not None)
    assert held == [True, False, False, False]  # six rows of four tokens a step
    assert wait_for(engine, answers) == [("young", 0)]
    assert engine.num_preemptions > 0
    assert answers["young"].ids
    engine.supply("young", 0, RED.embeddings)
    assert wait_for(engine, answers) == []
    for name, one in (("old", old), ("young", it)):
        assert_is_dense(load(), one, answers[name])


def test_who_begins_alike_waits_for_the_one_that_computes(load: Load) -> None:
    engine = engine_of(load(), budget=8)
    it = request(text(8, 41), max_tokens=3)
    for name in "ab":
        add(engine, name, it)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    answers = run(engine)
    assert [answers[n].num_cached for n in "ab"] == [0, 40]
    for name in "ab":
        assert_is_dense(load(), it, answers[name])


@pytest.mark.parametrize("overlap", [False, True])
def test_who_begins_alike_waits_until_an_images_numbers_are_checked(
    overlap: bool, load: Load
) -> None:
    """With overlap a step passes until then, though the first waits for another image by now."""
    engine = engine_of(load(), budget=64, overlap=overlap)
    first = request(text(0, 5), RED, text(1, 3), BLUE, max_tokens=6)
    second = request(text(0, 5), RED, text(1, 3), text(2, 4), max_tokens=6)
    engine.add("first", first.ids, first.params, [RED.image(), BLUE.image(late=True)])
    answers: dict[str, Answer] = {}
    collect(engine.step(), answers)
    add(engine, "second", second)
    wait_for(engine, answers)
    assert answers["second"].num_cached == 12
    assert_is_dense(load(), second, answers["second"])
    engine.supply("first", 1, BLUE.embeddings)
    run(engine, answers)
    assert_is_dense(load(), first, answers["first"])


def test_who_begins_alike_does_not_wait_for_one_that_waits_for_an_image(load: Load) -> None:
    engine = engine_of(load(), budget=8)
    it = request(text(8, 9), RED, text(0, 9), max_tokens=3)
    answers: dict[str, Answer] = {}
    add(engine, "first", it, late=True)
    wait_for(engine, answers)
    add(engine, "second", it)
    wait_for(engine, answers)
    assert_is_dense(load(), it, answers["second"])
    engine.supply("first", 0, RED.embeddings)
    run(engine, answers)
    assert_is_dense(load(), it, answers["first"])


def test_images_given_to_several_requests_are_each_ones_own(load: Load) -> None:
    """The end of one takes nothing from the others, though all were given the same objects."""
    engine = engine_of(load())
    one = request(text(0, 3), ANONYMOUS, max_tokens=1)
    images = one.images()
    for name, tokens in (("short", 1), ("long", 6), ("longer", 9)):
        engine.add(name, one.ids, replace(one.params, max_tokens=tokens), images)
    answers = run(engine)
    assert [len(a.ids) for a in answers.values()] == [1, 6, 9]
    assert images[0].embeddings is ANONYMOUS.embeddings
    late = ANONYMOUS.image(late=True)
    for name in "ab":
        engine.add(name, one.ids, one.params, [late])
    assert wait_for(engine, answers) == [("a", 0), ("b", 0)]
    engine.supply("a", 0, ANONYMOUS.embeddings)
    assert wait_for(engine, answers) == []
    assert answers["a"].reason is FinishReason.LENGTH
    assert answers["b"].reason is None


def test_embeddings_for_a_request_that_has_ended_are_left_alone(load: Load) -> None:
    engine = engine_of(load())
    it = request(RED, max_tokens=1)
    engine.supply("unknown", 0, RED.embeddings)
    assert not engine.has_work
    add(engine, "one", it, late=True)
    engine.step()
    engine.supply("one", 0, RED.embeddings)  # on its way when the request ends
    engine.abort("one")
    assert run(engine)["one"].reason is FinishReason.ABORT
    engine.supply("one", 5, RED.embeddings)
    assert not engine.has_work


def test_embeddings_that_do_not_fit_are_refused(load: Load) -> None:
    engine = engine_of(load())
    it = request(RED, max_tokens=1)
    add(engine, "one", it, late=True)
    for index in (1, -1):
        with pytest.raises(InvalidRequest, match=f"has 1 images, not one at {index}"):
            engine.supply("one", index, RED.embeddings)
    with pytest.raises(InvalidRequest, match=r"have shape \(5, 32\), expected \(6, 32\)"):
        engine.supply("one", 0, RED.embeddings[:5])


# Requests whose numbers are not sound


def poisoned(it: Picture, value: float = float("nan")) -> Picture:
    embeddings = it.embeddings.clone()
    embeddings[3, 5] = value
    return replace(it, embeddings=embeddings)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("budget", [2, 64])
def test_an_image_with_nan_ends_its_request_alone(
    overlap: bool, value: float, budget: int, load: Load
) -> None:
    """The others get what they get beside a sound request of that shape, to the last bit."""
    others = {str(i): with_params(request_of(i, pictures=i % 2), logprobs=2) for i in range(3)}
    came: dict[bool, dict[str, Answer]] = {}
    for sound in (True, False):
        image = RED if sound else poisoned(RED, value)
        engine = engine_of(load(), budget=budget, overlap=overlap)
        watch = Watch(engine)
        for name, it in others.items():
            add(engine, name, it)
        # Of one token, so that the sound one takes part in no more steps than the other.
        add(engine, "odd", request(text(0, 3), image, max_tokens=1))
        came[sound] = run(engine)
        watch.check_idle()
    odd = came[False].pop("odd")
    assert (odd.ids, odd.reason) == ([], FinishReason.ERROR)
    assert odd.outputs[-1].error == "the embeddings of an image hold NaN or infinity"
    assert came[True].pop("odd").reason is FinishReason.LENGTH
    if budget == 64:
        assert came[False] == came[True]
    for name, it in others.items():
        assert_is_dense(load(), it, came[False][name])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [2, 5, 64])
@pytest.mark.parametrize("behind", range(7))
@pytest.mark.parametrize("late", [False, True])
def test_nobody_shares_what_was_computed_from_nan(
    overlap: bool, budget: int, behind: int, late: bool, load: Load
) -> None:
    """A twin comes so many steps behind, with sound embeddings under the same digest."""
    engine = engine_of(load(), budget=budget, overlap=overlap)
    watch = Watch(engine)
    it = request(text(0, 3), RED, text(1, 6), max_tokens=5)
    add(engine, "odd", request(text(0, 3), poisoned(RED), text(1, 6), max_tokens=5))
    answers: dict[str, Answer] = {}
    for _ in range(behind):
        collect(engine.step(), answers)
    add(engine, "twin", it, late=late)
    for name, index in wait_for(engine, answers):
        engine.supply(name, index, RED.embeddings)
    run(engine, answers)
    assert answers["odd"].reason is FinishReason.ERROR
    assert_is_dense(load(), it, answers["twin"])
    watch.check_idle()


def test_nobody_shares_what_a_preempted_request_computed_from_nan(load: Load) -> None:
    """Its flag is read a step after the launch; it has given its blocks up by then."""
    # The first block has room for four tokens of the old one; its fifth preempts the young one,
    # whose chunk with the image was launched in the step before.
    for wait in range(1, 9):
        engine = engine_of(load(), length=40, cache=24, seqs=2, budget=64)
        watch = Watch(engine)
        it = request(RED, text(1, 3), max_tokens=2)
        answers: dict[str, Answer] = {}
        add(engine, "old", old := request(text(2, 9), max_tokens=12))
        for _ in range(wait):
            collect(engine.step(), answers)
        add(engine, "odd", request(poisoned(RED), text(1, 3), max_tokens=9))
        run(engine, answers)
        assert answers["odd"].reason is FinishReason.ERROR
        answer = answer_of(engine, it)
        assert answer.num_cached == 0
        assert_is_dense(load(), it, answer)
        assert_is_dense(load(), old, answers["old"])
        watch.check_idle()


def test_what_nan_left_in_a_block_reaches_nobody(load: Load) -> None:
    """The next owner of the block decodes in it, with the rest of it as it was."""
    engine = engine_of(load(), length=32, cache=32, seqs=1, block_size=16)
    odd = request(*[poisoned(picture(n, 7)) for n in range(3)], max_tokens=3)
    assert answer_of(engine, odd).reason is FinishReason.ERROR
    it = request(text(0, 2), max_tokens=6)
    assert_is_dense(load(), it, answer_of(engine, it))


def test_logits_that_are_nan_end_their_request_alone(load: Load) -> None:
    engine = engine_of(load(), budget=64)
    watch = Watch(engine)
    first, second = request(text(0, 9), max_tokens=8), request(text(1, 9), max_tokens=8)
    for name, it in (("odd", first), ("other", second)):
        add(engine, name, it)
    answers: dict[str, Answer] = {}
    for _ in range(3):
        collect(engine.step(), answers)
    [odd, _] = engine._scheduler.running
    engine._runner.cache.keys[0, odd.blocks[1]] = float("nan")
    run(engine, answers)
    assert answers["odd"].reason is FinishReason.ERROR
    assert answers["odd"].outputs[-1].error == "the logits hold NaN or infinity"
    assert answers["odd"].ids == expected(load(), first)[0][: len(answers["odd"].ids)]
    assert_is_dense(load(), second, answers["other"])
    again = answer_of(engine, first)
    assert again.num_cached == 0
    assert_is_dense(load(), first, again)
    watch.check_idle()


# Steps that fail


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(
    overlap: bool, steps: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(load(), seqs=2, budget=8, overlap=overlap)
    watch = Watch(engine)
    requests = {str(i): request_of(i, pictures=i % 2, max_tokens=9) for i in range(3)}
    answers: dict[str, Answer] = {}
    for name, it in requests.items():
        add(engine, name, it)
    for _ in range(steps):
        collect(engine.step(), answers)

    def fail(*_: object) -> Tensor:
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.decoder, "forward", fail)
    collect(engine.step(), answers)
    failed = [name for name, a in answers.items() if a.reason is FinishReason.ERROR]
    assert failed
    assert engine.failure == "the step failed: RuntimeError: out of memory"
    assert {answers[name].outputs[-1].error for name in failed} == {engine.failure}
    run(engine, answers)
    for name, it in requests.items():
        if name in failed:
            assert answers[name].ids == expected(load(), it)[0][: len(answers[name].ids)]
        else:
            assert_is_dense(load(), it, answers[name])
    watch.check_idle()
    for it in requests.values():  # nothing of the failed step is shared
        assert_is_dense(load(), it, answer_of(engine, it))
    watch.check_idle()


def test_who_shares_what_a_failed_step_should_have_computed_ends_with_it(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fills its block, and so names it, in the step where the second starts."""
    engine = engine_of(load(), overlap=False, budget=64)
    watch = Watch(engine)
    it = request(text(0, 5), max_tokens=9)
    ids, _ = expected(load(), it)
    answers: dict[str, Answer] = {}
    add(engine, "first", it)
    for _ in range(3):
        collect(engine.step(), answers)
    # Shares two blocks, and then waits for its image, with no part in the step.
    twin = request([*it.ids, *ids[:3]], RED, text(4, 2), max_tokens=3)
    add(engine, "second", twin, late=True)

    def fail(*_: object) -> Tensor:
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.decoder, "forward", fail)
    collect(engine.step(), answers)
    if answers["second"].reason is None:
        engine.supply("second", 0, RED.embeddings)
        run(engine, answers)
        assert_is_dense(load(), twin, answers["second"])
    run(engine, answers)
    watch.check_idle()
    assert_is_dense(load(), twin, answer_of(engine, twin))


def test_a_step_that_fails_before_it_gives_lanes_ends_who_started_with_it(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(load(), budget=64)
    watch = Watch(engine)

    def fail(*_: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._runner, "start", fail)
    add(engine, "one", it := request(RED, text(0, 3), max_tokens=3), late=True)
    answers: dict[str, Answer] = {}
    run(engine, answers)
    assert answers["one"].reason is FinishReason.ERROR
    assert_is_dense(load(), it, answer_of(engine, it))
    watch.check_idle()


# Ending a request early


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
def test_an_aborted_request_ends_and_frees_its_room_within_a_step(
    steps: int, overlap: bool, load: Load
) -> None:
    engine = engine_of(load(), seqs=1, budget=10, overlap=overlap)
    watch = Watch(engine)
    it = request_of(7, pictures=2, length=20)
    assert len(it.ids) > 20
    add(engine, "gone", it)
    answers: dict[str, Answer] = {}
    for _ in range(steps):
        collect(engine.step(), answers)
    engine.abort("gone")
    collect(engine.step(), answers)
    assert answers["gone"].reason is FinishReason.ABORT
    assert answers["gone"].outputs[-1].num_generated == len(answers["gone"].ids)
    assert (engine.num_running, engine.num_waiting, engine.kv_usage) == (0, 0, 0)
    kept = request_of(1)
    assert_is_dense(load(), kept, answer_of(engine, kept))
    watch.check_idle()


def test_a_waiting_request_can_be_aborted(load: Load) -> None:
    engine = engine_of(load(), seqs=1)
    add(engine, "running", request_of(1))
    add(engine, "waiting", request_of(2))
    engine.step()
    engine.abort("waiting")
    answers = run(engine)
    assert answers["waiting"].reason is FinishReason.ABORT
    assert answers["waiting"].ids == []
    assert answers["running"].reason is FinishReason.LENGTH


def test_a_request_that_waits_for_an_image_can_be_aborted(load: Load) -> None:
    engine = engine_of(load())
    watch = Watch(engine)
    add(engine, "one", request(text(0, 9), RED), late=True)
    answers: dict[str, Answer] = {}
    wait_for(engine, answers)
    assert engine.kv_usage > 0
    engine.abort("one")
    assert engine.has_work
    run(engine, answers)
    assert answers["one"].reason is FinishReason.ABORT
    watch.check_idle()


def test_aborting_what_is_unknown_or_finished_does_nothing(load: Load) -> None:
    engine = engine_of(load())
    engine.abort("unknown")
    assert engine.step() == []
    assert not engine.has_work
    answer_of(engine, request_of(1))
    engine.abort("one")
    assert engine.step() == []


# What is refused


@pytest.mark.parametrize(
    ("ids", "pictures", "message"),
    [
        ([], [], "the prompt has no tokens"),
        ([-1, 5], [], "the prompt holds the id -1; ids are 0 or more"),
        ([1, 1024], [], "the prompt has 1 image positions and the pictures 0 rows"),
        ([1], [2], "the prompt has 0 image positions and the pictures 2 rows"),
        ([1024, 1025, 1], [2, 1], "the prompt has 2 image positions and the pictures 3 rows"),
        ([1025, 1024, 1], [2], "they must match in number and order"),
        ([1024, 1026, 1], [2], "they must match in number and order"),
        ([1024, 5, 1025], [2], "the rows of a picture do not stand together in the prompt"),
        ([1, 2], [0], "an image has 0 rows, the least is 1"),
    ],
)
def test_a_prompt_that_cannot_be_right_is_refused(
    ids: list[int], pictures: list[int], message: str, load: Load
) -> None:
    engine = engine_of(load())
    for late in (False, True):
        images = [Image(n, embeddings=None if late else torch.zeros(n, WIDTH)) for n in pictures]
        with pytest.raises(InvalidRequest) as caught:
            engine.add("one", ids, SamplingParams(max_tokens=1), images)
        assert message in caught.value.message
    assert not engine.has_work


def test_a_prompt_that_is_too_long_is_told_all_the_numbers(load: Load) -> None:
    engine = engine_of(load(), length=2000, cache=4000)
    with pytest.raises(PromptTooLong) as caught:
        engine.add("one", [1] * 1500, SamplingParams(max_tokens=501))
    assert caught.value.message == (
        "the prompt takes 1,500 tokens and max_tokens is 501, together 2,001; the model holds 2,000"
    )
    assert caught.value.code == "context_length_exceeded"
    engine.add("one", [1] * 1500, SamplingParams(max_tokens=500))


def test_a_prompt_that_never_fits_the_cache_is_refused(load: Load) -> None:
    engine = engine_of(load(), length=2000, cache=1198)
    with pytest.raises(PromptTooLong) as caught:
        engine.add("one", [1] * 1201, SamplingParams(max_tokens=1))
    assert caught.value.message == (
        "the prompt takes 1,201 tokens and the key/value cache holds 1,200; "
        "give the decoder more memory"
    )
    assert caught.value.code == "context_length_exceeded"
    answer = answer_of(engine, request([1] * 1200, max_tokens=2))
    assert (len(answer.ids), answer.reason) == (1, FinishReason.LENGTH)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_bias_on_an_id_that_is_not_there_is_refused(token: int, load: Load) -> None:
    with pytest.raises(InvalidRequest) as caught:
        add(engine_of(load()), "one", request([1], logit_bias=((token, 1.0),)))
    assert caught.value.message == f"logit_bias names the id {token}; ids are 0 to 1,023"
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 32), (2,)])
def test_embeddings_of_another_width_are_refused_before_they_can_stop_a_step(
    shape: tuple[int, ...], load: Load
) -> None:
    engine = engine_of(load())
    with pytest.raises(InvalidRequest, match="embeddings"):
        engine.add("one", [1, 1024, 1025], SamplingParams(max_tokens=2), [torch.zeros(shape)])
    assert not engine.has_work


def test_a_request_id_in_use_is_refused_and_nobody_else_notices(load: Load) -> None:
    engine = engine_of(load())
    it = request_of(1)
    add(engine, "one", it)
    with pytest.raises(InvalidRequest, match="request id 'one' is in use"):
        engine.add("one", [1, 2], it.params)
    answers = run(engine)
    assert_is_dense(load(), it, answers["one"])
    assert answer_of(engine, it).ids == answers["one"].ids  # free again


# Counters


def test_usage_counts_the_blocks_that_running_requests_hold(load: Load) -> None:
    engine = engine_of(load(), length=50, cache=80, seqs=2, overlap=False)
    for name in range(3):
        add(engine, str(name), request(text(name, 7), max_tokens=15))
    assert (engine.num_running, engine.num_waiting, engine.kv_usage) == (0, 3, 0)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    assert engine.kv_usage == pytest.approx(4 / 20)
    engine.step()  # of each the eighth token: both blocks are full
    assert engine.kv_usage == pytest.approx(4 / 20)
    engine.step()
    assert engine.kv_usage == pytest.approx(6 / 20)
    while engine.has_work:
        engine.step()
    assert (engine.num_running, engine.num_waiting, engine.kv_usage) == (0, 0, 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_tokens_are_counted_as_they_wait_and_once_they_are_computed(
    load: Load, overlap: bool
) -> None:
    engine = engine_of(load(), seqs=2, budget=16, overlap=overlap)
    for name, length in enumerate((20, 10, 5)):
        add(engine, str(name), request(text(name, length), max_tokens=3))
    engine.step()
    assert engine.waiting_prompt_tokens == 35 - 16
    assert engine.num_prefilled == (0 if overlap else 16)  # not read yet
    while engine.has_work:
        engine.step()
    assert (engine.waiting_prompt_tokens, engine.num_prefilled) == (0, 35)


def test_prompt_tokens_wait_up_to_the_first_picture_that_is_missing(load: Load) -> None:
    engine = engine_of(load(), overlap=False)
    it = request(text(1, 5), picture(1, 6), text(2, 7), max_tokens=3)
    engine.add("one", it.ids, it.params, [Image(6, b"digest")])
    engine._take_in()
    assert engine.waiting_prompt_tokens == 5
    engine.step()
    assert (engine.waiting_prompt_tokens, engine.num_prefilled) == (0, 5)
    engine.supply("one", 0, torch.zeros(6, WIDTH))
    engine._take_in()
    assert engine.waiting_prompt_tokens == 13
    engine.step()
    assert (engine.waiting_prompt_tokens, engine.num_prefilled) == (0, 18)


def test_preemptions_are_counted(load: Load) -> None:
    engine = engine_of(load(), length=40, cache=40)
    for name in range(2):
        add(engine, str(name), request(text(name, 8), max_tokens=28))
    assert engine.num_preemptions == 0
    run(engine)
    assert engine.num_preemptions == 1


def test_an_abort_does_not_count_as_a_request_that_waits(load: Load) -> None:
    engine = engine_of(load())
    engine.add("one", [1], SamplingParams(max_tokens=1))
    engine.abort("another")
    assert engine.num_waiting == 1


def test_an_engine_without_work_does_nothing(load: Load) -> None:
    engine = engine_of(load())
    assert not engine.has_work
    assert engine.step() == []


# The 8-bit cache


@pytest.mark.parametrize("budget", [5, 64])
def test_an_8_bit_cache_moves_no_log_probability_by_more_than_a_fifth(
    budget: int, load: Load
) -> None:
    """Rounding keys and values to four digits of two moves these tiny models' scores by less."""
    decoder = load()
    worst = 0.0
    for seed in range(12):
        it = with_params(request_of(seed, pictures=seed % 3, max_tokens=10), logprobs=20)
        answers = [
            answer_of(engine_of(decoder, budget=budget, kv_cache_dtype=dtype), it)
            for dtype in ("auto", "fp8")
        ]
        for exact, rounded in zip(*(a.outputs for a in answers), strict=True):
            one, other = (dict(o.logprobs[0].top) for o in (exact, rounded))
            both = one.keys() & other.keys()
            assert len(both) >= 12
            worst = max(worst, *(abs(one[i] - other[i]) for i in both))
            if exact.ids != rounded.ids:
                break  # from here on the two say different things
    assert 1e-6 < worst < 0.2


# Threads


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
def test_requests_come_and_go_from_other_threads_while_steps_run(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, length=60, cache=180, seqs=5, budget=8)
    workers, each = 4, 12
    requests = {
        f"{w}.{i}": request_of(i, pictures=i % 2, max_tokens=30 if i % 3 == 0 else 6, length=6)
        for w in range(workers)
        for i in range(each)
    }
    dropped = {name for name in requests if int(name.split(".")[1]) % 3 == 0}

    def come_and_go(worker: int) -> None:
        rng = random.Random(worker)
        for i in range(each):
            name = f"{worker}.{i}"
            add(engine, name, requests[name])
            time.sleep(rng.random() * 0.002)
            if name in dropped:
                engine.abort(name)

    threads = [threading.Thread(target=come_and_go, args=(w,)) for w in range(workers)]
    answers: dict[str, Answer] = {}
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        collect(engine.step(), answers)
    run(engine, answers)
    assert answers.keys() == requests.keys()
    dense = [expected(decoder, requests[f"0.{i}"]) for i in range(each)]
    for name, answer in answers.items():
        ids, reason = dense[int(name.split(".")[1])]
        if name in dropped and answer.reason is FinishReason.ABORT:
            assert answer.ids == ids[: len(answer.ids)]
        else:
            assert (answer.ids, answer.reason) == (ids, reason)
    assert engine.kv_usage == 0


@pytest.mark.usefixtures("quick_switches")
def test_an_abort_that_follows_its_request_at_once_is_never_lost(load: Load) -> None:
    """Whatever of the two a step has looked for already; a lost one shows as an endless answer."""
    engine = engine_of(load(), length=400, cache=4000, seqs=10, budget=100)
    endless = SamplingParams(max_tokens=390, temperature=0)
    workers, each = 4, 1000

    def come_and_go(worker: int) -> None:
        for i in range(each):
            engine.add(f"{worker}.{i}", [1, 2, 3], endless)
            engine.abort(f"{worker}.{i}")

    threads = [threading.Thread(target=come_and_go, args=(w,)) for w in range(workers)]
    answers: dict[str, Answer] = {}
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        collect(engine.step(), answers)
    collect(engine.step(), answers)
    assert len(answers) == workers * each
    assert {answer.reason for answer in answers.values()} == {FinishReason.ABORT}
    assert not engine.has_work
