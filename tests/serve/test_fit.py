"""The engine that fits a share: counted limits, and a cache that leaves room for a step."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from xc_ray.config import AdapterOptions, DecoderOptions, ServeConfig
from xc_ray.engine.config import EngineConfig
from xc_ray.errors import ConfigError
from xc_ray.model.config import XComposerConfig
from xc_ray.model.decoder import Decoder
from xc_ray.model.weights import Checkpoint
from xc_ray.plan import ADAPTER_CONTEXT_BYTES, adapter_bytes, decoder_plan
from xc_ray.serve.device import Device
from xc_ray.serve.fit import engine_config, fitting_engine

Tiny = Callable[..., Path]
ON_CPU = cast("Decoder", SimpleNamespace(device=torch.device("cpu")))


class TestLimits:
    CPU = Device("cpu", torch.float32)

    @pytest.fixture
    def model(self, tiny: Tiny) -> XComposerConfig:
        return Checkpoint.open(tiny()).config

    @pytest.fixture(autouse=True)
    def no_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Device, "enforce", lambda self, outside: None)

    def test_on_cpu_the_cache_holds_four_of_the_longest(self, model: XComposerConfig) -> None:
        assert engine_config(ServeConfig(), model, self.CPU) == EngineConfig(
            16_384, 65_536, 32, 4096, max_loras=8
        )

    def test_what_the_file_says_counts(self, model: XComposerConfig) -> None:
        options = DecoderOptions(
            max_num_seqs=2,
            max_prefill_tokens=64,
            kv_cache_tokens=999,
            kv_cache_dtype="fp8",
            prefix_cache=False,
            cuda_graphs=False,
        )
        adapters = AdapterOptions(slots=3, max_rank=16)
        config = ServeConfig(max_model_len=500, decoder=options, adapters=adapters)
        expected = EngineConfig(
            500,
            999,
            2,
            64,
            kv_cache_dtype="fp8",
            prefix_cache=False,
            cuda_graphs=False,
            max_loras=3,
            max_lora_rank=16,
        )
        assert engine_config(config, model, self.CPU) == expected
        card = Device("cuda", torch.bfloat16, 2_000_000_000)
        assert engine_config(config, model, card) == expected

    def test_a_cache_smaller_than_a_request_is_refused(self, model: XComposerConfig) -> None:
        config = ServeConfig(decoder=DecoderOptions(kv_cache_tokens=1000))
        with pytest.raises(ConfigError, match=r"holds 1,000 tokens and max_model_len is 16,384"):
            engine_config(config, model, self.CPU)

    def test_on_a_gpu_the_cache_is_the_rest_of_the_share(self, model: XComposerConfig) -> None:
        device = Device("cuda", torch.bfloat16, 2_000_000_000)
        plan = decoder_plan(
            model, device.budget, max_num_seqs=4096, max_model_len=16_384, adapter_slots=8
        )
        config = ServeConfig(decoder=DecoderOptions(max_num_seqs=4096))
        assert plan.kv_tokens > 16_384
        assert engine_config(config, model, device).kv_cache_tokens == plan.kv_tokens

    @pytest.mark.parametrize("room_for", [0, 1, 2.9, 20])
    def test_slots_are_what_is_left_beside_the_longest_request(
        self, model: XComposerConfig, room_for: float
    ) -> None:
        bare = decoder_plan(model, 0, max_model_len=16_384)
        slot = adapter_bytes(model, 64, 2)
        fixed = bare.fixed + (ADAPTER_CONTEXT_BYTES if room_for else 0)
        budget = fixed + 16_384 * bare.kv_bytes_per_token + int(room_for * slot)
        limits = engine_config(ServeConfig(), model, Device("cuda", torch.bfloat16, budget))
        assert limits.max_loras == min(8, int(room_for))
        assert limits.kv_cache_tokens >= 16_384

    def test_more_slots_than_the_share_holds_are_refused(self, model: XComposerConfig) -> None:
        bare = decoder_plan(model, 0, max_model_len=16_384)
        fixed = bare.fixed + ADAPTER_CONTEXT_BYTES
        budget = fixed + 16_384 * bare.kv_bytes_per_token + adapter_bytes(model, 64, 2)
        config = ServeConfig(adapters=AdapterOptions(slots=2))
        with pytest.raises(ConfigError, match=r"adapters 0\.00.*its share is"):
            engine_config(config, model, Device("cuda", torch.bfloat16, budget))

    def test_a_cache_that_leaves_no_room_for_a_step_is_made_smaller(self) -> None:
        """Only a device runs out of memory: the engine is one that asks for less than so much."""
        tried: list[int] = []

        def make(_: Any, limits: EngineConfig) -> Any:
            tried.append(limits.kv_cache_tokens)
            if limits.kv_cache_tokens > 97_000:
                raise torch.OutOfMemoryError("out of memory")
            return limits

        limits, model = EngineConfig(1000, 100_000), ON_CPU
        found = cast("Any", fitting_engine(model, limits, make=make))
        assert found == replace(limits, kv_cache_tokens=96_040)
        assert tried == [100_000, 98_000, 96_040]
        with pytest.raises(ConfigError, match=r"beside 188,238 tokens of cache"):
            fitting_engine(model, EngineConfig(1000, 200_000), make=make)
        assert tried[3:] == [200_000, 196_000, 192_080, 188_238]
        with pytest.raises(
            ConfigError, match=r"max_prefill_tokens \(4,096\) does not fit .*100,000"
        ):
            fitting_engine(model, limits, given=100_000, make=make)
        with pytest.raises(ConfigError, match=r"beside 100,000 tokens of cache; raise num_gpus"):
            fitting_engine(model, EngineConfig(99_000, 100_000), make=make)

    def test_what_did_not_fit_is_gone_before_the_next_try(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also where a log handler keeps its records, as Serve's does in throughput mode."""
        left: list[weakref.ref[Any]] = []

        def make(_: Any, limits: EngineConfig) -> Any:
            assert [it() for it in left] == [None] * len(left)
            cache = torch.empty(1)
            left.append(weakref.ref(cache))
            if len(left) < 3:
                raise torch.OutOfMemoryError("out of memory")
            return cache

        fitting_engine(ON_CPU, EngineConfig(1000, 100_000), make=make)
        assert len(caplog.records) == 2
        assert "98000 tokens of cache: out of memory" in caplog.text

    def test_a_share_without_room_is_refused(self, model: XComposerConfig) -> None:
        device = Device("cuda", torch.bfloat16, 500_000_000)
        with pytest.raises(ConfigError, match=r"its share is 0\.50 GB; raise its num_gpus"):
            engine_config(ServeConfig(), model, device)
