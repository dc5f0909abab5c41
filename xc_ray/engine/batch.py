"""A schedule -> tensors of one flat batch: ids, positions, slots, picture rows, lanes."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from xc_ray.engine.attention import Span
from xc_ray.engine.sequence import Work


@dataclass(frozen=True)
class Batch:
    """Tensors of a step; T tokens, S sequences that sample.

    ids, positions, slots, lanes (T,) int64; image_rows (Ti,) int64 or None, with their embeddings
    (Ti, C); sample_rows (S,) int64: the rows whose logits are needed.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    lanes: Tensor
    image_rows: Tensor | None
    image_embeddings: Tensor | None
    sample_rows: Tensor
    spans: tuple[Span, ...]


def build_batch(work: Seq[Work], vocab_size: int, device: torch.device) -> Batch:
    """Lays the work of a step end to end, in order.

    One host-to-device copy carries all integer tensors.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    lanes: list[int] = []
    image_rows: list[int] = []
    pictures: list[Tensor] = []
    sample_rows: list[int] = []
    spans: list[Span] = []
    for w in work:
        seq, new = w.sequence, len(w.ids)
        first = len(ids)
        rows = [first + i for i, token in enumerate(w.ids) if token >= vocab_size]
        if rows:
            # Virtual ids of a request count up by one, so a chunk's rows are one slice: a view.
            a = w.ids[rows[0] - first] - vocab_size
            pictures.append(seq.image_embeddings[a : a + len(rows)].to(device, non_blocking=True))
            image_rows += rows
        ids += [0 if token >= vocab_size else token for token in w.ids] if rows else w.ids
        positions += range(seq.num_computed, seq.num_computed + new)
        slots += range(seq.start + seq.num_computed, seq.start + seq.num_computed + new)
        lanes += [seq.lane] * new
        spans.append(Span(seq.start, seq.num_computed, new))
        if w.samples:
            sample_rows.append(len(ids) - 1)
    packed = torch.tensor(
        [*ids, *positions, *slots, *lanes, *image_rows, *sample_rows], device=device
    )
    n = len(ids)
    parts = packed.split([n, n, n, n, len(image_rows), len(sample_rows)])
    return Batch(
        ids=parts[0],
        positions=parts[1],
        slots=parts[2],
        lanes=parts[3],
        image_rows=parts[4] if image_rows else None,
        image_embeddings=(pictures[0] if len(pictures) == 1 else torch.cat(pictures))
        if pictures
        else None,
        sample_rows=parts[5],
        spans=tuple(spans),
    )
