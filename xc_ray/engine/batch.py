"""A schedule -> tensors of one flat batch: decoding rows first, then the chunks of prompts."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from xc_ray.engine.sequence import Work
from xc_ray.model.plora import ImageRows

# An adapter's slot, the first row that uses it, and how many rows there do.
Segment = tuple[int, int, int]


@dataclass(frozen=True)
class Batch:
    """Tensors of a step of T rows, S of which sample.

    positions, lanes (T,) int64; the first `num_decode` rows take the token that their lane chose
    last, the others have ids (T − num_decode,) int64, with 0 at image rows. image_rows of the T
    rows and their embeddings (Ti, C), None without images. sample_rows (S,) int64: the rows whose
    logits are needed; None if these are all rows, in order. `chunks` are (past, new, lane) of the
    prompts' rows; `pictures` (which work, rows of embeddings) of the images in them. `adapters` are
    the segments of rows that have one, `sample_adapters` the same among the rows that sample.
    """

    positions: Tensor
    lanes: Tensor
    num_decode: int
    ids: Tensor
    image_rows: ImageRows
    image_embeddings: Tensor | None
    sample_rows: Tensor | None
    num_sampling: int
    samples_images: bool  # whether one of these rows is an image row
    chunks: tuple[tuple[int, int, int], ...]
    pictures: tuple[tuple[int, Tensor], ...]
    max_length: int  # of a decoding sequence, its new token included
    adapters: tuple[Segment, ...] = ()
    sample_adapters: tuple[Segment, ...] = ()


def build_batch(work: Seq[Work], vocab_size: int, device: torch.device) -> Batch:
    """Lays the work of a step end to end, decoding rows first.

    One host-to-device copy carries all integers.
    """
    positions: list[int] = []
    lanes: list[int] = []
    ids: list[int] = []
    image_rows: list[int] = []
    pictures: list[tuple[int, Tensor]] = []
    sample_rows: list[int] = []
    chunks: list[tuple[int, int, int]] = []
    adapters: list[Segment] = []
    sample_adapters: list[Segment] = []
    num_decode = sum(w.decode for w in work)
    max_length = 0
    for number, w in enumerate(work):
        seq, first = w.sequence, len(positions)
        positions += range(w.start, w.stop)
        lanes += [seq.lane] * (w.stop - w.start)
        if seq.slot >= 0:
            adapters.append((seq.slot, first, w.stop - w.start))
            if w.samples:
                sample_adapters.append((seq.slot, len(sample_rows), 1))
        if w.samples:
            sample_rows.append(len(positions) - 1)
        if w.decode:
            assert len(positions) <= num_decode, "decoding rows come first"
            max_length = max(max_length, w.stop)
            continue
        chunks.append((w.start, w.stop - w.start, seq.lane))
        ids += seq.ids(w.start, w.stop)
        for start, image in zip(seq.image_starts, seq.images, strict=True):
            a, b = max(start, w.start), min(start + image.num_rows, w.stop)
            if a < b:
                # A chunk's rows of an image are one slice: a view.
                rows = image.embeddings[a - start : b - start]
                pictures.append((number, rows.to(device, non_blocking=True)))
                image_rows += range(first + a - w.start, first + b - w.start)
    for row in image_rows:
        ids[row - num_decode] = 0
    all_sample = len(sample_rows) == len(positions)
    together = bool(image_rows) and image_rows[-1] - image_rows[0] + 1 == len(image_rows)
    listed = [] if together else image_rows
    parts = to_device([positions, lanes, ids, listed, [] if all_sample else sample_rows], device)
    rows_of_images: ImageRows = None
    if image_rows:
        rows_of_images = slice(image_rows[0], image_rows[-1] + 1) if together else parts[3]
    return Batch(
        positions=parts[0],
        lanes=parts[1],
        num_decode=num_decode,
        ids=parts[2],
        image_rows=rows_of_images,
        image_embeddings=_together([rows for _, rows in pictures]),
        sample_rows=None if all_sample else parts[4],
        num_sampling=len(sample_rows),
        samples_images=not set(sample_rows).isdisjoint(image_rows),
        chunks=tuple(chunks),
        pictures=tuple(pictures),
        max_length=max_length,
        adapters=tuple(adapters),
        sample_adapters=tuple(sample_adapters),
    )


def _together(pictures: list[Tensor]) -> Tensor | None:
    if len(pictures) < 2:
        return pictures[0] if pictures else None
    return torch.cat(pictures)


def to_device(lists: Seq[Seq[int]], device: torch.device) -> list[Tensor]:
    """Several lists of whole numbers as int64 tensors on the device, by one copy."""
    packed = torch.tensor([i for part in lists for i in part], dtype=torch.int64)
    if device.type == "cuda":
        packed = packed.pin_memory()  # so that the copy does not wait for what runs
    return list(packed.to(device, non_blocking=True).split([len(part) for part in lists]))
