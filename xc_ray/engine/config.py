"""EngineConfig: the limits of one engine, all counted before anything loads."""

from dataclasses import dataclass
from typing import Literal

from xc_ray.errors import ConfigError

KVCacheDtype = Literal["auto", "fp8"]
MAX_LORA_RANK = 64
# Ranks are padded to this on the device: tensor cores multiply no fewer rows.
LORA_RANK_STEP = 16


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine.

    `kv_cache_tokens` is the capacity of the key/value cache in tokens over all sequences, in blocks
    of `block_size` (paging, 2309.06180). `max_prefill_tokens` bounds the prompt tokens of one step,
    and with them the activations (chunked prefill, 2308.16369). `kv_cache_dtype` is the model's own
    (`auto`) or e4m3 with a scale a token and head (`fp8`). `prefix_cache` shares blocks between
    requests that begin alike. `cuda_graphs` and `overlap` (a step is launched before the tokens of
    the one before it are read) change speed alone; the first has no effect on CPU. `max_loras`
    adapters of ranks up to `max_lora_rank` are on the device at once; more wait for their turn.
    """

    max_model_len: int
    kv_cache_tokens: int
    max_num_seqs: int = 32
    max_prefill_tokens: int = 4096
    block_size: int = 64
    kv_cache_dtype: KVCacheDtype = "auto"
    prefix_cache: bool = True
    cuda_graphs: bool = True
    overlap: bool = True
    max_loras: int = 0
    max_lora_rank: int = 64

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "kv_cache_tokens",
            "max_num_seqs",
            "max_prefill_tokens",
            "block_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, the least is 1", param=name)
        if self.max_loras < 0:
            raise ConfigError(f"max_loras is {self.max_loras}, the least is 0", param="max_loras")
        if not 1 <= self.max_lora_rank <= MAX_LORA_RANK:
            raise ConfigError(
                f"max_lora_rank is {self.max_lora_rank}, expected 1 to {MAX_LORA_RANK}",
                param="max_lora_rank",
            )
        if self.kv_cache_dtype not in ("auto", "fp8"):
            raise ConfigError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}, expected auto or fp8",
                param="kv_cache_dtype",
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache: `kv_cache_tokens` in whole blocks, rounded up."""
        return -(-self.kv_cache_tokens // self.block_size)

    @property
    def padded_lora_rank(self) -> int:
        """The largest rank as a slot holds it."""
        return -(-self.max_lora_rank // LORA_RANK_STEP) * LORA_RANK_STEP

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence that the model and the cache can hold."""
        return min(-(-self.max_model_len // self.block_size), self.num_blocks)

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens that a sequence can reach: the model's limit, or all of the cache."""
        return min(self.max_model_len, self.num_blocks * self.block_size)
