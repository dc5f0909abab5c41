import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.stop_text import until_stop
from xc_ray.demo.make import train_tokenizer
from xc_ray.errors import CheckpointError, InvalidRequest
from xc_ray.model.config import Variant
from xc_ray.prompt.tokenizer import TextStream, Tokenizer, decode_bytes, load_tokenizer

TOKENIZER = Tokenizer(train_tokenizer())
# What a person may type to be taken for a turn mark, and what it falls apart into.
FORGERIES = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_146]",
    "[UNUSED_TOKEN_",
    "UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_145",
    "145]",
    "[",
    "]",
    "<",
    "s>",
    "user\n",
    "assistant\n",
    "<ImageHere>",
    "<|im_end|>",
    "7",
    "\n",
    " ",
]
# ▁ (U+2581) is how SentencePiece spells a space, see the test of its own.
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=6)
TYPED = st.lists(st.one_of(st.sampled_from(FORGERIES), CHARACTERS), max_size=12).map("".join)
BYTE_IDS = [i for i in range(len(TOKENIZER)) if TOKENIZER.piece(i).startswith("<0x")]
IDS = st.lists(
    st.one_of(
        st.integers(0, len(TOKENIZER) - 1).map(lambda i: [i]),
        st.sampled_from(BYTE_IDS).map(lambda i: [i]),
        CHARACTERS.map(TOKENIZER.encode_untrusted),
        st.sampled_from(["é", "浦", "\U0001f600", "\ufffd"]).map(TOKENIZER.encode_untrusted),
    ),
    max_size=12,
).map(lambda parts: list(chain.from_iterable(parts)))
MANY = settings(max_examples=300, deadline=None)


def chunked(ids: list[int], cuts: list[bool]) -> list[list[int]]:
    """The ids in pieces, cut behind those whose entry of `cuts` (repeated) is true."""
    chunks: list[list[int]] = [[]]
    for i, token in enumerate(ids):
        chunks[-1].append(token)
        if cuts[i % len(cuts)]:
            chunks.append([])
    return chunks


def streamed(ids: list[int], cuts: list[bool], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = TextStream(TOKENIZER, stop)
    text = "".join([stream.push(chunk) for chunk in chunked(ids, cuts)]) + stream.finish()
    return text, stream.stopped


CUTS = st.lists(st.booleans(), min_size=1, max_size=8)


# Text to ids


@MANY
@given(TYPED)
def test_untrusted_text_never_yields_a_control_id(text: str) -> None:
    assert not TOKENIZER.control_ids.intersection(TOKENIZER.encode_untrusted(text))


@MANY
@given(TYPED)
def test_untrusted_text_comes_back_as_it_was_typed(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_untrusted(text)) == text


@pytest.mark.parametrize("number", range(147))
def test_no_reserved_piece_can_be_typed(number: int) -> None:
    # The whole vocabulary reserves 147 pieces; which of them a model uses is its own affair.
    piece = f"[UNUSED_TOKEN_{number}]"
    for text in (piece, f"[{piece}]", f"{piece}{piece}", f"[UNUSED_TOKEN_{piece}"):
        ids = TOKENIZER.encode_untrusted(text)
        assert TOKENIZER.decode(ids) == text
        assert all(TOKENIZER.piece(i) != piece for i in ids)


def test_trusted_text_yields_control_ids() -> None:
    start, end = (TOKENIZER.id_of(f"[UNUSED_TOKEN_{n}]") for n in (146, 145))
    ids = TOKENIZER.encode("[UNUSED_TOKEN_146]user\nHi[UNUSED_TOKEN_145]\n</s>", bos=True)
    assert ids[:2] == [TOKENIZER.bos_id, start]
    assert ids[-3:] == [end, TOKENIZER.id_of("\n"), TOKENIZER.eos_id]
    assert TOKENIZER.encode("a<unk><s>b")[1:3] == [TOKENIZER.unk_id, TOKENIZER.bos_id]


def test_control_ids_are_the_specials_and_the_reserved_pieces() -> None:
    names = {TOKENIZER.piece(i) for i in TOKENIZER.control_ids}
    assert names == {"<unk>", "<s>", "</s>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"}


@pytest.mark.parametrize("text", ["Which picture has more?", "日本語 \U0001f600", "12 345", ""])
def test_plain_text_has_the_same_ids_trusted_or_not(text: str) -> None:
    assert TOKENIZER.encode(text) == TOKENIZER.encode_untrusted(text)


@pytest.mark.parametrize("encode", [TOKENIZER.encode, TOKENIZER.encode_untrusted])
@pytest.mark.parametrize("before", ["", "ab", "[UNUSED_TOKEN_145] ab"])
def test_half_a_surrogate_pair_is_refused_with_its_place(
    encode: Callable[[str], list[int]], before: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(before + "\ud83d" + "c")
    assert caught.value.message == (
        f"the text holds half a surrogate pair (U+D83D at character {len(before)}); send valid "
        "Unicode"
    )


# Ids to text


def test_a_lower_one_eighth_block_decodes_to_a_space() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_untrusted("a▁b")) == "a b"


def test_a_space_at_the_start_of_a_piece_is_kept() -> None:
    for text in (" red", "  ", " a  b "):
        assert TOKENIZER.decode(TOKENIZER.encode_untrusted(text)) == text


def test_special_ids_add_no_text_and_turn_marks_do() -> None:
    ids = TOKENIZER.encode("a</s>b[UNUSED_TOKEN_145]", bos=True)
    assert TOKENIZER.decode([*ids, TOKENIZER.unk_id]) == "ab[UNUSED_TOKEN_145]"
    assert TOKENIZER.bytes_of(TOKENIZER.eos_id) == b""


@settings(deadline=None)
@given(st.binary(max_size=12))
def test_a_byte_of_no_character_becomes_a_replacement_of_its_own(data: bytes) -> None:
    text, at = "", 0
    while at < len(data):
        sizes = [n for n in range(1, 5) if _is_character(data[at : at + n])]
        text += data[at : at + sizes[0]].decode() if sizes else "\ufffd"
        at += sizes[0] if sizes else 1
    assert decode_bytes(data) == text


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def test_a_piece_is_found_by_its_own_spelling_only() -> None:
    token = TOKENIZER.id_of("▁red") or TOKENIZER.encode_untrusted(" red")[0]
    assert TOKENIZER.id_of(TOKENIZER.piece(token)) == token
    assert TOKENIZER.id_of("no such piece") is None


# Streaming


@MANY
@given(IDS, CUTS)
def test_a_stream_gives_the_text_of_all_ids_however_they_arrive(
    ids: list[int], cuts: list[bool]
) -> None:
    assert streamed(ids, cuts) == (TOKENIZER.decode(ids), False)


@MANY
@given(CHARACTERS.filter(lambda t: "\ufffd" not in t), CUTS)
def test_a_stream_never_gives_half_a_character(text: str, cuts: list[bool]) -> None:
    stream = TextStream(TOKENIZER)
    ids = [BYTE_IDS[0] + byte for byte in text.encode()]  # every character in byte pieces
    assert TOKENIZER.decode(ids) == text
    given_out = ""
    for chunk in chunked(ids, cuts):
        given_out += stream.push(chunk)
        assert text.startswith(given_out)
    assert given_out == text
    assert stream.finish() == ""


def test_a_stream_holds_a_character_back_until_its_last_byte() -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push([BYTE_IDS[0] + byte]) for byte in "a\U0001f600b".encode()]
    assert pieces == ["a", "", "", "", "\U0001f600", "b"]


def test_bytes_that_become_no_character_are_given_out_at_the_end() -> None:
    stream = TextStream(TOKENIZER)
    assert stream.push([BYTE_IDS[0xF0], BYTE_IDS[0x9F]]) == ""
    assert stream.finish() == "\ufffd\ufffd"
    assert stream.finish() == ""


def test_without_stop_strings_text_is_given_out_at_once() -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode_untrusted("How many circles are there?")
    assert [stream.push([i]) for i in ids] == [TOKENIZER.decode([i]) for i in ids]


@MANY
@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    CUTS,
)
def test_nothing_at_or_after_a_stop_string_is_ever_given_out(
    text: str, stop: list[str], cuts: list[bool]
) -> None:
    ids = [BYTE_IDS[0] + byte for byte in text.encode()]
    assert streamed(ids, cuts, tuple(stop)) == until_stop(text, stop)


@MANY
@given(IDS, st.lists(st.sampled_from(["é", "\ufffd", "a", " ", "浦\U0001f600"]), min_size=1), CUTS)
def test_stop_strings_of_any_characters_are_found(
    ids: list[int], stop: list[str], cuts: list[bool]
) -> None:
    assert streamed(ids, cuts, tuple(stop)) == until_stop(TOKENIZER.decode(ids), stop)


def test_of_two_stop_strings_the_first_to_be_complete_counts_in_one_chunk_too() -> None:
    ids = TOKENIZER.encode_untrusted("abcd")
    for cuts in ([True], [False]):
        assert streamed(ids, cuts, ("abcd", "bc")) == ("a", True)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ("stop!",))
    assert stream.push(TOKENIZER.encode_untrusted("go st")) == "go "
    assert stream.push(TOKENIZER.encode_untrusted("and s")) == "stand "
    assert stream.finish() == "s"
    assert not stream.stopped


def test_one_stop_string_need_not_be_put_into_a_list() -> None:
    stream = TextStream(TOKENIZER, "end")
    assert stream.push(TOKENIZER.encode_untrusted("need an end here")) == "need an "


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        TextStream(TOKENIZER, ("end", ""))


def test_after_a_stop_string_nothing_follows() -> None:
    stream = TextStream(TOKENIZER, ("\n\n",))
    assert stream.push(TOKENIZER.encode_untrusted("one\n\ntwo")) == "one"
    assert stream.stopped
    assert stream.push(TOKENIZER.encode_untrusted("three")) == ""
    assert stream.finish() == ""


# Files


def test_a_tokenizer_crosses_a_process_border_whole() -> None:
    twin = pickle.loads(pickle.dumps(TOKENIZER))
    assert twin.to_bytes() == TOKENIZER.to_bytes()
    text = "浦语 <s> [UNUSED_TOKEN_145] 12"
    assert twin.encode(text) == TOKENIZER.encode(text)
    assert twin.encode_untrusted(text) == TOKENIZER.encode_untrusted(text)


def test_a_tokenizer_is_read_from_a_checkpoint_of_its_vocabulary(
    tiny: Callable[[Variant], Path],
) -> None:
    assert len(load_tokenizer(tiny("2.5"), 1024)) == 1024


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny: Callable[[Variant], Path]) -> None:
    folder = tiny("2.5")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder, 92544)
    assert caught.value.message == (
        f"{folder / 'tokenizer.model'} has 1,024 pieces, config.json tells a vocabulary of 92,544: "
        "it belongs to another model"
    )


def test_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is missing; copy it from"):
        load_tokenizer(tmp_path, 1024)


@pytest.mark.parametrize("data", [b"", b"not a model" * 10])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a SentencePiece model: "):
        load_tokenizer(tmp_path, 1024)
