"""Training from nothing: a step follows from the recipe alone, whoever computes it and when."""

import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.demo.test_batches import FONTS
from xc_ray.demo import pretrain
from xc_ray.demo.batches import Batches
from xc_ray.demo.drawn.tasks import HELD_OUT, LATE_TASKS
from xc_ray.demo.make import demo_config, tiny_config
from xc_ray.demo.pretrain import Draw, Recipe, Run
from xc_ray.model.ops import PLAIN
from xc_ray.model.weights import Checkpoint
from xc_ray.pipeline import Pipeline
from xc_ray.prompt.tokenizer import load_tokenizer

CPU = torch.device("cpu")
# Two parts a step, easy samples, and a rate that rises for four steps and falls in the last three.
RECIPE = Recipe(
    num_steps=10,
    batch_tokens=200,
    parts=2,
    few_steps=0,
    learning_rate=1e-3,
    warmup_steps=4,
    easy_steps=1_000,
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 32 and two layers in place of the demo model's."""
    monkeypatch.setattr(pretrain, "demo_config", lambda: tiny_config("2.5"))
    monkeypatch.setattr(pretrain, "find_fonts", lambda *_, **__: FONTS)


pytestmark = pytest.mark.usefixtures("root_logger_as_it_was")


def trained(folder: Path, recipe: Recipe = RECIPE, upto: int | None = None) -> Run:
    """The run in a folder, begun or gone on with up to a step."""
    run = Run(folder, recipe, FONTS, CPU)
    run.train(minutes=1e9, processes=0, upto=upto)
    return run


def weights(run: Run) -> dict[str, Tensor]:
    return dict(zip(run.masters.names, (e.detach() for e in run.masters.exact), strict=True))


def saved(folder: Path) -> dict[str, Tensor]:
    """The exact weights in a run's state."""
    tensors: dict[str, Tensor] = {}
    for path in (folder / "state").glob("*.safetensors"):
        tensors |= load_file(path)
    return {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# The recipe


@given(
    num_steps=st.integers(1, 20_000),
    warmup_steps=st.integers(1, 3_000),
    decay_share=st.floats(0.01, 1.0),
)
def test_the_rate_warms_up_stays_and_falls_to_just_above_0(
    num_steps: int, warmup_steps: int, decay_share: float
) -> None:
    recipe = Recipe(num_steps=num_steps, warmup_steps=warmup_steps, decay_share=decay_share)
    rates = [recipe.rate(step) for step in {*range(0, num_steps, 97), num_steps - 1}]
    assert all(0 < rate <= recipe.learning_rate for rate in rates)
    falling = decay_share * num_steps
    last = recipe.learning_rate * min(1.0, 1 / falling, num_steps / warmup_steps)
    assert recipe.rate(num_steps - 1) == pytest.approx(last)
    assert recipe.rate(num_steps) == 0


def test_the_rate_of_the_recipe_in_numbers() -> None:
    recipe = Recipe(num_steps=100, learning_rate=1.0, warmup_steps=4, decay_share=0.25)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[3:76]) == {1.0}
    assert rates[76:] == pytest.approx([i / 25 for i in range(24, 0, -1)])


def test_steps_have_one_part_at_first_and_grow_hard() -> None:
    recipe = Recipe(parts=4, few_steps=10, easy_steps=20)
    assert [recipe.parts_of(step) for step in (0, 9, 10, 11)] == [1, 1, 4, 4]
    assert [recipe.stage(step) for step in (0, 10, 20, 30)] == [0.0, 0.5, 1.0, 1.0]


def test_samples_follow_from_the_seed() -> None:
    first, other = (Draw(replace(RECIPE, seed=seed), FONTS)(0, 5) for seed in (1, 2))
    assert Draw(RECIPE, FONTS)(0, 5).turns == first.turns
    assert (first.turns, first.scenes) != (other.turns, other.scenes)


def test_late_samples_begin_at_their_step() -> None:
    draw = Draw(replace(RECIPE, late_step=3, easy_steps=1), FONTS)
    early, late = ([draw(step, index) for index in range(150)] for step in (2, 3))
    assert not {sample.task for sample in early} & set(LATE_TASKS)
    assert {sample.task for sample in late} & set(LATE_TASKS)


# A run and what is left of it


@pytest.mark.usefixtures("tiny_model")
def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", upto=4)
    half = trained(tmp_path / "parts", upto=2)
    again = Run(tmp_path / "parts", RECIPE, FONTS, CPU)
    assert again.step == 2
    assert farthest(weights(again), weights(half)) == 0  # the weights are exact
    again.train(minutes=1e9, processes=0, upto=4)
    assert (again.step, whole.step) == (4, 4)
    moved = farthest(weights(whole), weights(half))
    # The moments were rounded to bf16: 8 bits.
    assert 0 < farthest(weights(again), weights(whole)) < 0.02 * moved


@pytest.mark.usefixtures("tiny_model")
def test_processes_that_draw_change_nothing(tmp_path: Path) -> None:
    runs = [Run(tmp_path / str(n), RECIPE, FONTS, CPU) for n in (0, 2)]
    for run, processes in zip(runs, (0, 2), strict=True):
        run.train(minutes=1e9, processes=processes, upto=3)
    assert farthest(*map(weights, runs)) == 0


@pytest.mark.usefixtures("tiny_model")
def test_a_folder_of_another_recipe_is_refused_and_named(tmp_path: Path) -> None:
    trained(tmp_path, upto=1)
    for change in ({"seed": 2}, {"learning_rate": 2e-3}, {"parts": 1}):
        with pytest.raises(
            SystemExit, match=r"another recipe.*seed=1.*take another folder"
        ) as told:
            Run(tmp_path, replace(RECIPE, **change), FONTS, CPU)
        assert str(tmp_path) in str(told.value)


@pytest.mark.usefixtures("tiny_model")
def test_a_run_may_become_longer_until_its_rate_falls(tmp_path: Path) -> None:
    longer = replace(RECIPE, num_steps=40)
    trained(tmp_path, upto=7)  # rates of steps 0 to 7 are the same in both
    assert Run(tmp_path, longer, FONTS, CPU).recipe == longer
    trained(tmp_path, upto=8)  # the rate of step 8 is not
    with pytest.raises(SystemExit, match="num_steps=10"):
        Run(tmp_path, longer, FONTS, CPU)
    assert Run(tmp_path, RECIPE, FONTS, CPU).step == 8


@pytest.mark.usefixtures("tiny_model")
def test_a_longer_run_is_the_one_that_it_would_have_been_from_the_start(tmp_path: Path) -> None:
    longer = replace(RECIPE, num_steps=40)
    trained(tmp_path / "a", upto=2)
    trained(tmp_path / "b", longer, upto=2)
    assert farthest(saved(tmp_path / "a"), saved(tmp_path / "b")) == 0
    trained(tmp_path / "a", longer, upto=3)
    assert json.loads((tmp_path / "a/state/state.json").read_text()) == {
        "step": 3,
        "recipe": asdict(longer),
    }


@pytest.mark.usefixtures("tiny_model")
def test_a_run_at_its_end_has_nothing_left_to_do(tmp_path: Path) -> None:
    run = trained(tmp_path)
    assert run.step == RECIPE.num_steps
    before = saved(tmp_path)
    again = trained(tmp_path)
    assert again.step == RECIPE.num_steps
    assert farthest(saved(tmp_path), before) == 0


@pytest.mark.usefixtures("tiny_model")
def test_the_loss_falls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = replace(RECIPE, num_steps=200, batch_tokens=600, learning_rate=3e-3, parts=1)
    run = Run(tmp_path, recipe, FONTS, CPU)
    data = Batches(run.config, run.tokenizer, Draw(recipe, FONTS), batch_tokens=2000)
    unseen = data[9_000, 0]  # no step of the run has its samples

    @torch.no_grad()
    def losses() -> list[float]:
        loss, hints = run.student(unseen, PLAIN)
        return [loss.item() / len(unseen.pack.targets), hints.item()]

    before = losses()
    with caplog.at_level(logging.INFO, logger="xc_ray.demo.pretrain"):
        run.train(minutes=1e9, processes=0, upto=100)
    after = losses()
    assert after[0] < 0.7 * before[0]
    assert after[1] < 0.9 * before[1]
    assert "step 100/200  loss " in caplog.text


# Several ranks


def command(folder: str, recipe: str, steps: str) -> None:
    """The command of one rank, with the tiny model; torchrun's variables are set."""
    given = [f"--{key.replace('_', '-')}={value}" for key, value in json.loads(recipe).items()]
    argv = ["pretrain", folder, "--exam=0", "--processes=0", "--device=cpu", f"--steps={steps}"]
    with (
        mock.patch.object(pretrain, "demo_config", return_value=tiny_config("2.5")),
        mock.patch.object(pretrain, "find_fonts", return_value=FONTS),
        mock.patch.object(sys, "argv", argv + given),
    ):
        pretrain.main()


def run_ranks(world: int, folder: Path, recipe: Recipe, steps: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = "import sys; from tests.demo.test_pretrain import command; command(*sys.argv[1:])"
    arguments = [str(folder), json.dumps(asdict(recipe)), str(steps)]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT,
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world


@pytest.mark.usefixtures("tiny_model")
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Three parts at last, so that the ranks have unlike shares, and at first one, of rank 0.

    The rate is small: where a gradient is nothing but rounding, Adam takes a whole step.
    """
    recipe = replace(RECIPE, parts=3, few_steps=1, learning_rate=3e-5)
    alone = Run(tmp_path / "one", recipe, FONTS, CPU)
    first = {name: weight.clone() for name, weight in weights(alone).items()}
    alone.train(minutes=1e9, processes=0, upto=3)
    run_ranks(2, tmp_path / "two", recipe, 3)
    assert farthest(weights(alone), first) > 3e-5
    assert farthest(weights(alone), saved(tmp_path / "two")) < 1e-6


# The command and the model


@pytest.mark.usefixtures("tiny_model")
def test_the_command_trains_saves_and_examines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--steps=2", "--exam=1", "--processes=0", "--device=cpu"]
    recipe = ["--num-steps=10", "--batch-tokens=200", "--parts=1", "--few-steps=0"]
    monkeypatch.setattr(sys, "argv", ["pretrain", str(tmp_path), *given, *recipe])
    pretrain.main()
    assert json.loads((tmp_path / "state/state.json").read_text())["step"] == 2
    assert Checkpoint.open(tmp_path / "model").config == tiny_config("2.5")
    shares = capsys.readouterr().out.splitlines()[-1].split("  ")
    assert shares == [f"{task} 0.000" for task in HELD_OUT]


def test_missing_fonts_are_told_by_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", str(tmp_path / "out"), f"--fonts={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        pretrain.main()
    assert ended.value.code == 2
    assert "install fonts-liberation fonts-lato" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny_model")
def test_no_minutes_save_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--minutes=0", "--exam=0", "--processes=0", "--device=cpu", "--batch-tokens=200"]
    monkeypatch.setattr(sys, "argv", ["pretrain", str(tmp_path), *given])
    pretrain.main()
    assert json.loads((tmp_path / "state/state.json").read_text())["step"] == 0
    assert Checkpoint.open(tmp_path / "model").load()
    recipe = replace(Recipe(), batch_tokens=200)
    fresh, gone_on = (Run(folder, recipe, FONTS, CPU) for folder in (tmp_path / "new", tmp_path))
    for run in (fresh, gone_on):
        run.train(minutes=1e9, processes=0, upto=1)
    assert farthest(weights(fresh), weights(gone_on)) == 0


def test_the_model_is_small_enough_to_be_bundled_and_answers(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE, FONTS, CPU)
    run.train(minutes=0, processes=0)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.config == demo_config()
    assert sum(p.numel() for p in checkpoint.load().parameters()) <= 6_000_000
    (weights_file,) = (tmp_path / "model").glob("*.safetensors")
    assert weights_file.stat().st_size <= 12_000_000
    load_tokenizer(tmp_path / "model", checkpoint.config.decoder.vocab_size)
    answer, history = Pipeline.load(tmp_path / "model", device="cpu").chat("Hello!", max_tokens=3)
    assert history == [("Hello!", answer)]
