"""Curves that do not depend on how the rows of a step are divided: real ranks over gloo."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from tests.train.ranks import Case, run, run_ranks
from xc_ray.config import LoraOptions, StepOptions
from xc_ray.model.weights import Checkpoint
from xc_ray.train.feed import Feed
from xc_ray.train.network import Learner, LoraOps, add_lora
from xc_ray.train.plan import Plan
from xc_ray.train.rows import CheckedRow
from xc_ray.train.step import Ranks, Stepper, step_seed
from xc_ray.train.store import RowStore, write_rows

ALONE = Case(batch_size=8)
TWO_RANKS = {
    "two ranks of 4": Case(batch_size=4),
    "two ranks of 4, unpacked": Case(batch_size=4, packing=False),
    "two ranks of 2, twice": Case(batch_size=2, accumulation=2),
    "two ranks of 2, twice, unpacked": Case(batch_size=2, accumulation=2, packing=False),
    "texts on one rank, pictures on the other": Case(batch_size=4, lopsided=True),
    "nothing on the second rank": Case(batch_size=4, idle=True, steps=7),
    "recomputed": Case(batch_size=4, checkpointing=True, steps=7),
}


@pytest.fixture(scope="module")
def alone(tiny: Callable[..., Path], stored: Path) -> list[list[float]]:
    """One rank, eight conversations in a pass; every sixth step is an epoch's last, with five."""
    return run(tiny("2.5"), stored, ALONE, Ranks())


@pytest.fixture(scope="module")
def on_two(tiny: Callable[..., Path], stored: Path) -> dict[str, list[list[list[float]]]]:
    told = run_ranks(2, tiny("2.5"), stored, list(TWO_RANKS.values()))
    return {name: [rank[i] for rank in told] for i, name in enumerate(TWO_RANKS)}


def close(one: list[list[float]], other: list[list[float]]) -> None:
    for (loss, norm), (other_loss, other_norm) in zip(one, other[: len(one)], strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-3)


def test_the_loss_falls(alone: list[list[float]]) -> None:
    assert alone[-1][0] < alone[0][0] - 0.5


def test_unpacked_rows_give_the_curve_of_packed_ones(
    alone: list[list[float]], tiny: Callable[..., Path], stored: Path
) -> None:
    close(run(tiny("2.5"), stored, replace(ALONE, packing=False), Ranks()), alone)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_give_the_curve_of_one(
    name: str, on_two: dict[str, list[list[list[float]]]], alone: list[list[float]]
) -> None:
    first, second = on_two[name]
    assert first == second  # every rank knows the loss of all
    close(first, alone)


def test_dropout_is_drawn_by_seed_step_and_rank(tiny: Callable[..., Path], stored: Path) -> None:
    case = Case(batch_size=8, dropout=0.3, steps=3)
    first, again = (run(tiny("2.5"), stored, case, Ranks()) for _ in range(2))
    without = run(tiny("2.5"), stored, replace(case, dropout=0.0), Ranks())
    assert first == again
    # B is 0 in the first step: dropout shows in the gradients, and from the second on in the loss.
    assert [one[1] for one in first] != [one[1] for one in without]
    seeds = {step_seed(s, n, r) for s in range(5) for n in range(5) for r in range(5)}
    assert len(seeds) == 125


def first_step(folder: Path, rows: list[CheckedRow], path: Path, *, encoder: bool) -> list[float]:
    """Loss and gradient norm of a step with all rows."""
    checkpoint = Checkpoint.open(folder)
    whole = checkpoint.load()
    add_lora(whole.decoder, LoraOptions(rank=4, alpha=8, dropout=0.0), seed=3)
    write_rows(fs.LocalFileSystem(), str(path), rows)
    store = RowStore.open(fs.LocalFileSystem(), str(path), checkpoint.config.decoder.vocab_size)
    options = StepOptions(max_steps=1, batch_size=len(rows))
    plan = Plan(store.sizes, (1.0,), options, rows_a_step=len(rows), pack_tokens=2000)
    learner = Learner(whole.decoder, LoraOps(), recompute=False).train()
    stepper = Stepper(learner, whole.vision if encoder else None, plan, store, Ranks())
    with Feed(store, checkpoint.config) as feed:
        done = stepper.step(0, feed.packs(stepper.mine(0)))
    return [done.loss, done.grad_norm]


def test_texts_are_learnt_without_an_encoder_and_pictures_are_not(
    tiny: Callable[..., Path], checked_rows: list[CheckedRow], tmp_path: Path
) -> None:
    texts = [row for row in checked_rows if not row.pictures][:4]
    given, none = (
        first_step(tiny("2.5"), texts, tmp_path / f"{encoder}.arrow", encoder=encoder)
        for encoder in (True, False)
    )
    assert given == none
    with pytest.raises(AssertionError, match="pictures in a step of text alone"):
        first_step(tiny("2.5"), checked_rows[:4], tmp_path / "pictures.arrow", encoder=False)
