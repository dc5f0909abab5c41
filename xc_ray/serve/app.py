"""build(config) -> Application: the only .bind() calls. `import_path: xc_ray.serve.app:build`."""

from pathlib import Path

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from xc_ray.config import DecoderOptions, EncoderOptions, IngressOptions, ServeConfig
from xc_ray.errors import CheckpointError, ConfigError, RegistryError
from xc_ray.hub import find_base, in_registry, local_cache, open_store, resolve_model
from xc_ray.keys import KeyFile
from xc_ray.model.config import XComposerConfig
from xc_ray.model.layout import check_layout, read_layout
from xc_ray.prompt.tokenizer import Tokenizer, load_tokenizer
from xc_ray.publish import base_config
from xc_ray.serve.decoder import Decoder
from xc_ray.serve.device import Device
from xc_ray.serve.encoder import VisionEncoder
from xc_ray.serve.fit import engine_config
from xc_ray.serve.ingress import Ingress
from xc_ray.serve.router import router_config


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
    except (CheckpointError, ConfigError, RegistryError) as e:
        raise RayServeException(e.message) from e


def _build(config: ServeConfig) -> Application:
    open_store(config.registry)  # a setting that is none is refused here
    if config.keys:
        KeyFile.read(Path(config.keys))  # and a key file
    config, model, tokenizer = _pinned(config)
    if not config.decoder.num_gpus:
        engine_config(config, model, Device("cpu", torch.float32))  # refuse before a replica does
    encoder = _deployment(VisionEncoder, config.encoder, 64)
    # Requests wait in the decoder, which knows whose turn it is and how long that takes: Serve's
    # own bound is beyond what the decoder lets wait.
    most = config.decoder.max_num_seqs * 2 + config.limits.max_waiting * 4
    decoder = _deployment(Decoder, config.decoder, most).options(
        request_router_config=_router_config(config, model)
    )
    ingress = _deployment(serve.ingress()(Ingress), config.ingress, most)
    return ingress.bind(config, model, tokenizer, decoder.bind(config, encoder.bind(config)))


def _router_config(config: ServeConfig, model: XComposerConfig) -> RequestRouterConfig:
    """A decoder with less to do than the longest request is never too busy for one more."""
    longest = config.max_model_len or model.decoder.max_length
    return router_config(load_factor=config.decoder.load_factor, free_tokens=longest)


def _pinned(config: ServeConfig) -> tuple[ServeConfig, XComposerConfig, Tokenizer]:
    """The configuration with a model that means the same to every replica, and what it is.

    A base of the registry was checked whole when it was imported: of it only the small files come
    to this machine.
    """
    if not in_registry(config.model):
        layout = read_layout(resolve_model(config.model))
        check_layout(layout)
        vocabulary = layout.config.decoder.vocab_size
        return config, layout.config, load_tokenizer(layout.folder, vocabulary)
    base = find_base(config.model, config.registry)
    model = base_config(base.manifest)
    small = tuple(f for f in base.manifest.files if not f.path.endswith(".safetensors"))
    with local_cache().fetch(base.store, base.manifest.model_copy(update={"files": small})) as kept:
        tokenizer = load_tokenizer(kept.folder, model.decoder.vocab_size)
    pinned = config.model_copy(
        update={"model": base.pinned, "served_model_name": config.public_name}
    )
    return pinned, model, tokenizer


def _deployment(
    kind: type, part: DecoderOptions | EncoderOptions | IngressOptions, max_ongoing: int
) -> serve.Deployment:
    asked = part.model_dump(include={"num_cpus", "num_gpus", "resources"})
    make = serve.deployment(
        max_ongoing_requests=max_ongoing, ray_actor_options={"num_gpus": 0.0} | asked
    )
    return make(kind)
