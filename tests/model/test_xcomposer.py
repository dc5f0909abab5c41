from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference import clip, decoder
from tests.reference.pictures import bicubic, tiled_tokens
from xc_ray.demo.make import tiny_config
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.rope import inverse_frequencies, rope_table
from xc_ray.model.vision import normalise
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import ImageEncoder, XComposer, packed_rope

TILED: list[Variant] = ["2.0-4KHD", "2.5"]


def encoder(folder: Path, dtype: torch.dtype = torch.float64) -> ImageEncoder:
    return Checkpoint.open(folder).load_vision(dtype=dtype)


def canvas(rows: int = 1, cols: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows * 56, cols * 56, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("variant", TILED)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 3), (2, 2)])
def test_a_tiled_picture_becomes_the_papers_embeddings(
    variant: Variant, rows: int, cols: int, tiny: Callable[[Variant], Path]
) -> None:
    model = encoder(tiny(variant))
    state = model.state_dict()
    x = normalise(canvas(rows, cols))
    squares = [bicubic(x, 56).double()]
    for row in range(rows):
        for col in range(cols):
            tile = x[:, row * 56 : (row + 1) * 56, col * 56 : (col + 1) * 56]
            squares.append(tile.double())
    patches = torch.stack([clip.patches(model.config.vision, state, s) for s in squares])
    newline, separator = (state[f"plora_{n}_GN"].flatten() for n in ("sub", "glb"))
    expected = model.vision_proj(tiled_tokens(patches, 4, rows, cols, newline, separator))
    (ours,) = model([canvas(rows, cols)])
    assert len(ours) == model.config.image_tokens(rows, cols)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # pixels are float32


@pytest.mark.parametrize("variant", ["2.0", "2.0-VL"])
def test_an_untiled_picture_is_its_patches_projected(
    variant: Variant, tiny: Callable[[Variant], Path]
) -> None:
    model = encoder(tiny(variant))
    square = normalise(canvas()).double()
    expected = model.vision_proj(clip.patches(model.config.vision, model.state_dict(), square))
    (ours,) = model([canvas()])
    torch.testing.assert_close(ours, expected)
    assert len(ours) == 16


@pytest.mark.parametrize("max_squares", [1, 2, 3, 64])
def test_pictures_of_one_call_do_not_change_each_other_however_they_are_split(
    max_squares: int, tiny: Callable[[Variant], Path]
) -> None:
    model = encoder(tiny("2.5"))
    pictures = [canvas(1, 2, 1), canvas(1, 1, 2), canvas(3, 1, 3)]
    together = model(pictures, max_squares=max_squares)
    for picture, embeddings in zip(pictures, together, strict=True):
        torch.testing.assert_close(embeddings, model([picture])[0])


def test_embeddings_have_the_models_dtype(tiny: Callable[[Variant], Path]) -> None:
    model = encoder(tiny("2.5"), torch.bfloat16)
    (embeddings,) = model([canvas()])
    assert (model.dtype, embeddings.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = encoder(tiny("2.5"))([canvas()])[0]
    assert (embeddings - exact).abs().max() < 0.3


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_whole_model_from_pixels_to_logits(
    variant: Variant, tiny: Callable[[Variant], Path]
) -> None:
    model: XComposer = Checkpoint.open(tiny(variant)).load(dtype=torch.float64)
    config = model.config
    pictures = model.vision([canvas(seed=4), canvas(seed=5)])
    vocab, length = config.decoder.vocab_size, len(pictures[0])
    first = [1, 5, *range(vocab, vocab + length), 9]
    second = [*range(vocab + length, vocab + 2 * length), 7]
    hidden = model(torch.tensor(first + second), [len(first), len(second)], torch.cat(pictures))
    logits = model.decoder.logits(hidden).split([len(first), len(second)])
    state = model.decoder.state_dict()
    alone = [i - length if i >= vocab else i for i in second]
    for ids, picture, ours in zip((first, alone), pictures, logits, strict=True):
        expected = decoder.logits(config, state, ids, picture)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_packed_positions_begin_anew_and_are_scaled_by_each_sequences_own_length() -> None:
    config = tiny_config("2.5")
    lengths = [3, 2000]  # the second is past the limit of 1024
    cos, sin = packed_rope(config, lengths, torch.device("cpu"))
    assert len(cos) == len(sin) == 2003
    for start, length in ((0, 3), (3, 2000)):
        frequencies = inverse_frequencies(config.decoder, length)
        expected_cos, expected_sin = rope_table(torch.arange(length), frequencies)
        assert torch.equal(cos[start : start + length], expected_cos)
        assert torch.equal(sin[start : start + length], expected_sin)
