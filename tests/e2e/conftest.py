"""A `serve run` for test modules that ask for one; those that follow each other may share it."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest

from tests.e2e.serve_run import ServeRun, serve_run


@pytest.fixture(scope="session")
def kept() -> Iterator[tuple[ExitStack, dict[str, ServeRun]]]:
    """The server that runs, by its `ARGS`, and what ends it."""
    with ExitStack() as stack:
        yield stack, {}


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, kept: tuple[ExitStack, dict[str, ServeRun]]
) -> Iterator[ServeRun]:
    """The repository's serve_config.yaml, running; a module's `ARGS` go on top of its `args`.

    It goes on for the next module, if that has the same `ARGS`; so name them alike only where
    nothing that one module leaves behind disturbs another.
    """
    (stack, running), args = kept, args_of(request.module)
    if args not in running:
        running[args] = stack.enter_context(serve_run(getattr(request.module, "ARGS", {})))
    yield running[args]
    follower = next_module(request)
    if follower is None or args_of(follower) != args:
        running.clear()
        stack.close()


def args_of(module: Any) -> str:
    return repr(getattr(module, "ARGS", {}))


def next_module(request: pytest.FixtureRequest) -> ModuleType | None:
    """The module of the test behind this one's last, if that test asks for the `server` of here."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    last = max(i for i, item in enumerate(items) if item.module is request.module)
    if last + 1 == len(items) or "kept" not in items[last + 1].fixturenames:
        return None
    module: ModuleType = items[last + 1].module
    return module
