"""Batches: the same wherever they are made, pictures at their rows, learnt answers alone."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from xc_ray.demo.batches import PICTURES_LAST, Batch, Batches, grids_of, messages_of
from xc_ray.demo.drawn.fonts import PILLOW_FACE, Fonts
from xc_ray.demo.drawn.hints import hints_of
from xc_ray.demo.drawn.tasks import Sample, training_sample
from xc_ray.demo.make import tiny_config
from xc_ray.demo.network import embed
from xc_ray.demo.vocabulary import make_tokenizer
from xc_ray.model.xcomposer import XComposer
from xc_ray.prompt.chat import ImageSlot
from xc_ray.prompt.tiles import Grid, make_canvas
from xc_ray.prompt.tokenizer import Tokenizer

CONFIG = tiny_config("2.5")
VOCAB = CONFIG.decoder.vocab_size
TOKENIZER = Tokenizer(make_tokenizer())
FONTS = Fonts((PILLOW_FACE,), ())
ROOT = Path(__file__).parents[2]


class Recorded:
    """Draws samples and keeps them, with the indices it was asked for."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.samples: list[Sample] = []

    def __call__(self, step: int, index: int) -> Sample:
        self.indices.append(index)
        self.samples.append(training_sample(1, index, FONTS, float(step > 0)))
        return self.samples[-1]


def make(key: tuple[int, int], batch_tokens: int = 1500) -> tuple[Batch, Recorded]:
    draw = Recorded()
    return Batches(CONFIG, TOKENIZER, draw, batch_tokens=batch_tokens)[key], draw


def fingerprint(batch: Batch) -> str:
    digest = hashlib.sha256(repr((batch.pack.lengths, list(batch.canvases))).encode())
    pack = batch.pack
    tensors = (pack.ids, pack.wanted, pack.targets, batch.image_rows, batch.things, batch.colours)
    for tensor in (*tensors, *batch.canvases.values()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def made() -> tuple[Batch, list[Sample]]:
    """Samples of all kinds: with two pictures, one or none, of one tile or many."""
    batch, draw = make((1, 0), 6000)
    assert {len(sample.pictures) for sample in draw.samples} == {0, 1, 2}
    assert len(batch.canvases) > 3
    return batch, draw.samples


def by_shape(samples: list[Sample]) -> dict[tuple[int, int], list[tuple[Sample, int, Grid]]]:
    """The pictures in the order of a batch's canvases."""
    found: dict[tuple[int, int], list[tuple[Sample, int, Grid]]] = {}
    for sample in samples:
        for i, grid in enumerate(grids_of(CONFIG, sample)):
            found.setdefault((grid.rows, grid.cols), []).append((sample, i, grid))
    return found


# Which samples


def test_a_step_and_a_part_make_the_same_batch_again() -> None:
    first, again = (fingerprint(make((3, 1))[0]) for _ in range(2))
    assert first == again
    assert len({first, fingerprint(make((3, 0))[0]), fingerprint(make((4, 1))[0])}) == 3


def test_another_process_makes_the_same_batch() -> None:
    script = "from tests.demo.test_batches import *; print(fingerprint(make((3, 1))[0]))"
    out = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    ).stdout
    assert out.split() == [fingerprint(make((3, 1))[0])]


def test_no_two_parts_and_no_two_steps_share_a_sample() -> None:
    keys = [(step, part) for step in (1, 2) for part in range(3)]
    drawn = [index for key in keys for index in make(key)[1].indices]
    assert len(drawn) > len(keys)
    assert len(set(drawn)) == len(drawn)


def test_samples_are_drawn_as_hard_as_the_step_is() -> None:
    steps: list[int] = []

    def draw(step: int, index: int) -> Sample:
        steps.append(step)
        return training_sample(1, index, FONTS, 0.0)

    assert Batches(CONFIG, TOKENIZER, draw, batch_tokens=100)[7, 1]
    assert set(steps) == {7}


@pytest.mark.parametrize("tokens", [1, 300, 2000])
def test_a_batch_has_its_tokens_and_would_not_without_its_last_conversation(tokens: int) -> None:
    batch, draw = make((2, 0), tokens)
    lengths = batch.pack.lengths
    assert len(lengths) == len(draw.samples)
    assert sum(lengths) == len(batch.pack.ids) >= tokens > sum(lengths[:-1])


# Where pictures are


def test_virtual_ids_address_the_rows_of_their_own_pictures(
    made: tuple[Batch, list[Sample]],
) -> None:
    batch, samples = made
    torch.manual_seed(0)
    model = XComposer(CONFIG).double().eval()
    with torch.no_grad():
        rows, _ = embed(model, batch.canvases)
        one_by_one = [
            model.vision([torch.from_numpy(make_canvas(picture, grid, tiled=True).copy())])[0]
            for sample in samples
            for picture, grid in zip(sample.pictures, grids_of(CONFIG, sample), strict=True)
        ]
    at_their_places = rows[batch.pack.ids[batch.image_rows] - VOCAB]
    torch.testing.assert_close(at_their_places, torch.cat(one_by_one), rtol=0, atol=1e-9)


def test_every_row_stands_in_exactly_one_place(made: tuple[Batch, list[Sample]]) -> None:
    batch, samples = made
    ids = batch.pack.ids
    num = sum(
        CONFIG.image_tokens(grid.rows, grid.cols) for s in samples for grid in grids_of(CONFIG, s)
    )
    assert sorted(ids[batch.image_rows].tolist()) == list(range(VOCAB, VOCAB + num))
    assert (ids >= VOCAB).sum() == num


def test_canvases_are_those_of_serving_by_their_grid(made: tuple[Batch, list[Sample]]) -> None:
    batch, samples = made
    wanted = by_shape(samples)
    assert list(batch.canvases) == list(wanted)
    for shape, places in wanted.items():
        for canvas, (sample, i, grid) in zip(batch.canvases[shape], places, strict=True):
            same = make_canvas(sample.pictures[i], grid, tiled=True)
            assert torch.equal(canvas, torch.from_numpy(same.copy()))


def test_hints_have_a_row_a_square_in_the_order_of_the_canvases(
    made: tuple[Batch, list[Sample]],
) -> None:
    batch, samples = made
    hints = [
        hints_of(CONFIG, sample.scenes[i], grid)
        for places in by_shape(samples).values()
        for sample, i, grid in places
    ]
    num = sum(len(c) * (1 + rows * cols) for (rows, cols), c in batch.canvases.items())
    assert batch.things.shape == batch.colours.shape == (num, 16)
    assert batch.things.dtype == batch.colours.dtype == torch.uint8
    assert torch.equal(batch.things, torch.cat([torch.from_numpy(h.things) for h in hints]))
    assert torch.equal(batch.colours, torch.cat([torch.from_numpy(h.colours) for h in hints]))


def test_two_pictures_share_the_budget_of_several() -> None:
    sample = Sample("compare", (("Which?", "Both."),), (Image.new("RGB", (900, 900)),) * 2, ())
    (one,) = grids_of(CONFIG, Sample("count", sample.turns, sample.pictures[:1], ()))
    assert one.num_tiles > CONFIG.family.max_tiles_several
    assert all(g.num_tiles <= CONFIG.family.max_tiles_several for g in grids_of(CONFIG, sample))


def test_pictures_stand_before_the_first_question_or_behind_it() -> None:
    picture = Image.new("RGB", (9, 9))
    sample = Sample("compare", (("One?", "1."), ("Two?", "2.")), (picture, picture), ())
    slots = (ImageSlot(0), ImageSlot(1))
    for last, parts in ((False, (*slots, "One?")), (True, ("One?", *slots))):
        messages = messages_of(sample, pictures_last=last)
        assert [m.role for m in messages] == ["user", "assistant"] * 2
        assert [m.parts for m in messages] == [parts, ("1.",), ("Two?",), ("2.",)]


def test_a_fifth_of_the_conversations_ask_before_they_show(
    made: tuple[Batch, list[Sample]],
) -> None:
    batch, samples = made
    head = TOKENIZER.encode("user\n")
    behind = []
    for ids, sample in zip(batch.pack.ids.split(batch.pack.lengths), samples, strict=True):
        if sample.pictures:
            behind.append(int((ids >= VOCAB).nonzero()[0]) > 2 + len(head))
    assert 0 < sum(behind) < len(behind) / 2
    luck = [Random(f"place-{i}").random() < PICTURES_LAST for i in range(2000)]
    assert 0.17 < sum(luck) / len(luck) < 0.23


def test_a_batch_may_have_no_pictures() -> None:
    def draw(step: int, index: int) -> Sample:
        return Sample("small_talk", ((f"Hello {step} {index}", "Hello!"),), (), ())

    batch = Batches(CONFIG, TOKENIZER, draw, batch_tokens=50)[0, 0]
    assert batch.canvases == {}
    assert batch.image_rows.shape == (0,)
    assert batch.things.shape == batch.colours.shape == (0, 16)


# What is learnt


def test_answers_alone_are_learnt_with_their_end_marks(made: tuple[Batch, list[Sample]]) -> None:
    batch, samples = made
    tokens = CONFIG.tokens
    wanted: list[int] = []
    for sample in samples:
        for _, answer in sample.turns:
            wanted += [*TOKENIZER.encode(answer), tokens.end_of_turn]
        wanted += [*TOKENIZER.encode("\n"), tokens.eos]
    assert batch.pack.targets.tolist() == wanted
    assert torch.equal(batch.pack.ids[batch.pack.wanted + 1], batch.pack.targets)
    assert not batch.pack.predicts_behind_pictures


def test_a_batch_goes_to_a_device_whole(made: tuple[Batch, list[Sample]]) -> None:
    batch, _ = made
    moved = batch.to(torch.device("cpu"))
    assert fingerprint(moved) == fingerprint(batch)
    on_meta = batch.to(torch.device("meta"))
    tensors = (on_meta.pack.ids, on_meta.pack.wanted, on_meta.pack.targets, on_meta.image_rows)
    more = (on_meta.things, on_meta.colours, *on_meta.canvases.values())
    assert {t.device.type for t in (*tensors, *more)} == {"meta"}
