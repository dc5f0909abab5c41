"""Which base is served, and whether an adapter is one of its."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor

from xc_ray.errors import NotFound, RegistryError, XcRayError
from xc_ray.registry.manifest import Manifest
from xc_ray.serve.background import Background

logger = logging.getLogger("ray.serve")


class ServedBase:
    """`name` in requests, and the digest that `tell` finds in a thread: it may read every file."""

    def __init__(self, name: str, tell: Callable[[], str], threads: Executor) -> None:
        self.name = name
        self._background = Background()
        self._told = self._background.start(self._tell(tell, threads))

    @property
    def digest(self) -> str | None:
        """None until it is known, and if it cannot be."""
        return self._told.result() if self._told.done() and not self.failed else None

    @property
    def failed(self) -> bool:
        """Whether it cannot be told."""
        told = self._told
        return told.done() and (told.cancelled() or told.exception() is not None)

    async def known(self) -> None:
        """Returns once the digest is known.

        Raises:
            RegistryError: it cannot be told.
        """
        try:
            await asyncio.shield(self._told)
        except XcRayError:
            raise RegistryError(
                "adapters are not available: which base is served could not be told; the server's "
                "log says why",
                param="model",
            ) from None

    def owns(self, manifest: Manifest) -> bool:
        """Whether it is an adapter of this base."""
        return manifest.base is not None and manifest.base.digest == self.digest

    def check(self, manifest: Manifest) -> None:
        """Refuses what is no adapter of this base.

        Raises:
            NotFound: says which base it belongs to, and which is served.
        """
        name = f"{manifest.name}@{manifest.version}"
        if manifest.base is None:
            problem = f"{name!r} is a base, not an adapter"
        elif not self.owns(manifest):
            problem = (
                f"adapter {name!r} belongs to the base {manifest.base.name!r} "
                f"({_short(manifest.base.digest)}), and served is {self.name!r} "
                f"({_short(self.digest or '')})"
            )
        else:
            return
        raise NotFound(problem, param="model", code="model_not_found")

    async def _tell(self, tell: Callable[[], str], threads: Executor) -> str:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, tell)
        except Exception as e:
            logger.error("adapters stay unavailable, which base is served cannot be told: %s", e)
            raise RegistryError("which base is served cannot be told") from e


def _short(digest: str) -> str:
    return f"{digest[:19]}…"
