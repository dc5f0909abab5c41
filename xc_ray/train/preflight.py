"""Data sets -> rows that can be learnt from, and a report: before anything is loaded or started.

Every row is read and every picture opened, in as many processes as there are cores. What cannot be
learnt from is found here and not after hours of training.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeAlias

from xc_ray.config import DataFile, DataOptions
from xc_ray.errors import DataError
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.check import Finding, Item, Outcome, RowCheck, row_digest
from xc_ray.train.crew import in_processes
from xc_ray.train.data import Example
from xc_ray.train.reading import DataSet
from xc_ray.train.report import Report, Tally
from xc_ray.train.rows import CheckedRow, Place

__all__ = ["Checked", "Report", "check_rows", "overlap", "preflight"]

INLINE_ROWS = 64  # so few are checked sooner than processes start
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """Good rows in order, what was found, and the sha256 (hex) over all that is learnt from them.

    Two data sets with one digest teach the same.
    """

    rows: list[CheckedRow]
    report: Report
    digest: str


def preflight(
    files: Sequence[DataFile],
    options: DataOptions,
    config: XComposerConfig,
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    processes: int | None = None,
) -> Checked:
    """Checks every row of `files`; `progress` is called with (what, rows done, rows).

    `processes` is by default the number of cores, and none for few rows. Rows that are bad are an
    error, or left out under `on_bad_row: skip`; the same row twice is a warning.

    Raises:
        ConfigError: an address that is none.
        DataError: bad rows, with the first of them in the message and all in its `report`; no good
            row; or a data set that cannot be read.
        RegistryError: object storage fails.
    """
    checked = check_rows(files, options, config, tokenizer, progress=progress, processes=processes)
    report = checked.report
    names = ", ".join(file.path for file in files)
    if not report.num_rows:
        raise DataError(f"{names}: there is no row in it", report=report)
    if not report.num_good:
        found = report.first_problems() or str(report.warnings[0])
        raise DataError(
            f"{names}: none of the {report.num_rows:,} rows can be learnt from: {found}",
            report=report,
        )
    if report.problems and options.on_bad_row == "fail":
        raise DataError(
            f"{len(report.problems):,} of {report.num_rows:,} rows are bad: "
            f"{report.first_problems()}; mend them, or leave them out with on_bad_row: skip "
            "(`xc-ray data check` lists them all)",
            report=report,
        )
    return checked


def check_rows(
    files: Sequence[DataFile],
    options: DataOptions,
    config: XComposerConfig,
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    processes: int | None = None,
) -> Checked:
    """As `preflight`, but bad rows are left out whatever the options say, and none is no error."""
    sets = [DataSet(file.path) for file in files]
    total = sum(len(one) for one in sets) if progress is not None else 0
    check = RowCheck(config, tokenizer, options)
    rows: list[CheckedRow] = []
    seen: dict[str, Place] = {}
    whole, tally = hashlib.sha256(), Tally()
    same: dict[int, int] = {}
    with closing(_outcomes(check, _items(sets), processes)) as outcomes:
        for done, outcome in enumerate(outcomes, 1):
            if progress is not None:
                progress("checking rows", done, max(done, total))
            tally.add(outcome)
            if outcome.row is None:
                continue
            row = replace(outcome.row, example=_compact(outcome.row.example, same))
            rows.append(row)
            digest = row_digest(row)
            whole.update(f"{row.part} {digest}\n".encode())
            first = seen.setdefault(digest, row.place)
            if first is not row.place:
                tally.warn(Finding(row.place, "duplicate", f"it is the same as {first}"))
    return Checked(rows, tally.report(), whole.hexdigest())


def overlap(training: Checked, validation: Checked) -> tuple[Finding, ...]:
    """Rows for validation that are learnt in training, so that they validate nothing."""
    learnt = {row_digest(row): row.place for row in training.rows}
    return tuple(
        Finding(row.place, "duplicate", f"it is for validation and the same as {learnt[digest]}")
        for row in validation.rows
        if (digest := row_digest(row)) in learnt
    )


def _items(sets: Iterable[DataSet]) -> Iterator[Item]:
    for part, rows in enumerate(sets):
        for place, said in rows:
            yield Item(place, part, said)


def _outcomes(
    check: RowCheck, items: Iterator[Item], processes: int | None
) -> Generator[Outcome, None, None]:
    if processes is None:
        first = list(islice(items, INLINE_ROWS + 1))
        items = chain(first, items)
        processes = len(os.sched_getaffinity(0)) if len(first) > INLINE_ROWS else 1
    yield from map(check, items) if processes == 1 else in_processes(check, items, processes)


def _compact(example: Example, same: dict[int, int]) -> Example:
    """The example with one object for each number: a quarter of the memory, over all rows."""
    ids = [same.setdefault(i, i) for i in example.ids]
    labels = [same.setdefault(i, i) for i in example.labels]
    return Example(ids, labels, example.spans)
