"""The figures of a run, row by row, and the table and the line that show them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_client import Answer, Run

PERCENTILES = (50, 90, 99)
MAX_LATE_S = 0.05  # 99 of 100 requests have to be sent within it, or the run is invalid


@dataclass(frozen=True)
class Level:
    """The service level: seconds to the first token, and seconds from token to token, on average.

    An answer that is not streamed has as long as both allow together.
    """

    ttft_s: float
    interval_s: float

    def met(self, answer: Answer) -> bool:
        """Whether an answer is whole and was quick enough."""
        if answer.outcome != "ok":
            return False
        if answer.first_token_s is None:
            return answer.latency <= self.ttft_s + self.interval_s * max(0, answer.tokens - 1)
        return answer.first_token_s <= self.ttft_s and (answer.interval_s or 0) <= self.interval_s


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The least of the values that `percent` of them do not exceed; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p90 and p99 of the values that are known."""
    known = [value for value in values if value is not None]
    return {f"p{p}": rounded(percentile(known, p)) for p in PERCENTILES}


def jain(values: Sequence[float]) -> float | None:
    """Jain's index of fairness: 1 if all have the same, 1/n if one of n has everything."""
    squares = sum(value**2 for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def most_at_once(answers: Iterable[Answer]) -> int:
    """The most requests that were under way at one time."""
    changes = [change for a in answers for change in ((a.sent, 1), (a.finished, -1))]
    level = most = 0
    for _, change in sorted(changes):
        level += change
        most = max(most, level)
    return most


def shares(answers: Sequence[Answer], of: Callable[[Answer], str | None]) -> dict[str, Any]:
    """By key or by model: requests asked and answered, tokens, and the share of all tokens."""
    asked = Counter(name for a in answers if (name := of(a)) is not None)
    total = sum(a.tokens for a in answers)
    found = {}
    for name in sorted(asked):
        own = [a for a in answers if of(a) == name]
        tokens = sum(a.tokens for a in own)
        found[name] = {
            "asked": len(own),
            "answered": sum(a.outcome == "ok" for a in own),
            "tokens": tokens,
            "share": rounded(tokens / total if total else 0.0),
        }
    return found


def figures(run: Run, seconds: float, level: Level) -> dict[str, Any]:
    """All figures of one row, whose requests were due within `seconds`.

    What is offered counts over those; what comes back over the time to the last answer, if that is
    longer. Times are of requests that were answered whole.
    """
    answers = run.answers
    kinds: dict[str, list[Answer]] = {"ok": [], "refused": [], "error": [], "cut": []}
    for answer in answers:
        kinds[answer.outcome].append(answer)
    ok, refused, cut = kinds["ok"], kinds["refused"], kinds["cut"]
    elapsed = max(seconds, *(a.finished for a in answers))
    late = [max(0.0, a.sent - a.due) for a in answers]
    late_p99 = percentile(late, 99) or 0.0
    prompt = sum(a.prompt_tokens for a in ok)
    by_key = shares(answers, lambda a: a.key)
    return {
        "requests": len(answers),
        "elapsed_s": rounded(elapsed),
        "offered_per_s": rounded(len(answers) / seconds),
        "completed_per_s": rounded(len(ok) / elapsed),
        "goodput_per_s": rounded(sum(map(level.met, answers)) / elapsed),
        "output_tokens_per_s": rounded(sum(a.tokens for a in answers) / elapsed),
        "prompt_tokens_per_s": rounded(prompt / elapsed),
        "cached_share": rounded(sum(a.cached_tokens for a in ok) / prompt if prompt else 0.0),
        "most_at_once": most_at_once(answers),
        "headers_s": percentiles(a.headers - a.sent for a in ok if a.headers is not None),
        "ttft_s": percentiles(a.first_token_s for a in ok),
        "interval_s": percentiles(a.interval_s for a in ok),
        "largest_gap_s": percentiles(a.largest_gap for a in ok if a.events > 1),
        "latency_s": percentiles(a.latency for a in ok),
        "completed": len(ok),
        "refused": {
            "count": len(refused),
            "latency_p99_s": rounded(percentile((a.latency for a in refused), 99)),
            "with_retry_after": sum(a.retry_after is not None for a in refused),
        },
        "errors": dict(Counter(f"{a.status or '-'} {a.code}" for a in kinds["error"])),
        "cut": {"count": len(cut), "before_headers": sum(a.headers is None for a in cut)},
        "heartbeats": sum(a.comments for a in answers),
        "by_key": by_key,
        "by_model": shares(answers, lambda a: a.model),
        "jain": rounded(jain([share["tokens"] for share in by_key.values()])),
        "late_s": {"p99": rounded(late_p99), "most": rounded(max(late))},
        "client_cpu": rounded(run.client_cpu),
        "valid": late_p99 <= MAX_LATE_S,
    }


def rounded(value: float | None) -> float | None:
    """To a tenth of a millisecond."""
    return None if value is None else round(value, 4)


COLUMNS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "rate": lambda row: row["rate"],
    "offered/s": lambda row: f"{row['offered_per_s']:.2f}",
    "done/s": lambda row: f"{row['completed_per_s']:.2f}",
    "good/s": lambda row: f"{row['goodput_per_s']:.2f}",
    "tokens/s": lambda row: f"{row['output_tokens_per_s']:.1f}",
    "first token, s": lambda row: _three(row["ttft_s"], 1),
    "interval, ms": lambda row: _three(row["interval_s"], 1000),
    "latency, s": lambda row: _three(row["latency_s"], 1),
    "429": lambda row: str(row["refused"]["count"]),
    "errors": lambda row: str(sum(row["errors"].values())),
    "cut": lambda row: str(row["cut"]["count"]),
}


def _three(values: Mapping[str, float | None], scale: float) -> str:
    return " ".join("-" if v is None else f"{v * scale:.3g}" for v in values.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each row; three figures in one column are p50, p90 and p99."""
    lines = [list(COLUMNS), *([column(row) for column in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def remarks(row: dict[str, Any]) -> list[str]:
    """What a row's line of the table does not tell, the gravest first."""
    found = []
    late, cut, refused = row["late_s"], row["cut"], row["refused"]
    if not row["valid"]:
        found.append(
            f"INVALID: the generator was late, by {late['p99']} s at p99 and {late['most']} s at "
            f"most (limit {MAX_LATE_S} s at p99); give it more --processes or its own machine"
        )
    if cut["count"]:
        early = cut["before_headers"]
        found.append(f"CUT: {cut['count']} ended without a word, {early} of them before headers")
    found += [f"{count} failed: {what}" for what, count in sorted(row["errors"].items())]
    if refused["count"]:
        found.append(
            f"{refused['count']} refused, {refused['with_retry_after']} with Retry-After, "
            f"in {refused['latency_p99_s']} s at p99"
        )
    for name, share in row["by_key"].items():
        found.append(
            f"key {name}: {share['answered']} of {share['asked']} answered, "
            f"{share['share']:.1%} of the tokens"
        )
    if row["jain"] is not None:
        found.append(f"fairness between keys (Jain): {row['jain']:.3f}")
    found.append(
        f"at most {row['most_at_once']} at once; {row['cached_share']:.1%} of prompt tokens "
        f"cached; {row['heartbeats']} heartbeats; generator: {row['client_cpu']:.0%} of a core, "
        f"late by {late['p99'] * 1000:.1f} ms at p99"
    )
    return found
