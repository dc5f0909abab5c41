"""The engine that fits a decoder's share: its limits before anything loads, then a try."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from xc_ray.config import MAX_AUTO_SLOTS, ServeConfig
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.errors import ConfigError
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.plan import (
    CPU_CACHE_REQUESTS,
    adapter_bytes,
    decoder_plan,
    engine_limits,
    slots_that_fit,
)
from xc_ray.serve.device import Device

logger = logging.getLogger("ray.serve")

# A cache that leaves no room for a step is made smaller; so many sizes are tried.
SHRINK, MAX_TRIES = 0.98, 4


def engine_config(config: ServeConfig, model: XComposerConfig, device: Device) -> EngineConfig:
    """The engine's limits: what the share holds on a GPU, a few of the longest requests on CPU.

    Raises:
        ConfigError: the longest request does not fit the cache, or the adapters asked for do not.
    """
    length = config.max_model_len or model.decoder.max_length
    wanted = config.decoder
    if device.on_gpu:
        limits = _limits_of_share(config, model, device, length)
    else:
        tokens = wanted.kv_cache_tokens or CPU_CACHE_REQUESTS * length
        limits = EngineConfig(
            length,
            tokens,
            wanted.max_num_seqs,
            wanted.max_prefill_tokens,
            max_loras=MAX_AUTO_SLOTS if config.adapters.slots == "auto" else config.adapters.slots,
        )
    if limits.max_sequence_tokens < length:
        raise ConfigError(
            f"the key/value cache holds {limits.kv_cache_tokens:,} tokens and max_model_len is "
            f"{length:,}: the longest request would be cut short; "
            "raise kv_cache_tokens or lower max_model_len",
            param="max_model_len",
        )
    return replace(
        limits,
        kv_cache_dtype=wanted.kv_cache_dtype,
        prefix_cache=wanted.prefix_cache,
        cuda_graphs=wanted.cuda_graphs,
        max_lora_rank=config.adapters.max_rank,
    )


def fitting_engine(
    decoder: Decoder,
    limits: EngineConfig,
    *,
    given: int | None = None,
    make: Callable[[Decoder, EngineConfig], Engine] = Engine,
) -> Engine:
    """An engine whose first steps have run within the share, with less cache if need be.

    What a step takes is an estimate until it has run (`Runner.warm_up`). A cache of `given` tokens
    is left as it is.

    Raises:
        ConfigError: a step does not fit.
    """
    if decoder.device.type == "cuda":
        _tidy(decoder)
    most = limits.kv_cache_tokens
    sizes = [round(most * SHRINK**i) for i in range(1 if given else MAX_TRIES)]
    for tokens in sizes:
        if tokens < limits.max_model_len:
            break
        limits = replace(limits, kv_cache_tokens=tokens)
        try:
            return make(decoder, limits)
        except torch.OutOfMemoryError as e:
            message = str(e)
        # What was allocated hangs on the error's frames, and a log handler may keep what it is
        # given: it gets no error.
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning("a step does not fit beside %d tokens of cache: %s", tokens, message)
    raise ConfigError(
        f"a step of max_prefill_tokens ({limits.max_prefill_tokens:,}) does not fit into the "
        f"decoder's share beside {limits.kv_cache_tokens:,} tokens of cache; raise num_gpus, or "
        "lower kv_cache_tokens, max_model_len or max_prefill_tokens",
        param="kv_cache_tokens",
    )


def _tidy(decoder: Decoder) -> None:
    """Gives back what loading left, and lets the allocator's segments grow and shrink from now on.

    Segments of fixed size leave gaps that no step of another length fits, and a cache that takes
    what the others leave has no room for gaps. Weights come before: pages of growing segments are
    20 MB, and the holes between weights would keep theirs.
    """
    from xc_ray.engine.kernels.fused import join_gates

    join_gates(decoder)
    torch.cuda.empty_cache()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _limits_of_share(
    config: ServeConfig, model: XComposerConfig, device: Device, length: int
) -> EngineConfig:
    wanted, rank = config.decoder, config.adapters.max_rank
    plan_with = partial(
        decoder_plan,
        model,
        device.budget,
        number_bytes=device.dtype.itemsize,
        max_num_seqs=wanted.max_num_seqs,
        max_prefill_tokens=wanted.max_prefill_tokens,
        max_model_len=length,
        kv_cache_dtype=wanted.kv_cache_dtype,
        cuda_graphs=wanted.cuda_graphs,
        adapter_rank=rank,
    )
    slots = config.adapters.slots
    if slots == "auto":
        slots = slots_that_fit(
            plan_with(),
            adapter_bytes(model, rank, device.dtype.itemsize),
            kv_cache_tokens=max(length, wanted.kv_cache_tokens or 0),
            most=MAX_AUTO_SLOTS,
        )
        if not slots:
            logger.warning("the decoder's share has no room for adapters: only the base is served")
    plan = plan_with(adapter_slots=slots)
    limits = engine_limits(
        plan,
        max_model_len=length,
        max_num_seqs=wanted.max_num_seqs,
        max_prefill_tokens=wanted.max_prefill_tokens,
        kv_cache_tokens=wanted.kv_cache_tokens,
    )
    device.enforce(plan.parts["context"])
    return replace(limits, max_loras=slots)
