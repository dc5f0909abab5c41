"""Masters: AdamW in float32 under a model of any dtype, saved and gone on from."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.demo.test_batches import CONFIG
from xc_ray.demo.network import Student, initialise
from xc_ray.demo.optimizer import BETAS, Masters
from xc_ray.model.weights import Checkpoint, save_checkpoint

RATES = (1e-2, 3e-3, 1e-3, 1e-2)
MAX_NORM = 0.7


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def teach(net: nn.Module, step: int) -> None:
    """Gradients of a step, above `MAX_NORM` and below it."""
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (drawn * (1.0 if step % 2 else 0.01)).to(parameter.dtype)


def weights(masters: Masters) -> list[Tensor]:
    return [exact.detach().clone() for exact in masters.exact]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_adamw_on_a_float32_copy(dtype: torch.dtype) -> None:
    net = make_net()
    copied = copy.deepcopy(net)
    masters = Masters(net, weight_decay=0.3)
    net.to(dtype)
    matrices = [p for p in copied.parameters() if p.dim() > 1]
    others = [p for p in copied.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        betas=BETAS,
    )
    for step, rate in enumerate(RATES):
        teach(net, step)
        for parameter, used in zip(copied.parameters(), net.parameters(), strict=True):
            assert used.grad is not None
            parameter.grad = used.grad.float().clone()
        wanted = nn.utils.clip_grad_norm_(copied.parameters(), MAX_NORM)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        norm = masters.step(rate, MAX_NORM)
        torch.testing.assert_close(norm, wanted)
        assert (norm > MAX_NORM) == (step % 2 == 1)
    for exact, parameter, used in zip(
        masters.exact, copied.parameters(), net.parameters(), strict=True
    ):
        torch.testing.assert_close(exact, parameter, rtol=1e-6, atol=1e-7)
        assert used.dtype == dtype
        assert torch.equal(used, exact.to(dtype))
        assert used.grad is None


def test_norms_and_biases_do_not_decay() -> None:
    net = make_net()
    masters = Masters(net, weight_decay=0.5)
    before = weights(masters)
    masters.step(0.1, MAX_NORM)  # without a gradient, decay is all there is
    for name, old, new in zip(masters.names, before, masters.exact, strict=True):
        factor = 1 - 0.1 * 0.5 if old.dim() > 1 else 1.0
        torch.testing.assert_close(new.detach(), old * factor, msg=name)


def test_decay_takes_matrices_alone_in_the_real_model() -> None:
    student = Student(CONFIG)
    masters = Masters(student, weight_decay=0.5)
    decaying, staying = masters.optimizer.param_groups
    assert all(p.dim() > 1 for p in decaying["params"])
    assert staying["weight_decay"] == 0
    names = {id(e): n for n, e in zip(masters.names, masters.exact, strict=True)}
    without = {names[id(p)] for p in staying["params"]}
    assert {n for n in masters.names if "norm" in n or n.endswith("bias")} <= without


def test_steps_too_small_for_bf16_add_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    masters = Masters(net, weight_decay=0.0)
    net.bfloat16()
    for _ in range(200):
        net.weight.grad = torch.ones_like(net.weight)
        masters.step(1e-4, 10.0)  # 1 − 1e-4 is 1 in bf16
    assert masters.exact[0].item() == pytest.approx(0.98, abs=1e-4)
    assert net.weight.item() == pytest.approx(0.98, abs=4e-3)


def test_what_no_row_went_through_stands_still() -> None:
    net = make_net()
    masters = Masters(net, weight_decay=0.0)
    before = weights(masters)
    teach(net, 0)
    next(net.parameters()).grad = None
    masters.step(1e-2, MAX_NORM)
    assert torch.equal(masters.exact[0], before[0])
    assert not any(
        torch.equal(exact, old) for exact, old in zip(masters.exact[1:], before[1:], strict=True)
    )


# What is saved


def test_a_run_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    whole = make_net()
    masters = Masters(whole, weight_decay=0.1)
    for step in range(5):
        teach(whole, step)
        masters.step(1e-2, MAX_NORM)
    state = {name: tensor.clone() for name, tensor in masters.state().items()}
    resumed = make_net().bfloat16()
    torch.manual_seed(4)
    for parameter in resumed.parameters():  # whatever it began with
        nn.init.normal_(parameter)
    others = Masters(resumed, weight_decay=0.1)
    others.load(state, 5)
    for exact, other, used in zip(masters.exact, others.exact, resumed.parameters(), strict=True):
        assert torch.equal(exact, other)
        assert torch.equal(used, exact.bfloat16())
    resumed.float()
    for step in range(5, 8):
        before = weights(masters)
        for net, own in ((whole, masters), (resumed, others)):
            teach(net, step)
            own.step(1e-2, MAX_NORM)
        # bf16 has 8 bits: each moment is off by 1 / 256 at most, and the update by as much.
        for exact, other, old in zip(masters.exact, others.exact, before, strict=True):
            moved = (exact - old).abs().max()
            assert (exact - other).abs().max() < 0.02 * moved
            assert moved > 0


def test_a_state_holds_exact_weights_and_rounded_moments() -> None:
    net = make_net()
    masters = Masters(net, weight_decay=0.1)
    teach(net, 1)
    masters.step(1e-2, MAX_NORM)
    state = masters.state()
    assert len(state) == 3 * len(masters.names)
    for name, exact in zip(masters.names, masters.exact, strict=True):
        own = masters.optimizer.state[exact]
        assert torch.equal(state[f"weight.{name}"], exact)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[f"{key}.{name}"], own[key].bfloat16())


def test_a_state_before_the_first_step_can_be_gone_on_from() -> None:
    first, second = make_net(), make_net()
    masters, others = (Masters(net, weight_decay=0.1) for net in (first, second))
    others.load(masters.state(), 0)
    for net, own in ((first, masters), (second, others)):
        teach(net, 1)
        own.step(1e-2, MAX_NORM)
    assert all(map(torch.equal, masters.exact, others.exact))


def test_what_is_published_is_one_whole_model_of_the_published_names(tmp_path: Path) -> None:
    student = Student(CONFIG)
    initialise(student.model, 2)
    masters = Masters(student, weight_decay=0.1)
    config = replace(CONFIG, torch_dtype="bfloat16")
    published = masters.published()
    assert not any("hinter" in name for name in published)
    save_checkpoint(tmp_path, config, published)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.shapes) == set(published)
    loaded = checkpoint.load(dtype=torch.bfloat16)
    for name, parameter in student.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name
