"""HAProxy and throughput mode: answers, clients that leave and replicas that die, as without.

The tests are those of `test_serve_run`, which has Serve's Python proxy, the default.
"""

from collections.abc import Iterator

import pytest

from tests.e2e.serve_run import ServeRun, haproxy, serve_run
from tests.e2e.test_serve_run import (  # noqa: F401 - collected here
    ARGS,
    TestClientsThatLeave,
    TestLargePictures,
    TestManyAtOnce,
    TestReplicasThatDie,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeRun]:
    with serve_run(ARGS, **haproxy(tmp_path_factory.mktemp("proxy"))) as running:
        yield running
