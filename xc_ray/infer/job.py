"""A data set answered through the engine, and compared with its own answers.

    job = Job("demo", dataset="questions.jsonl", output=Path("answers.jsonl"))
    summary = infer(job)

`rows` makes questions of rows, `engine` answers them, `output` keeps the lines, `model` tells which
base and adapter it is, `rouge` how near an answer comes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from xc_ray.errors import InvalidRequest
from xc_ray.infer.engine import Answer, Answerer, Options
from xc_ray.infer.model import Found, find_adapter, find_checkpoint, find_model, validation_file
from xc_ray.infer.output import Output
from xc_ray.infer.rouge import rouge_l
from xc_ray.infer.rows import Row, read_rows
from xc_ray.model.weights import Checkpoint
from xc_ray.train.reading import DataSet

Progress = Callable[[str, int, int], None]
LISTED_ERRORS = 100  # in the summary; every line with one is in the output


@dataclass(frozen=True)
class Job:
    """What to answer, with what, and where the answers go.

    `model` is what `hub.resolve_model` takes, `adapter` a folder of peft or a reference, and
    `checkpoint` a training checkpoint; of the two one at most. Without a `dataset` the rows are
    those that the checkpoint's run kept for validation.
    """

    model: str
    output: Path
    dataset: str | None = None
    adapter: str | None = None
    checkpoint: str | None = None
    registry: str | None = None
    max_samples: int | None = None
    options: Options = field(default_factory=Options)
    batch_size: int | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """Figures of a whole output; the last four are of this run alone.

    `exact_match` and `rouge_l` are means over the `compared` rows: those answered that have a
    reference. `errors` are (place, message) of the first rows without an answer.
    """

    rows: int
    answered: int
    failed: int
    compared: int
    exact_match: float | None
    rouge_l: float | None
    errors: tuple[tuple[str, str], ...] = field(repr=False)
    new_rows: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    tokens_per_s: float | None = None


@dataclass
class _Spent:
    """What this run did."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


def infer(job: Job, progress: Progress | None = None) -> Summary:
    """Answers every row that the output does not have yet; `progress(what, done, total)` in rows.

    A row that cannot be used gets a line with its error.

    Raises:
        CheckpointError: there is no such model or adapter.
        ConfigError: the output is another's, or the device has no room.
        InvalidRequest: an option is out of its bounds, or the adapter is one of another base.
        NotFound: the registry has no such adapter.
        RegistryError: storage fails.
        EngineError: the engine failed; run it again to continue.
    """
    report = progress or (lambda *_: None)
    base = find_model(job.model, job.registry)
    adapter = _adapter(job, base)
    config = Checkpoint.open(base.folder).config
    job.options.sampling(config, 0, job.options.max_tokens)  # refuses what is out of bounds
    dataset = DataSet(_dataset(job))
    with Output.open(job.output, _settings(job, base, adapter), overwrite=job.overwrite) as output:

        def rows() -> Iterator[Row]:
            return read_rows(dataset, config, job.options.system, job.max_samples)

        total = len(dataset) if job.max_samples is None else min(len(dataset), job.max_samples)
        _check_rows(output, rows, total)
        output.start()
        spent = _Spent()
        if output.num_kept < total:
            report(*_so_far(spent, output.num_kept, total))
            answerer = Answerer.load(
                base, adapter, batch_size=job.batch_size, device=job.device, dtype=job.dtype
            )
            begun, before = time.monotonic(), output.num_kept
            waiting = (row for row in rows() if not output.keeps(row))
            for answer in answerer.answers(waiting, job.options):
                output.write(answer.row, line_of(answer))
                spent.rows += 1
                spent.tokens += answer.num_tokens
                spent.seconds = time.monotonic() - begun
                report(*_so_far(spent, before + spent.rows, total))
        summary = _summary(output, spent)
        output.finish(asdict(summary))
    return summary


def line_of(answer: Answer) -> dict[str, Any]:
    """What is written of an answer: the question, the text beside the reference, and how near."""
    question = answer.row.question
    line: dict[str, Any] = {"place": str(answer.row.place)}
    if question is not None:
        line |= question.as_json()
    if answer.error or question is None:
        return {**line, "error": answer.error}
    return {
        **line,
        "response": answer.text,
        "reference": question.reference,
        "finish_reason": answer.finish_reason,
        **_scores(answer.text, question.reference),
    }


def _scores(text: str, reference: str | None) -> dict[str, bool | float | None]:
    if reference is None:
        return {"exact_match": None, "rouge_l": None}
    return {
        "exact_match": text.strip() == reference.strip(),
        "rouge_l": round(rouge_l(text, reference), 6),
    }


def _adapter(job: Job, base: Found) -> Found | None:
    if job.adapter is not None and job.checkpoint is not None:
        raise InvalidRequest("an adapter and a checkpoint are given; give one of the two")
    if job.checkpoint is not None:
        return find_checkpoint(job.checkpoint, base)
    return find_adapter(job.adapter, base, job.registry) if job.adapter is not None else None


def _dataset(job: Job) -> str:
    if job.dataset is not None:
        return job.dataset
    if job.checkpoint is None:
        raise InvalidRequest("there is no data set: give one, or a checkpoint that has rows")
    return str(validation_file(job.checkpoint))


def _settings(job: Job, base: Found, adapter: Found | None) -> dict[str, Any]:
    """What answers depend on, and how it was called."""
    return {
        "model": base.name,
        "model_digest": base.digest,
        "adapter": adapter.name if adapter else None,
        "adapter_digest": adapter.digest if adapter else None,
        "dataset": _dataset(job),
        **asdict(job.options),
    }


def _check_rows(output: Output, rows: Callable[[], Iterator[Row]], total: int) -> None:
    """Refuses an output whose lines are not of these rows."""
    output.check_rows(total)
    if output.num_kept:
        for row in rows():
            output.keeps(row)


def _so_far(spent: _Spent, done: int, total: int) -> tuple[str, int, int]:
    """What a `Progress` shows: numbers of 1,000 and more would be bytes to it."""
    speed = f"{spent.tokens_per_s:,.0f} tokens/s" if spent.tokens_per_s else "loading the model"
    if total < 1000:
        return f"rows, {speed}", done, total
    return f"% of {total:,} rows, {speed}", 100 * done // total, 100


def _summary(output: Output, spent: _Spent) -> Summary:
    rows, matches, rouge = 0, [], []
    errors: list[tuple[str, str]] = []
    failed = 0
    for line in output.lines():
        rows += 1
        if "error" in line:
            failed += 1
            if len(errors) < LISTED_ERRORS:
                errors.append((line["place"], line["error"]))
        elif line["reference"] is not None:
            matches.append(line["exact_match"])
            rouge.append(line["rouge_l"])
    return Summary(
        rows,
        rows - failed,
        failed,
        len(rouge),
        _mean(matches),
        _mean(rouge),
        tuple(errors),
        spent.rows,
        spent.tokens,
        round(spent.seconds, 3),
        round(spent.tokens_per_s, 1) if spent.tokens_per_s is not None else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None
