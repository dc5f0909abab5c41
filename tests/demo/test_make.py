import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xc_ray.demo.make import (
    demo_config,
    make_model,
    save_random,
    tiny_config,
    train_tokenizer,
)
from xc_ray.model.config import FAMILIES, Variant, XComposerConfig
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = Tokenizer(train_tokenizer())


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# Weights


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_tiny_model_of_every_variant_loads(
    variant: Variant, tiny: Callable[[Variant], Path]
) -> None:
    checkpoint = Checkpoint.open(tiny(variant))
    assert checkpoint.config == tiny_config(variant)
    assert sum(p.numel() for p in checkpoint.load().parameters()) < 200_000
    assert len(load_tokenizer(tiny(variant), checkpoint.config.decoder.vocab_size)) == 1024


def test_a_seed_makes_the_same_model_to_the_byte_and_another_another(tmp_path: Path) -> None:
    folders = [make_model(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, again, other = map(content, folders)
    assert first == again
    assert first["tokenizer.model"] == other["tokenizer.model"]
    assert first["model.safetensors"] != other["model.safetensors"]


def test_the_file_tells_every_size_so_that_nothing_is_guessed(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "2.0-4KHD")
    raw = json.loads((folder / "config.json").read_text())
    assert XComposerConfig.from_dict(raw, {}) == tiny_config("2.0-4KHD")


def test_random_weights_keep_activations_near_unit_size(tiny: Callable[[Variant], Path]) -> None:
    model = Checkpoint.open(tiny("2.5")).load()
    (embeddings,) = model.vision([torch.randint(0, 256, (112, 56, 3), dtype=torch.uint8)])
    ids = torch.tensor([1, *range(1024, 1024 + len(embeddings)), 7, 8])
    hidden = model(ids, [len(ids)], embeddings)
    for x in (embeddings, model.decoder.logits(hidden)):
        assert x.isfinite().all()
        assert 0.1 < x.std() < 10


def test_a_checkpoint_of_any_config_and_dtype_is_written_in_shards(tmp_path: Path) -> None:
    config = replace(demo_config(), torch_dtype="bfloat16")
    save_random(tmp_path, config, dtype=torch.bfloat16, max_shard_bytes=1_000_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    assert Checkpoint.open(tmp_path).load(dtype=torch.bfloat16).decoder.dtype == torch.bfloat16


# The tokenizer


def test_the_tokenizer_is_the_same_each_time_it_is_trained() -> None:
    assert train_tokenizer() == TOKENIZER.to_bytes()


def test_no_space_is_put_before_a_text_and_none_is_taken_away() -> None:
    for text in ("red", " red", "red  circle ", "\n red\t"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode("red") != TOKENIZER.encode(" red")


def test_digits_stand_alone() -> None:
    pieces = [TOKENIZER.piece(i) for i in TOKENIZER.encode("2024 and 17")]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == [*"2024", *"17"]


def test_a_line_break_is_a_piece_of_its_own() -> None:
    newline = TOKENIZER.id_of("\n")
    assert newline is not None
    ids = TOKENIZER.encode("a\n\nb")
    assert ids.count(newline) == 2


def test_what_the_bundled_text_never_had_is_spelled_in_bytes() -> None:
    text = "\U0001f9ea ✗"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.unk_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_marks_and_specials_have_the_ids_that_the_config_tells() -> None:
    tokens = tiny_config("2.5").tokens
    assert TOKENIZER.id_of("[UNUSED_TOKEN_145]") == tokens.end_of_turn
    assert TOKENIZER.id_of("[UNUSED_TOKEN_146]") == tokens.start_of_turn
    assert (TOKENIZER.unk_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (
        tokens.unk,
        tokens.bos,
        tokens.eos,
    )
