"""Greedy answers while training, against the engine that serves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import VARIANTS
from xc_ray.config import LoraOptions
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import Image, SamplingParams
from xc_ray.model.config import Variant
from xc_ray.model.ops import PLAIN
from xc_ray.model.weights import Checkpoint
from xc_ray.train.generate import greedy_answer
from xc_ray.train.network import LoraOps, add_lora


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_answers_as_the_engine_does(variant: Variant, tiny: Callable[..., Path]) -> None:
    whole = Checkpoint.open(tiny(variant)).load(dtype=torch.float64)
    vocab, width = whole.config.decoder.vocab_size, whole.config.decoder.hidden_size
    prompt = [1, *range(20, 40), *range(vocab, vocab + 16), 50, 51]
    rows = torch.randn(16, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answer = greedy_answer(whole.decoder, PLAIN, prompt, rows, max_tokens=24, stop_ids=frozenset())
    assert len(answer) == 24
    engine = Engine(whole.decoder, EngineConfig(256, kv_cache_tokens=256, max_num_seqs=1))
    engine.add(
        "one", prompt, SamplingParams(max_tokens=24, temperature=0.0), [Image(16, b"", rows)]
    )
    served = []
    while engine.has_work:
        served += [token for output in engine.step() for token in output.ids]
    assert answer == served


def test_it_ends_before_the_id_that_ends_it(tiny: Callable[..., Path]) -> None:
    whole = Checkpoint.open(tiny("2.5")).load(dtype=torch.float64)
    add_lora(whole.decoder, LoraOptions(rank=2), seed=0)
    ask = {"max_tokens": 8}
    free = greedy_answer(whole.decoder, LoraOps(), [1, 30, 31], None, stop_ids=frozenset(), **ask)
    for token in set(free):
        cut = greedy_answer(
            whole.decoder, LoraOps(), [1, 30, 31], None, stop_ids=frozenset({token}), **ask
        )
        assert cut == free[: free.index(token)]
