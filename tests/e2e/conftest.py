"""One `serve run` for each test module that asks for one."""

from collections.abc import Iterator

import pytest

from tests.e2e.serve_run import ServeRun, serve_run


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[ServeRun]:
    """The repository's serve_config.yaml, running; a module's `ARGS` go on top of its `args`."""
    with serve_run(getattr(request.module, "ARGS", {})) as running:
        yield running
