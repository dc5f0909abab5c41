"""Bytes per part for a share of a device, before anything loads.

Fractions of a GPU are enforced: a process declares its budget (share × device memory), refuses to
start if its parts do not fit, and derives the size of the key/value cache from the budget, never
from what happens to be free. The activation figures are estimates.
"""

from dataclasses import dataclass

from xc_ray.engine.config import LORA_RANK_STEP, MAX_LORA_RANK, EngineConfig, KVCacheDtype
from xc_ray.errors import ConfigError
from xc_ray.model.config import PLORA_LINEARS, XComposerConfig

# CUDA context, kernels and library workspaces of one process (measured on an H200:
# docs/design.md).
CONTEXT_BYTES = 720_000_000
# The kernels of adapters, and the second stream that they run on (0.15 GB on an H100, whose context
# alone is 0.1 GB larger than an H200's).
ADAPTER_CONTEXT_BYTES = 240_000_000
# cuBLAS takes its workspace from torch's allocator.
WORKSPACE_BYTES = 64_000_000
# Blocks of the allocator stay unused between others: a step takes so much more than its tensors.
FRAGMENTATION = 1.1
# For a lane and an id of the vocabulary: the sampler's counts and candidates (4 + 8), logits of the
# graphs and of the step (2 + 2), an edited copy, and log-probabilities (4 + 4 + 4), in bytes.
SAMPLING_BYTES = 28
# What the graphs of decode steps keep, in rows of a prefill step for each sequence (46 MiB for 128
# sequences at 7B, measured on an H100).
GRAPH_ROWS = 2.5
GB = 1_000_000_000
# A cache larger than this many of the longest requests is of no use to a small replica on CPU.
CPU_CACHE_REQUESTS = 4


# Of a whole GPU; the rest is for the driver, the contexts of others, and what estimates miss.
WHOLE = 0.98


def budget_of(share: float, device_bytes: int) -> int:
    """The bytes that a process with a share of one GPU may take."""
    return int(min(share, WHOLE) * device_bytes)


@dataclass(frozen=True)
class Plan:
    """Parts of one process, in bytes; `kv_tokens` is what the rest of `budget` holds."""

    title: str
    budget: int
    parts: dict[str, int]
    kv_bytes_per_token: int = 0

    @property
    def fixed(self) -> int:
        """Everything but the key/value cache."""
        return sum(self.parts.values())

    @property
    def kv_tokens(self) -> int:
        """Tokens of cache that the rest of the budget holds; 0 if the parts alone do not fit."""
        if not self.kv_bytes_per_token:
            return 0
        return max(0, (self.budget - self.fixed) // self.kv_bytes_per_token)

    def check(self, max_model_len: int = 0) -> None:
        """Refuses a budget in which the parts, and the longest request, do not fit.

        Raises:
            ConfigError: says what is needed and what to change.
        """
        need = self.fixed + max_model_len * self.kv_bytes_per_token
        if need > self.budget:
            parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.parts.items())
            cache = (
                f", cache for {max_model_len:,} tokens "
                f"{max_model_len * self.kv_bytes_per_token / GB:.2f}"
                if max_model_len
                else ""
            )
            raise ConfigError(
                f"{self.title} needs {need / GB:.2f} GB ({parts}{cache}) and its share is "
                f"{self.budget / GB:.2f} GB; raise its num_gpus"
                + (" or lower max_model_len or max_prefill_tokens" if max_model_len else ""),
                param="num_gpus",
            )


def decoder_plan(
    config: XComposerConfig,
    budget: int,
    *,
    number_bytes: int = 2,
    max_num_seqs: int = 32,
    max_prefill_tokens: int = 4096,
    max_model_len: int = 0,
    kv_cache_dtype: KVCacheDtype = "auto",
    cuda_graphs: bool = True,
    adapter_slots: int = 0,
    adapter_rank: int = MAX_LORA_RANK,
    context: int = CONTEXT_BYTES,
) -> Plan:
    """Parts of a decoder process whose numbers take `number_bytes` each.

    A chunk of a prompt of up to `max_model_len` tokens reads what was computed of it before.
    `adapter_slots` adapters of ranks up to `adapter_rank` have room on the device.
    """
    d = config.decoder
    # Peak of a step of prompts' rows and one of each lane: gate, up and product rows of one layer,
    # residuals and projections; or copies of the keys and values of the prompts (`Scheduler`).
    rows, keys_read = max_prefill_tokens + max_num_seqs, max_prefill_tokens + max_model_len
    row = (3 * d.intermediate_size + 8 * d.hidden_size) * number_bytes
    # fp8 keys: their bytes, in float32 with and without the scale, and in the model's numbers.
    key = 9 + number_bytes if kv_cache_dtype == "fp8" else 2 * number_bytes
    history = keys_read * d.num_key_value_heads * d.head_dim * key
    attention = rows * 6 * d.hidden_size * number_bytes + history
    step = round(FRAGMENTATION * max(rows * row, attention))
    logits = max_num_seqs * d.vocab_size * SAMPLING_BYTES
    parts = {
        "decoder": decoder_parameters(config) * number_bytes,
        "PLoRA": plora_parameters(config) * number_bytes,
        "activations": step + logits + WORKSPACE_BYTES,
        "context": context,
    }
    if cuda_graphs:
        parts["graphs"] = round(max_num_seqs * GRAPH_ROWS * row)
    if adapter_slots:
        parts["context"] += ADAPTER_CONTEXT_BYTES
        parts["adapters"] = adapter_slots * adapter_bytes(config, adapter_rank, number_bytes)
    return Plan(
        "the decoder",
        budget,
        parts,
        kv_bytes_per_token(config, number_bytes, kv_cache_dtype),
    )


def encoder_plan(
    config: XComposerConfig,
    budget: int,
    *,
    number_bytes: int = 2,
    max_squares: int = 8,
    max_tiles: int | None = None,
    cuda_graphs: bool = True,
    context: int = CONTEXT_BYTES,
) -> Plan:
    """Parts of a vision encoder process with room for one picture of `max_tiles` tiles.

    Its three stages follow one another, so their largest counts: canvas to squares, squares through
    the tower `max_squares` at a time, patches through the merge and the projector. A process holds
    a whole picture between them, or a pass if that is larger. CUDA graphs keep activations of their
    own.
    """
    v, size = config.vision, config.decoder.hidden_size
    tiles = (max_tiles or config.family.max_tiles) if config.family.tiled else 1
    held = max(tiles + 1, max_squares)
    tokens = max(config.image_tokens(1, tiles), held * config.tokens_per_side**2)
    squares = 3 * config.tile**2 * held * number_bytes
    patches = held * v.num_positions * v.hidden_size * number_bytes
    one_pass = max_squares * v.num_positions * (2 * v.intermediate_size + 6 * v.hidden_size)
    stages = (
        3 * config.tile**2 * tiles * (1 + 4 + number_bytes) + squares,
        squares + 2 * patches + one_pass * number_bytes,
        patches + tokens * (2 * config.projector_in + 2 * size) * number_bytes,
    )
    return Plan(
        "the vision encoder",
        budget,
        {
            "tower": vision_parameters(config) * number_bytes,
            "projector": projector_parameters(config) * number_bytes,
            "activations": max(stages) * (2 if cuda_graphs else 1) + WORKSPACE_BYTES,
            "embeddings": tokens * size * number_bytes,
            "context": context,
        },
    )


def engine_limits(
    plan: Plan,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_prefill_tokens: int,
    kv_cache_tokens: int | None,
) -> EngineConfig:
    """The engine's limits within a plan.

    `kv_cache_tokens` must fit if given; else the cache takes the rest of the budget, as far as
    `max_num_seqs` requests could use it.

    Raises:
        ConfigError: the longest request, or the cache asked for, does not fit.
    """
    plan.check(max_model_len)
    if kv_cache_tokens is not None and kv_cache_tokens > plan.kv_tokens:
        raise ConfigError(
            f"kv_cache_tokens is {kv_cache_tokens:,}, the decoder's share of "
            f"{plan.budget / GB:.2f} GB holds {plan.kv_tokens:,}; lower it or raise num_gpus",
            param="kv_cache_tokens",
        )
    if kv_cache_tokens is not None and kv_cache_tokens < max_model_len:
        raise ConfigError(
            f"kv_cache_tokens is {kv_cache_tokens:,} and max_model_len is {max_model_len:,}: the "
            "longest request would be cut short; raise kv_cache_tokens or lower max_model_len",
            param="kv_cache_tokens",
        )
    return EngineConfig(
        max_model_len=max_model_len,
        # More than every lane at its longest could never be used.
        kv_cache_tokens=kv_cache_tokens or min(plan.kv_tokens, max_num_seqs * max_model_len),
        max_num_seqs=max_num_seqs,
        max_prefill_tokens=max_prefill_tokens,
    )


def adapter_bytes(config: XComposerConfig, rank: int, number_bytes: int) -> int:
    """Bytes of one adapter's slot: A and B of every linear, the rank padded as the engine does."""
    numbers = sum(a + b for a, b in config.linear_shapes.values())
    padded = -(-rank // LORA_RANK_STEP) * LORA_RANK_STEP
    return padded * numbers * config.decoder.num_hidden_layers * number_bytes


def slots_that_fit(plan: Plan, bytes_of_slot: int, *, kv_cache_tokens: int, most: int) -> int:
    """How many slots a plan without any holds beside a cache of so many tokens; up to `most`."""
    fixed = plan.fixed + ADAPTER_CONTEXT_BYTES
    spare = plan.budget - fixed - kv_cache_tokens * plan.kv_bytes_per_token
    return max(0, min(most, spare // bytes_of_slot))


def kv_bytes_per_token(
    config: XComposerConfig, number_bytes: int, kv_cache_dtype: KVCacheDtype = "auto"
) -> int:
    """Bytes of one token's keys and values in all layers; in fp8 with a float32 scale a head."""
    d = config.decoder
    if kv_cache_dtype == "fp8":
        return d.kv_numbers_per_token * (d.head_dim + 4) // d.head_dim
    return d.kv_numbers_per_token * number_bytes


def decoder_parameters(config: XComposerConfig) -> int:
    """Numbers in embeddings, layers and output, PLoRA left out."""
    d = config.decoder
    linears = sum(a * b for a, b in config.linear_shapes.values())
    bias = (config.linear_shapes["attention.wqkv"][0] + d.hidden_size) if d.bias else 0
    layer = linears + bias + 2 * d.hidden_size
    return 2 * d.vocab_size * d.hidden_size + d.num_hidden_layers * layer + d.hidden_size


def plora_parameters(config: XComposerConfig) -> int:
    """Numbers in all PLoRA pairs."""
    shapes = config.linear_shapes
    pairs = sum(config.plora[name].rank * sum(shapes[name]) for name in PLORA_LINEARS)
    return config.decoder.num_hidden_layers * pairs


def vision_parameters(config: XComposerConfig) -> int:
    """Numbers in the CLIP tower, its final norm left out."""
    v = config.vision
    c, i = v.hidden_size, v.intermediate_size
    layer = 4 * (c * c + c) + 2 * c * i + i + c + 4 * c
    return 3 * v.patch_size**2 * c + c + v.num_positions * c + 2 * c + v.num_hidden_layers * layer


def projector_parameters(config: XComposerConfig) -> int:
    """Numbers in the projector and the two separators."""
    c, into = config.decoder.hidden_size, config.projector_in
    return into * c + c + c * c + c + (2 * into if config.family.tiled else 0)


def render(plans: list[Plan], *, max_model_len: int) -> str:
    """A table of the plans, in GB (10⁹ bytes), and what the cache holds."""
    lines = []
    for plan in plans:
        lines.append(f"{plan.title}: share {plan.budget / GB:.2f} GB")
        lines += [f"  {name:<12} {size / GB:8.2f} GB" for name, size in plan.parts.items()]
        if plan.kv_bytes_per_token:
            cache = plan.kv_tokens * plan.kv_bytes_per_token
            lines.append(
                f"  {'KV cache':<12} {cache / GB:8.2f} GB  {plan.kv_tokens:,} tokens of "
                f"{plan.kv_bytes_per_token / 1024:g} KiB, "
                f"{plan.kv_tokens / max_model_len:.1f} × the longest request ({max_model_len:,})"
            )
        else:
            lines.append(f"  {'left':<12} {(plan.budget - plan.fixed) / GB:8.2f} GB")
    return "\n".join(lines)
