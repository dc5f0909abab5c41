"""The exam: an answer counts if greedy decoding gives it, whole, and the last one alone counts."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.demo.test_batches import CONFIG, FONTS, TOKENIZER, VOCAB
from xc_ray.demo.batches import Batch
from xc_ray.demo.drawn.tasks import HELD_OUT, Sample, held_out_sample
from xc_ray.demo.exam import ROWS, Exam, exact_answers
from xc_ray.demo.network import Student, embed, hidden_states, initialise
from xc_ray.model.ops import PLAIN
from xc_ray.model.weights import published_state, save_checkpoint
from xc_ray.model.xcomposer import XComposer
from xc_ray.pipeline import Pipeline
from xc_ray.prompt.tokenizer import TOKENIZER_FILE

END = CONFIG.tokens.end_of_turn
SEED = 3


def exam(*tasks: str, num: int) -> Exam:
    return Exam(CONFIG, TOKENIZER, FONTS, tasks, num=num, seed=SEED)


def samples(task: str, num: int) -> list[Sample]:
    return [held_out_sample(task, SEED, i, FONTS) for i in range(num)]


def model_of(seed: int) -> XComposer:
    torch.manual_seed(seed)
    student = Student(CONFIG)
    initialise(student.model, seed)
    return student.model


# What is asked


def test_every_task_has_its_number_of_samples_in_sheets() -> None:
    made = exam("count", "add_text_2_digits", num=ROWS + 3)
    assert len(made) == 4
    sheets = [made[i] for i in range(4)]
    assert [(s.task, len(s.batch.pack.lengths)) for s in sheets] == [
        ("count", ROWS), ("count", 3), ("add_text_2_digits", ROWS), ("add_text_2_digits", 3),
    ]  # fmt: skip
    assert sum(len(c) for c in sheets[0].batch.canvases.values()) == ROWS
    assert not sheets[2].batch.canvases


@pytest.mark.parametrize("task", HELD_OUT)
def test_the_last_answer_with_its_end_mark_is_all_that_counts(task: str) -> None:
    batch = exam(task, num=3)[0].batch
    wanted: list[int] = []
    for sample in samples(task, 3):
        wanted += [*TOKENIZER.encode(sample.turns[-1][1]), END]
    assert batch.pack.targets.tolist() == wanted
    assert torch.equal(batch.pack.ids[batch.pack.wanted + 1], batch.pack.targets)


def test_earlier_turns_are_given_as_they_should_be() -> None:
    batch = exam("two_turn", num=4)[0].batch
    for ids, sample in zip(
        batch.pack.ids.split(batch.pack.lengths), samples("two_turn", 4), strict=True
    ):
        text = TOKENIZER.decode([i for i in ids.tolist() if i < VOCAB])
        (_, first), (second, _) = sample.turns
        assert f"assistant\n{first}" in text
        assert f"user\n{second}" in text


# What is right


@torch.no_grad()
def likeliest(model: XComposer, batch: Batch) -> torch.Tensor:
    rows = embed(model, batch.canvases)[0]
    logits: torch.Tensor = model.decoder.output(hidden_states(model, batch, PLAIN, rows))
    return logits.argmax(-1)


def with_targets(batch: Batch, targets: torch.Tensor) -> Batch:
    return replace(batch, pack=replace(batch.pack, targets=targets))


def test_one_wrong_token_makes_its_own_answer_wrong_and_no_other() -> None:
    model, batch = model_of(0), exam("describe", num=4)[0].batch
    own = likeliest(model, batch)
    assert exact_answers(model, with_targets(batch, own), PLAIN) == [True] * 4
    answers = [len(TOKENIZER.encode(s.turns[-1][1])) + 1 for s in samples("describe", 4)]
    assert sum(answers) == len(own)
    start = 0
    for number, length in enumerate(answers):
        for place in (start, start + length // 2, start + length - 1):  # the end mark too
            wrong = own.clone()
            wrong[place] = (wrong[place] + 1) % VOCAB
            told = exact_answers(model, with_targets(batch, wrong), PLAIN)
            assert told == [i != number for i in range(4)]
        start += length


def overfit(model: XComposer, batch: Batch, steps: int) -> None:
    """Until the first conversation's answers are known by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = embed(model, batch.canvases)[0] if batch.canvases else None
        logits = model.decoder.output(hidden_states(model, batch, PLAIN, rows))
        loss = torch.nn.functional.cross_entropy(logits, batch.pack.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def greedy(pipe: Pipeline, sample: Sample) -> str:
    """The last answer, the pictures and all before it being given."""
    files = []
    for picture in sample.pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.append(buffer.getvalue())
    turns: Sequence[tuple[str, str]] = sample.turns
    marks = "<ImageHere>" * len(files)
    asked = [(marks + turns[0][0], turns[0][1]), *turns[1:]]
    answer, _ = pipe.chat(
        asked[-1][0],
        asked[:-1],
        files,
        temperature=0.0,
        repetition_penalty=1.0,
        max_tokens=len(TOKENIZER.encode(turns[-1][1])) + 5,
    )
    return answer


@pytest.mark.parametrize("task", ["count", "two_turn", "compare", "add_text_1_digits"])
def test_an_answer_counts_if_and_only_if_greedy_decoding_gives_it(
    task: str, tmp_path: Path
) -> None:
    """Of six samples, of which a model has learnt the first two by heart."""
    model = model_of(1)
    overfit(model, exam(task, num=2)[0].batch, 40)
    save_checkpoint(tmp_path, CONFIG, published_state(model))
    (tmp_path / TOKENIZER_FILE).write_bytes(TOKENIZER.to_bytes())
    pipe = Pipeline.load(tmp_path, device="cpu", dtype=torch.float32)
    told = exact_answers(model, exam(task, num=6)[0].batch, PLAIN)
    wanted = [greedy(pipe, sample) == sample.turns[-1][1] for sample in samples(task, 6)]
    assert told == wanted
    assert told[:2] == [True, True]
    assert not all(told)
