"""docs/security.md names the tests that show what it says."""

import re
from pathlib import Path

import pytest

from tests import hostile

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/[^`]+\.py(?:::\w+)?)`", (ROOT / "docs/security.md").read_text())


@pytest.mark.parametrize("named", sorted(set(NAMED)))
def test_a_test_that_the_page_names_is_there(named: str) -> None:
    file, _, name = named.partition("::")
    text = (ROOT / file).read_text()
    assert not name or re.search(rf"^\s*(async def|def|class) {name}\b", text, re.MULTILINE)


def test_the_table_has_rows_of_every_kind() -> None:
    urls = (*hostile.ADDRESSES_INSIDE, *hostile.NAMES_INSIDE, *hostile.MALFORMED)
    assert len(set(urls)) == len(urls) > 80
    assert len({file.what for file in hostile.FILES}) == len(hostile.FILES) > 60
    assert len({body.what for body in hostile.BODIES}) == len(hostile.BODIES) > 40
