"""Routes of prompts: requests that begin alike have names in common, others have not."""

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.prompt.sequence import ImageSpan, Prompt
from xc_ray.serve.prefixes import BLOCK_TOKENS, MAX_KEYS, PIECE_TOKENS, Route, route_of

START, VOCAB = 3, 1000
ROWS = 70
Turn = list[int]
texts = st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=40)


def prompt(*turns: Turn, pictures_in: int | None = None, num_pictures: int = 1) -> Prompt:
    """Turns with their start marks; pictures of ROWS rows at the head of one of them."""
    ids, spans = [1], []
    for number, turn in enumerate(turns):
        ids.append(START)
        for index in range(num_pictures if number == pictures_in else 0):
            spans.append(ImageSpan(index, len(ids), ROWS))
            ids += range(VOCAB + index * ROWS, VOCAB + (index + 1) * ROWS)
        ids += turn
    return Prompt([*ids, START, 9], tuple(spans))


def route(
    made: Prompt,
    digests: tuple[bytes, ...] = (b"a" * 32,),
    *,
    system: bool = True,
    adapter: str = "",
    salt: str = "",
) -> Route:
    return route_of(
        made,
        digests,
        start_of_turn=START,
        system=system,
        answer_tokens=10,
        adapter=adapter,
        salt=salt,
    )


def common(one: Route, other: Route) -> int:
    """Tokens of the longest beginning that both have a name for."""
    return max(
        (n for key, n in zip(one.keys, one.lengths, strict=True) if key in other.keys), default=0
    )


SYSTEM = [7] * 80


@given(st.lists(texts, min_size=1, max_size=6), texts, texts)
def test_a_later_turn_has_all_names_of_the_one_before(
    turns: list[Turn], answer: Turn, question: Turn
) -> None:
    before = route(prompt(SYSTEM, *turns))
    after = route(prompt(SYSTEM, *turns, [9, *answer], question))
    assert after.keys[: len(before.keys)] == before.keys
    assert after.lengths[: len(before.keys)] == before.lengths
    assert len(after.keys) > len(before.keys)


@given(texts, texts)
def test_questions_about_one_picture_share_the_picture(one: Turn, other: Turn) -> None:
    a, b = (route(prompt(SYSTEM, turn, pictures_in=1)) for turn in (one, other))
    assert common(a, b) >= 2 + len(SYSTEM) + 1 + ROWS
    assert a.keys[0] == b.keys[0]


def test_another_picture_of_the_same_size_shares_nothing() -> None:
    made = prompt(SYSTEM, [5], pictures_in=1)
    assert not set(route(made).keys) & set(route(made, (b"b" * 32,)).keys)


def test_the_order_of_pictures_counts() -> None:
    made = prompt(SYSTEM, [5], pictures_in=1, num_pictures=2)
    a, b = b"a" * 32, b"b" * 32
    assert common(route(made, (a, b)), route(made, (a, a))) == 2 + len(SYSTEM) + 1 + ROWS
    assert common(route(made, (a, b)), route(made, (b, a))) == 0


def test_a_system_text_alone_draws_nobody_together() -> None:
    assert common(route(prompt(SYSTEM, [5])), route(prompt(SYSTEM, [6]))) == 0


def test_without_a_system_turn_the_first_question_has_a_name() -> None:
    made = prompt([5] * 80)
    assert route(made, system=False).lengths == (len(made.ids) - 2,)


def test_a_long_text_that_two_begin_with_is_seen() -> None:
    text = [6] * (PIECE_TOKENS + 100)
    assert common(route(prompt(SYSTEM, [*text, 7])), route(prompt(SYSTEM, [*text, 8]))) == (
        1 + 1 + len(SYSTEM) + PIECE_TOKENS
    )


def test_adapters_share_nothing() -> None:
    made = prompt(SYSTEM, [5])
    names = [route(made, adapter=adapter).keys for adapter in ("", "cats", "dogs")]
    assert len({key for keys in names for key in keys}) == sum(map(len, names))


@settings(deadline=None)
@given(*[st.tuples(st.text("ab\0", max_size=3), st.text("ab\0", max_size=3))] * 2)
def test_requests_share_with_those_of_their_adapter_and_salt(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    made = prompt(SYSTEM, [5])
    first, second = (route(made, adapter=a, salt=s).keys for a, s in (one, other))
    assert bool(set(first) & set(second)) == (one == other)


def test_ids_that_spell_a_pictures_digest_are_not_that_picture() -> None:
    digest = struct.pack("<8i", *range(4, 12))
    with_picture = prompt(SYSTEM, [5] * 200, pictures_in=1)
    spelled = Prompt([*with_picture.ids[:-2], *range(4, 12), START, 9], ())
    one, other = route(with_picture, (digest,)), route(spelled, ())
    assert not set(one.keys) & set(other.keys)


def test_what_fills_no_block_has_no_name_but_a_price() -> None:
    made = prompt([5] * (BLOCK_TOKENS - 3))
    assert len(made.ids) == BLOCK_TOKENS + 1
    assert route(made) == Route(tokens=BLOCK_TOKENS + 1 + 10)
    assert route(prompt([5] * (BLOCK_TOKENS - 2)), system=False).lengths == (BLOCK_TOKENS,)


def test_of_a_very_long_conversation_the_first_and_last_names_are_kept() -> None:
    turns = [[number] for number in range(10, 110)]
    before, after = route(prompt(SYSTEM, *turns)), route(prompt(SYSTEM, *turns, [8], [8]))
    assert len(after.keys) == MAX_KEYS
    assert after.keys[0] == before.keys[0]
    assert common(before, after) == before.lengths[-1]


@given(st.lists(texts, min_size=1, max_size=8), st.integers(0, 7))
def test_no_beginning_ends_inside_a_picture(turns: list[Turn], place: int) -> None:
    made = prompt(SYSTEM, *turns, pictures_in=place, num_pictures=3)
    for length in route(made, (b"a", b"b", b"c")).lengths:
        assert all(not span.start < length < span.start + span.length for span in made.spans)
