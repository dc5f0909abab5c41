"""Text and ids of the published tokenizer, streaming included."""

import re
from typing import Any

import pytest

from tests.parity.golden import Golden
from xc_ray.prompt.tokenizer import TextStream, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(golden: Golden) -> Tokenizer:
    return golden.tokenizer


@pytest.fixture(scope="module")
def stored(golden: Golden) -> dict[str, Any]:
    cases = golden.text_cases("cases")
    if not cases:
        pytest.skip(f"{golden.root.name}/tokenizer/cases.json is not there")
    return cases


def test_the_vocabulary_and_its_special_ids_are_the_originals(
    tokenizer: Tokenizer, stored: dict[str, Any]
) -> None:
    special = stored["special"]
    assert len(tokenizer) == stored["vocab_size"]
    assert tokenizer.bos_id == special["bos"]
    assert tokenizer.eos_id == special["eos"]
    assert tokenizer.unk_id == special["unk"]
    for name, token in special.items():
        if match := re.search(r"\[UNUSED_TOKEN_\d+\]", name):
            assert tokenizer.id_of(match[0]) == token
            assert token in tokenizer.control_ids


def test_texts_become_the_originals_ids(tokenizer: Tokenizer, stored: dict[str, Any]) -> None:
    for case in stored["cases"]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], bos=True) == case["ids_with_bos"], case["text"]
        assert [tokenizer.piece(i) for i in ids] == case["pieces"], case["text"]


def test_ids_become_the_originals_texts_without_special_tokens(
    tokenizer: Tokenizer, stored: dict[str, Any]
) -> None:
    for case in stored["cases"]:
        assert tokenizer.decode(case["ids"]) == case["decode_skip_special"]
        assert tokenizer.decode(case["ids_with_bos"]) == case["decode_with_bos_skip_special"]
    for case in stored["random_ids"]:
        assert tokenizer.decode(case["ids"]) == case["decode_skip_special"]


def test_a_cut_character_becomes_replacement_characters(
    tokenizer: Tokenizer, stored: dict[str, Any]
) -> None:
    for case in stored["cut_inside_a_character"]:
        assert tokenizer.decode(case["ids"]) == case["decode"]


def test_a_stream_sends_a_character_once_it_is_whole(
    tokenizer: Tokenizer, stored: dict[str, Any]
) -> None:
    for case in stored["streaming"]:
        stream = TextStream(tokenizer)
        assert [stream.push([token]) for token in case["ids"]] == case["expected_deltas"]
        assert "".join(case["expected_deltas"]) + stream.finish() == case["prefix_decodes"][-1]


def test_untrusted_text_never_becomes_a_control_id(
    tokenizer: Tokenizer, stored: dict[str, Any]
) -> None:
    controls = {stored["special"][name] for name in ("bos", "eos", "unk")}
    controls |= {token for piece, token in reserved_pieces(tokenizer)}
    for case in stored["cases"]:
        ids = tokenizer.encode_untrusted(case["text"])
        assert not controls.intersection(ids), case["text"]
        assert tokenizer.decode(ids) == case["text"].replace("▁", " ")


def test_untrusted_text_without_control_strings_becomes_the_originals_ids(
    tokenizer: Tokenizer, stored: dict[str, Any]
) -> None:
    controls = [*(piece for piece, _ in reserved_pieces(tokenizer)), "<s>", "</s>", "<unk>"]
    harmless = [c for c in stored["cases"] if not any(text in c["text"] for text in controls)]
    assert harmless
    for case in harmless:
        assert tokenizer.encode_untrusted(case["text"]) == case["ids"], case["text"]


def reserved_pieces(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    pieces = ((tokenizer.piece(token), token) for token in range(len(tokenizer)))
    return [(p, token) for p, token in pieces if re.fullmatch(r"\[UNUSED_TOKEN_\d+\]", p)]
