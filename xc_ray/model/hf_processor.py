"""The tokenizer and the processor that `hf.py` registers: text, messages and pictures -> tensors.

A batch for `XComposerForCausalLM` has, besides `input_ids` and `attention_mask` (B, L),

    mm_token_type_ids (B, L)   1 at picture positions, 0 elsewhere: transformers' own name, so that
                               `generate` slices, extends and repeats it
    canvases                   uint8 (H, W, 3), one a picture, over the batch in reading order

Picture positions hold `<unk>` in `input_ids`: an id of the vocabulary, so that logits processors
can index by it, and one that no answer holds, so that a repetition penalty on it means nothing.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizer,
    ProcessorMixin,
)

from xc_ray.errors import CheckpointError, InvalidRequest, MediaError
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.chat import (
    IMAGE_MARK,
    ImageSlot,
    Mark,
    Message,
    Segment,
    TextSegment,
    check_order,
    render,
)
from xc_ray.prompt.sequence import build_prompt
from xc_ray.prompt.tiles import image_grid, make_canvas, open_image
from xc_ray.prompt.tokenizer import TOKENIZER_FILE, Tokenizer

# A picture as PIL has it, the bytes of an image file, or a path to one.
Picture: TypeAlias = Image.Image | bytes | str | Path
_ROLES = ("system", "user", "assistant")


class XComposerTokenizer(PreTrainedTokenizer):
    """`Tokenizer` as a transformers tokenizer: the same ids, `<s>` first unless told otherwise.

    Text is trusted here, as everywhere in transformers: a typed `</s>` or `[UNUSED_TOKEN_145]`
    becomes its id. `XComposerProcessor.apply_chat_template` takes anybody's text. Padding is on the
    left, as `generate` wants it.
    """

    vocab_files_names = {"vocab_file": TOKENIZER_FILE}  # noqa: RUF012 - the base class declares it so
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - the base class declares it so
    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        """`vocab_file` is the path of a `tokenizer.model`.

        Raises:
            CheckpointError: no such file, or not a SentencePiece model.
        """
        if vocab_file is None:
            folder = kwargs.get("name_or_path", "the folder")
            raise CheckpointError(
                f"{folder} has no {TOKENIZER_FILE}; copy it from the published checkpoint"
            )
        core = self.core = Tokenizer(vocab_file)
        self._id_of = {core.piece(i): i for i in range(len(core))}
        kwargs.setdefault("unk_token", core.piece(core.unk_id))
        kwargs.setdefault("bos_token", core.piece(core.bos_id))
        kwargs.setdefault("eos_token", core.piece(core.eos_id))
        kwargs.setdefault("pad_token", kwargs["eos_token"])  # as in every published file
        kwargs["special_tokens_pattern"] = "bos"
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]  # theirs

    @property
    def vocab_size(self) -> int:
        """Pieces of the model file, without tokens added later."""
        return len(self.core)

    def get_vocab(self) -> dict[str, int]:
        """Every piece and added token with its id."""
        return {**self._id_of, **self._added_tokens_encoder}

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes the model file into a folder."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + TOKENIZER_FILE)
        target.write_bytes(self.core.to_bytes())
        return (str(target),)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces -> text, special ones spelled out."""
        ids = self.convert_tokens_to_ids(tokens)
        return self._decode(ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self.core.piece(i) for i in self.core.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._id_of.get(token, self.core.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self.core.piece(index)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        # Spaces stay as they are: no clean-up, and none around special tokens as the original adds.
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        text, run = "", list[int]()
        for token in [token_ids] if isinstance(token_ids, int) else token_ids:
            if token in skipped:
                continue
            if token in self._added_tokens_decoder:
                text += self.core.decode(run) + self._added_tokens_decoder[token].content
                run = []
            else:
                run.append(token)
        return text + self.core.decode(run)


class XComposerProcessor(ProcessorMixin):
    """Text with `<ImageHere>` marks, or messages with picture parts, and the pictures -> a batch.

    A PIL picture is taken as it is (`convert("RGB")` and the exact part); bytes and paths go
    through `open_image`, which applies the EXIF orientation and puts transparency on white.
    """

    image_token = IMAGE_MARK

    def __init__(
        self, tokenizer: XComposerTokenizer, config: XComposerConfig | Mapping[str, Any]
    ) -> None:
        """`config` is the model's, or the keys that `XComposerConfig.to_dict` writes."""
        if not isinstance(config, XComposerConfig):
            config = XComposerConfig.from_dict(config, {})
        self.config = config
        self.image_token_id = config.tokens.unk
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]  # theirs

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the base names the hub's options one by one
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "XComposerProcessor":
        """From a model's folder or hub id, or from a folder that `save_pretrained` wrote."""
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        tokenizer: Any = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config := saved.get("config"):
            return cls(tokenizer, config)
        model = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(tokenizer, model.xcomposer)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds: enough to load the processor without the model."""
        return {"processor_class": type(self).__name__, "config": self.config.to_dict()}

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch."""
        return [*self.tokenizer.model_input_names, "mm_token_type_ids", "canvases"]

    def __call__(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | Sequence[str] = "",
        *,
        max_tiles: int | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Whole prompts, with turn marks as the vocabulary spells them, -> a batch.

        Turn marks and `<ImageHere>` count; everything else is plain text. `images` are in reading
        order over the batch. `max_tiles` is every picture's tile budget, the family's by default.

        Raises:
            InvalidRequest: slots and pictures do not match one to one, or another `padding` than
                to the longest text.
        """
        if padding not in (True, "longest"):
            raise InvalidRequest(f"padding is {padding!r}; texts are padded to the longest")
        prompts = [self._parse(t) for t in ([text] if isinstance(text, str) else text)]
        slots = [sum(isinstance(s, ImageSlot) for s in segments) for segments in prompts]
        pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        pictures = [] if images is None else pictures
        if sum(slots) != len(pictures):
            raise InvalidRequest(
                f"the text has {sum(slots)} image slots for {len(pictures)} pictures; give each "
                "picture one slot"
            )
        rest = iter(pictures)
        rows = [(p, [next(rest) for _ in range(n)]) for p, n in zip(prompts, slots, strict=True)]
        return self._batch(rows, max_tiles, padding_side, return_tensors)

    def apply_chat_template(  # type: ignore[override]  # no templates: there is one turn format
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        max_tiles: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = "pt",
    ) -> Any:
        """Messages -> the prompt's text; with `tokenize` its ids, with `return_dict` the batch.

        `conversation` is a list of messages, or a list of such lists. `content` is a string or a
        list of parts, `{"type": "text", "text": …}` and `{"type": "image", "image": picture}` (or
        `path`). Texts are untrusted: no turn mark and no slot comes out of them (only the *string*
        that `tokenize=False` gives cannot tell them apart). The assistant's turn is opened when the
        last message is a user's, unless told.

        Raises:
            InvalidRequest: roles out of order, an unknown part, or a part without a picture.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        chats = conversation if batched else [conversation]
        rows = [self._render(chat, add_generation_prompt) for chat in chats]
        if not tokenize:
            texts = [self._spell(segments) for segments, _ in rows]
            return texts if batched else texts[0]
        batch = self._batch(rows, max_tiles, padding_side, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def _render(
        self, chat: Sequence[Mapping[str, Any]], answer: bool | None
    ) -> tuple[list[Segment], list[Any]]:
        """Segments of one conversation, and its pictures."""
        pictures: list[Any] = []
        messages = [_message(turn, pictures) for turn in chat]
        if answer is None:
            answer = not messages or messages[-1].role == "user"
        if answer:
            check_order(messages)
        return render(self.config, messages, answer_follows=answer), pictures

    @property
    def _marks(self) -> dict[str, Mark]:
        tokens, piece = self.config.tokens, self.tokenizer.core.piece
        return {piece(tokens.start_of_turn): Mark("start"), piece(tokens.end_of_turn): Mark("end")}

    def _parse(self, text: str) -> list[Segment]:
        marks = self._marks
        mark = re.compile("(" + "|".join(map(re.escape, marks)) + ")")
        segments: list[Segment] = []
        for index, part in enumerate(text.split(IMAGE_MARK)):
            segments += [ImageSlot(index - 1)] if index else []
            segments.append(TextSegment(tuple(marks.get(p, p) for p in mark.split(part) if p)))
        return segments

    def _spell(self, segments: Sequence[Segment]) -> str:
        spelled = {mark: piece for piece, mark in self._marks.items()}
        return "".join(
            IMAGE_MARK
            if isinstance(s, ImageSlot)
            else "".join(spelled[i] if isinstance(i, Mark) else i for i in s.items)
            for s in segments
        )

    def _batch(
        self,
        rows: Sequence[tuple[Sequence[Segment], Sequence[Picture]]],
        max_tiles: int | None,
        padding_side: str | None,
        return_tensors: str | None,
    ) -> BatchFeature:
        config, vocab = self.config, self.config.decoder.vocab_size
        ids: list[list[int]] = []
        canvases: list[torch.Tensor] = []
        for segments, sources in rows:
            pictures = [_open(s) for s in sources]
            budget = config.default_max_tiles(len(pictures)) if max_tiles is None else max_tiles
            grids = [image_grid(config, p.size, budget) for p in pictures]
            prompt = build_prompt(config, self.tokenizer.core, segments, grids)
            for span in prompt.spans:
                picture, grid = pictures[span.image], grids[span.image]
                canvas = make_canvas(picture, grid, tiled=config.family.tiled)
                canvases.append(torch.from_numpy(np.array(canvas)))
            ids.append(prompt.ids)
        longest = max(map(len, ids))
        left = (padding_side or self.tokenizer.padding_side) == "left"

        def pad(values: list[int], filler: int) -> list[int]:
            filling = [filler] * (longest - len(values))
            return filling + values if left else values + filling

        data = {
            "input_ids": [
                pad([i if i < vocab else self.image_token_id for i in row], config.tokens.pad)
                for row in ids
            ],
            "attention_mask": [pad([1] * len(row), 0) for row in ids],
            "mm_token_type_ids": [pad([int(i >= vocab) for i in row], 0) for row in ids],
        }
        batch = BatchFeature(data, tensor_type=return_tensors)
        if canvases:
            batch["canvases"] = canvases
        return batch


def _message(turn: Mapping[str, Any], pictures: list[Any]) -> Message:
    """One message; the pictures of its parts are appended to `pictures`."""
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES:
        raise InvalidRequest(f"a message has role {role!r}, known are {', '.join(_ROLES)}")
    parts: list[str | ImageSlot] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif part.get("type") == "image":
            parts.append(ImageSlot(len(pictures)))
            pictures.append(part.get("image", part.get("path", part.get("url"))))
        else:
            raise InvalidRequest(f"a content part is {part!r}; it is text with a string, or image")
    return Message(role, tuple(parts))


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return open_image(source)
    if isinstance(source, str | Path) and "://" not in str(source):
        try:
            return open_image(Path(source).read_bytes())
        except OSError as e:
            raise MediaError(f"{source} cannot be read: {e.strerror or e}") from None
    raise InvalidRequest(
        f"a picture is {str(source)[:80]!r} ({type(source).__name__}); give a PIL image, the bytes "
        "of a file or a path (nothing is fetched here)"
    )
