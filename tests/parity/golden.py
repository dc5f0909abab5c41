"""Reads a folder of golden data: cases come from its JSON files and tensor names, none from code.

    DIR/<variant>/checkpoint/{config.json, tiny.json, model.safetensors}
    DIR/<variant>/{preprocess,vision,decoder,loss}.{json,safetensors}, chat.json, images/
    DIR/tokenizer/{cases.json, prompts.json, tokenizer.model}

Any of them may be missing: a test whose data are not there is skipped.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from xc_ray.model.config import TokenIds, XComposerConfig
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import XComposer
from xc_ray.prompt.chat import Message, Role, split_marks
from xc_ray.prompt.tiles import Canvas, Grid, Transform, image_canvas, image_grid
from xc_ray.prompt.tokenizer import Tokenizer

# The largest difference that counts as the same (float32, absolute), by what is compared.
NORMALISED = 1e-6
EMBEDDINGS = 5e-5
LOGITS = 5e-4
CACHED_LOGITS = 1e-3
LOSS = 1e-4
GRADIENT_NORM = 1e-3  # relative

# What tiny.json says and published files leave to the code.
_EXPLICIT = ("vision", "plora", "tile", "tokens")
_SETTING = re.compile(r"(?P<family>train_)?hd(?P<tiles>\d+)")
_EMBEDDING = re.compile(
    r"(?P<picture>.+)\.(?P<setting>[^.]+)\.(full|row_norms|(first|last|rows)\d+)"
)
_TURN = re.compile(r"\[UNUSED_TOKEN_146\](\w+)\n(.*?)(?:\[UNUSED_TOKEN_145\]\n|\Z)", re.DOTALL)
_ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def assert_close(ours: Tensor, golden: Tensor, tolerance: float, what: str) -> None:
    """Shapes are equal and the largest difference is within the tolerance."""
    assert ours.shape == golden.shape, f"{what}: shape {ours.shape}, golden {golden.shape}"
    off = (ours.double() - golden.double()).abs().max().item()
    assert off <= tolerance, f"{what}: off by {off:.2e}, accepted are {tolerance:.0e}"


def read_setting(config: XComposerConfig, setting: str) -> tuple[int, Transform]:
    """`hd9` -> 9 tiles as served; `train_hd12` -> 12 as fine-tuned; `490` -> the one square."""
    if match := _SETTING.fullmatch(setting):
        return int(match["tiles"]), "family" if match["family"] else "serving"
    assert int(setting) == config.tile, f"setting {setting!r} of a model of {config.tile} px"
    return 1, "serving"


def messages_of_text(text: str) -> list[Message]:
    """The turns of a joined training text, slots numbered through, without an open last answer."""
    messages: list[Message] = []
    num_slots = 0
    for role, value in _TURN.findall(text.removesuffix("</s>")):
        parts = split_marks(value, num_slots)
        num_slots += sum(not isinstance(part, str) for part in parts)
        messages.append(Message(_ROLES[role], parts))
    if text.endswith("[UNUSED_TOKEN_146]assistant\n"):
        messages.pop()
    return messages


class FoldingTokenizer(Tokenizer):
    """The real tokenizer for a tiny model: each real id is folded into the tiny vocabulary."""

    def __init__(self, path: str | Path, variant: "Variant") -> None:
        super().__init__(path)
        self.variant = variant

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [self.variant.fold(i) for i in super().encode(text, bos=bos)]

    def encode_untrusted(self, text: str) -> list[int]:
        return [self.variant.fold(i) for i in super().encode_untrusted(text)]


class Variant:
    """One variant's folder; files are read when a test first asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._embeddings: dict[tuple[str, str], Tensor] = {}

    def __repr__(self) -> str:
        return self.folder.name

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object, empty if there is no such file."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file, none if there is no such file."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else {}

    @cached_property
    def preprocess(self) -> dict[str, Any]:
        return self.json("preprocess")

    @cached_property
    def normalised(self) -> dict[str, Tensor]:
        return self.tensors("preprocess")

    @cached_property
    def embedded(self) -> dict[str, Tensor]:
        return self.tensors("vision")

    @cached_property
    def decoder_cases(self) -> dict[str, Any]:
        return self.json("decoder")

    @cached_property
    def decoded(self) -> dict[str, Tensor]:
        return self.tensors("decoder")

    @cached_property
    def loss_rows(self) -> dict[str, Tensor]:
        return self.tensors("loss")

    @cached_property
    def names(self) -> set[str]:
        """What other files call this variant: its folder's name and what its own files say."""
        own = (self.json(name).get("variant") for name in ("preprocess", "loss", "chat"))
        return {self.folder.name, *(name for name in own if name)}

    @cached_property
    def tiny(self) -> dict[str, Any]:
        return self.json("checkpoint/tiny")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tiny checkpoint, with what the published code hard-codes written into its config."""
        source = self.folder / "checkpoint"
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config |= {key: self.tiny[key] for key in _EXPLICIT if self.tiny.get(key) is not None}
        with tempfile.TemporaryDirectory(prefix="xc_ray-parity-") as scratch:
            folder = Path(scratch)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for path in source.iterdir():
                if path.name not in ("config.json", "tiny.json"):
                    (folder / path.name).symlink_to(path.resolve())
            checkpoint = Checkpoint.open(folder)
            files = {name: path.resolve() for name, path in checkpoint.files.items()}
        return replace(checkpoint, folder=source, files=files)

    @cached_property
    def config(self) -> XComposerConfig:
        return self.checkpoint.config

    @cached_property
    def published_config(self) -> XComposerConfig:
        """The model with the published vocabulary and turn marks, for ids that are not folded."""
        decoder = replace(self.config.decoder, vocab_size=TokenIds().start_of_turn + 1)
        return replace(self.config, tokens=TokenIds(), decoder=decoder)

    @cached_property
    def model(self) -> XComposer:
        return self.checkpoint.load()

    @cached_property
    def _fold_modulus(self) -> int:
        told = re.search(r"r % (\d+)", self.tiny.get("token_fold", ""))
        return int(told[1]) if told else self.config.decoder.vocab_size - 5

    def fold(self, token: int) -> int:
        """The tiny id of a real id."""
        published, tiny = TokenIds(), self.config.tokens
        if token == published.end_of_turn:
            return tiny.end_of_turn
        if token == published.start_of_turn:
            return tiny.start_of_turn
        return token if token < 3 else 3 + token % self._fold_modulus

    def open(self, picture: str) -> Image.Image:
        """A picture as stored: neither turned nor put on white, unlike what `open_image` gives."""
        listed = self.preprocess.get("images", {}).get(picture, {}).get("file")
        path = self.folder / listed if listed else next(self.folder.glob(f"images/{picture}.*"))
        with Image.open(path) as image:
            return image.copy()

    def canvas(self, picture: str, setting: str) -> Canvas:
        return image_canvas(self.config, self.open(picture), *read_setting(self.config, setting))

    def grid(self, picture: str, setting: str) -> Grid:
        return image_grid(self.config, self.open(picture).size, *read_setting(self.config, setting))

    def embeddings(self, picture: str, setting: str) -> Tensor:
        """Our embeddings of a picture (Ti, C), computed once."""
        key = picture, setting
        if key not in self._embeddings:
            canvas = torch.from_numpy(self.canvas(picture, setting).copy())
            with torch.no_grad():
                (self._embeddings[key],) = self.model.vision([canvas])
        return self._embeddings[key]


@dataclass(frozen=True)
class Case:
    """One golden case: its variant, a name for the test report, and its JSON object."""

    variant: Variant
    name: str
    data: Any = None
    picture: str = ""
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.variant}-{self.name}"


class Golden:
    """A whole folder."""

    def __init__(self, root: Path, tokenizer: Path | None = None) -> None:
        self.root = root
        self.tokenizer_file = tokenizer or root / "tokenizer" / "tokenizer.model"
        self.variants = [
            Variant(path.parent.parent) for path in sorted(root.glob("*/checkpoint/config.json"))
        ]

    def text_cases(self, name: str) -> dict[str, Any]:
        """A JSON file of the tokenizer's folder, empty if there is none."""
        path = self.root / "tokenizer" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The real tokenizer; the test is skipped without it."""
        return Tokenizer(self.tokenizer_path)

    @cached_property
    def tokenizer_path(self) -> Path:
        path = self.tokenizer_file
        if not path.is_file():
            pytest.skip("needs the published tokenizer.model: give it with --tokenizer FILE")
        wanted = self.text_cases("cases").get("tokenizer_sha256")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if wanted not in (None, found):
            pytest.fail(f"{path} is not the tokenizer of these cases (sha256 {found[:16]}…)")
        return path

    def folding(self, variant: Variant) -> FoldingTokenizer:
        """The real tokenizer with its ids folded for a tiny model."""
        return FoldingTokenizer(self.tokenizer_path, variant)

    def variant_called(self, name: str) -> Variant | None:
        return next((v for v in self.variants if name in v.names), None)

    def pictures(self) -> Iterator[Case]:
        for variant in self.variants:
            for picture, about in variant.preprocess.get("images", {}).items():
                for setting, data in about["settings"].items():
                    yield Case(variant, f"{picture}.{setting}", data, picture, setting)

    def processed_pictures(self) -> Iterator[Case]:
        return (case for case in self.pictures() if case.data.get("processed_png"))

    def whole_normalised(self) -> Iterator[Case]:
        for case in self.pictures():
            if f"{case.name}.full" in case.variant.normalised:
                yield case

    def grids(self) -> Iterator[Case]:
        for variant in self.variants:
            cases: dict[str, list[Any]] = {}
            for case in variant.preprocess.get("grid_cases") or []:
                cases.setdefault(case["setting"], []).append(case)
            for setting, data in cases.items():
                yield Case(variant, setting, data, setting=setting)

    def embeddings(self) -> Iterator[Case]:
        for variant in self.variants:
            found: dict[tuple[str, str], None] = {}
            for name in variant.embedded:
                if match := _EMBEDDING.fullmatch(name):
                    found[match["picture"], match["setting"]] = None
            for picture, setting in found:
                yield Case(variant, f"{picture}.{setting}", None, picture, setting)

    def towers(self) -> Iterator[Case]:
        for variant in self.variants:
            about = variant.json("vision").get("debug")
            if about:
                picture, _, setting = about["image"].rpartition(".")
                yield Case(variant, about["image"], about, picture, setting)

    def samples(self) -> Iterator[Case]:
        for variant in self.variants:
            for sample in variant.json("loss").get("samples", []):
                yield Case(variant, sample["name"], sample)

    def samples_with(self, key: str) -> Iterator[Case]:
        """Training samples that hold a value under a key."""
        return (case for case in self.samples() if case.data.get(key) is not None)

    def samples_with_pictures(self) -> Iterator[Case]:
        return (case for case in self.samples() if any(case.data["images"]))

    def samples_with_system_turn(self) -> Iterator[Case]:
        for case in self.samples():
            rows = [messages_of_text(text) for text in case.data["texts"]]
            if any(message.role == "system" for row in rows for message in row):
                yield case

    def chats(self) -> Iterator[Case]:
        for variant in self.variants:
            for i, case in enumerate(variant.json("chat").get("cases", [])):
                yield Case(variant, str(i), case)

    def chats_with(self, key: str) -> Iterator[Case]:
        """Chats that hold a value under a key."""
        return (case for case in self.chats() if case.data.get(key))

    def prompts(self) -> Iterator[Case]:
        for i, case in enumerate(self.text_cases("prompts").get("chat", [])):
            for name in re.findall(r"\w+", case["variant"].replace(" and ", " ")):
                if variant := self.variant_called(name):
                    yield Case(variant, str(i), case)
