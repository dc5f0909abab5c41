"""What peft's `adapter_config.json` says of a LoRA (2106.09685), and what is refused in it.

A setting that is not known here may change what the numbers mean. So every field is either read,
or known to say nothing about the result, or empty; anything else is a problem with a name.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from xc_ray.errors import CheckpointError

ADAPTER_CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
SHOWN_CHARS = 120  # of a value in a message

_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
    }
)
# Where the adapter comes from, how it was trained or how A and B began; of the last group
# `init_lora_weights` tells whether it was used.
_WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
    }
)
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_WHY = {
    "use_dora": "DoRA also rescales the weights; train plain LoRA",
    "modules_to_save": "whole modules were trained beside the LoRA; train without them",
    "lora_bias": "biases of B are not served; train without them",
    "fan_in_fan_out": "the linears of this family are stored (out, in)",
    "layer_replication": "the base has other layers than the served one",
    "target_parameters": "adapters belong on linear modules, see target_modules",
    "trainable_token_indices": "embedding rows were trained too; train without them",
}
# A pattern runs on short names; what could make it run for hours is not needed in it.
_MAX_PATTERN_CHARS = 300
_MAX_REPEATS = 4
_ODD = re.compile(r"\)[*+{]|\[[^\]]*\[|--|\|\||[^\w.\\^$|()*+?\[\]{},:!=<-]", re.ASCII)
# As peft uses a pattern: on the end of a module's name, and before a layer's number.
_ENDS_WITH = r"(.*\.)?({})$"
_LAYER_OF = r"(?:^|.*?\.){}\.(\d+)\."

Value = TypeVar("Value")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that matter, and what is wrong with the others; `rank` None: not told."""

    rank: int | None
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers: frozenset[int] = frozenset()  # empty: all
    layers_pattern: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int | None:
        """The rank of a module, `model.layers.0.attention.wo`; None if the file does not tell."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / √r by rsLoRA (2312.03732)."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether peft puts a LoRA on the module: a whole name, the end of one, or a pattern."""
        if _named(self.exclude_modules, module):
            return False
        wanted = self.target_modules
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return True
        if isinstance(wanted, str) or module in wanted:
            return _named(wanted, module)
        return _named(wanted, module) and (not self.layers or self._layer(module) in self.layers)

    def _layer(self, module: str) -> int | None:
        patterns = [_LAYER_OF.format(p) for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, module):
                return int(match[match.re.groups])
        return None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads `adapter_config.json`; what cannot be served is listed in `problems`.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    path = folder / ADAPTER_CONFIG_FILE
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; that is no {ADAPTER_CONFIG_FILE}")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {ADAPTER_CONFIG_FILE}; is it a folder that peft saved?"
        ) from None
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {str(e)[:SHOWN_CHARS]}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(raw).__name__}")
    return _Reader(raw).config()


class _Reader:
    """Typed access to the fields; every failure becomes a problem, and a harmless value goes on."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def config(self) -> AdapterConfig:
        v = self.values
        if v.get("peft_type") != "LORA":
            self.wrong("peft_type", "'LORA'")
        if v.get("bias", "none") not in ("none", None):
            self.wrong("bias", "'none': biases of the base stay as they are")
        if not isinstance(v.get("use_rslora", False), bool | None):
            self.wrong("use_rslora", "true or false")
        self.init()
        self.unknown()
        rank, alpha = self.number("r", v.get("r")), self.number("lora_alpha", v.get("lora_alpha"))
        return AdapterConfig(
            rank=self.rank("r", rank),
            alpha=0.0 if alpha is None else alpha,
            rslora=bool(v.get("use_rslora")),
            rank_pattern={
                k: rank for k, n in self.patterns("rank_pattern") if (rank := self.rank(k, n))
            },
            alpha_pattern=dict(self.patterns("alpha_pattern")),
            target_modules=self.modules("target_modules", needed=True),
            exclude_modules=self.modules("exclude_modules"),
            layers=self.layers(),
            layers_pattern=self.layers_pattern(),
            problems=tuple(self.problems),
        )

    def wrong(self, key: str, wanted: str, value: Any = None) -> None:
        value = self.values.get(key) if value is None else value
        self.problems.append(f"{key} is {shown(value)}, expected {wanted}")

    def init(self) -> None:
        init = self.values.get("init_lora_weights", True)
        if isinstance(init, int | float) and not isinstance(init, bool):
            self.wrong("init_lora_weights", "true, false or a name")
        elif not any(init is plain or init == plain for plain in _PLAIN_INITS):
            self.problems.append(
                f"init_lora_weights is {shown(init)}, which changes the base too; save the adapter "
                "again with peft's path_initial_model_for_weight_conversion"
            )

    def unknown(self) -> None:
        for key in sorted(self.values.keys() - _READ - _WITHOUT_EFFECT):
            if self.values[key]:  # null, false and empty mean that it is not used
                why = _WHY.get(key, "not known to leave the result as it is; unset it")
                name = key if key.isidentifier() else shown(key)
                self.problems.append(f"{name} is {shown(self.values[key])}: {why}")

    def number(self, key: str, value: Any) -> float | None:
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                number = float(value)
                if math.isfinite(number):
                    return number
        except OverflowError:
            pass
        self.wrong(key, "a number", value)
        return None

    def rank(self, key: str, value: float | None) -> int | None:
        if value is None:
            return None
        if value < 1 or value != int(value):
            self.wrong(key, "a whole number of at least 1", value)
            return None
        return int(value)

    def patterns(self, key: str) -> list[tuple[str, float]]:
        """The usable entries of `rank_pattern` or `alpha_pattern`, in their order."""
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            self.wrong(key, "an object of patterns")
            return []
        found = []
        for pattern, given in value.items():
            number = self.number(f"{key}: {shown(pattern)}", given)
            if self.pattern(key, pattern) and number is not None:
                found.append((pattern, number))
        return found

    def pattern(self, key: str, pattern: str) -> bool:
        bare = re.sub(r"\\.", "", pattern)
        repeats = len(re.findall(r"[*+{]", bare))
        if len(pattern) > _MAX_PATTERN_CHARS or repeats > _MAX_REPEATS or _ODD.search(bare):
            self.problems.append(f"{key} holds {shown(pattern)}; write a simpler pattern")
            return False
        try:
            for form in (pattern, _ENDS_WITH.format(pattern), _LAYER_OF.format(pattern)):
                re.compile(form)
        except (re.error, OverflowError) as e:
            self.problems.append(f"{key} holds {shown(pattern)}, no regular expression: {e}")
            return False
        return True

    def modules(self, key: str, *, needed: bool = False) -> str | tuple[str, ...]:
        value = self.values.get(key)
        if isinstance(value, str) and value:
            plain = value.lower() == "all-linear" and key == "target_modules"
            return value if plain or self.pattern(key, value) else ()
        if not needed and not value:
            return ()
        names = value if isinstance(value, list) else []
        if not names or not all(isinstance(n, str) for n in names):
            self.wrong(key, "a list of module names or a pattern")
            return ()
        return tuple(names)

    def layers(self) -> frozenset[int]:
        value = self.values.get("layers_to_transform")
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            self.wrong("layers_to_transform", "layer numbers")
            return frozenset()
        return frozenset(numbers)

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.values.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            self.wrong("layers_pattern", "a name or a list of names")
            return ()
        return tuple(n for n in names if self.pattern("layers_pattern", n))


def _named(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _by_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The first pattern that fits the module's name, or the end of it from a dot on."""
    for pattern, value in patterns.items():
        if re.match(_ENDS_WITH.format(pattern), module):
            return value
    return default


def shown(value: Any) -> str:
    """A value of the file for a message, cut to what a line holds."""
    try:
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    except (ValueError, RecursionError, TypeError):
        text = type(value).__name__
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
