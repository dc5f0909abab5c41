"""Fresh stores of each kind; the S3 server is in tests/conftest.py."""

from pathlib import Path

import pytest

from tests.s3_server import S3Server
from xc_ray.registry.store import ObjectStore


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A fresh store of each kind that can be had here."""
    if request.param == "memory":
        return ObjectStore.open("memory://")
    if request.param == "file":
        return ObjectStore.open(str(tmp_path / "store"))
    return s3_store(request.getfixturevalue("server"))


@pytest.fixture
def s3(server: S3Server) -> ObjectStore:
    return s3_store(server)


@pytest.fixture
def folder(tmp_path: Path) -> ObjectStore:
    return ObjectStore.open(str(tmp_path / "store"))


def s3_store(server: S3Server) -> ObjectStore:
    return ObjectStore.open(server.url(server.make_bucket(), "some/prefix"))
