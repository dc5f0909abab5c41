"""What happens in the registry at a run's end, checked at its beginning."""

import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xc_ray.config import PublishOptions, TrainConfig
from xc_ray.errors import ConfigError, NotFound
from xc_ray.publish import import_checkpoint, owner_of, push_adapter
from xc_ray.registry.manifest import Lineage, Manifest
from xc_ray.registry.reference import check_alias, check_name
from xc_ray.registry.registry import Registry

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Publisher:
    """What happens in the registry at the end, checked at the beginning."""

    def __init__(self, options: PublishOptions, registry: Registry, owner: Manifest) -> None:
        self.options, self.registry, self.owner = options, registry, owner

    @classmethod
    def open(
        cls, config: TrainConfig, folder: Path, progress: Progress | None = None
    ) -> "Publisher":
        """Checks names and that the registry takes an adapter of the base in `folder`.

        Raises:
            ConfigError: the base is not in the registry.
            InvalidRequest: a name or an alias is none.
            RegistryError: the store cannot be reached, or refuses.
        """
        options = config.publish
        assert options is not None
        assert config.registry is not None
        check_name(options.adapter)
        if options.promote is not None:
            check_alias(options.promote.alias)
        registry = Registry.open(config.registry)
        registry.store.prove_put_if_absent()
        try:
            owner = owner_of(registry, config.model)
        except NotFound:
            if not options.import_base:
                raise ConfigError(
                    f"the base {config.model!r} is not in the registry {config.registry}, where "
                    f"the adapter is to go; import it: xc-ray registry import {config.model} "
                    "--name NAME, or set publish.import_base",
                    param="publish",
                ) from None
            name = config.model.rstrip("/").rsplit("/", 1)[-1].split("@", 1)[0]
            owner = import_checkpoint(folder, registry, check_name(name), progress=progress)
        for version in registry.versions(options.adapter)[-1:]:
            if registry.manifest(options.adapter, version).kind != "adapter":
                raise ConfigError(
                    f"{options.adapter!r} is a base in the registry; give publish.adapter another "
                    "name",
                    param="publish.adapter",
                )
        return cls(options, registry, owner)

    def publish(
        self,
        folder: Path,
        *,
        metrics: Mapping[str, float],
        dataset_digest: str,
        config: Mapping[str, Any],
    ) -> tuple[str, bool | None]:
        """Pushes the adapter, and moves the alias if it is good enough.

        Gives NAME@VERSION, and whether the alias was moved; None if that was not asked for.
        """
        pushed = push_adapter(
            folder,
            self.registry,
            self.options.adapter,
            f"{self.owner.name}@{self.owner.version}",
            lineage=Lineage(
                dataset_digest=dataset_digest,
                code_version=code_version(),
                training_config=dict(config),
                metrics=dict(metrics),
            ),
        )
        reference = f"{pushed.name}@{pushed.version}"
        logger.info("pushed %s to %s", reference, self.registry.store.url)
        promote = self.options.promote
        if promote is None:
            return reference, None
        value = metrics.get(promote.metric)
        promoted = value is not None and value < promote.below
        if promoted:
            self.registry.promote(pushed.name, [(pushed.version, 1.0)], promote.alias)
        logger.info(
            "%s@%s %s: %s is %s, the threshold %g",
            pushed.name,
            promote.alias,
            f"is {reference} now" if promoted else "stays where it is",
            promote.metric,
            value,
            promote.below,
        )
        return reference, promoted


def code_version() -> str:
    """This package's version; a checkout on PYTHONPATH has none."""
    try:
        return importlib.metadata.version("xc_ray")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
