"""What a user has without the engine: transformers' `generate()` on `xc_ray.model.hf`.

Static batches of random ids over the benchmark's own weights, greedy, with a dynamic cache. No
prefix is kept between calls and no request joins a batch that runs.
"""

import time
from typing import Any

import torch
from shapes import Bench, random_ids, release, sync

from xc_ray.model.decoder import Decoder
from xc_ray.model.xcomposer import ImageEncoder, XComposer

CASE = "transformers generate()"


def transformers_model(bench: Bench, decoder: Decoder) -> Any:
    """The same decoder behind transformers' interface; the tower beside it is never run."""
    from xc_ray.model import hf  # registers itself with transformers, slowly

    release(bench.device)
    with torch.device("meta"):
        network = XComposer(bench.config)
    network.decoder = decoder
    network.vision = bench.module(ImageEncoder)
    config = hf.XComposerHfConfig.from_dict(bench.config.to_dict())
    with torch.device("meta"):
        model = hf.XComposerForCausalLM(config, network)
    model.eval()
    # No stop ids: every answer has its full length.
    model.generation_config.eos_token_id = None
    return model


def prefill_and_step(
    bench: Bench, model: Any, batch: int, prompt_tokens: int, new: int
) -> tuple[float, float]:
    """Seconds to the first token of a batch, and of each of `new` − 1 further steps."""
    ids = torch.tensor([random_ids(bench.config, prompt_tokens, i) for i in range(batch)])
    ids = ids.to(bench.device)

    def seconds(count: int) -> float:
        sync(bench.device)
        started = time.perf_counter()
        out = model.generate(ids, max_new_tokens=count, do_sample=False)
        sync(bench.device)
        assert out.shape == (batch, prompt_tokens + count), out.shape
        return time.perf_counter() - started

    seconds(2)
    prefill = min(seconds(1), seconds(1))
    if new == 1:
        return prefill, 0.0
    return prefill, (seconds(new) - prefill) / (new - 1)
