"""The demo model's tokenizer: print is spelled out, words of questions are one token."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xc_ray.demo.drawn.answers import COLOURS_ZH, KINDS_ZH, plural
from xc_ray.demo.drawn.colours import COLOURS
from xc_ray.demo.drawn.figures import KINDS
from xc_ray.demo.drawn.phrasings import QUESTIONS
from xc_ray.demo.drawn.small_talk import SMALL_TALK
from xc_ray.demo.drawn.words import HELD_OUT_WORDS, TRAINING_WORDS
from xc_ray.demo.make import VOCAB_SIZE, tiny_config
from xc_ray.demo.vocabulary import ROLES, make_tokenizer
from xc_ray.prompt.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_tokenizer())
# Private characters stand for the fillers, `▁` for a space: no person types them.
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Co"), exclude_characters="▁"))


def pieces(text: str) -> list[str]:
    return [TOKENIZER.piece(token) for token in TOKENIZER.encode_untrusted(text)]


# Its form


def test_it_has_the_size_that_the_models_are_made_with() -> None:
    assert len(TOKENIZER) == VOCAB_SIZE == tiny_config("2.5").decoder.vocab_size


def test_it_is_the_same_each_time_it_is_made() -> None:
    assert make_tokenizer() == TOKENIZER.to_bytes()


def test_no_two_ids_have_one_spelling() -> None:
    assert len({TOKENIZER.piece(token) for token in range(VOCAB_SIZE)}) == VOCAB_SIZE


def test_marks_and_specials_have_the_ids_that_the_config_tells() -> None:
    tokens = tiny_config("2.5").tokens
    assert TOKENIZER.id_of("[UNUSED_TOKEN_145]") == tokens.end_of_turn == 3
    assert TOKENIZER.id_of("[UNUSED_TOKEN_146]") == tokens.start_of_turn == 4
    assert (TOKENIZER.unk_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (
        tokens.unk,
        tokens.bos,
        tokens.eos,
    )


# What is one token


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_a_printed_word_is_spelled_character_by_character(case) -> None:
    for word in (*TRAINING_WORDS, *HELD_OUT_WORDS):
        assert pieces(case(word)) == list(case(word))


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30))
def test_any_print_without_a_space_is_spelled_character_by_character(text: str) -> None:
    assume(not any(role in text for role in ROLES))  # a turn's head is the one exception
    assert pieces(text) == list(text)


def test_a_number_is_its_digits_wherever_it_stands() -> None:
    assert pieces("1452 + 45304") == ["1", "4", "5", "2", "▁", "+", "▁", *"45304"]


def test_a_word_of_the_questions_is_one_token_with_the_space_before_it() -> None:
    phrasings = [p for group in QUESTIONS["en"].values() for p in group]
    phrasings += [text for said, answer in SMALL_TALK["en"] for text in (*said, answer)]
    words = {word for p in phrasings for word in re.findall(r"(?<= )[a-z]{2,}", p)}
    assert len(words) > 100
    for word in words:
        assert pieces(f"? {word}")[1:] == [f"▁{word}"]


def test_kinds_and_colours_are_one_token_behind_another_word() -> None:
    for word in (*KINDS, *map(plural, KINDS), *COLOURS):
        assert pieces(f"a {word}") == ["a", f"▁{word}"]


def test_chinese_names_take_a_token_a_character() -> None:
    for name in (*KINDS_ZH.values(), *COLOURS_ZH.values()):
        assert pieces(name) == list(name)


@pytest.mark.parametrize("role", ROLES)
def test_the_head_of_a_turn_is_one_piece_and_a_line_break(role: str) -> None:
    assert pieces(f"{role}\n") == [role, "\n"]


def test_a_text_takes_the_fewest_tokens() -> None:
    assert pieces("How many red circles are there?") == [
        *"How", "▁many", "▁red", "▁circles", "▁are", "▁there", "?",
    ]  # fmt: skip


# Any text


@given(TEXTS)
@settings(max_examples=300)
def test_every_text_comes_back_from_its_ids(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_untrusted(text)) == text


@given(TEXTS)
@settings(max_examples=300)
def test_fillers_and_unknowns_never_come_out_of_a_text(text: str) -> None:
    spelled = pieces(text)
    assert "<unk>" not in spelled
    assert not any(ord(piece[0]) >= 0xF0000 for piece in spelled)


def test_what_no_piece_spells_goes_byte_by_byte() -> None:
    assert pieces("é") == ["<0xC3>", "<0xA9>"]
