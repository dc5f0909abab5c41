from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.reference import decoder as reference
from xc_ray.demo.make import save_random, tiny_config
from xc_ray.model.attention import DenseAttend
from xc_ray.model.config import FAMILIES, PLoRAConfig, RopeScaling, Variant, XComposerConfig
from xc_ray.model.decoder import Decoder, RMSNorm
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import packed_rope

VOCAB = 1024


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Decoder:
    return Checkpoint.open(folder).load_decoder(dtype=dtype)


def made(folder: Path, config: XComposerConfig) -> Decoder:
    save_random(folder, config)
    return load(folder)


def prompt(pictures: int = 7, seed: int = 0) -> tuple[list[int], Tensor]:
    """Ids with a picture in the middle, and its embeddings (Ti, C)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCAB, (9,), generator=generator).tolist()
    ids = [*text[:4], *range(VOCAB, VOCAB + pictures), *text[4:]]
    return ids, torch.randn(pictures, 32, dtype=torch.float64, generator=generator)


def logits(
    decoder: Decoder, ids: list[int], pictures: Tensor | None, lengths: list[int] | None = None
) -> Tensor:
    lengths = lengths or [len(ids)]
    x, image_rows = decoder.embed(torch.tensor(ids), pictures)
    wide = torch.promote_types(decoder.dtype, torch.float32)
    rope = packed_rope(decoder.config, lengths, x.device, wide)
    return decoder.logits(decoder(x, rope, DenseAttend(lengths), image_rows))


def assert_is_textbook(decoder: Decoder, ids: list[int], pictures: Tensor | None) -> None:
    expected = reference.logits(decoder.config, decoder.state_dict(), ids, pictures)
    torch.testing.assert_close(logits(decoder, ids, pictures), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", FAMILIES)
def test_logits_of_text_and_pictures_are_the_textbooks(
    variant: Variant, tiny: Callable[[Variant], Path]
) -> None:
    assert_is_textbook(load(tiny(variant)), *prompt())


def test_logits_of_text_alone_are_the_textbooks(tiny: Callable[[Variant], Path]) -> None:
    assert_is_textbook(load(tiny("2.5")), [1, 5, 400, 3], None)


TINY = tiny_config("2.5")
UNUSUAL = {
    "biases": replace(TINY, decoder=replace(TINY.decoder, bias=True)),
    "one key head": replace(TINY, decoder=replace(TINY.decoder, num_key_value_heads=1)),
    "a key head a query": replace(TINY, decoder=replace(TINY.decoder, num_key_value_heads=4)),
    "linear rope": replace(
        TINY, decoder=replace(TINY.decoder, rope_scaling=RopeScaling("linear", 3.0))
    ),
    "past the limit": replace(
        TINY,
        decoder=replace(
            TINY.decoder, max_position_embeddings=8, rope_scaling=RopeScaling("dynamic", 2.0)
        ),
    ),
    "a rank and scaling each": replace(
        TINY, plora={n: PLoRAConfig(i + 1, 0.5 * i) for i, n in enumerate(TINY.plora)}
    ),
}


@pytest.mark.parametrize("config", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_logits_of_unusual_sizes_are_the_textbooks(config: XComposerConfig, tmp_path: Path) -> None:
    assert_is_textbook(made(tmp_path, config), *prompt())


def test_scaling_past_the_limit_changes_the_logits(tmp_path: Path) -> None:
    ids, pictures = prompt()
    scaled = made(tmp_path, UNUSUAL["past the limit"])
    plain = made(tmp_path, TINY)
    assert not torch.allclose(logits(scaled, ids, pictures), logits(plain, ids, pictures))


def test_sequences_laid_end_to_end_do_not_change_each_other(
    tiny: Callable[[Variant], Path],
) -> None:
    decoder = load(tiny("2.5"))
    (first, first_pictures), (second, second_pictures) = prompt(3, 1), prompt(5, 2)
    shifted = [i + 3 if i >= VOCAB else i for i in second]
    pictures = torch.cat([first_pictures, second_pictures])
    together = logits(decoder, first + shifted, pictures, [len(first), len(second)])
    alone = [logits(decoder, first, first_pictures), logits(decoder, second, second_pictures)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_plora_acts_on_pictures_alone(tiny: Callable[[Variant], Path]) -> None:
    decoder = load(tiny("2.5"))
    ids, pictures = prompt()
    before = logits(decoder, ids, pictures)
    text = logits(decoder, [1, 2, 3], None)
    for name, weight in decoder.named_parameters():
        if "Plora_B" in name:
            weight.data.mul_(2)
    assert torch.equal(logits(decoder, [1, 2, 3], None), text)
    after = logits(decoder, ids, pictures)
    assert torch.equal(after[:4], before[:4])  # text before the picture cannot see it
    assert not torch.allclose(after[4:], before[4:])


def test_picture_rows_given_as_a_slice_or_a_list_are_the_same(
    tiny: Callable[[Variant], Path],
) -> None:
    decoder = load(tiny("2.5"))
    ids, pictures = prompt()
    x, image_rows = decoder.embed(torch.tensor(ids), pictures)
    assert image_rows is not None
    rope = packed_rope(decoder.config, [len(ids)], x.device, torch.float64)
    listed, sliced, none = (
        decoder(x, rope, DenseAttend([len(ids)]), rows) for rows in (image_rows, slice(4, 11), None)
    )
    torch.testing.assert_close(sliced, listed, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(none, listed)


def test_virtual_ids_take_the_pictures_rows_wherever_they_stand(
    tiny: Callable[[Variant], Path],
) -> None:
    decoder = load(tiny("2.5"), torch.float32)
    pictures = torch.arange(3.0)[:, None].expand(3, 32).double()
    ids = torch.tensor([7, VOCAB + 2, 8, VOCAB, VOCAB + 1])
    x, image_rows = decoder.embed(ids, pictures)
    assert image_rows is not None
    assert image_rows.tolist() == [1, 3, 4]
    assert x.dtype == torch.float32
    assert x[[1, 3, 4], 0].tolist() == [2, 0, 1]
    embeddings = decoder.model.tok_embeddings.weight
    assert torch.equal(x[[0, 2]], embeddings[[7, 8]])


def test_a_prompt_without_pictures_has_no_picture_rows(tiny: Callable[[Variant], Path]) -> None:
    decoder = load(tiny("2.5"))
    for pictures in (None, torch.zeros(0, 32, dtype=torch.float64)):
        x, image_rows = decoder.embed(torch.tensor([1, 2]), pictures)
        assert image_rows is None
        assert x.shape == (2, 32)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_logits_are_of_at_least_32_bits(
    dtype: torch.dtype, expected: torch.dtype, tiny: Callable[[Variant], Path]
) -> None:
    ids, pictures = prompt()
    decoder = load(tiny("2.5"), dtype)
    assert decoder.dtype == dtype
    result = logits(decoder, ids, pictures)
    assert result.dtype == expected
    exact = logits(load(tiny("2.5")), ids, pictures)
    tolerance = {torch.bfloat16: 0.3, torch.float16: 0.03}.get(dtype, 1e-4)
    assert (result - exact).abs().max() < tolerance


def test_a_norm_works_in_float32_and_weighs_after_the_cast() -> None:
    norm = RMSNorm(64, 1e-5).bfloat16()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = (torch.randn(3, 64) * 300).bfloat16()
    wide = x.float()
    unit = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight * unit)
