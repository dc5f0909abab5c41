"""Training samples against the original: ids, labels, image spans, losses, gradients.

Losses and gradients are computed from the stored ids, so that they need no tokenizer. Where the
original is wrong or cannot do something, the fixed behaviour is tested; a sample shows by itself
that it is such a case: it holds an error, a system turn, pictures without slots, or pictures and
too many tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.golden import (
    GRADIENT_NORM,
    LOSS,
    Case,
    Golden,
    Variant,
    messages_of_text,
)
from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.weights import published_name
from xc_ray.prompt.chat import IMAGE_MARK, Message
from xc_ray.prompt.tiles import Grid
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.train.data import (
    IGNORED,
    Example,
    encode_conversation,
    parse_turns,
)
from xc_ray.train.loss import supervised_loss
from xc_ray.train.network import Learner, LoraOps, Pack

START, END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"


@dataclass(frozen=True)
class Row:
    """One conversation of a sample."""

    sample: dict[str, Any]
    number: int
    variant: Variant
    text: str
    pictures: Sequence[str]

    @property
    def messages(self) -> list[Message]:
        """From the conversation where the sample has one, else from the joined text."""
        turns = self.sample.get("conversation")
        return parse_turns(turns) if turns else messages_of_text(self.text)

    @property
    def grids(self) -> list[Grid]:
        return [self.variant.grid(name, self.sample["image_setting"]) for name in self.pictures]

    @property
    def num_slots(self) -> int:
        return self.text.count(IMAGE_MARK)

    @property
    def has_system_turn(self) -> bool:
        return any(message.role == "system" for message in self.messages)

    @property
    def without_slot(self) -> bool:
        """One picture and no slot: 2.5 puts it in front, elsewhere the original puts it behind."""
        return len(self.pictures) == 1 and self.num_slots == 0

    @property
    def slot_is_fixed(self) -> bool:
        return self.without_slot and self.variant.config.variant != "2.5"

    @property
    def mismatched(self) -> bool:
        return len(self.pictures) != self.num_slots and not self.without_slot

    def encode(self, tokenizer: Tokenizer, max_length: int) -> Example:
        config = self.variant.config
        return encode_conversation(
            config, tokenizer, self.messages, self.grids, max_length=max_length
        )

    def stored(self, what: str) -> list[int]:
        """Golden ids or labels without padding."""
        attended = self.sample["rows"][self.number]["attended"]
        values = self.variant.loss_rows[f"{self.sample['name']}.{self.number}.{what}"]
        ids: list[int] = values[:attended].tolist()
        return ids


def rows_of(case: Case) -> list[Row]:
    sample = case.data
    texts, pictures = sample["texts"], sample["images"]  # batches of texts alone list no pictures
    missing: list[list[str]] = [[]] * (len(texts) - len(pictures))
    pairs = zip(texts, [*pictures, *missing], strict=True)
    return [Row(sample, i, case.variant, text, own) for i, (text, own) in enumerate(pairs)]


def textbook(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a joined text without pictures, straight from its turn marks."""
    ids, labels = tokenizer.encode("", bos=True), [IGNORED]
    for turn in text.removesuffix("</s>").split(START)[1:]:
        role, _, rest = turn.partition("\n")
        value = rest.partition(END)[0].strip()
        for part, is_answer in (
            (f"{START}{role}\n", False),
            (f"{value}{END}", role == "assistant"),
            ("\n", False),
        ):
            new = tokenizer.encode(part)
            ids += new
            labels += new if is_answer else [IGNORED] * len(new)
    newline = len(tokenizer.encode("\n"))
    ids += tokenizer.encode("</s>")
    return ids, [*labels[:-newline], *ids[-newline - 1 :]]


def learnt(labels: Sequence[int]) -> list[int]:
    return [label for label in labels if label != IGNORED]


def without_pictures(example: Example) -> tuple[list[int], list[int]]:
    inside = {i for s in example.spans for i in range(s.start, s.start + s.length)}
    kept = [i for i in range(len(example.ids)) if i not in inside]
    return [example.ids[i] for i in kept], [example.labels[i] for i in kept]


def is_cut(row: Row, tokenizer: Tokenizer) -> bool:
    max_length: int = row.sample["max_length"]
    return len(row.encode(tokenizer, 1 << 30).ids) > max_length


def test_ids_labels_and_spans_match_the_original(sample: Case, golden: Golden) -> None:
    tokenizer = golden.folding(sample.variant)
    rows = [
        row
        for row in rows_of(sample)
        if not (row.sample.get("error") or row.mismatched or row.slot_is_fixed)
        and not (row.pictures and is_cut(row, tokenizer))
    ]
    if not rows:
        pytest.skip("the original is wrong here, the fixed behaviour is tested below")
    for row in rows:
        ours = row.encode(tokenizer, row.sample["max_length"])
        vocab = row.variant.config.decoder.vocab_size
        assert [i if i < vocab else -1 for i in ours.ids] == row.stored("ids")
        runs = row.sample["rows"][row.number]["image_runs_start_length"]
        assert [[span.start, span.length] for span in ours.spans] == runs
        if not row.has_system_turn:  # else the original's labels are wrong
            assert ours.labels == row.stored("labels")
            told = row.sample["rows"][row.number]
            positions = [i for i, label in enumerate(ours.labels) if label != IGNORED]
            assert positions == told["supervised_positions"]
            assert [ours.labels[i] for i in positions] == told["supervised_labels"]


def test_real_ids_and_labels_match_the_original(real_sample: Case, golden: Golden) -> None:
    (row,) = rows_of(real_sample)
    recorded = real_sample.data["real_ids"]  # v2 recorded them before the cut
    ours = encode_conversation(
        real_sample.variant.published_config,
        golden.tokenizer,
        row.messages,
        [],
        max_length=max(real_sample.data["max_length"], len(recorded)),
    )
    assert ours.ids == recorded
    if not row.has_system_turn:
        assert ours.labels == real_sample.data["real_labels"]


def test_the_turns_of_a_conversation_are_its_joined_text(conversation_sample: Case) -> None:
    (text,) = conversation_sample.data["texts"]
    joined = "".join(
        f"{START}{message.role}\n"
        + "".join(p if isinstance(p, str) else IMAGE_MARK for p in message.parts).strip()
        + f"{END}\n"
        for message in parse_turns(conversation_sample.data["conversation"])
    )
    assert f"{joined}</s>" == text


def test_a_system_turn_does_not_shift_what_is_learnt(system_sample: Case, golden: Golden) -> None:
    tokenizer = golden.folding(system_sample.variant)
    for row in rows_of(system_sample):
        if row.mismatched:
            continue
        ours = row.encode(tokenizer, 1 << 30)
        ids, labels = textbook(tokenizer, row.text.replace(IMAGE_MARK, ""))
        assert learnt(ours.labels) == learnt(labels)
        if not row.pictures:
            assert (ours.ids, ours.labels) == (ids, labels)


def test_what_the_original_cannot_do_is_encoded(failed_sample: Case, golden: Golden) -> None:
    tokenizer = golden.folding(failed_sample.variant)
    for row in rows_of(failed_sample):
        if row.mismatched:
            continue
        ours = row.encode(tokenizer, row.sample["max_length"])
        assert [s.length for s in ours.spans] == tokens_of(row)
        _, labels = textbook(tokenizer, row.text.replace(IMAGE_MARK, ""))
        assert learnt(ours.labels) == learnt(labels)


def test_a_picture_without_slot_goes_before_the_first_question(
    picture_sample: Case, golden: Golden
) -> None:
    """Shown on every sample with one picture by taking its slot away; in 2.5 it goes in front."""
    variant, tokenizer = picture_sample.variant, golden.folding(picture_sample.variant)
    for row in rows_of(picture_sample):
        if len(row.pictures) != 1:
            continue
        text = row.text.replace(IMAGE_MARK, "")
        ours = encode_conversation(variant.config, tokenizer, messages_of_text(text), row.grids)
        head = text[: text.index(f"{START}user\n")] + f"{START}user\n"
        in_front = variant.config.variant == "2.5"
        start = 0 if in_front else len(tokenizer.encode(head, bos=True))
        assert [[s.start, s.length] for s in ours.spans] == [[start, *tokens_of(row)]]
        assert without_pictures(ours) == textbook(tokenizer, text)


def test_slots_that_do_not_match_the_pictures_are_refused(
    picture_sample: Case, golden: Golden
) -> None:
    """Shown on every sample by adding a picture, or taking all away where there are slots."""
    tokenizer = golden.folding(picture_sample.variant)
    for row in rows_of(picture_sample):
        pictures = [] if row.num_slots else [*row.grids, *row.grids]
        if row.mismatched:
            pictures = row.grids
        with pytest.raises(
            InvalidRequest, match=f"{row.num_slots} image slots for {len(pictures)}"
        ):
            encode_conversation(row.variant.config, tokenizer, row.messages, pictures)


def test_a_row_with_pictures_is_never_cut(picture_sample: Case, golden: Golden) -> None:
    tokenizer = golden.folding(picture_sample.variant)
    for row in rows_of(picture_sample):
        if row.mismatched or not row.pictures:
            continue
        whole = row.encode(tokenizer, 1 << 30)
        needed = len(whole.ids)
        assert row.encode(tokenizer, needed) == whole
        limit = min(needed - 1, row.sample["max_length"])
        message = (
            f"takes {needed:,} tokens .*image 1: {tokens_of(row)[0]:,}.* max_length is {limit:,}"
        )
        with pytest.raises(PromptTooLong, match=message):
            row.encode(tokenizer, limit)


def tokens_of(row: Row) -> list[int]:
    return [row.variant.config.image_tokens(grid.rows, grid.cols) for grid in row.grids]


def test_losses_match_the_original(loss_sample: Case) -> None:
    with torch.no_grad():
        loss = loss_of(loss_sample, rows_of(loss_sample))
    assert abs(loss.item() - loss_sample.data["loss"]) <= LOSS


def test_what_training_computes_matches_the_original(loss_sample: Case) -> None:
    """In chunks over the rows that predict alone, the last layer for these alone."""
    variant = loss_sample.variant
    ids, labels, lengths, pictures = flat_of(loss_sample, rows_of(loss_sample))
    pack = Pack.of(ids, labels, lengths, [], variant.config.decoder.vocab_size)
    learner = Learner(variant.model.decoder, LoraOps(), recompute=False).eval()
    with torch.no_grad():
        loss = learner(pack, pictures) / len(pack.wanted)
    assert abs(loss.item() - loss_sample.data["loss"]) <= LOSS


def test_gradient_norms_match_the_original(gradient_sample: Case) -> None:
    model, told = gradient_sample.variant.model, gradient_sample.data["grad_norms"]
    wanted = {
        published_name(name): parameter
        for name, parameter in model.named_parameters()
        if published_name(name) in told
    }
    try:
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        loss_of(gradient_sample, rows_of(gradient_sample), train_vision=True).backward()
        ours = {n: 0.0 if p.grad is None else p.grad.norm().item() for n, p in wanted.items()}
    finally:
        for parameter in wanted.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    wrong = {
        name: (ours.get(name, 0.0), norm)
        for name, norm in told.items()
        if abs(ours.get(name, 0.0) - norm) > GRADIENT_NORM * norm
    }
    assert not wrong, f"(ours, golden): {wrong}"


def loss_of(case: Case, rows: Sequence[Row], *, train_vision: bool = False) -> Tensor:
    """The loss of a sample's stored ids and labels, its rows as one flat batch."""
    model = case.variant.model
    ids, labels, lengths, pictures = flat_of(case, rows, train_vision=train_vision)
    hidden = model(ids, lengths, pictures)
    return supervised_loss(model.decoder.logits(hidden), labels)


def flat_of(
    case: Case, rows: Sequence[Row], *, train_vision: bool = False
) -> tuple[Tensor, Tensor, list[int], Tensor | None]:
    """Stored ids and labels of all rows end to end, their lengths, embeddings of all pictures."""
    ids, labels, embeddings = [], [], []
    row_number = case.variant.config.decoder.vocab_size
    for row in rows:
        mine = row.stored("ids")
        for embedded, (start, length) in pictures_of(row, train_vision=train_vision):
            mine[start : start + length] = range(row_number, row_number + length)
            row_number += length
            embeddings.append(embedded[:length])  # the original cuts a picture that is too long
        ids.append(torch.tensor(mine))
        labels.append(torch.tensor(row.stored("labels")))
        assert min(mine) >= 0
    lengths = [len(part) for part in ids]
    return torch.cat(ids), torch.cat(labels), lengths, torch.cat(embeddings) if embeddings else None


def pictures_of(row: Row, *, train_vision: bool) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Embeddings and place of each picture of a row, computed anew if their gradient is wanted."""
    setting = row.sample["image_setting"]
    runs = row.sample["rows"][row.number]["image_runs_start_length"]
    for name, run in zip(row.pictures, runs, strict=True):
        if train_vision:
            canvas = torch.from_numpy(row.variant.canvas(name, setting).copy())
            yield row.variant.model.vision([canvas])[0], run
        else:
            yield row.variant.embeddings(name, setting), run
