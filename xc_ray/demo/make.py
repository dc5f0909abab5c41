"""Makes real checkpoints in the published layout with random weights, as the tests' tiny ones.

Own tokenizer (SentencePiece BPE with byte fallback, trained on `corpus.txt` in a blink), weights
from a seed. The same code fills models of any size, so a 7B checkpoint is `save_random` with
another config. The demo model's config is here too; its weights are trained by `demo.pretrain`.
"""

import io
from dataclasses import replace
from importlib import resources
from pathlib import Path

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from xc_ray.model.config import (
    FAMILIES,
    PLORA_LINEARS,
    DecoderConfig,
    PLoRAConfig,
    RopeScaling,
    TokenIds,
    Variant,
    VisionConfig,
    XComposerConfig,
)
from xc_ray.model.weights import published_name, save_checkpoint
from xc_ray.model.xcomposer import XComposer
from xc_ray.prompt.tokenizer import TOKENIZER_FILE

VOCAB_SIZE = 1024
_START, _END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"


def demo_config() -> XComposerConfig:
    """The bundled model: XComposer2.5 with 224 px tiles and 5.8 M parameters."""
    tiny = tiny_config("2.5")
    return replace(
        tiny,
        torch_dtype="bfloat16",
        vision=VisionConfig(192, 768, 6, 6, image_size=224),
        decoder=replace(
            tiny.decoder,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=16384,
        ),
    )


def tiny_config(variant: Variant) -> XComposerConfig:
    """Width 32, two layers, 56 px tiles of 4 × 4 patches: each variant at test size."""
    family = FAMILIES[variant]
    dynamic = RopeScaling("dynamic", 2.0 if variant == "2.5" else 1.0)
    return XComposerConfig(
        variant=variant,
        vision=VisionConfig(32, 64, 2, 2, image_size=56),
        decoder=DecoderConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_scaling=None if variant == "2.0-4KHD" else dynamic,
            max_position_embeddings=1024,
            max_length=family.max_length,
        ),
        plora={
            name: PLoRAConfig(4, 2.0 if variant == "2.0-4KHD" and name == "attention.wqkv" else 1.0)
            for name in PLORA_LINEARS
        },
        # unk, bos and eos come first, then the reserved pieces in the order of `train_tokenizer`.
        tokens=TokenIds(end_of_turn=3, start_of_turn=4),
        torch_dtype="float32",
    )


def make_model(
    folder: str | Path,
    variant: Variant = "2.5",
    *,
    config: XComposerConfig | None = None,
    seed: int = 0,
) -> Path:
    """A tiny random checkpoint with its tokenizer in `folder`, which is returned."""
    folder = Path(folder)
    config = config or tiny_config(variant)
    save_random(folder, config, seed=seed)
    (folder / TOKENIZER_FILE).write_bytes(train_tokenizer())
    return folder


def train_tokenizer() -> bytes:
    """A `tokenizer.model` by the published rules: no dummy prefix, byte fallback, turn marks."""
    lines = (
        resources.files(__package__).joinpath("corpus.txt").read_text(encoding="utf-8").splitlines()
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=[_END, _START, "\n"],
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def padded_tokenizer(vocab_size: int, tokens: TokenIds) -> bytes:
    """The small tokenizer, filled up to `vocab_size`, its turn marks at the ids of `tokens`.

    Stands in for a published `tokenizer.model` beside random weights of published sizes: ids have
    the right range and the marks their places; the fillers never come out of a text.
    """
    # protobuf makes its classes at import, where no type checker sees them.
    proto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    model = proto.FromString(train_tokenizer())
    marks = {tokens.start_of_turn: _START, tokens.end_of_turn: _END}
    for piece in model.pieces:
        if piece.piece in (_START, _END):
            piece.piece = f"[UNUSED_TOKEN_{900 + (piece.piece == _END)}]"
    for token in range(len(model.pieces), vocab_size):
        piece = model.pieces.add(piece=marks.get(token, f"\U000f0000{token}"), score=-1e6)
        if token in marks:
            piece.type = piece.USER_DEFINED
    return bytes(model.SerializeToString())


def save_random(
    folder: str | Path,
    config: XComposerConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a random checkpoint of `config`, of any size: tensor by tensor, made on `device`."""
    with torch.device("meta"):
        shapes = {published_name(n): p.shape for n, p in XComposer(config).named_parameters()}
    generator = torch.Generator(device=device).manual_seed(seed)
    state = {n: _random(n, s, generator, dtype) for n, s in shapes.items()}
    save_checkpoint(folder, config, state, max_shard_bytes=max_shard_bytes)


def _random(name: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Scaled so that activations and logits stay near unit size, norms near one."""
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    if "norm" in name and name.endswith("weight"):
        return x.mul_(0.1).add_(1)
    if name.endswith("bias"):
        return x.mul_(0.1)
    if "embedding" in name or "_GN" in name:
        return x
    fan_in = shape[1:].numel()
    return x.mul_(fan_in**-0.5)
