"""The serving form of tower and projector computes what the plain one does.

Its siblings with compiled parts, CUDA graphs and each attention are in tests/gpu.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xc_ray.demo.make import save_random, tiny_config
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.fast_vision import FastVision
from xc_ray.model.projector import merge_patches
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import ImageEncoder

Tiny = Callable[..., Path]


def load(folder: Path, dtype: torch.dtype = torch.float64) -> ImageEncoder:
    return Checkpoint.open(folder).load_vision(dtype=dtype)


@pytest.mark.parametrize("variant", FAMILIES)
def test_rows_are_the_towers_merged_and_projected(variant: Variant, tiny: Tiny) -> None:
    encoder = load(tiny(variant))
    config = encoder.config
    squares = torch.randn(3, 3, config.tile, config.tile, dtype=torch.float64)
    patches = encoder.vit(squares)
    merged = patches
    if config.family.tiled:
        side = config.vision.patches_per_side
        merged = merge_patches(patches, side, config.family.merge).flatten(1, 2)
    fast = FastVision(encoder)
    torch.testing.assert_close(fast.patches(squares), patches)
    torch.testing.assert_close(fast(squares), encoder.vision_proj(merged))


def test_a_tower_of_other_heads_layers_and_norms(tmp_path: Path) -> None:
    tiny = tiny_config("2.5")
    vision = replace(
        tiny.vision, num_hidden_layers=3, num_attention_heads=4, layer_norm_eps=1e-2, image_size=84
    )
    save_random(tmp_path, replace(tiny, vision=vision))
    encoder = load(tmp_path)
    squares = torch.randn(2, 3, 84, 84, dtype=torch.float64)
    expected = encoder.vit(squares)
    torch.testing.assert_close(FastVision(encoder).patches(squares), expected)


def test_the_packed_weights_are_the_encoders_own(tiny: Tiny) -> None:
    """Nothing is held twice, the encoder still works, and a second packing changes nothing."""
    encoder = load(tiny("2.5"), torch.float32)
    state = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    squares = torch.randn(2, 3, 56, 56)
    before = encoder.vit(squares)
    fast = FastVision(encoder)
    clip: Any = encoder.vit.vision_tower.vision_model
    packed, _ = fast._layers[0].qkv
    k_proj = clip.encoder.layers[0].self_attn.k_proj
    assert k_proj.weight.data_ptr() == packed[len(packed) // 3 :].data_ptr()
    assert all(torch.equal(weight, state[n]) for n, weight in encoder.state_dict().items())
    torch.testing.assert_close(encoder.vit(squares), before)
    torch.testing.assert_close(FastVision(encoder)(squares), fast(squares))


def test_a_square_is_the_same_alone_and_in_any_pass(tiny: Tiny) -> None:
    fast = FastVision(load(tiny("2.5"), torch.float32))
    squares = torch.randn(7, 3, 56, 56)
    together = fast(squares)
    for i, square in enumerate(squares):
        torch.testing.assert_close(fast(square[None])[0], together[i], atol=1e-5, rtol=1e-5)


def test_options_of_a_gpu_change_nothing_on_cpu(tiny: Tiny) -> None:
    encoder = load(tiny("2.5"), torch.float32)
    squares = torch.randn(2, 3, 56, 56)
    plain, all_of_them = FastVision(encoder), FastVision(encoder, attention="flash", compiled=True)
    assert torch.equal(plain(squares), all_of_them(squares))
