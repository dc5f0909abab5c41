"""Curves that do not depend on how the rows of a step are divided: real ranks over gloo."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pyarrow import fs

from tests.train.ranks import Case, run, run_ranks
from xc_ray.config import LoraOptions, StepOptions
from xc_ray.errors import DataError
from xc_ray.model.weights import Checkpoint
from xc_ray.train.feed import Feed
from xc_ray.train.network import Learner, LoraOps, add_lora, lora_parameters
from xc_ray.train.plan import Plan
from xc_ray.train.rows import CheckedRow
from xc_ray.train.step import Done, Ranks, Stepper, step_seed
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


@pytest.fixture
def alone_of(tiny: Callable[..., Path], stored: Path) -> Callable[..., Stepper]:
    """A function that gives the steps of one rank with the options that are named."""

    def make(*, dropout: float = 0.0, rank: int = 0, **options: object) -> Stepper:
        checkpoint = Checkpoint.open(tiny("2.5"))
        whole = checkpoint.load()
        add_lora(whole.decoder, LoraOptions(rank=4, alpha=8, dropout=dropout), seed=3)
        vocab = checkpoint.config.decoder.vocab_size
        store = RowStore.open(fs.LocalFileSystem(), str(stored), vocab)
        made = StepOptions.model_validate({"max_steps": 4, "batch_size": 4, **options})
        plan = Plan(store.sizes, (1.0,), made, rows_a_step=4, pack_tokens=2000)
        learner = Learner(whole.decoder, LoraOps(), recompute=False).train()
        return Stepper(learner, whole.vision, plan, store, Ranks(rank))

    return make


def take(stepper: Stepper, *numbers: int, stop: bool = False) -> list[Done]:
    """These steps, one after another."""
    with Feed(stepper.store, stepper.learner.decoder.config) as feed:
        packs = feed.packs(pack for n in numbers for pack in stepper.mine(n))
        return [stepper.step(n, packs, stop=stop) for n in numbers]


def test_a_step_tells_what_it_learnt_from(alone_of: Callable[..., Stepper]) -> None:
    stepper = alone_of()
    (done,) = take(stepper, 0)
    sizes, rows = stepper.plan.sizes, stepper.plan.rows(0)
    assert done.conversations == len(rows) == 4
    assert done.tokens == sizes.tokens[rows].sum() > done.learnt
    assert done.learnt == sizes.learnt[rows].sum()


def test_a_step_moves_by_the_rate_of_its_number(alone_of: Callable[..., Stepper]) -> None:
    """Adam's first move is the rate itself, whatever the gradient; B begins at 0."""
    for number in (0, 1):
        stepper = alone_of(learning_rate=1e-2, warmup=0.75)
        (done,) = take(stepper, number)
        assert done.learning_rate == pytest.approx(1e-2 * (number + 1) / 4)
        moved = max(float(p.detach().abs().max()) for n, p in named(stepper) if "lora_B" in n)
        assert moved == pytest.approx(done.learning_rate, rel=1e-2)


def test_weight_decay_shrinks_what_has_no_gradient(alone_of: Callable[..., Stepper]) -> None:
    stepper = alone_of(learning_rate=1e-2, warmup=0, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in named(stepper) if "lora_A" in name}
    take(stepper, 0)  # A has none while B is 0
    for name, parameter in named(stepper):
        if "lora_A" in name:
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5e-2))


def test_gradients_are_clipped_and_told_as_they_were(alone_of: Callable[..., Stepper]) -> None:
    stepper, freely = alone_of(max_grad_norm=1e-3), alone_of(max_grad_norm=1e9)
    (done,), (other,) = take(stepper, 0), take(freely, 0)
    assert done.grad_norm == pytest.approx(other.grad_norm) != pytest.approx(1e-3)
    assert float(norm(stepper)) == pytest.approx(1e-3, rel=1e-2)
    assert float(norm(freely)) == pytest.approx(other.grad_norm)


def test_no_gradient_of_a_step_is_left_in_the_next(alone_of: Callable[..., Stepper]) -> None:
    first, again = take(alone_of(learning_rate=1e-12, max_grad_norm=1e9), 0, 0)
    assert again.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)


def test_each_step_draws_from_its_seed_number_and_rank_alone(
    alone_of: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed, whole = (alone_of(dropout=0.5, learning_rate=1e-12) for _ in range(2))
    assert take(resumed, 2)[0].grad_norm == pytest.approx(take(whole, 0, 1, 2)[2].grad_norm)
    cases = [(5, 0), (6, 0), (5, 1)]
    steppers = [alone_of(seed=seed, rank=rank) for seed, rank in cases]
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(Plan, "share", lambda plan, rows, workers: [[tuple(rows)]] * 2)
    for stepper in steppers:
        take(stepper, 0, 1)
    assert seeds == [step_seed(seed, n, rank) for seed, rank in cases for n in (0, 1)]


def test_a_loss_that_is_no_number_changes_nothing_and_names_the_rows(
    alone_of: Callable[..., Stepper],
) -> None:
    stepper = alone_of()
    with torch.no_grad():
        stepper.parameters[0].fill_(float("nan"))
    before = [parameter.detach().clone() for parameter in stepper.parameters]
    with pytest.raises(DataError, match="step 2: the loss is nan") as caught:
        take(stepper, 1)
    for row in stepper.plan.rows(1):
        assert str(stepper.store.place(row)) in str(caught.value)
    for parameter, old in zip(stepper.parameters, before, strict=True):
        assert torch.equal(parameter.nan_to_num(), old.nan_to_num())
    assert not stepper.optimizer.state


@pytest.mark.parametrize(("own", "others"), [(False, 0.0), (True, 0.0), (False, 1.0), (True, 1.0)])
def test_all_stop_if_any_rank_was_asked_to(
    alone_of: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch, own: bool, others: float
) -> None:
    stepper = alone_of()
    stepper.ranks = Ranks(0, 2)

    def add_the_other(both: torch.Tensor, group: object) -> None:
        both += torch.tensor([1.0, others], dtype=both.dtype)

    monkeypatch.setattr(dist, "all_reduce", add_the_other)
    (done,) = take(stepper, 0, stop=own)
    assert done.stop is (own or others > 0)


def named(stepper: Stepper) -> list[tuple[str, torch.nn.Parameter]]:
    return list(lora_parameters(stepper.learner.decoder).items())


def norm(stepper: Stepper) -> torch.Tensor:
    """Of the gradients that the optimizer was given."""
    return torch.nn.utils.get_total_norm(p.grad for p in stepper.parameters if p.grad is not None)
