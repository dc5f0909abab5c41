"""Canvas -> normalised overview + tiles (N, 3, S, S) -> CLIP ViT patches (N, P, Cv)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from xc_ray.model.config import VisionConfig, XComposerConfig

# CLIP's means and deviations of the three channels, of values in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W): (x / 255 − mean) / std."""
    x = pixels.movedim(-1, -3).contiguous().to(torch.float32).div_(255)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
    return x.sub_(mean).div_(std)


def to_overview(x: Tensor, size: int) -> Tensor:
    """Normalised canvas (3, H, W) -> (1, 3, S, S), its aspect ratio not kept.

    Upstream quirk: it is the *normalised, padded* canvas that is resized, bicubically and without
    antialiasing.
    """
    return F.interpolate(x[None], size=(size, size), mode="bicubic", align_corners=False)


def to_squares(config: XComposerConfig, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised canvas (3, H, W) -> squares (N, 3, S, S) in `dtype`: overview, then tiles by rows.

    Untiled variants have the one square alone.
    """
    s = config.tile
    if not config.family.tiled:
        return x[None].to(dtype)
    rows, cols = x.shape[1] // s, x.shape[2] // s
    tiles = x.to(dtype).view(3, rows, s, cols, s).permute(1, 3, 0, 2, 4)
    return torch.cat((to_overview(x, s).to(dtype), tiles.reshape(rows * cols, 3, s, s)))


class VisionTower(nn.Module):
    """transformers' CLIP ViT under the published tensor names.

    Features are the last layer's output, class row dropped, **without** the model's final norm,
    which the published files may or may not carry.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                patch_size=config.patch_size,
                image_size=config.image_size,
                hidden_act=config.hidden_act,
                layer_norm_eps=config.layer_norm_eps,
            )
        )
        clip.register_module("post_layernorm", nn.Identity())
        # transformers 5 has no `vision_model.` level of its own; the published names do.
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = clip

    def forward(self, squares: Tensor) -> Tensor:
        """Squares (N, 3, S, S) -> patches (N, P, Cv), row by row."""
        clip = self.vision_tower.vision_model
        assert isinstance(clip, CLIPVisionModel)
        x: Tensor = clip.pre_layrnorm(clip.embeddings(squares))
        for layer in clip.encoder.layers:
            x = layer(x, None)
        return x[:, 1:]
