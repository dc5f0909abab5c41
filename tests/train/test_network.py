"""LoRA on the frozen decoder: what is wrapped, how it is computed, and the loss of a pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from tests.conftest import VARIANTS
from xc_ray.config import LoraOptions
from xc_ray.model.adapter import load_adapter
from xc_ray.model.config import PLORA_LINEARS, RopeScaling, Variant
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import Ops
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import XComposer
from xc_ray.train.data import IGNORED
from xc_ray.train.loss import supervised_loss
from xc_ray.train.network import (
    Learner,
    LoraOps,
    Pack,
    add_lora,
    lora_parameters,
    name_linears,
    save_adapter,
    wrapped_linears,
)

OPTIONS = LoraOptions(rank=4, alpha=12, dropout=0.0)


@pytest.fixture(params=VARIANTS)
def whole(request: pytest.FixtureRequest, tiny: Callable[[Variant], Path]) -> XComposer:
    return Checkpoint.open(tiny(request.param)).load(dtype=torch.float64)


@pytest.fixture
def newest(tiny: Callable[[Variant], Path]) -> XComposer:
    return Checkpoint.open(tiny("2.5")).load(dtype=torch.float64)


def shake(decoder: Decoder) -> None:
    """Weights as after some training: B is not 0 any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.copy_(0.1 * torch.randn_like(parameter))


def make_pack(whole: XComposer, *, picture_in_answer: bool = False) -> tuple[Pack, Tensor]:
    """A text of 20, and 40 tokens with 16 picture rows; embeddings of these."""
    vocab = whole.config.decoder.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab, (60,), generator=generator)
    ids[25:41] = torch.arange(vocab, vocab + 16)
    labels = ids.clone()
    labels[:7] = labels[20:30] = labels[25:41] = IGNORED
    if not picture_in_answer:
        labels[41:44] = IGNORED
    width = whole.config.decoder.hidden_size
    rows = torch.randn(16, width, generator=generator, dtype=torch.float64)
    return Pack.of(ids, labels, [20, 40], [], vocab), rows


def gradients(decoder: Decoder) -> list[Tensor]:
    found = []
    for parameter in lora_parameters(decoder).values():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found


def test_every_linear_of_the_layers_is_wrapped_and_plora_never(whole: XComposer) -> None:
    before = dict(whole.decoder.named_parameters())
    add_lora(whole.decoder, OPTIONS, seed=0)
    layers = range(whole.config.decoder.num_hidden_layers)
    wanted = {f"model.layers.{n}.{linear}" for n in layers for linear in PLORA_LINEARS}
    assert set(wrapped_linears(whole.decoder)) == wanted
    trained = lora_parameters(whole.decoder)
    assert len(trained) == 2 * len(wanted)
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert not any(parameter.requires_grad for parameter in before.values())


def test_targets_are_the_linears_that_are_named(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS.model_copy(update={"targets": ("attention.wo",)}), seed=0)
    assert wrapped_linears(newest.decoder) == [f"model.layers.{n}.attention.wo" for n in range(2)]


def test_linears_are_named_once_for_all_their_layers() -> None:
    names = [f"model.layers.{n}.attention.wo" for n in (0, 1, 2, 5)]
    assert name_linears(names) == "model.layers.{0–2, 5}.attention.wo"


@pytest.mark.parametrize("rslora", [False, True])
def test_it_computes_what_peft_does(newest: XComposer, rslora: bool) -> None:
    add_lora(newest.decoder, OPTIONS.model_copy(update={"rslora": rslora}), seed=0)
    shake(newest.decoder)
    pack, rows = make_pack(newest)
    ours, theirs = (Learner(newest.decoder, ops, recompute=False) for ops in (LoraOps(), Ops()))
    one = ours.train()(pack, rows)
    one.backward()
    wanted_gradients = gradients(newest.decoder)
    other = theirs(pack, rows)
    other.backward()
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(wanted_gradients, gradients(newest.decoder))


def test_rank_stabilised_scaling_is_another(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS.model_copy(update={"rslora": True}), seed=0)
    layers = [m for m in newest.decoder.modules() if isinstance(m, LoraLayer)]
    assert {m.scaling["default"] for m in layers} == {12 / 2}  # alpha / √4, not alpha / 4


@pytest.mark.parametrize("picture_in_answer", [False, True])
def test_the_loss_of_a_pass_is_the_sum_over_its_conversations(
    whole: XComposer, picture_in_answer: bool
) -> None:
    """Against whole sequences, one by one, with every row of every layer computed."""
    add_lora(whole.decoder, OPTIONS, seed=0)
    shake(whole.decoder)
    pack, rows = make_pack(whole, picture_in_answer=picture_in_answer)
    assert pack.predicts_behind_pictures == picture_in_answer
    loss = Learner(whole.decoder, LoraOps(), recompute=False)(pack, rows)
    labels = torch.full((60,), IGNORED)
    labels[pack.wanted + 1] = pack.targets
    expected = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 20), slice(20, 60)):
        own = pack.ids[part]
        hidden = whole(own, [len(own)], rows)
        logits = hidden @ whole.decoder.output.weight.T
        learnt = int((labels[part][1:] != IGNORED).sum())
        expected += supervised_loss(logits, labels[part]) * learnt
    torch.testing.assert_close(loss, expected)


def test_recomputing_layers_changes_no_number(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS.model_copy(update={"dropout": 0.3}), seed=0)
    shake(newest.decoder)
    pack, rows = make_pack(newest)
    told = []
    for recompute in (False, True):
        torch.manual_seed(4)
        loss = Learner(newest.decoder, LoraOps(), recompute=recompute).train()(pack, rows)
        loss.backward()
        told.append((loss, gradients(newest.decoder)))
    torch.testing.assert_close(told[0], told[1], rtol=0, atol=0)


def test_recomputing_keeps_fewer_activations(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS, seed=0)
    pack, rows = make_pack(newest)

    def kept(recompute: bool) -> int:
        sizes = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Learner(newest.decoder, LoraOps(), recompute=recompute).train()(pack, rows)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_dropout_is_off_in_validation(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS.model_copy(update={"dropout": 0.5}), seed=0)
    shake(newest.decoder)
    pack, rows = make_pack(newest)
    learner = Learner(newest.decoder, LoraOps(), recompute=False)
    with torch.no_grad():
        learner.train()
        assert learner(pack, rows) != learner(pack, rows)
        learner.eval()
        assert learner(pack, rows) == learner(pack, rows)


def test_what_is_saved_is_an_adapter_of_the_base(newest: XComposer, tmp_path: Path) -> None:
    model = add_lora(newest.decoder, OPTIONS, seed=0)
    shake(newest.decoder)
    save_adapter(model, tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", newest.config, digest="", dtype=torch.float64)
    assert adapter.rank == 4
    pair = adapter.pairs[1, "feed_forward.w2"]
    wanted = lora_parameters(newest.decoder)
    name = "model.layers.1.feed_forward.w2.lora_B.default.weight"
    torch.testing.assert_close(pair.b, wanted[name])
    assert pair.scaling == 3.0


def test_dropout_falls_on_what_the_lora_sees_as_with_peft(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS.model_copy(update={"dropout": 0.3}), seed=0)
    shake(newest.decoder)
    pack, rows = make_pack(newest)
    told = []
    for ops in (LoraOps(), Ops()):
        torch.manual_seed(4)
        loss = Learner(newest.decoder, ops, recompute=False).train()(pack, rows)
        loss.backward()
        told.append((loss, gradients(newest.decoder)))
    torch.testing.assert_close(told[0], told[1])


def test_each_conversation_of_a_pass_has_positions_of_its_own_length(newest: XComposer) -> None:
    """Dynamic NTK: the angles of 20, 40 and 60 tokens are three if the limit is 16."""
    add_lora(newest.decoder, OPTIONS, seed=0)
    shake(newest.decoder)
    config = newest.config
    short = replace(
        config.decoder, max_position_embeddings=16, rope_scaling=RopeScaling("dynamic", 1.0)
    )
    newest.decoder.config = replace(config, decoder=short)
    learner = Learner(newest.decoder, LoraOps(), recompute=False)
    ids = torch.randint(5, 99, (60,), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[[0, 20]] = IGNORED
    vocab = config.decoder.vocab_size
    together = learner(Pack.of(ids, labels, [20, 40], [], vocab), None)
    first, second = (
        learner(Pack.of(ids[part], labels[part], [len(ids[part])], [], vocab), None)
        for part in (slice(0, 20), slice(20, 60))
    )
    torch.testing.assert_close(together, first + second)


def test_a_pack_means_the_same_on_its_device(newest: XComposer) -> None:
    add_lora(newest.decoder, OPTIONS, seed=0)
    pack, rows = make_pack(newest, picture_in_answer=True)
    learner = Learner(newest.decoder, LoraOps(), recompute=False)
    torch.testing.assert_close(learner(pack.to(torch.device("cpu")), rows), learner(pack, rows))


def test_a_lora_begins_as_its_seed_says_and_changes_nothing_yet(
    tiny: Callable[[Variant], Path],
) -> None:
    begun: list[dict[str, torch.nn.Parameter]] = []
    for seed in (1, 1, 2):
        whole = Checkpoint.open(tiny("2.5")).load()
        torch.rand(len(begun))  # whatever was drawn before
        add_lora(whole.decoder, OPTIONS, seed=seed)
        begun.append(lora_parameters(whole.decoder))
    one, again, other = begun
    for name in one:
        assert torch.equal(one[name], again[name])
        assert torch.equal(one[name], other[name]) == ("lora_B" in name)
        assert "lora_A" in name or not one[name].any()


def test_a_lora_on_a_base_of_low_precision_is_learnt_in_float32(
    tiny: Callable[[Variant], Path],
) -> None:
    whole = Checkpoint.open(tiny("2.5")).load(dtype=torch.bfloat16)
    add_lora(whole.decoder, OPTIONS, seed=0)
    assert {p.dtype for p in lora_parameters(whole.decoder).values()} == {torch.float32}
    pack, rows = make_pack(whole)
    Learner(whole.decoder, LoraOps(), recompute=False).train()(pack, rows.bfloat16()).backward()
    assert {g.dtype for g in gradients(whole.decoder)} == {torch.float32}


def test_an_adapters_folder_holds_its_weights_and_configuration_alone(
    newest: XComposer, tmp_path: Path
) -> None:
    save_adapter(add_lora(newest.decoder, OPTIONS, seed=0), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
