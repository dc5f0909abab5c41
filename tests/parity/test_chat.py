"""Prompts of the public chat(): ids, picture places, and what the model answers to them.

The originals' bugs are recorded too, and each is tested for the fixed behaviour: two BOS in prompts
without pictures, slots that do not match the pictures, pictures that are not RGB.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.parity.golden import Case, Golden, Variant
from tests.parity.slow import decode, steps_at_one_base
from xc_ray.errors import InvalidRequest
from xc_ray.model.config import FAMILIES, XComposerConfig
from xc_ray.prompt.chat import (
    IMAGE_MARK,
    ImageSlot,
    Message,
    Role,
    Segment,
    check_order,
    render,
    split_marks,
)
from xc_ray.prompt.sequence import build_prompt, text_ids
from xc_ray.prompt.tiles import Grid
from xc_ray.prompt.tokenizer import Tokenizer

# The text that v2 and 4KHD use by default and 2.5 with use_meta=True.
META_INSTRUCTION = next(f.system_text for f in FAMILIES.values() if f.system_text)


def pictures_of(call: dict[str, Any]) -> list[str]:
    """Names of a call's pictures; prompts alone give their number `n`."""
    image = call.get("image", [str(i) for i in range(call.get("n", 0))])
    return [] if image is None else [image] if isinstance(image, str) else list(image)


def system_of(config: XComposerConfig, call: dict[str, Any], *, chat: bool) -> str | None:
    """The system text that a call means, None for the family's default."""
    if config.variant == "2.5" and chat:  # chat() asks use_meta first
        return call.get("meta_instruction", META_INSTRUCTION) if call.get("use_meta") else None
    text: str | None = call.get("meta_instruction")
    return text


def segments_of(
    config: XComposerConfig, call: dict[str, Any], *, chat: bool = True
) -> list[Segment]:
    """The call as this package takes it: messages in order, slots numbered through."""
    system = system_of(config, call, chat=chat)
    messages = [] if system is None else [Message("system", (system,) if system else ())]
    num_slots = 0
    for query, answer in [*call.get("history", []), (call["query"], None)]:
        turns: list[tuple[Role, str | None]] = [("user", query), ("assistant", answer)]
        for role, text in turns:
            if text is not None:
                messages.append(Message(role, split_marks(text, num_slots)))
                num_slots += text.count(IMAGE_MARK)
    check_order(messages)
    unmarked = config.variant == "2.5" and num_slots == 0 and len(pictures_of(call)) == 1
    return render(config, messages, unmarked_image=unmarked)


def slots_match(config: XComposerConfig, call: dict[str, Any]) -> bool:
    texts = [call["query"], *(text for turn in call.get("history", []) for text in turn)]
    num_slots = sum(text.count(IMAGE_MARK) for text in texts)
    automatic = config.variant == "2.5" and num_slots == 0  # one slot is put in front
    num_pictures = len(pictures_of(call))
    return num_slots == num_pictures or (automatic and num_pictures == 1)


def setting_of(variant: Variant, call: dict[str, Any]) -> str:
    """The picture setting of a call; 2.5 takes its own tile budget for several pictures."""
    config, count = variant.config, len(pictures_of(call))
    if not config.family.tiled:
        return str(config.tile)
    several = count > 1 and config.family.max_tiles != config.family.max_tiles_several
    budget = config.default_max_tiles(count)
    return f"hd{budget if several else call.get('hd_num', budget)}"


def grids_of(variant: Variant, call: dict[str, Any]) -> list[Grid]:
    setting = setting_of(variant, call)
    return [variant.grid(name, setting) for name in pictures_of(call)]


def one_bos(ids: Sequence[int]) -> list[int]:
    """Without the second BOS that the original puts before a prompt without pictures."""
    return list(ids[1:] if list(ids[:2]) == [1, 1] else ids)


def test_a_chat_prompt_has_the_originals_ids_and_picture_places(
    chat_case: Case, golden: Golden
) -> None:
    variant, call = chat_case.variant, chat_case.data["call"]
    tokenizer = golden.folding(variant)
    segments, grids = segments_of(variant.config, call), grids_of(variant, call)
    if not slots_match(variant.config, call):
        message = f"image slots for {len(grids)} pictures"
        with pytest.raises(InvalidRequest, match=message):
            build_prompt(variant.config, tokenizer, segments, grids)
        return
    prompt = build_prompt(variant.config, tokenizer, segments, grids)
    if chat_case.data.get("error"):
        assert prompt.image_tokens == sum(
            variant.config.image_tokens(grid.rows, grid.cols) for grid in grids
        )
        return
    vocab = variant.config.decoder.vocab_size
    texts = [i for i in prompt.ids if i < vocab]
    recorded = [i for part in chat_case.data["tokenizer_calls"] for i in part["folded"]]
    assert texts == one_bos(recorded)
    runs = chat_case.data["image_runs_start_length"]
    assert [[span.start, span.length] for span in prompt.spans] == runs
    doubled = len(recorded) - len(one_bos(recorded))
    assert len(prompt.ids) == chat_case.data["prompt_length"] - doubled


def test_a_picture_that_the_original_cannot_open_is_encoded(failed_case: Case) -> None:
    variant, call = failed_case.variant, failed_case.data["call"]
    for name, grid in zip(pictures_of(call), grids_of(variant, call), strict=True):
        embeddings = variant.embeddings(name, setting_of(variant, call))
        assert len(embeddings) == variant.config.image_tokens(grid.rows, grid.cols)
        assert embeddings.isfinite().all()


def test_the_model_answers_a_recorded_prompt_with_the_originals_ids(answered_case: Case) -> None:
    """From the recorded ids, bugs included, so that this needs no tokenizer."""
    variant, data = answered_case.variant, answered_case.data
    call, told = data["call"], data["generate_kwargs"]
    assert not told["do_sample"]
    assert told.get("num_beams", 1) == 1
    ids, embeddings = recorded_prompt(answered_case)
    assert len(ids) == data["prompt_length"]
    steps = steps_at_one_base(variant.config.decoder, len(ids), told["max_new_tokens"])
    decoder = variant.model.decoder
    with torch.no_grad():
        x, image_rows = decoder.embed(ids, embeddings)
        ours = decode(
            decoder,
            x,
            image_rows,
            steps,
            penalty=told.get("repetition_penalty", 1.0),
            penalised=ids.tolist() if data["given_as"] == "input_ids" else (),
            stop=told["eos_token_id"],
        )
    assert ours.ids == data["generated"][:steps], call


def recorded_prompt(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A case's folded ids with its pictures at their recorded places, as virtual ids."""
    variant, data = case.variant, case.data
    texts = [i for part in data["tokenizer_calls"] for i in part["folded"]]
    row = variant.config.decoder.vocab_size
    ids: list[int] = []
    embeddings = []
    # The original may drop pictures behind the last place.
    places = zip(pictures_of(data["call"]), data["image_runs_start_length"], strict=False)
    for name, (start, length) in places:
        while len(ids) < start:
            ids.append(texts.pop(0))
        ids += range(row, row + length)
        row += length
        embeddings.append(variant.embeddings(name, setting_of(variant, data["call"])))
        assert len(embeddings[-1]) == length
    return torch.tensor(ids + texts), torch.cat(embeddings) if embeddings else None


def test_a_prompt_has_the_originals_text_and_picture_segments(
    prompt_case: Case, golden: Golden
) -> None:
    config, call = prompt_case.variant.published_config, prompt_case.data["call"]
    tokenizer = golden.tokenizer
    segments = segments_of(config, call, chat=False)
    num_pictures = len(pictures_of(call))
    if not slots_match(config, call):
        grids = [Grid(1, 1, (1, 1), (0, 0), (1, 1))] * num_pictures
        with pytest.raises(InvalidRequest, match=f"image slots for {num_pictures} pictures"):
            build_prompt(config, tokenizer, segments, grids)
        return
    recorded: list[list[int] | int] = [
        part["image_index"] if "image_index" in part else one_bos(part["ids"])
        for part in prompt_case.data["segments"]
    ]
    assert encoded(config, tokenizer, segments) == recorded


def encoded(
    config: XComposerConfig, tokenizer: Tokenizer, segments: Sequence[Segment]
) -> list[list[int] | int]:
    """Ids of each text segment that has any, and the index of each picture."""
    result: list[list[int] | int] = []
    for position, segment in enumerate(segments):
        if isinstance(segment, ImageSlot):
            result.append(segment.index)
        elif ids := text_ids(config, tokenizer, segment, first=position == 0):
            result.append(ids)
    return result
