"""A request's ids, parameters and images, checked -> a Sequence."""

import struct
from collections.abc import Sequence as Seq
from itertools import accumulate

from torch import Tensor

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.sequence import Image, SamplingParams, Sequence
from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.config import DecoderConfig
from xc_ray.model.rope import rope_base


def make_sequence(
    request_id: str,
    ids: Seq[int],
    params: SamplingParams,
    images: Seq[Tensor | Image],
    adapter: PackedAdapter | None,
    model: DecoderConfig,
    limits: EngineConfig,
    salt: bytes = b"",
) -> Sequence:
    """A new sequence with image objects of its own; arguments as of `Engine.add`.

    Raises:
        InvalidRequest: see `Engine.add`.
    """
    ids = list(ids)
    own = tuple(
        Image(i.num_rows, i.digest, i.embeddings)
        if isinstance(i, Image)
        else Image(len(i), embeddings=i)
        for i in images
    )
    room = limits.num_blocks * limits.block_size + 1  # the last token need not be in the cache
    _check_length(ids, params, limits, room)
    _check_images(ids, own, model)
    _check_ids(ids, params, model.vocab_size)
    if adapter is not None and not limits.max_loras:
        raise InvalidRequest("this engine has no room for adapters: max_loras is 0", param="model")
    if adapter is not None and adapter.rank > limits.padded_lora_rank:
        raise InvalidRequest(
            f"the adapter was packed with rank {adapter.rank} and the slots of this engine hold "
            f"{limits.padded_lora_rank}; pack it for this engine",
            param="model",
        )
    return Sequence(
        request_id,
        ids,
        params,
        own,
        _image_starts(ids, own, model.vocab_size),
        _prefix_key(len(ids) + params.max_tokens, model, adapter, salt),
        min(params.max_tokens, room - len(ids)),
        adapter=adapter,
    )


def check_embeddings(embeddings: Tensor, num_rows: int, width: int) -> None:
    """Refuses embeddings of a picture that are not (num_rows, width).

    Raises:
        InvalidRequest: says both shapes.
    """
    if tuple(embeddings.shape) != (num_rows, width):
        raise InvalidRequest(
            f"embeddings of a picture have shape {tuple(embeddings.shape)}, "
            f"expected ({num_rows}, {width})"
        )


def _prefix_key(
    rope_length: int, model: DecoderConfig, adapter: PackedAdapter | None, salt: bytes
) -> bytes:
    """What blocks are told apart by, beside ids and images.

    A rope base scaled by the length, the adapter and the salt, each with its length in front.
    """
    digest = adapter.digest.encode() if adapter is not None else b""
    base = rope_base(model, rope_length)
    return struct.pack("<dqq", base, len(digest), len(salt)) + digest + salt


def _image_starts(ids: list[int], images: Seq[Image], vocab_size: int) -> tuple[int, ...]:
    firsts = accumulate((i.num_rows for i in images), initial=vocab_size)
    return tuple(ids.index(first) for first, _ in zip(firsts, images, strict=False))


def _check_length(ids: list[int], params: SamplingParams, limits: EngineConfig, room: int) -> None:
    total = len(ids) + params.max_tokens
    if not ids:
        raise InvalidRequest("the prompt has no tokens")
    if total > limits.max_model_len:
        raise PromptTooLong(
            f"the prompt takes {len(ids):,} tokens and max_tokens is {params.max_tokens:,}, "
            f"together {total:,}; the model holds {limits.max_model_len:,}",
            code="context_length_exceeded",
        )
    if len(ids) >= room:
        raise PromptTooLong(
            f"the prompt takes {len(ids):,} tokens and the key/value cache holds "
            f"{room - 1:,}; give the decoder more memory",
            code="context_length_exceeded",
        )


def _check_images(ids: list[int], images: Seq[Image], model: DecoderConfig) -> None:
    for image in images:
        if image.num_rows < 1:
            raise InvalidRequest(f"an image has {image.num_rows} rows, the least is 1")
        if image.embeddings is not None:
            check_embeddings(image.embeddings, image.num_rows, model.hidden_size)
    virtual = [i for i in ids if i >= model.vocab_size]
    rows = sum(image.num_rows for image in images)
    if virtual != list(range(model.vocab_size, model.vocab_size + rows)):
        raise InvalidRequest(
            f"the prompt has {len(virtual)} image positions and the pictures {rows} rows; "
            "they must match in number and order"
        )
    starts = _image_starts(ids, images, model.vocab_size)
    for start, image in zip(starts, images, strict=True):
        if ids[start : start + image.num_rows][-1] != ids[start] + image.num_rows - 1:
            raise InvalidRequest("the rows of a picture do not stand together in the prompt")


def _check_ids(ids: list[int], params: SamplingParams, vocab_size: int) -> None:
    if min(ids) < 0:
        raise InvalidRequest(f"the prompt holds the id {min(ids)}; ids are 0 or more")
    for token, _ in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"logit_bias names the id {token}; ids are 0 to {vocab_size - 1:,}",
                param="logit_bias",
            )
