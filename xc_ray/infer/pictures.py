"""Pictures of a data set: read in threads, encoded in one more, each once while it is kept."""

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Self, TypeAlias

import torch
from torch import Tensor

from xc_ray.errors import XcRayError
from xc_ray.model.xcomposer import MAX_SQUARES, ImageEncoder
from xc_ray.prompt.tiles import Canvas, Grid, make_canvas, open_image
from xc_ray.train.reading import read_picture
from xc_ray.train.rows import PictureSource

KEPT_SOURCES = 64  # pictures whose file bytes are remembered
# Rows of embeddings that are remembered: 16 pictures of XComposer2.5 with 8 tiles, 0.5 GB at 7B.
KEPT_ROWS = 65_536


@dataclass(frozen=True)
class Picture:
    """File bytes and the grid that their header gave; `num_rows` embeddings come of it."""

    data: bytes = field(repr=False)
    grid: Grid
    num_rows: int
    digest: bytes

    @classmethod
    def of(cls, data: bytes, grid: Grid, num_rows: int) -> Self:
        """The picture with its digest, of bytes and grid."""
        return cls(data, grid, num_rows, hashlib.sha256(data).digest() + repr(grid).encode())


class Sources:
    """File bytes by source, for any number of threads; a failure is remembered as well."""

    def __init__(self, kept: int = KEPT_SOURCES) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Future[bytes]] = OrderedDict()

    def read(self, source: PictureSource) -> bytes:
        """The bytes; waits where another thread reads them already.

        Raises:
            MediaError: it cannot be read.
            RegistryError: the store that it is in fails.
        """
        if isinstance(source, bytes):
            return source
        with self._lock:
            known = self._found.pop(source, None)
            future = self._found[source] = known or Future()
            if len(self._found) > self._kept:
                self._found.popitem(last=False)
        if known is None:
            try:
                future.set_result(read_picture(source))
            except BaseException as e:  # noqa: BLE001 - those who wait must hear of it, whatever it is
                future.set_exception(e)
        return future.result()


_Asked: TypeAlias = tuple[Picture, "Future[Canvas]"]


@dataclass(frozen=True)
class Failure:
    """A request whose picture could not be encoded."""

    request: str
    error: Exception


class Pictures:
    """Encodes what the engine asks for, several pictures in one pass of the tower.

    Pictures are decoded on `threads`; `supply` brings embeddings to a request, and `wake` is called
    whenever something has come. As a context it ends its thread.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        threads: Executor,
        supply: Callable[[str, int, Tensor], None],
        wake: Callable[[], None],
    ) -> None:
        self.failures: queue.SimpleQueue[Failure] = queue.SimpleQueue()
        self._encoder = encoder
        self._threads = threads
        self._supply = supply
        self._wake = wake
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._waiting: dict[bytes, list[tuple[str, int]]] = {}  # requests, by the picture's digest
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pictures", daemon=True)
        self._thread.start()

    def ask(self, request: str, index: int, picture: Picture) -> None:
        """Has a picture brought to a request, as its image `index`."""
        with self._lock:
            known = self._kept.get(picture.digest)
            if known is not None:
                self._kept.move_to_end(picture.digest)
            elif picture.digest in self._waiting:
                self._waiting[picture.digest].append((request, index))
            else:
                self._waiting[picture.digest] = [(request, index)]
                canvas = self._threads.submit(self._canvas, picture)
                self._asked.put((picture, canvas))
        if known is not None:
            self._supply(request, index, known)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._asked.put(None)
        self._thread.join()

    def _canvas(self, picture: Picture) -> Canvas:
        family = self._encoder.config.family
        return make_canvas(open_image(picture.data), picture.grid, tiled=family.tiled)

    def _run(self) -> None:
        while (first := self._asked.get()) is not None and not self._closed:
            canvases: list[tuple[Picture, Canvas]] = []
            for picture, future in self._batch(first):
                try:
                    canvases.append((picture, future.result()))
                except Exception as e:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                    self._fail(picture, e)
            if canvases:
                self._encode(canvases)
            self._wake()

    def _batch(self, first: _Asked) -> list[_Asked]:
        """What goes through the tower together: about one pass of it."""
        batch, squares = [first], first[0].grid.num_tiles + 1
        while squares < MAX_SQUARES and not self._asked.empty():  # nobody else takes from it
            one = self._asked.get()
            if one is None:
                self._asked.put(None)
                break
            batch.append(one)
            squares += one[0].grid.num_tiles + 1
        return batch

    def _encode(self, canvases: list[tuple[Picture, Canvas]]) -> None:
        try:
            # Pillow's arrays are read-only views; torch wants to own what it might write to.
            tensors = [torch.from_numpy(canvas.copy()) for _, canvas in canvases]
            with torch.inference_mode():
                embeddings = self._encoder(tensors)
        except Exception as e:  # noqa: BLE001 - as above
            for picture, _ in canvases:
                self._fail(picture, e)
            return
        for (picture, _), rows in zip(canvases, embeddings, strict=True):
            with self._lock:
                self._kept[picture.digest] = rows
                while len(self._kept) > 1 and sum(map(len, self._kept.values())) > KEPT_ROWS:
                    self._kept.popitem(last=False)
                waiting = self._waiting.pop(picture.digest)
            for request, index in waiting:
                try:
                    self._supply(request, index, rows)
                except XcRayError as e:  # encoder and decoder disagree
                    self.failures.put(Failure(request, e))

    def _fail(self, picture: Picture, error: Exception) -> None:
        with self._lock:
            waiting = self._waiting.pop(picture.digest)
        for request, _ in waiting:
            self.failures.put(Failure(request, error))
