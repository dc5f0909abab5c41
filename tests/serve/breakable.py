"""A decoder whose engine can be broken for good by a request, as a faulty device would do it."""

from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve import Application

from xc_ray.config import ServeConfig
from xc_ray.model.layout import read_layout
from xc_ray.prompt.tokenizer import load_tokenizer
from xc_ray.serve.decoder import Decoder
from xc_ray.serve.encoder import VisionEncoder
from xc_ray.serve.ingress import Ingress
from xc_ray.serve.messages import GenerateRequest, Notice, Tokens
from xc_ray.serve.prefixes import Route

BREAKING_SEED = 666


class BreakableDecoder(Decoder):
    async def generate(
        self, request: GenerateRequest, route: Route | None = None
    ) -> AsyncIterator[list[Tokens] | Notice]:
        if request.sampling.seed == BREAKING_SEED:
            self._driver._engine.step = _fail  # type: ignore[method-assign]
        async for tokens in super().generate(request):
            yield tokens


def _fail() -> Any:
    raise RuntimeError("CUDA error at 0x7f00")


def application(config: ServeConfig) -> Application:
    """The three deployments as `xc_ray.serve.app` binds them; Serve asks for health each second."""
    config = config.resolve(0)
    layout = read_layout(config.model)
    tokenizer = load_tokenizer(layout.folder, layout.config.decoder.vocab_size)
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0.25},
        "max_ongoing_requests": 64,
        "health_check_period_s": 1,
        "graceful_shutdown_timeout_s": 1,
    }
    make = serve.deployment(**options)
    decoder = make(BreakableDecoder).bind(config, make(VisionEncoder).bind(config))
    ingress = make(serve.ingress()(Ingress))
    return ingress.bind(config, layout.config, tokenizer, decoder)
