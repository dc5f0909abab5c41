"""Tower, projector and decoder: `ImageEncoder`, and `XComposer` with the decoder beside it.

The two halves stand alone because serving runs them in different processes. Module names are the
published tensor names below `vision.` and `decoder.`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xc_ray.model.attention import DenseAttend
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.projector import lay_out, make_projector, merge_patches
from xc_ray.model.rope import inverse_frequencies, rope_table
from xc_ray.model.vision import VisionTower, normalise, to_squares

# Squares that go through the tower in one pass: they bound its activations (`plan.encoder_plan`).
MAX_SQUARES = 8


class ImageEncoder(nn.Module):
    """Canvases in, picture embeddings out."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTower(config.vision)
        self.vision_proj = make_projector(config)
        if config.family.tiled:
            # Upstream quirk: sub_GN ends every row, also of the overview; glb_GN only parts
            # overview and tiles.
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, config.projector_in))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, config.projector_in))

    @property
    def device(self) -> torch.device:
        """Where the weights are; `forward` moves canvases there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the embeddings."""
        return next(self.parameters()).dtype

    def forward(
        self, canvases: Sequence[Tensor], *, max_squares: int = MAX_SQUARES
    ) -> list[Tensor]:
        """Canvases uint8 (H, W, 3) of whole tiles -> embeddings (Ti, C), one tensor a picture."""
        squares = [
            to_squares(self.config, normalise(c.to(self.device)), self.dtype) for c in canvases
        ]
        counts = [len(s) for s in squares]
        stacked = torch.cat(squares) if len(squares) > 1 else squares[0]
        del squares
        patches = torch.cat([self.vit(part) for part in stacked.split(max_squares)])
        del stacked
        return [
            self.embed(p, c.shape[0] // self.config.tile, c.shape[1] // self.config.tile)
            for p, c in zip(patches.split(counts), canvases, strict=True)
        ]

    def embed(self, patches: Tensor, rows: int, cols: int) -> Tensor:
        """Patches (N, P, Cv) of one picture's squares -> embeddings (Ti, C)."""
        result: Tensor = self.vision_proj(self.projector_input(patches, rows, cols))
        return result

    def projector_input(self, patches: Tensor, rows: int, cols: int) -> Tensor:
        """Patches (N, P, Cv) -> merged vectors with separators (Ti, Cp)."""
        family, side = self.config.family, self.config.vision.patches_per_side
        if not family.tiled:
            return patches[0]
        merged = merge_patches(patches, side, family.merge)
        return lay_out(merged, rows, cols, self.plora_sub_GN.view(-1), self.plora_glb_GN.view(-1))


class XComposer(nn.Module):
    """The whole model of one checkpoint."""

    def __init__(self, config: XComposerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ImageEncoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, ids: Tensor, lengths: Sequence[int], image_embeddings: Tensor | None = None
    ) -> Tensor:
        """Hidden states (T, C) of whole sequences laid end to end.

        ids (T,) int64, `lengths` the sequences' sizes in tokens. Rope is scaled by each sequence's
        own length. This is the reference form: dense, without a cache.
        """
        x, image_rows = self.decoder.embed(ids, image_embeddings)
        rope = packed_rope(
            self.config, lengths, x.device, torch.promote_types(x.dtype, torch.float32)
        )
        hidden: Tensor = self.decoder(x, rope, DenseAttend(lengths), image_rows)
        return hidden


def packed_rope(
    config: XComposerConfig,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D) of whole sequences end to end, each scaled by its own length."""
    tables = [
        rope_table(
            torch.arange(n, device=device),
            inverse_frequencies(config.decoder, n, device=device, dtype=dtype),
        )
        for n in lengths
    ]
    return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])
