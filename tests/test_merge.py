import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

import xc_ray.merge
from tests.adapters import peft_model, write_adapter
from tests.conftest import VARIANTS
from xc_ray.demo.make import save_random, tiny_config, train_tokenizer
from xc_ray.errors import CheckpointError, ConfigError
from xc_ray.merge import export_merged
from xc_ray.model.adapter import load_adapter, merged_weight
from xc_ray.model.config import Variant
from xc_ray.model.weights import Checkpoint
from xc_ray.pipeline import Pipeline
from xc_ray.proof import Proof

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = "model.layers."


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= {n: t.clone() for n, t in load_file(path).items()}
    return found


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a random base of a dtype."""

    def made(dtype: torch.dtype = torch.float32, variant: Variant = "2.5", **options: Any) -> Path:
        folder = tmp_path / "base"
        save_random(folder, tiny_config(variant), dtype=dtype, **options)
        (folder / "tokenizer.model").write_bytes(train_tokenizer())
        return folder

    return made


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a random adapter."""
    return lambda **options: write_adapter(tmp_path / "adapter", tiny_config("2.5"), **options)


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_linears_change_and_by_one_rounding(base, adapter, tmp_path: Path, dtype):
    folder, lora = base(dtype, max_shard_bytes=150_000), adapter(linears=["attention.wo"])
    proof = export_merged(folder, lora, tmp_path / "merged")
    before, after = tensors(folder), tensors(tmp_path / "merged")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"{LAYERS}{i}.attention.wo.weight" for i in range(2)}
    pairs = load_adapter(lora, tiny_config("2.5"), digest="", dtype=torch.float32).pairs
    for i in range(2):
        name = f"{LAYERS}{i}.attention.wo.weight"
        assert torch.equal(after[name], merged_weight(before[name], pairs[i, "attention.wo"]))
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}
    for path in folder.iterdir():  # the headers too: same names, shapes, dtypes, places
        assert path.stat().st_size == (tmp_path / "merged" / path.name).stat().st_size
    assert 0 < proof.difference < proof.tolerance < proof.effect
    assert proof.dtype == dtype


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_folder_answers_as_peft_does(tiny, tmp_path: Path, variant: Variant):
    wrapped = peft_model(tiny(variant), use_rslora=True, rank_pattern={"wo": 7})
    wrapped.save_pretrained(tmp_path / "adapter")
    export_merged(tiny(variant), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    batch = AutoProcessor.from_pretrained(tiny(variant)).apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": "What is a lake?"}]}]],
        tokenize=True,
        return_dict=True,
    )
    with torch.no_grad():
        expected = wrapped(**batch).logits
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=0)
    assert Pipeline.load(tmp_path / "merged").chat("Hello", max_tokens=3)[0] is not None


@pytest.mark.parametrize("shards", [1, 3])
def test_old_shards_are_merged_into_safetensors(base, adapter, tmp_path: Path, shards: int):
    folder, lora = base(torch.bfloat16), adapter()
    export_merged(folder, lora, tmp_path / "new")
    state = tensors(folder)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"pytorch_model-{i}.bin" if shards > 1 else "pytorch_model.bin"
        part = {n: state[n] for n in list(state)[i::shards]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    export_merged(folder, lora, tmp_path / "old")
    assert not list((tmp_path / "old").glob("*.bin*"))
    new, old = tensors(tmp_path / "new"), tensors(tmp_path / "old")
    assert all(torch.equal(new[n], old[n]) for n in new.keys() | old.keys())


def test_small_files_come_along_and_code_does_not(base, adapter, tmp_path: Path):
    folder = base()
    for name in ("README.md", "LICENSE", "chat_template.jinja", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    for name in ("modeling.py", ".gitattributes", "LICENSE.py"):
        (folder / name).write_text("x")
    extra = {f"{LAYERS}0.attention.wo.lora_web_A.weight": torch.ones(2, 32)}
    save_file(tensors(folder) | extra, folder / "model.safetensors")
    export_merged(folder, adapter(), tmp_path / "merged")
    made = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {p.name for p in folder.iterdir()} - made == {
        "modeling.py",
        ".gitattributes",
        "LICENSE.py",
    }
    assert Checkpoint.open(tmp_path / "merged").extra_lora == ("lora_web",)


def test_an_adapter_that_says_nothing_changes_no_bit(base, adapter, tmp_path: Path):
    folder = base(torch.bfloat16)
    proof = export_merged(folder, adapter(scale=0.0), tmp_path / "merged")
    after = tensors(tmp_path / "merged")
    assert all(torch.equal(t, after[n]) for n, t in tensors(folder).items())
    assert (proof.difference, proof.effect) == (0, 0)
    assert proof.same_tokens == proof.tokens > 80


def test_an_effect_below_the_dtypes_own_error_is_said_to_prove_nothing(
    base, adapter, tmp_path: Path, caplog
):
    with caplog.at_level(logging.WARNING):
        proof = export_merged(base(torch.bfloat16), adapter(scale=1e-4), tmp_path / "merged")
    assert proof.effect < proof.tolerance
    assert "too small for the logits to tell" in caplog.text


def test_progress_names_files_and_layers(base, adapter, tmp_path: Path):
    told: list[tuple[str, int, int]] = []
    export_merged(base(), adapter(), tmp_path / "m", progress=lambda *step: told.append(step))
    assert ("write model.safetensors", 1, 3) in told
    assert [s[1:] for s in told if s[0].startswith("compare")] == [(0, 2), (1, 2)]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_target_is_left_alone(base, adapter, tmp_path: Path, kind: str):
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="target exists; name a folder that does not"):
        export_merged(base(), adapter(), target)
    assert target.is_symlink() or target.exists()


def no_trace(tmp_path: Path, folder: Path, lora: Path, message: str, error=CheckpointError) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(error, match=message):
        export_merged(folder, lora, place / "merged")
    assert list(place.iterdir()) == []


def test_a_folder_for_the_target_must_be_there(base, adapter, tmp_path: Path):
    with pytest.raises(ConfigError, match="missing is not a folder; make it first"):
        export_merged(base(), adapter(), tmp_path / "missing" / "merged")


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path: Path):
    lora = adapter(target_modules=["attention.wo"])
    no_trace(tmp_path, base(), lora, "16 on linears that target_modules leaves out")


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(
    base, adapter, tmp_path: Path, monkeypatch
):
    class Small:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Small)
    no_trace(tmp_path, base(), adapter(), "needs .* bytes, .* has 1,000 left", ConfigError)


def test_a_weight_that_grows_past_its_dtype_is_named(base, adapter, tmp_path: Path):
    lora = adapter(scale=1e5, linears=["attention.wo"])
    message = re.escape(f"{LAYERS}0.attention.wo.weight exceeds what torch.float16 holds")
    no_trace(tmp_path, base(torch.float16), lora, message)


def test_a_dtype_that_cannot_be_merged_into_is_named(base, adapter, tmp_path: Path):
    folder = base()
    state = tensors(folder)
    name = f"{LAYERS}1.feed_forward.w2.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors")
    no_trace(tmp_path, folder, adapter(), f"{re.escape(name)} is stored as F8_E4M3")


def test_ctrl_c_leaves_nothing_behind(base, adapter, tmp_path: Path):
    place = tmp_path / "place"
    place.mkdir()

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("compare"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_merged(base(), adapter(), place / "merged", progress=interrupt)
    assert list(place.iterdir()) == []


def half(weight: Tensor, pair: Any) -> Tensor:
    return (weight + merged_weight(weight, pair)) / 2


def one_left_out(weight: Tensor, pair: Any) -> Tensor:
    return weight if len(weight) == 32 else merged_weight(weight, pair)


def coarser(weight: Tensor, pair: Any) -> Tensor:
    merged = merged_weight(weight, pair)
    step = 2 ** (torch.finfo(weight.dtype).bits // 8)  # 2 or 4 bits fewer
    noise = torch.randn(merged.shape).sign() * torch.finfo(weight.dtype).eps * step
    result: Tensor = (merged * (1 + noise)).to(weight.dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [half, one_left_out, coarser])
def test_a_merge_that_went_wrong_is_found_and_removed(
    base, adapter, tmp_path: Path, monkeypatch, wrong: Any, dtype: torch.dtype
):
    monkeypatch.setattr(xc_ray.merge, "merged_weight", wrong)
    message = "would not answer as base and adapter do: logits differ by at most .* serve base and"
    no_trace(tmp_path, base(dtype), adapter(), message)


@pytest.mark.parametrize(
    ("difference", "tolerance", "holds"),
    [
        (0, 0, True),
        (1, 2, True),
        (2, 1, False),
        (math.nan, 1, False),
        (1, math.nan, False),
        (1, math.inf, False),
        (math.inf, math.inf, False),
    ],
)
def test_nothing_is_proven_by_numbers_that_are_none(difference, tolerance, holds: bool):
    assert Proof(difference, tolerance, 1.0, 9, 9, torch.float16).holds == holds


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_proves_the_same(base, adapter, tmp_path: Path, dtype: torch.dtype):
    folder, lora = base(dtype), adapter()
    proofs = [
        export_merged(folder, lora, tmp_path / device, device=device) for device in ("cpu", "cuda")
    ]
    assert proofs[0].effect == pytest.approx(proofs[1].effect, rel=1e-3)
    assert all(proof.holds for proof in proofs)
