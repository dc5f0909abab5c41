"""build(config) -> Application: the only .bind() calls. `import_path: xc_ray.serve.app:build`."""

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from xc_ray.config import ServeConfig
from xc_ray.errors import CheckpointError, ConfigError
from xc_ray.hub import resolve_model
from xc_ray.model.layout import check_layout, read_layout
from xc_ray.prompt.tokenizer import load_tokenizer
from xc_ray.serve.decoder import Decoder, engine_config
from xc_ray.serve.device import Device
from xc_ray.serve.encoder import VisionEncoder
from xc_ray.serve.ingress import Ingress


def build(config: ServeConfig) -> Application:
    """The three deployments of DESIGN: ingress -> decoder -> vision encoder.

    Shares that say `auto` are resolved here, by whether the cluster has a GPU. Serve validates the
    file's `args` against the annotation.

    Raises:
        RayServeException: the model or the configuration cannot work, in one line; of all errors
            Serve does not try this one again. An application that runs already stays up.
    """
    try:
        return _build(config.resolve(ray.cluster_resources().get("GPU", 0)))
    except (CheckpointError, ConfigError) as e:
        raise RayServeException(e.message) from e


def _build(config: ServeConfig) -> Application:
    layout = read_layout(resolve_model(config.model))
    check_layout(layout)
    model = layout.config
    if not config.decoder.num_gpus:
        engine_config(config, model, Device("cpu", torch.float32))  # refuse before a replica does
    tokenizer = load_tokenizer(layout.folder, model.decoder.vocab_size)
    encoder = _deployment(VisionEncoder, config.encoder.num_cpus, config.encoder.num_gpus, 64)
    decoder = _deployment(Decoder, config.decoder.num_cpus, config.decoder.num_gpus, 256)
    ingress = _deployment(serve.ingress()(Ingress), config.ingress.num_cpus, 0, 512)
    return ingress.bind(config, model, tokenizer, decoder.bind(config, encoder.bind(config)))


def _deployment(
    kind: type, num_cpus: float, num_gpus: float | str, max_ongoing: int
) -> serve.Deployment:
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    make = serve.deployment(max_ongoing_requests=max_ongoing, ray_actor_options=options)
    return make(kind)
