"""A decoder fills its share of a GPU with cache, and no step runs out of memory beside it.

Layers have the sizes of the 7B model, so that steps take what its steps take; two of them serve.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch

from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import Image, SamplingParams
from xc_ray.model.config import preset
from xc_ray.model.decoder import Decoder
from xc_ray.plan import decoder_plan, engine_limits
from xc_ray.serve.device import Device
from xc_ray.serve.fit import fitting_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LENGTH, CACHE, LANES, CHUNK = 24_576, 120_000, 128, 2048
CONFIG = replace(preset("2.5"), decoder=replace(preset("2.5").decoder, num_hidden_layers=2))
VOCAB = CONFIG.decoder.vocab_size
PICTURE = 2000  # rows


@pytest.fixture
def engine() -> Iterator[Engine]:
    plan = decoder_plan(
        CONFIG, 0, max_num_seqs=LANES, max_prefill_tokens=CHUNK, max_model_len=LENGTH
    )
    plan = replace(plan, budget=plan.fixed + CACHE * plan.kv_bytes_per_token)
    limits = engine_limits(
        plan,
        max_model_len=LENGTH,
        max_num_seqs=LANES,
        max_prefill_tokens=CHUNK,
        kv_cache_tokens=None,
    )
    assert limits.kv_cache_tokens == CACHE
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    device = Device("cuda", torch.bfloat16, plan.budget + before)
    device.enforce(plan.parts["context"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            decoder = Decoder(CONFIG)
        torch.set_default_dtype(torch.float32)
        yield fitting_engine(decoder, limits)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_steps_of_every_length_fit_beside_a_cache_that_fills_the_share(engine: Engine) -> None:
    """Pictures and text, alone and behind long beginnings that many share, sampled in all ways."""
    assert engine.config.kv_cache_tokens >= 0.98 * CACHE
    random = Random(1)
    rows = torch.randn(PICTURE, CONFIG.decoder.hidden_size, dtype=torch.bfloat16)
    shared = [random.randrange(3, VOCAB) for _ in range(9000)]
    left = list(range(400))
    failed: list[str] = []
    while left or engine.has_work:
        for number in left[: random.randrange(12)]:
            text = [random.randrange(3, VOCAB) for _ in range(int(random.lognormvariate(6, 1)))]
            ids, images = text[:4000], []
            if number % 3 == 0:
                count = random.choice((1, 1, 4))
                images = [Image(PICTURE, bytes([number % 256, i]), rows) for i in range(count)]
                ids = [*range(VOCAB, VOCAB + count * PICTURE), *ids]
            elif number % 3 == 1:
                ids = shared + ids
            odd = number % 5 == 0
            params = SamplingParams(
                max_tokens=random.randrange(1, 200),
                temperature=random.choice((0.0, 1.0)),
                top_p=0.8,
                repetition_penalty=1.05,
                logprobs=20 if odd else None,
                logit_bias=((7, 1.0),) if odd else (),
            )
            engine.add(str(number), ids, params, images)
            left.remove(number)
        failed += [output.error for output in engine.step() if output.error]
    assert failed == []
    assert engine.failure is None
