"""Stored rows -> packs on their way to the device, read ahead by threads."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xc_ray.errors import DataError, MediaError
from xc_ray.model.config import XComposerConfig
from xc_ray.prompt.tiles import make_canvas, open_image
from xc_ray.train.network import Pack
from xc_ray.train.plan import PackRows
from xc_ray.train.reading import read_picture
from xc_ray.train.rows import Picture, Place
from xc_ray.train.store import RowStore

THREADS = 4
# Packs that are read before they are needed: their canvases wait in memory.
AHEAD = 3


class Feed:
    """The packs of one worker, in the order in which they are asked for; a context."""

    def __init__(self, store: RowStore, config: XComposerConfig) -> None:
        self.store, self.config = store, config
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="feed")

    def packs(self, packs: Iterable[PackRows]) -> Iterator[Pack]:
        """Reads ahead of what is taken.

        Raises:
            DataError: a picture cannot be read any more, or has changed since it was checked.
            RegistryError: object storage that a picture lies in fails.
        """
        waiting: deque[Future[Pack]] = deque()
        try:
            for rows in packs:
                waiting.append(self._threads.submit(self.read, rows))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()

    def read(self, rows: PackRows) -> Pack:
        """One pack, now (errors: `packs`)."""
        vocab, image_rows = self.config.decoder.vocab_size, 0
        ids, labels, canvases, lengths = [], [], [], []
        for index in rows:
            row = self.store[index]
            own = row.ids
            own[own >= vocab] += image_rows
            image_rows += sum(span.length for span in row.spans)
            ids.append(own)
            labels.append(row.labels)
            lengths.append(len(own))
            canvases += [self._canvas(row.pictures[s.image], row.place) for s in row.spans]
        return Pack.of(
            torch.from_numpy(np.concatenate(ids)),
            torch.from_numpy(np.concatenate(labels)),
            lengths,
            canvases,
            vocab,
        )

    def canvases(self, index: int, count: int | None = None) -> list[Tensor]:
        """The canvases of a row's first `count` pictures, by their number."""
        row = self.store[index]
        return [self._canvas(p, row.place) for p in row.pictures[:count]]

    def _canvas(self, picture: Picture, place: Place) -> Tensor:
        try:
            data = picture.data if picture.data is not None else read_picture(picture.source)
        except MediaError as e:
            raise DataError(
                f"{place}: the picture was there when the data was checked, and is not now: "
                f"{e.message}"
            ) from None
        if hashlib.sha256(data).hexdigest() != picture.digest:
            raise DataError(
                f"{place}: the picture {picture.source} has changed since the data was checked; "
                "start the run again under another name"
            )
        image = open_image(data)
        return torch.from_numpy(
            make_canvas(image, picture.grid, tiled=self.config.family.tiled).copy()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
