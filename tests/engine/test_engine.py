import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference.generate import dense_logits, greedy
from tests.reference.sampling import logprobs as reference_logprobs
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sampler import Sampler
from xc_ray.engine.sequence import FinishReason, SamplingParams, StepOutput, TokenLogprob
from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.config import FAMILIES, DecoderConfig, Variant
from xc_ray.model.decoder import Decoder
from xc_ray.model.weights import Checkpoint

VOCAB, WIDTH = 1024, 32
Load = Callable[..., Decoder]


@pytest.fixture(scope="module")
def load(tiny: Callable[[Variant], Path]) -> Load:
    """A function that gives a variant's decoder, in float64 unless told."""
    made: dict[tuple[Variant, torch.dtype], Decoder] = {}

    def decoder(variant: Variant = "2.5", dtype: torch.dtype = torch.float64) -> Decoder:
        if (variant, dtype) not in made:
            made[variant, dtype] = Checkpoint.open(tiny(variant)).load_decoder(dtype=dtype)
        return made[variant, dtype]

    return decoder


@dataclass
class Answer:
    """Everything an engine gave for one request."""

    ids: list[int] = field(default_factory=list)
    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None


@dataclass
class Request:
    ids: list[int]
    params: SamplingParams
    pictures: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Tensor | None:
        return torch.cat(self.pictures) if self.pictures else None


def engine_of(
    decoder: Decoder, *, length: int = 200, cache: int = 400, seqs: int = 4, budget: int = 16
) -> Engine:
    return Engine(decoder, EngineConfig(length, cache, seqs, budget))


def collect(outputs: list[StepOutput], answers: dict[str, Answer]) -> None:
    for output in outputs:
        answer = answers.setdefault(output.request_id, Answer())
        assert answer.reason is None, "an output after the end"
        answer.ids += output.ids
        answer.outputs.append(output)


def run(engine: Engine, answers: dict[str, Answer] | None = None) -> dict[str, Answer]:
    answers = {} if answers is None else answers
    for _ in range(5000):
        if not engine.has_work:
            return answers
        collect(engine.step(), answers)
    raise AssertionError("the engine still has work after 5,000 steps")


def answer_of(engine: Engine, request: Request) -> Answer:
    engine.add("one", request.ids, request.params, request.pictures)
    return run(engine)["one"]


def request_of(seed: int, *, pictures: int = 0, max_tokens: int = 8, text: int = 12) -> Request:
    """A random prompt with random pictures of one to nine rows somewhere in it."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    parts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, text))]]
    rows: list[Tensor] = []
    next_id = VOCAB
    for _ in range(pictures):
        count = rng.randint(1, 9)
        rows.append(torch.randn(count, WIDTH, dtype=torch.float64, generator=generator))
        parts.append(list(range(next_id, next_id + count)))
        next_id += count
        parts.append([rng.randrange(VOCAB) for _ in range(rng.randint(0, text))])
    if rng.random() < 0.5 and pictures:
        parts = parts[1:]  # a picture comes first
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    return Request(list(chain.from_iterable(parts)), params, rows)


def expected(decoder: Decoder, request: Request) -> tuple[list[int], FinishReason]:
    ids, reason, _ = greedy(decoder, request.ids, request.params, request.rows)
    return ids, reason


def assert_is_dense(decoder: Decoder, request: Request, answer: Answer) -> None:
    ids, reason = expected(decoder, request)
    assert answer.ids == ids
    assert answer.reason == reason


# Greedy answers are those of the dense form


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_a_request_alone_is_answered_as_without_a_cache(
    variant: Variant, pictures: int, load: Load
) -> None:
    decoder = load(variant)
    for seed in range(3):
        request = request_of(seed, pictures=pictures)
        assert_is_dense(decoder, request, answer_of(engine_of(decoder), request))


@pytest.mark.parametrize("variant", FAMILIES)
def test_requests_in_any_company_are_answered_as_if_alone(variant: Variant, load: Load) -> None:
    decoder = load(variant)
    rng = random.Random(5)
    requests = {
        str(i): request_of(i, pictures=rng.randrange(3), max_tokens=rng.randint(1, 9))
        for i in range(10)
    }
    engine = engine_of(decoder, length=80, cache=150, seqs=3, budget=7)
    answers: dict[str, Answer] = {}
    for name, request in requests.items():
        engine.add(name, request.ids, request.params, request.pictures)
        for _ in range(rng.randrange(4)):
            collect(engine.step(), answers)
    run(engine, answers)
    for name, request in requests.items():
        assert_is_dense(decoder, request, answers[name])
    assert engine.kv_usage == 0


def test_float32_answers_are_the_dense_ones_until_two_ids_are_as_good(load: Load) -> None:
    decoder = load("2.5", torch.float32)
    engine = engine_of(decoder, seqs=4, budget=9)
    requests = {str(i): request_of(i, pictures=i % 3) for i in range(8)}
    for name, request in requests.items():
        engine.add(name, request.ids, request.params, request.pictures)
    answers = run(engine)
    compared = 0
    for name, request in requests.items():
        ids, _, leads = greedy(decoder, request.ids, request.params, request.rows)
        sure = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(ids))
        assert answers[name].ids[:sure] == ids[:sure]
        compared += sure
    assert compared > 50


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 64])
def test_a_prompt_in_chunks_is_answered_as_the_whole(budget: int, load: Load) -> None:
    decoder = load()
    request = request_of(2, pictures=2)
    assert_is_dense(decoder, request, answer_of(engine_of(decoder, budget=budget), request))


def test_a_request_that_takes_anothers_place_finds_nothing_of_it(load: Load) -> None:
    decoder = load()
    engine = engine_of(decoder, length=60, cache=60, seqs=1)
    for seed in range(4):
        request = request_of(seed, pictures=seed % 2)
        engine.add("other", request_of(seed + 50).ids, request.params)
        engine.add("one", request.ids, request.params, request.pictures)
        assert_is_dense(decoder, request, run(engine)["one"])


def test_penalties_do_not_fall_on_what_an_earlier_request_generated(load: Load) -> None:
    request = request_of(1)
    penalised = replace(request.params, repetition_penalty=1.5, frequency_penalty=2.0)
    engine = engine_of(load(), seqs=1)
    first, second = (answer_of(engine, replace(request, params=penalised)) for _ in range(2))
    assert first.ids == second.ids


# The length that scales the rope


def scaled(decoder: Decoder, limit: int) -> Decoder:
    """The decoder with another position limit; the weights are shared."""
    d: DecoderConfig = replace(decoder.config.decoder, max_position_embeddings=limit)
    with torch.device("meta"):
        other = Decoder(replace(decoder.config, decoder=d))
    other.load_state_dict(decoder.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


@pytest.mark.parametrize("budget", [4, 64])
def test_rope_is_scaled_by_prompt_and_max_tokens_from_the_first_token_on(
    budget: int, load: Load
) -> None:
    decoder = scaled(load(), limit=20)
    request = request_of(3, pictures=2, max_tokens=12)
    assert len(request.ids) + 12 > 20
    assert_is_dense(decoder, request, answer_of(engine_of(decoder, budget=budget), request))


def test_rope_scaling_is_each_requests_own(load: Load) -> None:
    decoder = scaled(load(), limit=20)
    requests = {str(i): request_of(i, max_tokens=3 + 9 * i, pictures=i % 2) for i in range(4)}
    lengths = [len(r.ids) + r.params.max_tokens for r in requests.values()]
    assert min(lengths) <= 20 < max(lengths)
    engine = engine_of(decoder)
    for name, request in requests.items():
        engine.add(name, request.ids, request.params, request.pictures)
    answers = run(engine)
    for name, request in requests.items():
        assert_is_dense(decoder, request, answers[name])


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
    request = request_of(1, max_tokens=5)
    whole, _ = expected(load(), request)
    assert len(set(whole)) == 5
    stop = frozenset({whole[place], 1023})
    params = replace(request.params, stop_token_ids=stop, logprobs=0)
    answer = answer_of(engine_of(load()), replace(request, params=params))
    assert answer.ids == whole[:place]
    last = answer.outputs[-1]
    assert (last.finish_reason, last.ids, last.logprobs) == (FinishReason.STOP, (), ())
    assert last.num_generated == place + 1


def test_one_token_and_the_largest_request_fit_exactly(load: Load) -> None:
    engine = engine_of(load(), length=20, cache=20, seqs=1)
    params = SamplingParams(max_tokens=1, temperature=0)
    assert len(answer_of(engine, Request([5] * 19, params)).ids) == 1
    assert len(answer_of(engine, Request([5], replace(params, max_tokens=19))).ids) == 19


def test_logprobs_are_the_dense_ones(load: Load) -> None:
    decoder, request = load(), request_of(4, pictures=1, max_tokens=3)
    params = replace(request.params, logprobs=2, presence_penalty=1.0)
    answer = answer_of(engine_of(decoder), replace(request, params=params))
    given = [p for o in answer.outputs for p in o.logprobs]
    assert len(given) == 3
    for i, logprob in enumerate(given):
        whole = dense_logits(
            decoder, request.ids + answer.ids[:i], request.rows, len(request.ids) + 3
        )
        table = reference_logprobs(whole[-1].tolist())
        assert isinstance(logprob, TokenLogprob)
        assert logprob.logprob == pytest.approx(table[answer.ids[i]])
        assert [p for _, p in logprob.top] == pytest.approx(sorted(table, reverse=True)[:2])


def test_without_a_wish_there_are_no_logprobs(load: Load) -> None:
    answer = answer_of(engine_of(load()), request_of(4, max_tokens=2))
    assert all(o.logprobs == () for o in answer.outputs)


def test_a_drawn_answer_depends_on_its_seed_alone(load: Load) -> None:
    engine = engine_of(load(), seqs=8)
    request = request_of(1, max_tokens=8)
    hot = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.95, seed=11)
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        engine.add(name, request.ids, replace(hot, seed=seed))
    engine.add("greedy", request.ids, request.params)
    together = run(engine)
    assert together["a"].ids == together["b"].ids != together["c"].ids
    assert answer_of(engine, replace(request, params=hot)).ids == together["a"].ids
    assert together["greedy"].ids == expected(load(), request)[0]


def test_each_token_is_drawn_for_its_own_place_in_the_sequence(load: Load) -> None:
    decoder, request = load(), request_of(1, pictures=1)
    hot = SamplingParams(max_tokens=8, temperature=3.0, seed=11)
    answer = answer_of(engine_of(decoder), replace(request, params=hot))
    sampler = Sampler(1, VOCAB, decoder.device)
    ids = list(request.ids)
    for token in answer.ids:
        logits = dense_logits(decoder, ids, request.rows, len(request.ids) + 8)
        assert sampler(logits[-1:], [hot], [0], [len(ids)]).ids == [token]
        ids.append(token)


# Ending a request early


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_ends_and_frees_its_room_at_every_stage(steps: int, load: Load) -> None:
    engine = engine_of(load(), seqs=1, budget=10)
    request = request_of(7, pictures=2, text=20)
    assert len(request.ids) > 20
    kept = request_of(1)
    engine.add("gone", request.ids, request.params, request.pictures)
    engine.add("kept", kept.ids, kept.params)  # waits meanwhile
    answers: dict[str, Answer] = {}
    for _ in range(steps):
        collect(engine.step(), answers)
    engine.abort("gone")
    collect(engine.step(), answers)
    assert answers["gone"].reason is FinishReason.ABORT
    assert answers["gone"].outputs[-1].num_generated == len(answers["gone"].ids)
    run(engine, answers)
    assert_is_dense(load(), kept, answers["kept"])
    assert engine.kv_usage == 0
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_a_waiting_request_can_be_aborted(load: Load) -> None:
    engine = engine_of(load(), seqs=1)
    running, waiting = request_of(1), request_of(2)
    engine.add("running", running.ids, running.params)
    engine.add("waiting", waiting.ids, waiting.params)
    engine.step()
    engine.abort("waiting")
    answers = run(engine)
    assert answers["waiting"].reason is FinishReason.ABORT
    assert answers["waiting"].ids == []
    assert answers["running"].reason is FinishReason.LENGTH


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
    ("ids", "pictures", "max_tokens", "message"),
    [
        ([], [], 1, "the prompt has no tokens"),
        ([-1, 5], [], 1, "the prompt holds the id -1; ids are 0 or more"),
        ([1, 1024], [], 1, "the prompt has 1 image positions and the pictures 0 rows"),
        ([1], [2], 1, "the prompt has 0 image positions and the pictures 2 rows"),
        ([1024, 1025, 1], [2, 1], 1, "the prompt has 2 image positions and the pictures 3 rows"),
        ([1025, 1024, 1], [2], 1, "they must match in number and order"),
        ([1024, 1026, 1], [2], 1, "they must match in number and order"),
    ],
)
def test_a_prompt_that_cannot_be_right_is_refused(
    ids: list[int], pictures: list[int], max_tokens: int, message: str, load: Load
) -> None:
    engine = engine_of(load())
    with pytest.raises(InvalidRequest) as caught:
        engine.add(
            "one",
            ids,
            SamplingParams(max_tokens=max_tokens),
            [torch.zeros(n, 32) for n in pictures],
        )
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
    request = request_of(1)
    engine.add("one", request.ids, request.params)
    with pytest.raises(InvalidRequest, match="request id 'one' is in use"):
        engine.add("one", [1, 2], request.params)
    answers = run(engine)
    assert_is_dense(load(), request, answers["one"])
    engine.add("one", request.ids, request.params)  # free again
    assert run(engine)["one"].ids == answers["one"].ids


# Counters


def test_usage_grows_with_admission_and_ends_at_nothing(load: Load) -> None:
    engine = engine_of(load(), length=50, cache=100, seqs=2)
    for name in "abc":
        engine.add(name, [1] * 10, SamplingParams(max_tokens=15, temperature=0))
    assert (engine.num_running, engine.num_waiting, engine.kv_usage) == (0, 3, 0)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    assert engine.kv_usage == pytest.approx(0.5)
    run(engine)
    assert (engine.num_running, engine.num_waiting, engine.kv_usage) == (0, 0, 0)


def test_an_abort_does_not_count_as_a_request_that_waits(load: Load) -> None:
    engine = engine_of(load())
    engine.add("one", [1], SamplingParams(max_tokens=1))
    engine.abort("another")
    assert engine.num_waiting == 1


def test_an_engine_without_work_does_nothing(load: Load) -> None:
    engine = engine_of(load())
    assert not engine.has_work
    assert engine.step() == []


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
        f"{w}.{i}": request_of(i, pictures=i % 2, max_tokens=30 if i % 3 == 0 else 6, text=6)
        for w in range(workers)
        for i in range(each)
    }
    dropped = {name for name in requests if int(name.split(".")[1]) % 3 == 0}

    def come_and_go(worker: int) -> None:
        rng = random.Random(worker)
        for i in range(each):
            name = f"{worker}.{i}"
            request = requests[name]
            engine.add(name, request.ids, request.params, request.pictures)
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
