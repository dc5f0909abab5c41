"""Pictures as the original prepares them: pixels, grids, token counts, normalised tensors."""

import hashlib

import numpy as np
import torch
from PIL import Image

from tests.parity.golden import NORMALISED, Case, assert_close, read_setting
from xc_ray.model.vision import normalise
from xc_ray.prompt.tiles import image_grid, make_canvas


def test_a_picture_has_the_originals_pixels(picture_case: Case) -> None:
    canvas = picture_case.variant.canvas(picture_case.picture, picture_case.setting)
    assert list(canvas.shape[1::-1]) == picture_case.data["output_wh"]
    for y, x, *rgb in picture_case.data["probe_yx_rgb"]:
        assert canvas[y, x].tolist() == rgb, f"pixel at row {y}, column {x}"
    assert hashlib.sha256(canvas.tobytes()).hexdigest() == picture_case.data["sha256_uint8"]


def test_a_picture_has_the_originals_grid_and_tokens(picture_case: Case) -> None:
    grid = picture_case.variant.grid(picture_case.picture, picture_case.setting)
    assert [grid.rows, grid.cols] == (picture_case.data["grid_hw"] or [1, 1])
    tokens = picture_case.variant.config.image_tokens(grid.rows, grid.cols)
    assert tokens == picture_case.data["image_tokens"]


def test_a_picture_of_another_mode_is_converted_to_rgb(picture_case: Case) -> None:
    variant, name = picture_case.variant, picture_case.picture
    stored = variant.open(name)
    about = variant.preprocess["images"][name]
    assert stored.mode == about["mode"]
    assert list(stored.size) == about["size_wh"]
    grid = variant.grid(name, picture_case.setting)
    converted = make_canvas(stored.convert("RGB"), grid, tiled=variant.config.family.tiled)
    canvas = variant.canvas(name, picture_case.setting)
    assert canvas.shape[2] == 3
    assert np.array_equal(canvas, converted)


def test_a_normalised_tensor_matches_the_original(picture_case: Case) -> None:
    variant, about = picture_case.variant, picture_case.data["normalised"]
    canvas = variant.canvas(picture_case.picture, picture_case.setting)
    ours = normalise(torch.from_numpy(canvas.copy()))
    wide = ours.double()
    assert abs(wide.mean().item() - about["mean"]) < NORMALISED
    assert abs(wide.std(correction=0).item() - about["std"]) < 1e-5
    assert abs(wide.abs().sum().item() / about["abs_sum"] - 1) < NORMALISED
    sample = variant.normalised.get(about["subsample_key"])
    if sample is not None:
        stride = about["subsample_stride"]
        assert_close(ours[:, ::stride, ::stride], sample, NORMALISED, "subsample")


def test_a_whole_normalised_tensor_matches_the_original(normalised_case: Case) -> None:
    variant = normalised_case.variant
    canvas = variant.canvas(normalised_case.picture, normalised_case.setting)
    golden = variant.normalised[f"{normalised_case.name}.full"]
    assert_close(normalise(torch.from_numpy(canvas.copy())), golden, NORMALISED, "whole tensor")


def test_a_stored_processed_picture_is_our_canvas(processed_case: Case) -> None:
    variant = processed_case.variant
    with Image.open(variant.folder / processed_case.data["processed_png"]) as stored:
        golden = np.asarray(stored)
    canvas = variant.canvas(processed_case.picture, processed_case.setting)
    assert np.array_equal(canvas, golden)


def test_grids_of_many_sizes_match_the_original(grid_case: Case) -> None:
    config = grid_case.variant.config
    max_tiles, transform = read_setting(config, grid_case.setting)
    wrong = []
    for case in grid_case.data:
        width, height = case["size_wh"]
        grid = image_grid(config, (width, height), max_tiles, transform)
        ours = {
            "output_wh": list(grid.canvas),
            "content_wh": list(grid.content),
            "content_offset_yx": list(grid.offset[::-1]),
            "grid_hw": [grid.rows, grid.cols],
            "image_tokens": config.image_tokens(grid.rows, grid.cols),
        }
        wrong += [(case["size_wh"], k, v, case[k]) for k, v in ours.items() if v != case[k]]
    assert not wrong, f"(size, what, ours, golden): {wrong}"
