"""What a check of data sets found: numbers, bad rows and warnings, for people and as JSON."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xc_ray.train.check import Finding, Outcome

SHOWN_FINDINGS = 20  # of each sort, for people
SHOWN_IN_ERROR = 3


@dataclass(frozen=True)
class Report:
    """Counts are of good rows, but for `num_rows`; `longest` is the tokens of the longest.

    `problems` are the bad rows. Rows of which something is to be known otherwise are in `warnings`,
    among them those too long that `on_long: skip` left out (`num_skipped`).
    """

    num_rows: int = 0
    num_good: int = 0
    num_skipped: int = 0
    num_pictures: int = 0
    num_tiles: int = 0
    num_tokens: int = 0
    num_image_tokens: int = 0
    num_supervised: int = 0
    longest: int = 0
    problems: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: the counts, then the findings, each with its data set and row."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {
            **counts,
            "problems": [_values(one) for one in self.problems],
            "warnings": [_values(one) for one in self.warnings],
        }

    def __str__(self) -> str:
        lines = [f"{name:<18}{value:>14,}" for name, value in self._table()]
        for title, findings in (("bad rows", self.problems), ("warnings", self.warnings)):
            if findings:
                lines += ["", f"{title}:", *(f"  {one}" for one in findings[:SHOWN_FINDINGS])]
            if len(findings) > SHOWN_FINDINGS:
                lines.append(f"  … and {len(findings) - SHOWN_FINDINGS:,} more")
        return "\n".join(lines)

    def first_problems(self) -> str:
        """The first bad rows in one line."""
        shown = "; ".join(str(one) for one in self.problems[:SHOWN_IN_ERROR])
        more = len(self.problems) - SHOWN_IN_ERROR
        return f"{shown}; … and {more:,} more" if more > 0 else shown

    def _table(self) -> Iterator[tuple[str, int]]:
        yield "rows", self.num_rows
        yield "  good", self.num_good
        yield "  bad", len(self.problems)
        if self.num_skipped:
            yield "  left out", self.num_skipped
        yield "pictures", self.num_pictures
        yield "tiles", self.num_tiles
        yield "tokens", self.num_tokens
        yield "  of pictures", self.num_image_tokens
        yield "  learnt", self.num_supervised
        yield "longest row", self.longest


class Tally:
    """A report while it grows, row by row."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(
            (name for name, value in vars(Report()).items() if isinstance(value, int)), 0
        )
        self._problems: list[Finding] = []
        self._warnings: list[Finding] = []

    def add(self, outcome: Outcome) -> None:
        """Counts one row."""
        counts = self._counts
        counts["num_rows"] += 1
        if outcome.problem is not None:
            self._problems.append(outcome.problem)
        if outcome.warning is not None:
            self.warn(outcome.warning)
        if outcome.row is None:
            counts["num_skipped"] += outcome.problem is None
            return
        example = outcome.row.example
        counts["num_good"] += 1
        counts["num_pictures"] += len(outcome.row.pictures)
        counts["num_tiles"] += sum(one.grid.num_tiles for one in outcome.row.pictures)
        counts["num_tokens"] += len(example.ids)
        counts["num_image_tokens"] += sum(span.length for span in example.spans)
        counts["num_supervised"] += example.num_supervised
        counts["longest"] = max(counts["longest"], len(example.ids))

    def warn(self, finding: Finding) -> None:
        """Adds a warning."""
        self._warnings.append(finding)

    def report(self) -> Report:
        """What was counted up to now."""
        return Report(
            **self._counts, problems=tuple(self._problems), warnings=tuple(self._warnings)
        )


def _values(finding: Finding) -> dict[str, Any]:
    place = finding.place
    return {
        "source": place.source,
        "row": place.number,
        "kind": finding.kind,
        "reason": finding.reason,
    }
