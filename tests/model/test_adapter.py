import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor

from tests.adapters import peft_model, random_tensors, settings_of, write_adapter
from tests.conftest import VARIANTS
from xc_ray.demo.make import demo_config, make_model, tiny_config
from xc_ray.errors import CheckpointError
from xc_ray.model.adapter import (
    Adapter,
    AdapterOps,
    adapted_modules,
    adapter_summary,
    load_adapter,
    merge_adapter,
    merged_weight,
)
from xc_ray.model.attention import DenseAttend
from xc_ray.model.config import PLORA_LINEARS, Variant, preset
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import XComposer, packed_rope

# peft 0.21 asks for an attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEM = "base_model.model.model.layers."
ANY = STEM + "1.feed_forward.w2.lora_A.weight"
CONFIG = tiny_config("2.5")


@cache
def pristine() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return random_tensors(CONFIG), settings_of()


def written(folder: Path, tensors: Mapping[str, Tensor], content: Any) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "adapter_config.json").write_text(text)
    return folder


def opened(folder: Path, **options: Any) -> Adapter:
    options = {"digest": "sha256:0", "dtype": torch.float32, **options}
    return load_adapter(folder, CONFIG, **options)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(folder, **options)
    return str(caught.value)


def refused(folder: Path, tensors: Mapping[str, Tensor] | None = None, **content: Any) -> str:
    plain, known = pristine()
    return refusal(written(folder, plain if tensors is None else tensors, known | content))


# ---------------------------------------------------------------- the same as peft

RED = Image.new("RGB", (150, 70), "red")
CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": [{"type": "text", "text": "What is a lake?"}]}],
    "picture": [
        {
            "role": "user",
            "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}],
        }
    ],
}
LORAS: dict[str, dict[str, Any]] = {
    "all five": {},
    "one linear": {"target_modules": ["attention.wo"], "r": 2},
    "some, by short names": {"target_modules": ["wqkv", "w2"], "lora_alpha": 3},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 5},
    "ranks by pattern": {
        "rank_pattern": {"feed_forward.w1": 7, r"model\.layers\.1\.attention\.w.+": 1},
        "alpha_pattern": {r"^model.layers.0.attention.wqkv": 11, "w3": 1.5},
    },
    "patterns and rsLoRA": {"use_rslora": True, "rank_pattern": {"wo": 9}},
    "one layer": {"layers_to_transform": 1},
    "one layer, named": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "a regular expression": {"target_modules": r".*\.layers\.0\.(attention|feed_forward)\.w\w+"},
    "with exclusions": {"exclude_modules": ["attention.wo", "model.layers.0.feed_forward.w1"]},
}


def our_logits(model: XComposer, batch: Any, ops: Callable[[], Ops]) -> Tensor:
    """Logits (T, V) of the processor's batch of one."""
    ids, canvases = batch["input_ids"][0].clone(), batch.get("canvases")
    vocab, pictures = CONFIG.decoder.vocab_size, None
    if canvases:
        marked = batch["mm_token_type_ids"][0] == 1
        pictures = torch.cat(model.vision(canvases))
        ids[marked] = vocab + torch.arange(len(pictures))
    x, rows = model.decoder.embed(ids, pictures)
    rope = packed_rope(model.config, [len(ids)], x.device, torch.float64)
    attend = DenseAttend([len(ids)])
    return model.decoder.logits(model.decoder(x, rope, attend, rows, ops()))


def compared_with_peft(base: Path, chats: Sequence[str], folder: Path, **lora: Any) -> Adapter:
    wrapped = peft_model(base, **lora)
    wrapped.save_pretrained(folder)
    checkpoint = Checkpoint.open(base)
    model = checkpoint.load(dtype=torch.float64)
    adapter = load_adapter(folder, checkpoint.config, digest="d", dtype=torch.float64)
    merged = checkpoint.load(dtype=torch.float64)
    merge_adapter(merged.decoder, adapter)
    processor = AutoProcessor.from_pretrained(base)
    with torch.no_grad():
        for chat in chats:
            batch = processor.apply_chat_template([CHATS[chat]], tokenize=True, return_dict=True)
            expected = wrapped(**batch).logits[0]
            unmerged = our_logits(
                model, batch, lambda: AdapterOps(adapted_modules(model.decoder, adapter))
            )
            torch.testing.assert_close(unmerged, expected, rtol=1e-9, atol=1e-9)
            folded = our_logits(merged, batch, lambda: PLAIN)
            torch.testing.assert_close(folded, expected, rtol=1e-9, atol=1e-9)
            assert (our_logits(model, batch, lambda: PLAIN) - expected).abs().max() > 0.01
    return adapter


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_adapted_logits_are_those_of_peft(tiny, tmp_path: Path, lora: dict[str, Any]):
    adapter = compared_with_peft(tiny("2.5"), ["text", "picture"], tmp_path / "a", **lora)
    assert adapter.rank == max(len(p.a) for p in adapter.pairs.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_adapters(tiny, tmp_path: Path, variant: Variant):
    compared_with_peft(tiny(variant), ["text", "picture"], tmp_path / "adapter")


def test_what_peft_saves_as_a_pickle_is_the_same_adapter(tiny, tmp_path: Path):
    wrapped = peft_model(tiny("2.5"))
    wrapped.save_pretrained(tmp_path / "new")
    wrapped.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert not (tmp_path / "old" / "adapter_model.safetensors").exists()
    new, old = opened(tmp_path / "new"), opened(tmp_path / "old")
    assert new.pairs.keys() == old.pairs.keys()
    for place, pair in new.pairs.items():
        assert torch.equal(pair.a, old.pairs[place].a)
        assert torch.equal(pair.b, old.pairs[place].b)
        assert pair.scaling == old.pairs[place].scaling


def test_merging_leaves_plora_and_all_else_alone(tiny, tmp_path: Path):
    folder = write_adapter(tmp_path / "a", CONFIG, linears=["attention.wo"])
    model, before = (Checkpoint.open(tiny("2.5")).load_decoder() for _ in range(2))
    merge_adapter(model, opened(folder))
    changed = {
        name
        for (name, new), old in zip(
            model.state_dict().items(), before.state_dict().values(), strict=True
        )
        if not torch.equal(new, old)
    }
    assert changed == {f"model.layers.{i}.attention.wo.weight" for i in range(2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merged_weight_is_rounded_once(dtype: torch.dtype, tmp_path: Path):
    write_adapter(tmp_path / "a", CONFIG)
    pair = opened(tmp_path / "a").pairs[0, "feed_forward.w1"]
    weight = torch.randn(64, 32).to(dtype)
    exact = weight.double() + pair.scaling * pair.b.double() @ pair.a.double()
    error = (merged_weight(weight, pair).double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6).all()


# ---------------------------------------------------------------- what is loaded


def test_scaling_is_alpha_over_rank_or_its_root(tmp_path: Path):
    for rslora, expected in ((False, 8 / 4), (True, 8 / 2)):
        folder = write_adapter(tmp_path / str(rslora), CONFIG, use_rslora=rslora)
        assert {p.scaling for p in opened(folder).pairs.values()} == {expected}


def test_tensors_are_contiguous_copies_in_the_dtype_asked_for(tmp_path: Path):
    folder = write_adapter(tmp_path / "a", CONFIG, dtype=torch.bfloat16)
    adapter = opened(folder, dtype=torch.float16, digest="sha256:abc")
    shapes = CONFIG.linear_shapes
    assert adapter.digest == "sha256:abc"
    assert adapter.pairs.keys() == {(i, n) for i in range(2) for n in PLORA_LINEARS}
    # A map of a file that is cut short ends in a bus error; these are copies too.
    stored = {n: t.clone() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    numbers = 0
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for (layer, linear), pair in adapter.pairs.items():
        out, into = shapes[linear]
        assert (pair.a.shape, pair.b.shape) == ((4, into), (out, 4))
        for part, tensor in (("A", pair.a), ("B", pair.b)):
            assert tensor.dtype == torch.float16
            assert tensor.is_contiguous()
            name = f"{STEM}{layer}.{linear}.lora_{part}.weight"
            assert torch.equal(tensor, stored[name].half())
            numbers += tensor.numel()
    assert adapter.nbytes == 2 * numbers


def test_names_with_the_adapters_name_in_them_are_read_too(tmp_path: Path):
    plain, known = pristine()
    named = {n.replace(".weight", ".default.weight"): t for n, t in plain.items()}
    assert opened(written(tmp_path / "a", named, known)).pairs.keys() == {
        (i, n) for i in range(2) for n in PLORA_LINEARS
    }


def test_the_summary_needs_headers_alone(tmp_path: Path):
    folder = write_adapter(
        tmp_path / "a", CONFIG, rank=3, linears=["attention.wo", "feed_forward.w1"]
    )
    assert adapter_summary(folder) == {
        "rank": 3,
        "alpha": 8.0,
        "rslora": False,
        "targets": ["attention.wo", "feed_forward.w1"],
        "layers": 2,
        "parameters": 2 * 3 * (32 + 32 + 32 + 64),
        "dtype": "float32",
    }
    json.dumps(adapter_summary(folder))


def test_an_adapter_of_7b_loads_in_well_under_a_second(tmp_path: Path):
    config = preset("2.5")
    folder = write_adapter(tmp_path / "a", config, rank=16, dtype=torch.bfloat16)
    start = time.perf_counter()
    adapter = load_adapter(folder, config, digest="d", dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    assert len(adapter.pairs) == 5 * 32
    assert 75e6 < adapter.nbytes < 76e6
    assert seconds < 5  # 0.1 s where nobody else is at work


# ---------------------------------------------------------------- what is refused


def test_everything_wrong_is_said_at_once(tmp_path: Path):
    plain, known = pristine()
    broken = dict(plain)
    del broken[ANY]
    broken[STEM + "0.attention.wo.lora_B.weight"] = torch.zeros(5, 4)
    broken[STEM + "0.attention.wqkv.lora_A.weight"] = torch.full((4, 32), math.nan)
    broken[STEM + "0.attention.wqkv.Plora_A.lora_A.weight"] = torch.zeros(4, 32)
    broken["base_model.model.vit.vision_tower.x.lora_A.weight"] = torch.zeros(4, 32)
    broken["base_model.model.vision_proj.0.weight"] = torch.zeros(4, 32)
    broken[STEM + "7.attention.wo.lora_A.weight"] = torch.zeros(4, 32)
    broken["base_model.model.output.lora_A.weight"] = torch.zeros(4, 32)
    text = refusal(written(tmp_path / "a", broken, known | {"use_dora": True, "bias": "all"}))
    for part in (
        f"1 missing: {ANY}",
        f"{STEM}0.attention.wo.lora_B.weight is [5, 4], expected [32, 4]",
        f"NaN, inf): {STEM}0.attention.wqkv.lora_A.weight",
        "on PLoRA, which stays as published: 'base_model.model.model.layers.0.attention.wqkv.Plor",
        "on the vision tower, which adapters leave alone: 'base_model.model.vit",
        "on the projector, which adapters leave alone: 'base_model.model.vision_proj.0.weight'",
        "of layers that the base does not have (2): 'base_model.model.model.layers.7.attention",
        "on no linear that takes an adapter (attention.wqkv, attention.wo, feed_forward.w1",
        "use_dora is true: DoRA also rescales",
        "bias is 'all', expected 'none'",
    ):
        assert part in text


def test_b_without_a_is_refused(tmp_path: Path):
    plain, _ = pristine()
    assert f"1 missing: {ANY}" in refused(
        tmp_path / "a", {n: t for n, t in plain.items() if n != ANY}
    )


def test_a_linear_that_the_settings_promise_and_the_file_lacks_is_refused(tmp_path: Path):
    plain, _ = pristine()
    text = refused(tmp_path / "a", {n: t for n, t in plain.items() if "1.attention.wo" not in n})
    assert "2 missing" in text
    assert f"{STEM}1.attention.wo.lora_A.weight, {STEM}1.attention.wo.lora_B.weight" in text


def test_a_tensor_that_peft_would_leave_out_is_refused(tmp_path: Path):
    text = refused(tmp_path / "a", target_modules=["attention.wo"])
    assert f"16 on linears that target_modules leaves out: {STEM}0.attention.wqkv.lora_A" in text


def test_a_rank_that_the_settings_do_not_tell_is_refused(tmp_path: Path):
    text = refused(tmp_path / "a", rank_pattern={"1.feed_forward.w2": 3})
    assert f"{ANY} is [4, 64], expected [3, 64]" in text


def test_a_rank_above_the_limit_is_refused(tmp_path: Path):
    folder = write_adapter(tmp_path / "a", CONFIG, rank_pattern={}, rank=5)
    assert opened(folder, max_rank=5).rank == 5
    assert f"20 of a rank above 4, which is the limit here: {STEM}0" in refusal(folder, max_rank=4)


def test_a_tensor_given_twice_is_refused(tmp_path: Path):
    plain, _ = pristine()
    again = ANY.replace(".weight", ".default.weight")
    text = refused(tmp_path / "a", {**plain, again: plain[ANY].clone()})
    assert f"1 given twice: {ANY}" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, dtype: torch.dtype):
    plain, _ = pristine()
    text = refused(tmp_path / "a", {**plain, ANY: torch.zeros(4, 64).to(dtype)})
    assert "1 of no floating-point dtype: " + ANY in text


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path):
    plain, known = pristine()
    folder = written(tmp_path / "a", {**plain, ANY: torch.full((4, 64), 1e6)}, known)
    opened(folder, dtype=torch.bfloat16)
    text = refusal(folder, dtype=torch.float16)
    assert f"1 with values that torch.float16 cannot hold (NaN, inf): {ANY}" in text


def test_a_folder_without_files_says_what_it_lacks(tmp_path: Path):
    assert "has no adapter_config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings_of()))
    assert "has no adapter_model.safetensors" in refusal(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert "adapter_model.safetensors holds no tensor" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="it has no tensor of a known name"):
        adapter_summary(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    _, known = pristine()
    written(tmp_path / "a", {}, known)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({ANY: print}, tmp_path / "a" / "adapter_model.bin")
    assert "adapter_model.bin is not a file of plain tensors" in refusal(tmp_path / "a")
    torch.save({ANY: torch.eye(4).to_sparse()}, tmp_path / "a" / "adapter_model.bin")
    assert "holds sparse tensors" in refusal(tmp_path / "a")


# ---------------------------------------------------------------- any damage has a name

NAMES = st.sampled_from(sorted(pristine()[0]))
SHAPES = st.lists(st.integers(0, 9), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
damaged = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@damaged
@given(name=NAMES)
def test_any_dropped_tensor_is_named(tmp_path: Path, name: str):
    plain, _ = pristine()
    text = refused(tmp_path / "a", {n: t for n, t in plain.items() if n != name})
    assert f"1 missing: {name}" in text


@damaged
@given(name=NAMES, new=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
def test_any_renamed_tensor_is_named(tmp_path: Path, name: str, new: str):
    plain, _ = pristine()
    if new in plain or new == "__metadata__":
        return
    text = refused(tmp_path / "a", {new if n == name else n: t for n, t in plain.items()})
    assert f"1 missing: {name}" in text
    assert repr(new)[:100] in text or new in text


@damaged
@given(name=NAMES, shape=SHAPES)
def test_any_reshaped_tensor_is_named(tmp_path: Path, name: str, shape: list[int]):
    plain, _ = pristine()
    if tuple(shape) == tuple(plain[name].shape):
        return
    text = refused(tmp_path / "a", {**plain, name: torch.zeros(shape)})
    assert f"1 of another shape: {name} is {shape}" in text


@damaged
@given(name=NAMES, value=st.sampled_from([math.nan, math.inf, -math.inf]), row=st.integers(0, 3))
def test_any_bad_value_is_named(tmp_path: Path, name: str, value: float, row: int):
    plain, _ = pristine()
    bad = plain[name].clone()
    bad[row, row] = value
    assert f"NaN, inf): {name}" in refused(tmp_path / "a", {**plain, name: bad})


@damaged
@given(key=st.sampled_from([*settings_of(), *LORAS["ranks by pattern"], "new_thing"]), value=VALUES)
def test_any_setting_loads_or_is_refused(tmp_path: Path, key: str, value: Any):
    plain, known = pristine()
    folder = written(tmp_path / "a", plain, known | {key: value})
    try:
        adapter = opened(folder)
    except CheckpointError as e:
        message = str(e)
    else:
        message = str(folder)
        assert len(adapter.pairs) == 10
    assert str(folder) in message


@damaged
@given(data=st.data())
def test_a_damaged_file_is_refused(tmp_path: Path, data: st.DataObject):
    plain, known = pristine()
    folder = written(tmp_path / "a", plain, known)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = (folder / name).read_bytes()
    # Beyond its header a tensor's bytes may say anything; digests are what tells.
    cut = data.draw(st.integers(0, len(content) - 1))
    (folder / name).write_bytes(content[:cut])
    text = refusal(folder)
    assert name in text


@damaged
@given(at=st.integers(0, 4000), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_header_loads_or_is_refused(tmp_path: Path, at: int, bit: int):
    plain, known = pristine()
    folder = written(tmp_path / "a", plain, known)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
    message = str(folder)
    try:
        opened(folder)
    except CheckpointError as e:
        message = str(e)
    assert str(folder) in message


def test_a_base_of_another_size_is_refused(tmp_path: Path):
    write_adapter(tmp_path / "a", CONFIG)
    other = Checkpoint.open(make_model(tmp_path / "base", "2.0-4KHD")).config
    adapter = load_adapter(tmp_path / "a", other, digest="d", dtype=torch.float32)
    assert adapter.rank == 4  # shapes are the same; which base it is, the manifest says
    with pytest.raises(CheckpointError, match="not an adapter for this base"):
        load_adapter(tmp_path / "a", demo_config(), digest="d", dtype=torch.float32)
