from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.demo.make import tiny_config, train_tokenizer
from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.config import FAMILIES, GENERATION_DEFAULTS, Variant, XComposerConfig, preset
from xc_ray.prompt.chat import ImageSlot, Mark, Message, Segment, TextSegment, render
from xc_ray.prompt.sequence import (
    ImageSpan,
    Prompt,
    answer_room,
    build_prompt,
    check_slots,
    picture_grids,
)
from xc_ray.prompt.tiles import Grid
from xc_ray.prompt.tokenizer import Tokenizer

TOKENIZER = Tokenizer(train_tokenizer())
VOCAB = len(TOKENIZER)
BOS = 1
OLDER: list[Variant] = ["2.0", "2.0-VL", "2.0-4KHD"]


def grid(rows: int, cols: int) -> Grid:
    return Grid(rows, cols, (1, 1), (0, 0), (1, 1))


def ids_of(text: str) -> list[int]:
    """What the original tokenizer makes of a whole text, turn marks written out."""
    return TOKENIZER.encode(
        text.replace("<start>", "[UNUSED_TOKEN_146]").replace("<end>", "[UNUSED_TOKEN_145]")
    )


def prompt_of(
    variant: Variant, messages: list[Message], *grids: Grid, unmarked: bool = False
) -> Prompt:
    config = tiny_config(variant)
    return build_prompt(config, TOKENIZER, render(config, messages, unmarked_image=unmarked), grids)


def picture_ids(first: int, count: int) -> list[int]:
    return list(range(VOCAB + first, VOCAB + first + count))


def test_a_text_prompt_of_2_5_is_one_bos_and_the_turns() -> None:
    prompt = prompt_of("2.5", [Message("user", ("What is it? 12",))])
    text = "<start>user\nWhat is it? 12<end>\n<start>assistant\n"
    assert prompt == Prompt([BOS, *ids_of(text)], ())


@pytest.mark.parametrize("variant", OLDER)
def test_a_text_prompt_of_an_older_variant_begins_with_its_system_text(variant: Variant) -> None:
    prompt = prompt_of(variant, [Message("user", ("Hi",))])
    system = FAMILIES[variant].system_text
    text = f"<start>system\n{system}<end>\n<start>user\nHi<end>\n<start>assistant\n"
    assert prompt.ids == [BOS, *ids_of(text)]


def test_typed_turn_marks_stay_text() -> None:
    typed = "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\nYes</s><ImageHere>"
    ids = prompt_of("2.5", [Message("user", (typed,))]).ids
    tokens = tiny_config("2.5").tokens
    assert ids.count(tokens.start_of_turn) == 2
    assert ids.count(tokens.end_of_turn) == 1
    assert tokens.eos not in ids
    assert max(ids) < VOCAB


def test_2_5_has_one_bos_even_before_a_picture_that_comes_first() -> None:
    prompt = prompt_of("2.5", [Message("user", ("Hi",))], grid(1, 1), unmarked=True)
    count = tiny_config("2.5").image_tokens(1, 1)
    text = "<start>user\nHi<end>\n<start>assistant\n"
    assert prompt.ids == [BOS, *picture_ids(0, count), *ids_of(text)]
    assert prompt.spans == (ImageSpan(0, 1, count),)


def test_2_5_has_no_bos_after_a_picture() -> None:
    prompt = prompt_of("2.5", [Message("user", ("a", ImageSlot(0), "b"))], grid(1, 2))
    count = tiny_config("2.5").image_tokens(1, 2)
    before = [BOS, *ids_of("<start>user\na")]
    assert prompt.ids == [
        *before,
        *picture_ids(0, count),
        *ids_of("b<end>\n<start>assistant\n"),
    ]
    assert prompt.spans == (ImageSpan(0, len(before), count),)


@pytest.mark.parametrize("variant", OLDER)
def test_an_older_variant_has_a_bos_before_every_part_that_is_not_empty(variant: Variant) -> None:
    messages = [
        Message("system", ("",)),
        Message("user", (ImageSlot(0), ImageSlot(1), "b")),
    ]
    prompt = prompt_of(variant, messages, grid(1, 1), grid(1, 1))
    count = tiny_config(variant).image_tokens(1, 1)
    assert prompt.ids == [
        *(BOS, *ids_of("<start>user\n")),
        *picture_ids(0, count),  # nothing, not even a BOS, between the two pictures
        *picture_ids(count, count),
        *(BOS, *ids_of("b<end>\n<start>assistant\n")),
    ]


@pytest.mark.parametrize("variant", FAMILIES)
def test_pictures_in_any_turn_are_numbered_on_by_row(variant: Variant) -> None:
    config = tiny_config(variant)
    grids = [grid(1, 2), grid(2, 1), grid(1, 1)]
    messages = [
        Message("user", ("first", ImageSlot(0))),
        Message("assistant", ("one",)),
        Message("user", (ImageSlot(1), "and", ImageSlot(2))),
    ]
    prompt = prompt_of(variant, messages, *grids)
    lengths = [config.image_tokens(g.rows, g.cols) for g in grids]
    assert [s.length for s in prompt.spans] == lengths
    assert [i for i in prompt.ids if i >= VOCAB] == picture_ids(0, sum(lengths))
    for span, first in zip(prompt.spans, (0, lengths[0], sum(lengths[:2])), strict=True):
        place = prompt.ids[span.start : span.start + span.length]
        assert place == picture_ids(first, span.length)
    assert prompt.image_tokens == sum(lengths)


def test_rows_are_numbered_in_the_order_of_the_prompt_and_spans_name_the_picture() -> None:
    config = tiny_config("2.5")
    segments: list[Segment] = [ImageSlot(1), TextSegment(("and",)), ImageSlot(0)]
    prompt = build_prompt(config, TOKENIZER, segments, [grid(1, 1), grid(2, 2)])
    assert [s.image for s in prompt.spans] == [1, 0]
    assert [s.length for s in prompt.spans] == [
        config.image_tokens(2, 2),
        config.image_tokens(1, 1),
    ]
    assert [i for i in prompt.ids if i >= VOCAB] == picture_ids(0, prompt.image_tokens)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=4))
def test_a_text_between_marks_has_the_ids_of_the_whole(texts: list[str]) -> None:
    # The original tokenises a run of turns as one string; here the marks part it.
    items: list[Mark | str] = []
    whole = ""
    for text in texts:
        items += [Mark("start"), "user\n", text, Mark("end"), "\n"]
        whole += f"[UNUSED_TOKEN_146]user\n{text}[UNUSED_TOKEN_145]\n"
    prompt = build_prompt(tiny_config("2.5"), TOKENIZER, [TextSegment(tuple(items))], [])
    assert prompt.ids == TOKENIZER.encode(whole, bos=True)


@pytest.mark.parametrize(
    ("slots", "num_images"), [([], 1), ([0], 0), ([0, 1], 1), ([0], 2), ([0, 0], 2), ([1], 1)]
)
def test_slots_and_pictures_must_match_one_to_one(slots: list[int], num_images: int) -> None:
    segments: list[Segment] = [TextSegment(("a",)), *(ImageSlot(i) for i in slots)]
    with pytest.raises(InvalidRequest) as caught:
        check_slots(segments, num_images)
    assert caught.value.message == (
        f"the prompt has {len(slots)} image slots for {num_images} pictures; give each picture one "
        "slot"
    )
    with pytest.raises(InvalidRequest):
        build_prompt(tiny_config("2.5"), TOKENIZER, segments, [grid(1, 1)] * num_images)


# Room for the answer


def prompt_with(text: int, *pictures: int) -> Prompt:
    spans = []
    for i, length in enumerate(pictures):
        spans.append(ImageSpan(i, sum(pictures[:i]), length))
    return Prompt([0] * (text + sum(pictures)), tuple(spans))


def test_the_answer_gets_what_it_asks_for_if_that_fits() -> None:
    assert answer_room(prompt_with(100), 128, max_tokens=28) == 28
    assert answer_room(prompt_with(100), 128, max_tokens=1) == 1


def test_without_a_wish_the_answer_gets_the_familys_default_or_what_is_left() -> None:
    assert answer_room(prompt_with(100), 128) == 28
    assert answer_room(prompt_with(127), 128) == 1
    assert answer_room(prompt_with(100), 10_000) == GENERATION_DEFAULTS.max_tokens == 1024


def refusal(
    prompt: Prompt, limit: int, max_tokens: int | None = None, tiles: tuple[int, ...] = ()
) -> str:
    with pytest.raises(PromptTooLong) as caught:
        answer_room(prompt, limit, max_tokens=max_tokens, tiles=tiles)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    return caught.value.message


def test_too_long_a_text_is_told_its_length_and_the_limit() -> None:
    assert refusal(prompt_with(16_384), 16_384) == (
        "the prompt takes 16,384 tokens, the model holds 16,384 with the answer; shorten the text"
    )


def test_an_answer_that_does_not_fit_is_told_what_would() -> None:
    assert refusal(prompt_with(16_000), 16_384, 385) == (
        "the prompt takes 16,000 tokens, with max_tokens 385 that is 16,385, the model holds "
        "16,384; lower max_tokens to 384 or shorten the prompt"
    )


def test_pictures_that_do_not_fit_are_told_what_each_costs_and_what_is_left_for_them() -> None:
    prompt = prompt_with(541, 15_000, 10_101)
    assert refusal(prompt, 16_384, tiles=(36, 24)) == (
        "the prompt takes 25,642 tokens (25,101 for images; image 1: 15,000 in 36 tiles, "
        "image 2: 10,101 in 24 tiles), the model holds 16,384 with the answer, which leaves 15,842 "
        "for images; send fewer images or lower max_tiles"
    )
    assert "which leaves 15,743 for images" in refusal(prompt, 16_384, 100, (36, 24))
    assert "(25,101 for images; image 1: 15,000, image 2: 10,101)" in refusal(prompt, 16_384)


def test_no_room_at_all_for_pictures_is_told_as_none() -> None:
    assert "which leaves 0 for images" in refusal(prompt_with(20_000, 500), 16_384)


def test_an_answer_of_no_tokens_is_not_taken_for_no_wish() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        answer_room(prompt_with(100), 128, max_tokens=0)


# Grids of a request


def num_tiles(config: XComposerConfig, budgets: list[int | None]) -> list[int]:
    grids = picture_grids(config, [(5000, 5000)] * len(budgets), budgets)
    return [g.num_tiles for g in grids]


def test_one_picture_has_the_familys_budget_and_several_share_a_smaller_one() -> None:
    config = preset("2.5")
    assert num_tiles(config, [None]) == [16]  # 4 × 4 of 24
    assert num_tiles(config, [None, None]) == [4, 4]  # 2 × 2 of 6
    assert num_tiles(preset("2.0-4KHD"), [None, None]) == [25, 25]


def test_a_budget_that_is_given_wins() -> None:
    assert num_tiles(preset("2.5"), [9, None, 1]) == [9, 4, 1]


def test_a_budget_of_less_than_one_tile_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_tiles is 0, the least is 1"):
        num_tiles(preset("2.5"), [0])


@pytest.mark.parametrize("variant", ["2.0", "2.0-VL"])
def test_an_untiled_picture_is_one_square_whatever_its_size(variant: Variant) -> None:
    config = replace(preset(variant))
    (square,) = picture_grids(config, [(5000, 20)], [None])
    assert (square.num_tiles, square.canvas) == (1, (config.tile, config.tile))
