"""Rows put in place square by square are those of the whole picture."""

import random

import numpy as np
import pytest
import torch

from xc_ray.demo.make import tiny_config
from xc_ray.model.config import FAMILIES
from xc_ray.model.placement import Placement, Separators
from xc_ray.model.projector import lay_out


@pytest.mark.parametrize("variant", [v for v, family in FAMILIES.items() if family.tiled])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3), (3, 1)])
def test_squares_in_any_order_make_the_order_of_tokens(variant, rows: int, cols: int) -> None:
    config = tiny_config(variant)
    m, size = config.tokens_per_side, config.decoder.hidden_size
    blocks = torch.randn(1 + rows * cols, m, m, size)
    newline, separator = torch.randn(2, size)
    made = Placement(config, rows, cols, np.float32, Separators(newline.numpy(), separator.numpy()))
    for first in random.Random(0).sample(range(0, len(blocks), 2), -(-len(blocks) // 2)):
        made.put(first, blocks[first : first + 2].flatten(1, 2).numpy())
    expected = lay_out(blocks, rows, cols, newline, separator)
    assert made.embeddings.shape == (config.image_tokens(rows, cols), size)
    np.testing.assert_array_equal(made.embeddings, expected)


def test_an_untiled_picture_is_its_one_square() -> None:
    config = tiny_config("2.0-VL")
    made = Placement(config, 1, 1, np.uint16, None)
    rows = np.arange(made.embeddings.size, dtype=np.uint16).reshape(1, *made.embeddings.shape)
    made.put(0, rows)
    np.testing.assert_array_equal(made.embeddings, rows[0])
