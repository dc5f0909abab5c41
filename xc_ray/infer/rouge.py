"""ROUGE-L: how much of an answer stands in a reference in the same order (Lin, ACL 2004, W04-1013).

R = LCS / reference, P = LCS / answer, F = 2PR / (P + R), over words without case and punctuation.
Chinese, Japanese and Korean are not divided into words: each of their characters counts as one.
"""

import re
from collections.abc import Sequence

# Radicals to Han extension A, kana, Han, Hangul, compatibility forms, Han of the upper planes.
_CJK = "\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
_UNIT = re.compile(rf"(?=[^\W_])[{_CJK}]|(?:(?![{_CJK}_])\w)+")


def rouge_l(response: str, reference: str) -> float:
    """The F measure of two texts, 0 to 1.

    Where a text has no word at all ("?"), 1 if they are the same and 0 if not.
    """
    a, b = units(response), units(reference)
    if not a or not b:
        return float(response.strip() == reference.strip())
    return 2 * lcs_length(a, b) / (len(a) + len(b))


def units(text: str) -> list[str]:
    """Words without case and punctuation; single characters of Chinese, Japanese and Korean."""
    return _UNIT.findall(text.casefold())


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    One row of the table is one whole number, a bit a column (Hyyrö 2004): a bit that is 0 is a
    place where the length grows by one. An addition carries a match to the next such place.
    """
    places: dict[str, int] = {}
    for i, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for unit in b:
        matches = row & places.get(unit, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()
