"""One pass of the tower: pixels to the device, rows back, each square's rows into its picture.

On a GPU pixels go from pinned memory, and rows come back into pinned memory on a stream of their
own, so that the device goes on with the next pass meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xc_ray.config import EncoderOptions
from xc_ray.model.fast_vision import FastVision, PassGraphs
from xc_ray.model.placement import Placement, Separators
from xc_ray.model.vision import normalise, to_overview
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.tiles import Canvas, Grid

# Passes of up to so many squares are short enough for launches to count; full ones come often.
GRAPHED_SQUARES = 4
# cuDNN plans each size for some 40 ms when it first comes: up to this one at the start.
PLANNED_SQUARES = 16


@dataclass
class TiledPicture:
    """A picture between its bytes and its embeddings.

    `tiles` (N, S, S, 3) uint8 on the host, without the overview; rows are put in their places.
    `finite` turns false with the first row that holds NaN or infinity.
    """

    grid: Grid
    tiles: Tensor
    placement: Placement
    finite: bool = True


@dataclass(frozen=True)
class Launched:
    """A pass that has run, on the host once `copied` (None: at once).

    Rows (N, R, C), and `finite` (N,): which squares' rows are all numbers.
    """

    parts: Sequence[tuple[TiledPicture, int, int]]
    rows: Tensor
    finite: Tensor
    copied: torch.cuda.Event | None = None


class SquareRunner:
    """Runs passes of pictures' squares through tower and projector."""

    def __init__(self, encoder: ImageEncoder, options: EncoderOptions) -> None:
        self._encoder = encoder
        self._config = encoder.config
        self._tiled = encoder.config.family.tiled
        self._on_gpu = encoder.device.type == "cuda"
        self._vision = FastVision(encoder, compiled=options.compile_tower)
        self._separators = self._project_separators()
        self._copies = torch.cuda.Stream() if self._on_gpu else None
        self._graphs: PassGraphs | None = None
        if self._on_gpu:
            self._warm_up(options)

    def num_squares(self, grid: Grid) -> int:
        """Squares of a picture: its tiles, and the overview where the family has one."""
        return grid.num_tiles + 1 if self._tiled else 1

    def tile(self, canvas: Canvas, grid: Grid) -> TiledPicture:
        """A canvas cut into tiles, which the device can fetch; for threads of reading."""
        s = self._config.tile
        tiles = torch.empty((grid.num_tiles, s, s, 3), dtype=torch.uint8, pin_memory=self._on_gpu)
        cut = canvas.reshape(grid.rows, s, grid.cols, s, 3).swapaxes(1, 2)
        tiles.numpy().reshape(cut.shape)[...] = cut
        dtype = np.uint16 if self._encoder.dtype.itemsize == 2 else np.float32
        placement = Placement(self._config, grid.rows, grid.cols, dtype, self._separators)
        return TiledPicture(grid, tiles, placement)

    @torch.inference_mode()
    def launch(self, parts: Sequence[tuple[TiledPicture, int, int]]) -> Launched:
        """Runs one pass; each part is a picture, its first square, and how many.

        Returns when the tower is free again, be the rows on the host or still on their way.
        """
        squares = torch.cat([self._squares(*part) for part in parts])
        graphs = self._graphs
        if graphs is not None and graphs.can_use(len(squares)):
            rows = graphs.replay(squares)
        else:
            rows = self._vision(squares)
        finite = rows.isfinite().flatten(1).all(1)
        if self._copies is None:
            return Launched(parts, rows, finite)
        computed = torch.cuda.Event(blocking=True)
        computed.record()
        launched = self._copy(Launched(parts, rows, finite), computed)
        computed.synchronize()
        return launched

    def collect(self, launched: Launched) -> None:
        """Puts the rows of a pass in their places."""
        if launched.copied is not None:
            launched.copied.synchronize()
        rows, finite = to_array(launched.rows), launched.finite.numpy()
        start = 0
        for picture, first, count in launched.parts:
            picture.placement.put(first, rows[start : start + count])
            picture.finite &= bool(finite[start : start + count].all())
            start += count

    def _copy(self, launched: Launched, computed: torch.cuda.Event) -> Launched:
        """Starts the copy of a pass's results to the host, behind what computes them."""
        assert self._copies is not None
        copied = torch.cuda.Event(blocking=True)
        on_host = []
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(computed)
            for result in (launched.rows, launched.finite):
                target = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                on_host.append(target.copy_(result, non_blocking=True))
                result.record_stream(self._copies)
            copied.record()
        return Launched(launched.parts, on_host[0], on_host[1], copied)

    def _squares(self, picture: TiledPicture, first: int, count: int) -> Tensor:
        """Squares (count, 3, S, S) from `first` on, normalised on the device."""
        if not self._tiled or first:
            start = first - self._tiled
            return self._normalised(self._on_device(picture.tiles[start : start + count]))
        tiles = self._on_device(picture.tiles)  # the overview needs all of them
        overview = self._overview(tiles, picture.grid)
        return torch.cat((overview, self._normalised(tiles[: count - 1])))

    def _on_device(self, tiles: Tensor) -> Tensor:
        return tiles.to(self._encoder.device, non_blocking=True)

    def _normalised(self, tiles: Tensor) -> Tensor:
        return normalise(tiles).to(self._encoder.dtype)

    def _overview(self, tiles: Tensor, grid: Grid) -> Tensor:
        """Tiles (N, S, S, 3) -> the overview (1, 3, S, S)."""
        s = self._config.tile
        canvas = tiles.view(grid.rows, grid.cols, s, s, 3).transpose(1, 2)
        canvas = canvas.reshape(grid.rows * s, grid.cols * s, 3)
        return to_overview(normalise(canvas), s).to(self._encoder.dtype)

    @torch.inference_mode()
    def _project_separators(self) -> Separators | None:
        if not self._tiled:
            return None
        vectors = (self._encoder.plora_sub_GN.view(-1), self._encoder.plora_glb_GN.view(-1))
        newline, separator = to_array(self._encoder.vision_proj(torch.stack(vectors)))
        return Separators(newline, separator)

    @torch.inference_mode()
    def _warm_up(self, options: EncoderOptions) -> None:
        """Compiles kernels, plans attention and captures graphs before the first picture comes."""
        tile, most = self._config.tile, options.max_squares
        squares = torch.zeros(
            (most, 3, tile, tile), dtype=self._encoder.dtype, device=self._encoder.device
        )
        for size in sizes_up_to(PLANNED_SQUARES, most):
            self._vision(squares[:size])
        torch.cuda.synchronize()
        if options.cuda_graphs:
            self._graphs = PassGraphs(self._vision, sizes_up_to(GRAPHED_SQUARES, most))
            self._graphs.capture()


def sizes_up_to(limit: int, most: int) -> list[int]:
    """Every size of a pass up to `limit`, and the full one."""
    return sorted({*range(1, min(limit, most) + 1), most})


def to_array(x: Tensor) -> npt.NDArray[np.generic]:
    """A tensor as numpy for the object store: 16-bit floats as uint16 views, no copy on the CPU."""
    x = x.contiguous().cpu()
    array: npt.NDArray[np.generic] = (x.view(torch.uint16) if x.element_size() == 2 else x).numpy()
    return array
