"""Where an answer ends, one character at a time."""

from collections.abc import Sequence


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string to be complete, and whether there was one.

    Of two that are complete at the same character, the longer one counts.
    """
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False
