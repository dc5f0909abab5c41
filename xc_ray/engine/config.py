"""EngineConfig: the limits of one engine, all counted before anything loads."""

from dataclasses import dataclass

from xc_ray.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine.

    `kv_cache_tokens` is the capacity of the key/value cache in tokens over all sequences; a request
    takes prompt + max_tokens of it from admission to its end. `max_prefill_tokens` bounds the
    prompt tokens of one step, and with them the activations (chunked prefill, 2308.16369).
    """

    max_model_len: int
    kv_cache_tokens: int
    max_num_seqs: int = 32
    max_prefill_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_model_len", "kv_cache_tokens", "max_num_seqs", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, the least is 1", param=name)
        if self.kv_cache_tokens < self.max_model_len:
            raise ConfigError(
                f"the key/value cache holds {self.kv_cache_tokens:,} tokens and max_model_len is "
                f"{self.max_model_len:,}: the longest request would never start; "
                "give the decoder more memory or lower max_model_len",
                param="max_model_len",
            )
