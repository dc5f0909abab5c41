"""The same network as a transformers model; importing this module registers it.

    import xc_ray.model.hf
    model = AutoModelForCausalLM.from_pretrained(folder)  # the published layout, no remote code
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    model.generate(**inputs, max_new_tokens=64)

The code beside a published checkpoint is never run, whatever `trust_remote_code` says.

Dynamic NTK takes one base for a whole answer: `generate` plans each row's prompt and new tokens, a
plain `forward` takes the row's own length, and `rope_length` says otherwise (a loop of one's own
over `past_key_values` should give it where the limit is near).

A repetition penalty in `generate` sees the prompt's ids too, as transformers has it. The original's
does not when there are pictures: pass `inputs_embeds=model.embed(…)` without `input_ids` for that.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from xc_ray.errors import CheckpointError, ConfigError, InvalidRequest
from xc_ray.model.config import XComposerConfig
from xc_ray.model.hf_processor import XComposerProcessor, XComposerTokenizer
from xc_ray.model.layout import read_layout
from xc_ray.model.rope import inverse_frequencies, rope_table
from xc_ray.model.weights import Checkpoint, published_state
from xc_ray.model.xcomposer import ImageEncoder, XComposer

# In published files, of 2.5 and of the others. In memory the type is our own, because transformers
# gives every "internlm2" a tokenizer of its choice.
PUBLISHED_TYPES = ("internlm2", "internlm")
# Names that tokenizer_config.json files give: ours first.
TOKENIZERS = ("XComposerTokenizer", "InternLMXComposer2Tokenizer", "InternLM2Tokenizer")
# What no published config.json says; `XComposerConfig.to_dict` does.
_EXPLICIT = ("variant", "vision", "tile", "tokens", "plora")
_HUB = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})
_WITHOUT_EFFECT = frozenset(
    {"_from_auto", "low_cpu_mem_usage", "trust_remote_code", "weights_only"}
)


class XComposerHfConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # the base's hook
    """The keys of a `config.json`, published or saved; rope's are in `rope_parameters`.

    Declared here is what transformers would drop or warn of; `XComposerConfig` knows the defaults.
    """

    model_type = "xcomposer"

    rope_parameters: dict[str, Any] | None = None
    max_length: int = 4096
    tie_word_embeddings: bool = False
    use_cache: bool = True
    tokenizer_class: str | None = TOKENIZERS[0]
    variant: str | None = None
    vision: dict[str, Any] | None = None
    tile: int | None = None
    tokens: dict[str, Any] | None = None
    plora: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the base names the hub's options one by one
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> Any:
        """As `AutoConfig`, which knows the published types."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the keys of a file, without those that speak of the published code."""
        code = ("auto_map", "attn_implementation", "model_type")
        return super().from_dict({k: v for k, v in config_dict.items() if k not in code}, **kwargs)

    @property
    def explicit(self) -> bool:
        """Whether everything is said that the network is built from."""
        return None not in (self.variant, self.vision, self.plora)

    @property
    def xcomposer(self) -> XComposerConfig:
        """Our config; what the file does not say is read from the tensors beside it, once.

        Raises:
            CheckpointError: a value is wrong, or the folder has no weights to read from.
        """
        if not self.explicit:
            self.complete(read_layout(local_folder(self.name_or_path or "")).config)
        return XComposerConfig.from_dict(self._keys(), {})

    def complete(self, config: XComposerConfig) -> None:
        """Takes from `config` what the file did not say."""
        known = config.to_dict()
        for key in _EXPLICIT:
            if getattr(self, key) is None:
                setattr(self, key, known[key])

    def to_dict(self) -> dict[str, Any]:
        """The published keys, and every explicit one as soon as they are known."""
        keys = self._keys()
        if self.explicit:
            keys |= XComposerConfig.from_dict(keys, {}).to_dict()
            del keys["torch_dtype"]  # `dtype` says it; transformers warns of the older name
        return keys

    def _keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = super().to_dict()
        rope = keys.pop("rope_parameters", None) or {}
        kind, factor = rope.get("rope_type", "default"), rope.get("factor", 1.0)
        keys["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": factor}
        keys["rope_theta"] = rope.get("rope_theta", 10000.0)
        keys["model_type"] = PUBLISHED_TYPES[0]
        return keys


class PaddedAttend:
    """`Attend` for B rows of L tokens behind those of a cache; `valid` (B, past + L) or None."""

    def __init__(self, batch: int, valid: Tensor | None, cache: Cache | None) -> None:
        self.batch, self.valid, self.cache = batch, valid, cache
        self.mask: Tensor | None = None  # made at the first layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        q, k, v = (t.view(self.batch, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)  # (B, Hk, past + L, D)
        new, total = q.shape[2], k.shape[2]
        causal = self.valid is None and new == total
        if self.mask is None and not causal and (new > 1 or self.valid is not None):
            self.mask = self._seen(torch.arange(total, device=q.device), new)
        out = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def _seen(self, columns: Tensor, new: int) -> Tensor:
        """Which keys each query sees, (B or 1, 1, L, past + L); a padded query may see none."""
        causal = (columns <= columns[len(columns) - new :, None])[None, None]
        return causal if self.valid is None else causal & self.valid[:, None, None].bool()


class XComposerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # as above
    """Tower, projector and decoder under the published tensor names."""

    config_class = XComposerHfConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer: `num_items_in_batch` is honoured
    _supports_sdpa = True
    _input_embed_layer = "tok_embeddings"

    def __init__(self, config: XComposerHfConfig, network: XComposer | None = None) -> None:
        """A model of `config` with random weights, or around a loaded `network`."""
        super().__init__(config)
        self.xcomposer = config.xcomposer
        self.gradient_checkpointing = False
        parts = network or XComposer(self.xcomposer)
        self.model, self.output = parts.decoder.model, parts.decoder.output
        for name, part in parts.vision._modules.items():
            setattr(self, name, part)
        for name, parameter in parts.vision._parameters.items():
            setattr(self, name, parameter)
        self._set_generation_config(GenerationConfig())  # type: ignore[no-untyped-call]  # theirs
        self.post_init()  # type: ignore[no-untyped-call]  # theirs

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what the base takes besides is refused
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: XComposerHfConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        generation_config: GenerationConfig | None = None,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "XComposerForCausalLM":
        """Loads a folder or hub id, whole and strict, onto one device.

        `dtype` is the file's own unless given. `device_map` is one device: None, a name, an index
        or `{"": device}`. Other keywords are hub options, or keys of `config.json` to override.

        Raises:
            CheckpointError: lists every missing, unexpected and misshapen tensor, or missing files.
            ConfigError: an option of transformers that this model does not support.
        """
        hub = {name: kwargs.pop(name) for name in _HUB & kwargs.keys()}
        folder = local_folder(pretrained_model_name_or_path, **hub)
        if config is None:
            config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        refused = [k for k in kwargs.keys() - _WITHOUT_EFFECT if kwargs[k] not in (None, False)]
        if refused:
            raise ConfigError(
                f"from_pretrained does not support {', '.join(sorted(refused))}; the model goes "
                "whole onto one device, by dtype and device_map"
            )
        if adapter := (adapter_kwargs or {}).get("_adapter_model_path"):
            raise ConfigError(
                f"{adapter} is an adapter; load it by peft's AutoPeftModelForCausalLM"
            )
        config = copy.deepcopy(config)
        config.name_or_path = str(pretrained_model_name_or_path)
        config.dtype = _dtype(dtype or torch_dtype, config)
        network = _network(folder, config, _device(device_map))
        with torch.device("meta"):  # nothing to make, and transformers initialises nothing on meta
            model = cls(config, network)
        if generation_config is None and (folder / "generation_config.json").is_file():
            generation_config = GenerationConfig.from_pretrained(folder)
            generation_config.max_length = None  # never the model's limit in published files
        if generation_config is not None:
            model._set_generation_config(generation_config)
        model.requires_grad_(True).train(False)
        return model

    def _set_generation_config(self, generation_config: GenerationConfig) -> None:
        """The given settings; an answer ends at the end of its turn too, whatever they say."""
        tokens, given = self.xcomposer.tokens, generation_config.eos_token_id
        ends = given if isinstance(given, list) else [tokens.eos if given is None else given]
        self.generation_config = copy.deepcopy(generation_config)
        self.generation_config.eos_token_id = sorted({*ends, tokens.end_of_turn})
        self.generation_config.bos_token_id = tokens.bos
        self.generation_config.pad_token_id = tokens.pad

    @property
    def vision(self) -> ImageEncoder:
        """Tower and projector as one module: a view made anew, so that no part of it goes stale."""
        view = ImageEncoder.__new__(ImageEncoder)
        nn.Module.__init__(view)
        view.config = self.xcomposer
        for name in ("vit", "vision_proj", "plora_glb_GN", "plora_sub_GN"):
            if hasattr(self, name):
                setattr(view, name, getattr(self, name))
        return view

    def embed(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        canvases: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Ids and picture marks (B, L), pictures in reading order -> embeddings (B, L, C).

        Raises:
            InvalidRequest: the marks and the pictures' tokens are not equally many.
        """
        x: Tensor = self.model.tok_embeddings(input_ids.to(self.device))
        rows = _picture_rows(mm_token_type_ids, x.device)
        pictures = torch.cat(self.vision(canvases)) if canvases else x.new_zeros(0, x.shape[-1])
        marked = 0 if rows is None else len(rows)
        if len(pictures) != marked:
            raise InvalidRequest(
                f"mm_token_type_ids marks {marked} picture positions, the {len(canvases or ())} "
                f"canvases make {len(pictures)} tokens; pass both as the processor gave them"
            )
        if rows is None:
            return x
        return x.flatten(0, 1).index_copy(0, rows, pictures.to(x.dtype)).view_as(x)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        mm_token_type_ids: Tensor | None = None,
        canvases: Sequence[Tensor] | None = None,
        rope_length: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Ids or embeddings of (B, L), padded on either side -> float32 logits (B, L, V).

        `attention_mask` (B, past + L); `mm_token_type_ids` (B, L) marks picture positions, of which
        `canvases` are the pictures (not with `inputs_embeds`); `labels` (B, L), -100 where nothing
        is learned, as at every picture position; `rope_length`, one or (B,), tokens to scale by.

        Raises:
            InvalidRequest: inputs that do not fit one another.
        """
        if (input_ids is None) == (inputs_embeds is None) or output_attentions:
            raise InvalidRequest("pass input_ids or inputs_embeds, and no output_attentions")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, mm_token_type_ids, canvases)
        assert inputs_embeds is not None
        batch, length, width = inputs_embeds.shape
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if checkpointing := self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # layers run twice; as transformers' own do
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        valid = _checked(attention_mask, (batch, past + length), past_key_values)

        rope = self._rope(position_ids, valid, rope_length, (batch, past, length))
        cos, sin = (t.to(inputs_embeds.dtype) for t in rope)
        attend = PaddedAttend(batch, valid, past_key_values)
        rows = _picture_rows(mm_token_type_ids, inputs_embeds.device)
        x, states = inputs_embeds.reshape(-1, width), []
        # The loop of `DecoderBody.forward`, here for its hidden states and for checkpointing.
        for number, layer in enumerate(self.model.layers):
            states += [x] if output_hidden_states else []
            run = partial(self._gradient_checkpointing_func, layer) if checkpointing else layer
            x = run(x, (cos, sin), rows, attend, number)
        x = self.model.norm(x)
        states += [x] if output_hidden_states else []

        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(x.view(batch, length, width)[:, last])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None
        if labels is not None:
            if mm_token_type_ids is not None:
                labels = labels.masked_fill(mm_token_type_ids == 1, -100)
            vocab = self.xcomposer.decoder.vocab_size
            loss = self.loss_function(logits, labels, vocab, num_items_in_batch=num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(s.view(batch, length, width) for s in states) or None,
        )
        return result.to_tuple() if return_dict is False else result

    def _rope(
        self,
        position_ids: Tensor | None,
        valid: Tensor | None,
        rope_length: int | Tensor | None,
        shape: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B·L, D) of the last L of past + L tokens, each row by its own base."""
        batch, past, length = shape
        if position_ids is None:
            seen = torch.ones(1, past + length, device=self.device) if valid is None else valid
            position_ids = (seen.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        positions = position_ids.to(self.device).expand(batch, length).reshape(-1)
        if rope_length is None:
            rope_length = past + length if valid is None else valid.sum(1)
        lengths = [rope_length] if isinstance(rope_length, int) else rope_length.tolist()
        wide = torch.promote_types(self.dtype, torch.float32)
        decoder, device = self.xcomposer.decoder, self.device
        bases = [inverse_frequencies(decoder, n, device=device, dtype=wide) for n in lengths]
        each = torch.stack(bases).repeat_interleave(batch * length // len(bases), 0)
        return rope_table(positions, each)

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the rest goes to the base by keyword
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        canvases: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`; pictures are encoded once, rope is planned for all tokens."""
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if canvases:
            kwargs["inputs_embeds"] = self.embed(ids, kwargs.get("mm_token_type_ids"), canvases)
        prompt = kwargs.get("inputs_embeds", ids)
        if prompt is not None and kwargs.get("rope_length") is None:
            batch, length = prompt.shape[:2]
            mask = kwargs.get("attention_mask")
            own = torch.full((batch,), length) if mask is None else mask.sum(1)
            kwargs["rope_length"] = own + self._max_new(length, generation_config, kwargs)
        return super().generate(ids, generation_config, **kwargs)  # type: ignore[misc]  # its own protocol

    def _max_new(
        self, length: int, given: GenerationConfig | None, kwargs: Mapping[str, Any]
    ) -> int:
        """Tokens that may be generated behind a prompt of `length`, as transformers decides it."""
        sources = (kwargs, given.to_dict() if given else {}, self.generation_config.to_dict())
        for name, used in (("max_new_tokens", 0), ("max_length", length)):
            said = [source[name] for source in sources if source.get(name) is not None]
            if said:
                return max(0, int(said[0]) - used)
        return 20  # transformers' own default


def local_folder(name_or_path: str | Path, **hub: Any) -> Path:
    """The folder of a model: a path as it is; a hub id is downloaded, without its code."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if Path(name_or_path).is_absolute() or str(name_or_path).count("/") != 1:
        raise CheckpointError(f"{name_or_path} is neither a folder nor a hub id (owner/name)")
    wanted = ["*.json", "*.safetensors", "*.bin", "*.model"]
    return Path(snapshot_download(str(name_or_path), allow_patterns=wanted, **hub))


def _network(folder: Path, config: XComposerHfConfig, device: torch.device) -> XComposer:
    """The folder's weights in a network of `config`, whose overrides may not change a shape."""
    checkpoint = Checkpoint.open(folder)
    config.complete(checkpoint.config)
    with torch.device("meta"):
        wanted = published_state(XComposer(config.xcomposer))
    wrong = [n for n, t in wanted.items() if tuple(t.shape) != checkpoint.shapes.get(n)]
    if wrong:
        raise CheckpointError(f"{folder} has other sizes than the config given: {', '.join(wrong)}")
    assert isinstance(config.dtype, torch.dtype)
    return replace(checkpoint, config=config.xcomposer).load(device=device, dtype=config.dtype)


def _dtype(given: str | torch.dtype | None, config: XComposerHfConfig) -> torch.dtype:
    wanted = (config.dtype or torch.float32) if given in (None, "auto") else given
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {wanted!r}; use 'auto', 'float32', 'bfloat16' or 'float16'")
    return dtype


def _device(device_map: Any) -> torch.device:
    whole = isinstance(device_map, Mapping) and list(device_map) == [""]
    wanted = device_map[""] if whole else device_map
    try:
        return torch.device("cpu" if wanted is None else wanted)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"device_map is {device_map!r}; the model goes onto one device, 'cpu', 'cuda', 'cuda:1'"
        ) from None


def _checked(mask: Tensor | None, shape: tuple[int, int], cache: Cache | None) -> Tensor | None:
    """The mask (B, past + L), None if it hides nothing."""
    if cache is not None and cache.is_compileable:
        raise InvalidRequest(f"{type(cache).__name__} is not supported; use a cache that grows")
    if mask is not None and tuple(mask.shape) != shape:
        raise InvalidRequest(f"attention_mask is {list(mask.shape)}, expected {list(shape)}")
    return None if mask is None or bool(mask.all()) else mask


def _picture_rows(marks: Tensor | None, device: torch.device) -> Tensor | None:
    """Rows of the flat batch that are pictures, None if there are none."""
    rows = None if marks is None else (marks.flatten() == 1).nonzero().squeeze(1).to(device)
    return None if rows is None or not len(rows) else rows


for _type in (XComposerHfConfig.model_type, *PUBLISHED_TYPES):
    # Not `AutoConfig.register`, which wants the class to be of that very type.
    CONFIG_MAPPING.register(_type, XComposerHfConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(XComposerHfConfig, XComposerForCausalLM, exist_ok=True)
AutoProcessor.register(XComposerHfConfig, XComposerProcessor, exist_ok=True)  # type: ignore[no-untyped-call]  # theirs
for _name in TOKENIZERS:
    # By name alone: beside a tokenizer registered by its config class, transformers still runs the
    # folder's own code when told trust_remote_code=True.
    REGISTERED_TOKENIZER_CLASSES[_name] = XComposerTokenizer
