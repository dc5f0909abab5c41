"""Encoder and decoder by their shares of a GPU alone, for a cluster that only says it has GPUs."""

from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle


def where() -> list[int]:
    """The GPUs of this replica."""
    return [int(i) for i in ray.get_gpu_ids()]


class Encoder:
    async def gpus(self) -> list[int]:
        return where()


class Decoder:
    def __init__(self, encoder: DeploymentHandle[Any]) -> None:
        self._encoder = encoder

    async def gpus(self) -> list[int]:
        return where()


class Ingress:
    """Tells of all replicas where they are."""

    def __init__(self, decoder: DeploymentHandle[Any], encoder: DeploymentHandle[Any]) -> None:
        self._parts = {"decoder": decoder, "encoder": encoder}

    async def __call__(self, _: Any) -> dict[str, list[list[int]]]:
        return {
            name: await handle.broadcast("gpus").results_async(timeout_s=10)
            for name, handle in self._parts.items()
        }


def build(args: dict[str, Any]) -> Any:
    """The shares of `auto`, `num` of each."""

    def part(cls: type, num_gpus: float, num: int) -> Any:
        options = {"num_cpus": 0.1, "num_gpus": num_gpus}
        return serve.deployment(ray_actor_options=options, num_replicas=num)(cls)

    num = int(args["num"])
    encoder = part(Encoder, 0.15, num).bind()
    decoder = part(Decoder, 0.85, num).bind(encoder)
    return part(Ingress, 0, 1).bind(decoder, encoder)
