"""build(config) -> Application: the only .bind() calls. `import_path: xc_ray.serve.app:build`."""

import ray
from ray import serve
from ray.serve import Application

from xc_ray.config import ServeConfig
from xc_ray.hub import resolve_model
from xc_ray.model.layout import check_layout, read_layout
from xc_ray.prompt.tokenizer import load_tokenizer
from xc_ray.serve.decoder import Decoder
from xc_ray.serve.encoder import VisionEncoder
from xc_ray.serve.ingress import Ingress


def build(config: ServeConfig) -> Application:
    """The three deployments of DESIGN: ingress -> decoder -> vision encoder.

    Shares that say `auto` are resolved here, by whether the cluster has a GPU. Serve validates the
    file's `args` against the annotation.

    Raises:
        CheckpointError, ConfigError: the model or the configuration cannot work; the old app stays
        up.
    """
    config = config.resolve(ray.cluster_resources().get("GPU", 0))
    layout = read_layout(resolve_model(config.model))
    check_layout(layout)
    model = layout.config
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
