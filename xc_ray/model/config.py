"""XComposerConfig: what one model of the family is, read from its checkpoint and never from a name.

Published `config.json` files describe the language model only. What the original code hard-codes
(vision sizes, PLoRA scaling, tile size, turn ids) is taken from tensor shapes where they tell it,
from the family's constants otherwise, and from explicit fields of `config.json` before either:
`variant`, `vision`, `plora`, `tile`, `tokens`. `to_dict` writes those fields, so that a saved model
needs no inference.

Papers: XComposer2 2401.16420, 4KHD 2404.06512, 2.5 2407.03320, InternLM2 2403.17297 (arXiv).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from xc_ray.errors import CheckpointError

Variant = Literal["2.0", "2.0-VL", "2.0-4KHD", "2.5"]
Shapes = Mapping[str, tuple[int, ...]]

CONFIG_FILE = "config.json"
# The five linear maps of a decoder layer that carry PLoRA, by the suffix of their tensor names.
PLORA_LINEARS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
# alpha / rank of the published checkpoints; no file names it (256/256, and the class default 16/8).
_PLORA_SCALING_OF_RANK = {256: 1.0, 8: 2.0}
# Rows of the vision position table (patches + class row) -> variant: the surest mark of a published
# file.
_VARIANT_OF_POSITIONS: dict[int, Variant] = {
    16 * 16 + 1: "2.0",
    35 * 35 + 1: "2.0-VL",
    24 * 24 + 1: "2.0-4KHD",
    40 * 40 + 1: "2.5",
}
_CLIP_HEAD_DIM = 64  # CLIP ViT-L: 1024 / 16 heads; head counts leave no trace in shapes
VISION_PREFIX = "vit.vision_tower.vision_model."

_DEFAULT_SYSTEM = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model "
    "that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently "
    "in the language chosen by the user such as English and 中文.\n"
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses "
    "effectively based on the provided image."
)


@dataclass(frozen=True)
class Family:
    """What the variants differ in beyond sizes: picture rules, prompt rules and default limits."""

    tiled: bool
    merge: int  # patches of one side that become one token: 2 for the tiled variants
    max_tiles: int  # tile budget of a request with one picture
    max_tiles_several: int  # ... as soon as a request holds several
    family_max_tiles: int  # tile budget of the original fine-tuning code
    always_enlarge: bool  # 4KHD scales every picture up to the budget, 2.5 to the next tile only
    centre_padding: bool  # serving: 4KHD pads above and below, 2.5 below only
    bos_every_part: bool  # BOS before every text part (v2, 4KHD) or once at the start (2.5)
    system_text: str  # used when a request has no system turn; empty: no system turn at all
    max_length: int


FAMILIES: dict[Variant, Family] = {
    "2.0": Family(False, 1, 1, 1, 1, False, False, True, _DEFAULT_SYSTEM, 4096),
    "2.0-VL": Family(False, 1, 1, 1, 1, False, False, True, _DEFAULT_SYSTEM, 4096),
    "2.0-4KHD": Family(True, 2, 25, 25, 16, True, True, True, _DEFAULT_SYSTEM, 16384),
    "2.5": Family(True, 2, 24, 6, 18, False, False, False, "", 16384),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling of the originals' `chat()`, used where a request says nothing."""

    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 50
    repetition_penalty: float = 1.005
    max_tokens: int = 1024


GENERATION_DEFAULTS = GenerationDefaults()


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP ViT: sizes in numbers, `image_size` in pixels of one square."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 560
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a square: 40 for 560 px and patches of 14 px."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Rows of the position table: the patches of a square and the class row."""
        return self.patches_per_side**2 + 1


@dataclass(frozen=True)
class PLoRAConfig:
    """Rank and scaling (alpha / rank) of one linear map."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class RopeScaling:
    """How rope reaches past the trained length.

    `dynamic`: the base grows with a sequence past the limit; `linear`: positions shrink by
    `factor`.
    """

    type: Literal["dynamic", "linear"]
    factor: float


@dataclass(frozen=True)
class DecoderConfig:
    """InternLM2: grouped-query attention, SwiGLU, RMSNorm (2403.17297)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    max_length: int = 4096
    bias: bool = False
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        """Numbers in the query, key or value of one head (128 at 7B)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_numbers_per_token(self) -> int:
        """Keys and values of one token over all layers, in numbers (65,536 at 7B)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class TokenIds:
    """Ids that the prompt and the stop rule need; `end_of_turn` ends an answer."""

    bos: int = 1
    eos: int = 2
    pad: int = 2
    unk: int = 0
    start_of_turn: int = 92543  # [UNUSED_TOKEN_146]
    end_of_turn: int = 92542  # [UNUSED_TOKEN_145]


@dataclass(frozen=True)
class XComposerConfig:
    """Vision tower, projector and decoder of one model."""

    variant: Variant
    vision: VisionConfig
    decoder: DecoderConfig
    plora: Mapping[str, PLoRAConfig]
    tokens: TokenIds = field(default_factory=TokenIds)
    torch_dtype: str = "bfloat16"

    @property
    def family(self) -> Family:
        """Picture rules, prompt rules and default limits of the model's variant."""
        return FAMILIES[self.variant]

    @property
    def tile(self) -> int:
        """Pixels of one side of a tile (or of the one square of an untiled variant)."""
        return self.vision.image_size

    @property
    def tokens_per_side(self) -> int:
        """Tokens along one side of a merged square: 16, 35, 12, 20 for the published four."""
        return self.vision.patches_per_side // self.family.merge

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset({self.tokens.eos, self.tokens.end_of_turn})

    @property
    def projector_in(self) -> int:
        """Numbers in a vector that enters the projector: merge² patches side by side."""
        return self.vision.hidden_size * self.family.merge**2

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the five linear maps of a decoder layer."""
        d = self.decoder
        packed = (d.num_attention_heads + 2 * d.num_key_value_heads) * d.head_dim
        return {
            "attention.wqkv": (packed, d.hidden_size),
            "attention.wo": (d.hidden_size, d.hidden_size),
            "feed_forward.w1": (d.intermediate_size, d.hidden_size),
            "feed_forward.w2": (d.hidden_size, d.intermediate_size),
            "feed_forward.w3": (d.intermediate_size, d.hidden_size),
        }

    def image_tokens(self, rows: int, cols: int) -> int:
        """Tokens of one picture, overview and separators included.

        Tiled with m tokens a side: (rows·cols + 1)·m² + (rows + 1)·m + 1 (m = 12: 2404.06512, 20:
        2407.03320); untiled: m².
        """
        m = self.tokens_per_side
        if not self.family.tiled:
            return m * m
        return (rows * cols + 1) * m * m + (rows + 1) * m + 1

    def default_max_tiles(self, num_images: int) -> int:
        """The family's tile budget for a request with `num_images` pictures."""
        return self.family.max_tiles if num_images <= 1 else self.family.max_tiles_several

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` in the published layout, with every inferred value written out."""
        d, t = self.decoder, self.tokens
        scaling = asdict(d.rope_scaling) if d.rope_scaling else None
        return {
            "architectures": ["InternLMXComposer2ForCausalLM"],
            "model_type": "internlm2" if self.variant == "2.5" else "internlm",
            "vocab_size": d.vocab_size,
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            "num_hidden_layers": d.num_hidden_layers,
            "num_attention_heads": d.num_attention_heads,
            "num_key_value_heads": d.num_key_value_heads,
            "hidden_act": "silu",
            "rms_norm_eps": d.rms_norm_eps,
            "rope_theta": d.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": d.max_position_embeddings,
            "max_length": d.max_length,
            "bias": d.bias,
            "initializer_range": d.initializer_range,
            "tie_word_embeddings": False,
            "bos_token_id": t.bos,
            "eos_token_id": t.eos,
            "pad_token_id": t.pad,
            "torch_dtype": self.torch_dtype,
            "img_size": self.tile,
            "variant": self.variant,
            "vision": asdict(self.vision),
            "tile": self.tile if self.family.tiled else None,
            "tokens": asdict(t),
            "plora": {name: asdict(p) for name, p in self.plora.items()},
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], shapes: Shapes) -> "XComposerConfig":
        """The config of a checkpoint from its `config.json` and the shapes of its tensors.

        `shapes` may be empty when every explicit field is given (`to_dict` gives them).

        Raises:
            CheckpointError: a needed value is missing, of the wrong type, or contradicts another.
        """
        reader = _Reader(config, "config.json")
        decoder = _decoder(reader)
        variant = _variant(reader, shapes)
        result = cls(
            variant=variant,
            vision=_vision(reader, shapes, variant),
            decoder=decoder,
            plora=_plora(reader, shapes),
            tokens=_tokens(reader, decoder.vocab_size),
            torch_dtype=reader.text("torch_dtype", reader.text("dtype", "bfloat16")),
        )
        _check(result)
        return result


class _Reader:
    """Typed access to a JSON object; every failure names the file, the key and the value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fail(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {key!r} is {self.values.get(key)!r}, expected {wanted}"
        )

    def size(self, key: str, default: int | None = None) -> int:
        return self.int(key, default, least=1)

    def int(self, key: str, default: int | None = None, *, least: int = 0) -> int:
        value = self.values.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(key, f"a whole number of at least {least}")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.fail(key, "a number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def sub(self, key: str) -> "_Reader":
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.fail(key, "an object")
        return _Reader(value, f"{self.where}: {key}")


def _decoder(r: _Reader) -> DecoderConfig:
    if r.text("hidden_act", "silu") != "silu":
        raise r.fail("hidden_act", "'silu'")
    if r.values.get("tie_word_embeddings"):
        raise r.fail("tie_word_embeddings", "false: the family has an output matrix of its own")
    bias = r.values.get("bias", True)  # Upstream quirk: the original config class defaults to true
    if not isinstance(bias, bool):
        raise r.fail("bias", "true or false")
    if r.float("rope_theta", 10000.0) <= 0:
        raise r.fail("rope_theta", "a number of more than 0")
    heads = r.size("num_attention_heads")
    return DecoderConfig(
        vocab_size=r.size("vocab_size"),
        hidden_size=r.size("hidden_size"),
        intermediate_size=r.size("intermediate_size"),
        num_hidden_layers=r.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=r.size("num_key_value_heads", heads),
        rms_norm_eps=r.float("rms_norm_eps", 1e-6),
        rope_theta=r.float("rope_theta", 10000.0),
        rope_scaling=_rope_scaling(r),
        max_position_embeddings=r.size("max_position_embeddings", 2048),
        max_length=r.size("max_length", 4096),
        bias=bias,
        initializer_range=r.float("initializer_range", 0.02),
    )


def _rope_scaling(r: _Reader) -> RopeScaling | None:
    if not r.has("rope_scaling"):
        return None
    scaling = r.sub("rope_scaling")
    kind = scaling.text("type", scaling.text("rope_type", ""))
    factor = scaling.float("factor", 1.0)
    if factor < 1.0:
        raise scaling.fail("factor", "a number of at least 1")
    if kind == "dynamic":
        return RopeScaling("dynamic", factor)
    if kind == "linear":
        return RopeScaling("linear", factor)
    raise r.fail("rope_scaling", "null, or type 'dynamic' or 'linear' with a factor")


def _variant(r: _Reader, shapes: Shapes) -> Variant:
    if r.has("variant"):
        named = r.text("variant", "")
        for variant in FAMILIES:
            if variant == named:
                return variant
        raise r.fail("variant", f"one of {', '.join(FAMILIES)}")
    positions = shapes.get(VISION_PREFIX + "embeddings.position_embedding.weight")
    if positions and positions[0] in _VARIANT_OF_POSITIONS:
        return _VARIANT_OF_POSITIONS[positions[0]]
    known = ", ".join(f"{rows} ({v})" for rows, v in _VARIANT_OF_POSITIONS.items())
    seen = f"has {positions[0]} rows" if positions else "is missing"
    raise CheckpointError(
        f"cannot tell the variant: the vision position table {seen}, known are {known}; "
        f"write 'variant' into config.json ({', '.join(FAMILIES)})"
    )


def _vision(r: _Reader, shapes: Shapes, variant: Variant) -> VisionConfig:
    explicit = r.sub("vision")
    inferred = _vision_from_shapes(shapes)
    wanted = {**inferred, **{k: v for k, v in explicit.values.items() if k in _VISION_FIELDS}}
    if r.has("tile"):
        wanted["image_size"] = r.size("tile")
    if "hidden_size" not in wanted or "image_size" not in wanted:
        raise CheckpointError(
            "the vision tower's sizes are unknown: config.json has no 'vision' field and the "
            f"checkpoint no tensors under {VISION_PREFIX!r}"
        )
    sizes = _Reader(wanted, "config.json: vision")
    hidden = sizes.size("hidden_size")
    if sizes.text("hidden_act", "quick_gelu") not in _HIDDEN_ACTS:
        raise sizes.fail("hidden_act", f"one of {', '.join(_HIDDEN_ACTS)}")
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=sizes.size("intermediate_size", 4 * hidden),
        num_hidden_layers=sizes.size("num_hidden_layers", 24),
        num_attention_heads=sizes.size("num_attention_heads", max(1, hidden // _CLIP_HEAD_DIM)),
        patch_size=sizes.size("patch_size", 14),
        image_size=sizes.size("image_size"),
        hidden_act=sizes.text("hidden_act", "quick_gelu"),
        layer_norm_eps=sizes.float("layer_norm_eps", 1e-5),
    )


_HIDDEN_ACTS = ("quick_gelu", "gelu")
_VISION_FIELDS = frozenset(VisionConfig.__dataclass_fields__)


def _vision_from_shapes(shapes: Shapes) -> dict[str, Any]:
    patch = shapes.get(VISION_PREFIX + "embeddings.patch_embedding.weight")
    positions = shapes.get(VISION_PREFIX + "embeddings.position_embedding.weight")
    fc1 = shapes.get(VISION_PREFIX + "encoder.layers.0.mlp.fc1.weight")
    if not (patch and positions and fc1):
        return {}
    layers = {
        int(name[len(VISION_PREFIX) :].split(".")[2])
        for name in shapes
        if re.match(re.escape(VISION_PREFIX) + r"encoder\.layers\.\d+\.", name)
    }
    return {
        "hidden_size": patch[0],
        "patch_size": patch[-1],
        "image_size": math.isqrt(positions[0] - 1) * patch[-1],
        "intermediate_size": fc1[0],
        "num_hidden_layers": len(layers),
    }


def _plora(r: _Reader, shapes: Shapes) -> dict[str, PLoRAConfig]:
    explicit = r.sub("plora")
    default = explicit.values.get("default")
    result = {}
    for linear in PLORA_LINEARS:
        seen = shapes.get(f"model.layers.0.{linear}.Plora_A.weight")
        given = explicit.values.get(linear, default)
        if given is not None:
            if not isinstance(given, Mapping):
                raise explicit.fail(linear if linear in explicit.values else "default", "an object")
            one = _Reader(given, f"config.json: plora: {linear}")
            result[linear] = PLoRAConfig(
                one.size("rank", seen[0] if seen else None), one.float("scaling")
            )
        elif seen is None:
            raise CheckpointError(
                f"no PLoRA rank for {linear}: neither a tensor nor config.json tells it"
            )
        elif seen[0] not in _PLORA_SCALING_OF_RANK:
            raise CheckpointError(
                f"the PLoRA scaling of {linear} with rank {seen[0]} is unknown "
                "(known ranks: 8, 256); write it into config.json, for example "
                f'"plora": {{"{linear}": {{"scaling": 1.0}}}}'
            )
        else:
            result[linear] = PLoRAConfig(seen[0], _PLORA_SCALING_OF_RANK[seen[0]])
    return result


def _tokens(r: _Reader, vocab_size: int) -> TokenIds:
    explicit, default = r.sub("tokens"), TokenIds()
    ids = TokenIds(
        bos=explicit.int("bos", r.int("bos_token_id", default.bos)),
        eos=explicit.int("eos", r.int("eos_token_id", default.eos)),
        pad=explicit.int("pad", r.int("pad_token_id", default.pad)),
        unk=explicit.int("unk", default.unk),
        start_of_turn=explicit.int("start_of_turn", default.start_of_turn),
        end_of_turn=explicit.int("end_of_turn", default.end_of_turn),
    )
    for name, value in asdict(ids).items():
        if value >= vocab_size:
            raise CheckpointError(
                f"token id {name} = {value} is outside the vocabulary of {vocab_size}; "
                f'write the right one into config.json: "tokens": {{"{name}": ...}}'
            )
    return ids


def _check(c: XComposerConfig) -> None:
    d, v = c.decoder, c.vision
    if d.hidden_size % d.num_attention_heads or d.num_attention_heads % d.num_key_value_heads:
        raise CheckpointError(
            f"config.json: hidden_size {d.hidden_size}, "
            f"num_attention_heads {d.num_attention_heads} and "
            f"num_key_value_heads {d.num_key_value_heads} do not divide one another"
        )
    if v.hidden_size % v.num_attention_heads:
        raise CheckpointError(
            f"config.json: vision: hidden_size {v.hidden_size} is not a multiple of "
            f"num_attention_heads {v.num_attention_heads}"
        )
    if v.image_size % (v.patch_size * c.family.merge):
        raise CheckpointError(
            f"config.json: a tile of {v.image_size} px is not a whole number of {c.family.merge}×"
            f"{c.family.merge} groups of {v.patch_size} px patches"
        )


def preset(variant: Variant) -> XComposerConfig:
    """The published 7B model of a variant, as MODEL facts and public configs tell it."""
    tiled = FAMILIES[variant].tiled
    sizes = {"2.0": 224, "2.0-VL": 490, "2.0-4KHD": 336, "2.5": 560}
    wqkv = PLoRAConfig(8, 2.0) if variant == "2.0-4KHD" else PLoRAConfig(256, 1.0)
    return XComposerConfig(
        variant=variant,
        vision=VisionConfig(image_size=sizes[variant]),
        decoder=DecoderConfig(
            vocab_size=92544,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_scaling=RopeScaling("dynamic", 1.0),
            max_position_embeddings=24576 if variant == "2.5" else 32768,
            max_length=16384 if tiled else 4096,
        ),
        plora={n: wqkv if n == "attention.wqkv" else PLoRAConfig(256, 1.0) for n in PLORA_LINEARS},
    )


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        CheckpointError: no folder, no file, or not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no config.json; is it the folder of a checkpoint?"
        ) from None
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
