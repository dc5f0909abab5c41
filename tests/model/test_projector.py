import math

import pytest
import torch

from tests.reference.pictures import tiled_tokens
from xc_ray.demo.make import tiny_config
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.projector import lay_out, make_projector, merge_patches

SIDE, C = 6, 5


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 3), (3, 2)])
def test_tokens_come_in_the_papers_order(rows: int, cols: int) -> None:
    patches = torch.arange((1 + rows * cols) * SIDE * SIDE * C).view(-1, SIDE * SIDE, C).float()
    newline, separator = torch.full((4 * C,), -1.0), torch.full((4 * C,), -2.0)
    expected = tiled_tokens(patches, SIDE, rows, cols, newline, separator)
    merged = merge_patches(patches, SIDE, 2)
    tokens = lay_out(merged, rows, cols, newline, separator)
    assert tokens.shape == expected.shape
    assert torch.equal(tokens, expected)


def test_four_neighbours_are_merged_corner_by_corner() -> None:
    # side 4: patch 4·y + x stands at row y, column x
    patches = torch.arange(16.0).view(1, 16, 1)
    merged = merge_patches(patches, 4, 2)
    assert merged.shape == (1, 2, 2, 4)
    assert merged[0, 0, 0].tolist() == [0, 1, 4, 5]
    assert merged[0, 0, 1].tolist() == [2, 3, 6, 7]
    assert merged[0, 1, 0].tolist() == [8, 9, 12, 13]


def test_each_whole_row_ends_with_a_newline_and_one_separator_parts_the_overview() -> None:
    merged = torch.zeros(1 + 6, 2, 2, 1)
    tokens = lay_out(merged, 2, 3, torch.tensor([1.0]), torch.tensor([2.0]))
    overview = [0, 0, 1] * 2
    rows = [0, 0, 0, 0, 0, 0, 1] * 4
    assert tokens[:, 0].tolist() == [*overview, 2, *rows]


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3)])
def test_as_many_tokens_as_the_config_counts(variant: Variant, rows: int, cols: int) -> None:
    config = tiny_config(variant)
    if not config.family.tiled:
        assert config.image_tokens(rows, cols) == config.vision.patches_per_side**2
        return
    side = config.vision.patches_per_side
    merged = merge_patches(torch.zeros(1 + rows * cols, side * side, 1), side, config.family.merge)
    tokens = lay_out(merged, rows, cols, torch.zeros(4), torch.zeros(4))
    assert len(tokens) == config.image_tokens(rows, cols)


def test_the_projector_is_linear_exact_gelu_linear() -> None:
    projector = make_projector(tiny_config("2.5")).double()
    x = torch.randn(3, 128, dtype=torch.float64)
    state = projector.state_dict()
    assert sorted(state) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    h = x @ state["0.weight"].T + state["0.bias"]
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(projector(x), h @ state["2.weight"].T + state["2.bias"])
