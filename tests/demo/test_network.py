"""The demo model's loss: the layers and pictures of serving, and hints that reach the tower."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.demo.test_batches import CONFIG, TOKENIZER, VOCAB, make
from xc_ray.demo import network
from xc_ray.demo.batches import Batch, Batches
from xc_ray.demo.drawn.hints import NUM_THINGS, UNKNOWN
from xc_ray.demo.drawn.tasks import Sample
from xc_ray.demo.network import Hinter, Student, embed, initialise
from xc_ray.model.ops import PLAIN
from xc_ray.model.xcomposer import XComposer
from xc_ray.train.data import IGNORED
from xc_ray.train.loss import supervised_loss


@pytest.fixture(scope="module")
def batch() -> Batch:
    made, _ = make((1, 0), 2500)
    assert len(made.pack.lengths) > 3
    assert len(made.canvases) > 1
    return made


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    made = Student(CONFIG)
    initialise(made.model, 5)
    with torch.no_grad():  # PLoRA as after some training
        for name, parameter in made.model.named_parameters():
            if "Plora_B" in name:
                parameter.normal_(std=0.1)
    return made


# Pictures


def one_by_one(model: XComposer, batch: Batch) -> Tensor:
    pictures = [canvas for canvases in batch.canvases.values() for canvas in canvases]
    return torch.cat([rows for picture in pictures for rows in model.vision([picture])])


@torch.no_grad()
def test_pictures_are_embedded_as_serving_does(student: Student, batch: Batch) -> None:
    rows, patches = embed(student.model, batch.canvases)
    assert patches.shape == (len(batch.things), 16, CONFIG.vision.hidden_size)
    # In float32 a product over more rows may be summed in another order.
    torch.testing.assert_close(rows, one_by_one(student.model, batch), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_in_float64_pictures_differ_by_nothing_that_can_be_seen(
    student: Student, batch: Batch
) -> None:
    model = student.model.double()
    rows, _ = embed(model, batch.canvases)
    torch.testing.assert_close(rows, one_by_one(model, batch), rtol=0, atol=1e-13)


@torch.no_grad()
def test_passes_through_the_tower_are_bounded_and_change_nothing(
    student: Student, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student.model.double()
    whole, _ = embed(model, batch.canvases)
    seen: list[int] = []
    hook = model.vision.vit.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(network, "MAX_SQUARES", 7)
    parted, _ = embed(model, batch.canvases)
    hook.remove()
    assert max(seen) == 7
    assert sum(seen) == len(batch.things)
    torch.testing.assert_close(parted, whole, rtol=0, atol=1e-13)


# The loss of the answers


@torch.no_grad()
def test_the_loss_is_that_of_each_conversation_alone(student: Student, batch: Batch) -> None:
    """The plain forward of the model over one conversation after another, and `train.loss`."""
    loss, _ = student(batch, PLAIN)
    model, pack = student.model, batch.pack
    labels = torch.full_like(pack.ids, IGNORED)
    labels[pack.wanted + 1] = pack.targets
    rows = one_by_one(model, batch)
    total = torch.zeros(())
    for ids, own in zip(pack.ids.split(pack.lengths), labels.split(pack.lengths), strict=True):
        ids, image = ids.clone(), ids >= VOCAB
        pictures = rows[ids[image] - VOCAB]
        ids[image] = torch.arange(VOCAB, VOCAB + len(pictures))
        hidden = model(ids, [len(ids)], pictures if len(pictures) else None)
        mean = supervised_loss(model.decoder.logits(hidden), own)
        total += mean * (own != IGNORED).sum()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)


def test_a_batch_without_pictures_has_no_hints(student: Student) -> None:
    def draw(step: int, index: int) -> Sample:
        return Sample("small_talk", ((f"Hello {step} {index}", "Hello!"),), (), ())

    loss, hints = student(Batches(CONFIG, TOKENIZER, draw, batch_tokens=60)[0, 0], PLAIN)
    assert loss > 0
    assert hints == 0
    (loss + hints).backward()
    assert student.model.decoder.output.weight.grad is not None
    assert all(p.grad is None for p in student.model.vision.parameters())


def test_a_conversation_longer_than_the_rope_is_made_for_is_none_of_ours(
    student: Student,
) -> None:
    def draw(step: int, index: int) -> Sample:
        return Sample("small_talk", (("7" * 1100, f"{step} {index}"),), (), ())

    batch = Batches(CONFIG, TOKENIZER, draw, batch_tokens=1)[0, 0]
    with pytest.raises(AssertionError):
        student(batch, PLAIN)


# Hints


def patches_for(batch: Batch, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = CONFIG.vision.hidden_size
    return torch.randn(*batch.things.shape, size, generator=generator)


def test_hints_are_the_mean_loss_of_known_patches_and_nothing_counts_little(
    batch: Batch,
) -> None:
    torch.manual_seed(0)
    hinter, patches = Hinter(CONFIG), patches_for(batch)
    wanted = 0.0
    for head, labels in ((hinter.thing, batch.things), (hinter.colour, batch.colours)):
        above = below = 0.0
        for patch, label in zip(patches.flatten(0, 1), labels.flatten().tolist(), strict=True):
            if label != UNKNOWN:
                weight = 0.05 if label == 0 else 1.0
                above += weight * F.cross_entropy(head(patch), torch.tensor(label)).item()
                below += weight
        wanted += above / below
    assert hinter(patches, batch).item() == pytest.approx(wanted, rel=1e-5)


def test_what_is_unknown_does_not_count(batch: Batch) -> None:
    torch.manual_seed(0)
    hinter, patches = Hinter(CONFIG), patches_for(batch)
    blind = torch.rand(batch.things.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    things, colours = (t.masked_fill(blind, UNKNOWN) for t in (batch.things, batch.colours))
    hidden = replace(batch, things=things, colours=colours)
    other = torch.where(blind[..., None], patches_for(batch, 9), patches)
    told = hinter(patches, hidden)
    assert torch.equal(told, hinter(other, hidden))
    assert told != hinter(patches, batch)
    assert hinter(other, batch) != hinter(patches, batch)


def test_hints_of_what_is_all_unknown_are_0(batch: Batch) -> None:
    nothing = torch.full_like(batch.things, UNKNOWN)
    hidden = replace(batch, things=nothing, colours=nothing)
    assert Hinter(CONFIG)(patches_for(batch), hidden) == 0


def test_hints_alone_teach_the_tower_and_not_the_decoder(student: Student, batch: Batch) -> None:
    _, hints = student(batch, PLAIN)
    hints.backward()
    for name, parameter in student.model.named_parameters():
        if name.startswith("vision.vit."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:  # projector, separators and decoder are behind what the hints are told from
            assert parameter.grad is None, name
    assert all(p.grad is not None for p in student.hinter.parameters())


def test_answers_teach_the_tower_too(student: Student, batch: Batch) -> None:
    loss, _ = student(batch, PLAIN)
    loss.backward()
    embedding = student.get_parameter(
        "model.vision.vit.vision_tower.vision_model.embeddings.patch_embedding.weight"
    )
    assert embedding.grad is not None
    assert embedding.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.hinter.parameters())


def test_what_tells_the_hints_is_no_part_of_the_model(student: Student) -> None:
    assert student.hinter.thing.out_features == NUM_THINGS
    assert not any("hinter" in name for name, _ in student.model.named_parameters())


# The first weights


def test_first_weights_follow_from_their_seed() -> None:
    states = []
    for before, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(before)
        model = XComposer(CONFIG)
        initialise(model, seed)
        states.append(dict(model.named_parameters()))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.output.weight"], other["decoder.output.weight"])


def test_norms_begin_at_one_biases_at_nought_and_plora_as_nothing() -> None:
    model = XComposer(CONFIG)
    initialise(model, 1)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias") or "Plora_B" in name:
            assert not parameter.any(), name
        else:
            assert parameter.std() > 0, name


def test_a_residual_branch_begins_smaller_than_what_leads_into_it() -> None:
    model = XComposer(CONFIG)
    initialise(model, 1)
    layer = "decoder.model.layers.0.attention"
    wide, end = (model.get_parameter(f"{layer}.{name}.weight") for name in ("wqkv", "wo"))
    # Both read 32 numbers; two layers have four branches.
    assert (wide.std() / end.std()).item() == pytest.approx(2.0, rel=0.15)


@torch.no_grad()
def test_a_fresh_model_expects_nearly_everything_alike(batch: Batch) -> None:
    student = Student(CONFIG)
    initialise(student.model, 1)
    loss, hints = student(batch, PLAIN)
    mean = loss.item() / len(batch.pack.targets)
    assert mean == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=0.1)
    assert hints.isfinite()
