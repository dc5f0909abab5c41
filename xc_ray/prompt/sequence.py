"""Segments and grids -> one list of ids with image spans; no pixel is decoded for any count.

Image positions are virtual ids `vocab_size + row`, where `row` counts the image embeddings of the
request, so that one list of ints says everything: the PLoRA mask is `id >= vocab_size`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.config import GENERATION_DEFAULTS, XComposerConfig
from xc_ray.prompt.chat import ImageSlot, Mark, Segment, TextSegment
from xc_ray.prompt.tiles import Grid, image_grid
from xc_ray.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageSpan:
    """One picture inside a prompt.

    `image` is its index in the request; `start` and `length` are in tokens.
    """

    image: int
    start: int
    length: int


@dataclass(frozen=True)
class Prompt:
    """Ids of a request, image rows as `vocab_size + row`; spans in the order of the ids."""

    ids: list[int]
    spans: tuple[ImageSpan, ...]

    @property
    def image_tokens(self) -> int:
        """Tokens of all pictures together, overviews and separators included."""
        return sum(span.length for span in self.spans)


def build_prompt(
    config: XComposerConfig,
    tokenizer: Tokenizer,
    segments: Sequence[Segment],
    grids: Sequence[Grid],
) -> Prompt:
    """Ids and image spans; `grids[i]` is the grid of picture i.

    Raises:
        InvalidRequest: slots and pictures do not match one to one.
    """
    check_slots(segments, len(grids))
    ids: list[int] = []
    spans: list[ImageSpan] = []
    row = config.decoder.vocab_size
    for position, segment in enumerate(segments):
        if isinstance(segment, ImageSlot):
            grid = grids[segment.index]
            length = config.image_tokens(grid.rows, grid.cols)
            spans.append(ImageSpan(segment.index, len(ids), length))
            ids.extend(range(row, row + length))
            row += length
        else:
            ids.extend(text_ids(config, tokenizer, segment, first=position == 0))
    return Prompt(ids, tuple(spans))


def text_ids(
    config: XComposerConfig, tokenizer: Tokenizer, segment: TextSegment, *, first: bool
) -> list[int]:
    """Ids of one text segment with the family's BOS rule.

    v2 and 4KHD put BOS before every non-empty part, 2.5 once, before the first.
    """
    ids: list[int] = []
    text = ""
    for item in segment.items:
        if isinstance(item, Mark):
            # No piece spans a turn mark, so encoding between marks equals encoding the whole.
            ids += tokenizer.encode_untrusted(text)
            text = ""
            ids.append(
                config.tokens.start_of_turn if item.kind == "start" else config.tokens.end_of_turn
            )
        else:
            text += item
    ids += tokenizer.encode_untrusted(text)
    bos = bool(ids) if config.family.bos_every_part else first
    return [config.tokens.bos, *ids] if bos else ids


def check_slots(segments: Sequence[Segment], num_images: int) -> None:
    """Every picture has one slot and every slot a picture.

    Raises:
        InvalidRequest: with both counts (the original warns, drops or appends pictures).
    """
    slots = [s.index for s in segments if isinstance(s, ImageSlot)]
    if sorted(slots) != list(range(num_images)):
        raise InvalidRequest(
            f"the prompt has {len(slots)} image slots for {num_images} pictures; "
            "give each picture one slot"
        )


def answer_room(
    prompt: Prompt,
    max_model_len: int,
    *,
    max_tokens: int | None = None,
    tiles: Sequence[int] = (),
) -> int:
    """Tokens that may be generated: `max_tokens`, or else the family's default or what is left.

    `tiles` are the tiles of each picture, for the message.

    Raises:
        PromptTooLong: says how many tokens there are, what each picture costs and what would fit.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}, the least is 1", param="max_tokens")
    num_tokens = len(prompt.ids)
    left = max_model_len - num_tokens
    if left >= (max_tokens or 1):
        return max_tokens or min(left, GENERATION_DEFAULTS.max_tokens)
    message = f"the prompt takes {num_tokens:,} tokens{_costs(prompt, tiles)}, "
    if left >= 1:
        message += (
            f"with max_tokens {max_tokens:,} that is {num_tokens + (max_tokens or 1):,}, the model "
            f"holds {max_model_len:,}; lower max_tokens to {left:,} or shorten the prompt"
        )
    elif not prompt.spans:
        message += f"the model holds {max_model_len:,} with the answer; shorten the text"
    else:
        room = max(0, max_model_len - (num_tokens - prompt.image_tokens) - (max_tokens or 1))
        message += (
            f"the model holds {max_model_len:,} with the answer, which leaves {room:,} for images; "
            "send fewer images or lower max_tiles"
        )
    raise PromptTooLong(message, param="messages", code="context_length_exceeded")


def _costs(prompt: Prompt, tiles: Sequence[int]) -> str:
    if not prompt.spans:
        return ""
    each = ", ".join(
        f"image {s.image + 1}: {s.length:,}" + (f" in {tiles[s.image]} tiles" if tiles else "")
        for s in prompt.spans
    )
    return f" ({prompt.image_tokens:,} for images; {each})"


def picture_grids(
    config: XComposerConfig, sizes: Sequence[tuple[int, int]], max_tiles: Sequence[int | None]
) -> list[Grid]:
    """Grids of a request's pictures by (width, height).

    A budget of None is the family's for so many pictures.
    """
    default = config.default_max_tiles(len(sizes))
    return [
        image_grid(config, size, default if budget is None else budget)
        for size, budget in zip(sizes, max_tiles, strict=True)
    ]
