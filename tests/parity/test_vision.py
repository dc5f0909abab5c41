"""Picture embeddings as the original computes them, and the steps of the tower on the way."""

import re
from typing import Any

import torch
from torch import Tensor

from tests.parity.golden import EMBEDDINGS, Case, assert_close
from tests.parity.slow import outputs_of
from xc_ray.model.vision import normalise, to_squares


def test_embeddings_match_the_original(embedding_case: Case) -> None:
    variant = embedding_case.variant
    ours = variant.embeddings(embedding_case.picture, embedding_case.setting)
    told = variant.json("vision").get(embedding_case.name)
    if told:
        assert len(ours) == told["tokens"]
        assert abs(ours.double().mean().item() - told["mean"]) < EMBEDDINGS
        assert abs(ours.double().std(correction=0).item() - told["std"]) < 1e-4
    prefix = f"{embedding_case.name}."
    parts = {n.removeprefix(prefix): t for n, t in variant.embedded.items() if n.startswith(prefix)}
    assert parts
    for part, golden in parts.items():
        assert_close(rows_of(ours, part), golden, EMBEDDINGS, part)


def test_pictures_of_one_call_do_not_influence_one_another(tower_case: Case) -> None:
    variant = tower_case.variant
    canvas = variant.canvas(tower_case.picture, tower_case.setting)
    first = torch.from_numpy(canvas.copy())
    second = torch.full((variant.config.tile, variant.config.tile, 3), 90, dtype=torch.uint8)
    with torch.no_grad():
        together = variant.model.vision([second, first])[1]
    alone = variant.embeddings(tower_case.picture, tower_case.setting)
    assert_close(together, alone, EMBEDDINGS, "beside another picture")


def test_each_step_of_the_tower_matches_the_original(tower_case: Case) -> None:
    variant, vision = tower_case.variant, tower_case.variant.model.vision
    canvas = torch.from_numpy(variant.canvas(tower_case.picture, tower_case.setting).copy())
    grid = variant.grid(tower_case.picture, tower_case.setting)
    clip: Any = vision.vit.vision_tower.vision_model
    with torch.no_grad():
        squares = to_squares(variant.config, normalise(canvas))
        with outputs_of(clip.pre_layrnorm, *clip.encoder.layers) as hidden:
            patches = vision.vit(squares)
        projected = vision.projector_input(patches, grid.rows, grid.cols)
    stride = re.search(r"::(\d+)", tower_case.data["note"])
    every = int(stride[1]) if stride else 35
    found = {n.removeprefix("debug."): t for n, t in variant.embedded.items() if "debug." in n}
    assert found
    for name, golden in found.items():
        if name == "tiles_sub":
            ours = squares[:, :, ::every, ::every]
        elif name.startswith("hidden_states."):
            ours = hidden[int(name.removeprefix("hidden_states."))][:, : golden.shape[1]]
        else:
            ours = rows_of(projected, name.removeprefix("projector_in_"))
        assert_close(ours, golden, EMBEDDINGS, name)


def rows_of(x: Tensor, part: str) -> Tensor:
    """`full`, `row_norms`, `first8`, `last8`, `rows97` (every 97th) of (T, C)."""
    match = re.fullmatch(r"(full|row_norms)|(first|last|rows)(\d+)", part)
    assert match, f"unknown part {part!r}"
    if match[1]:
        return x if match[1] == "full" else x.norm(dim=1)
    count = int(match[3])
    return {"first": x[:count], "last": x[-count:], "rows": x[::count]}[match[2]]
