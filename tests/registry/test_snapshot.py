"""Snapshots: the same answers as the registry's, few reads, and damage that stays where it is."""

import pickle
from pathlib import Path

import pytest

from tests.registry.folders import DEMO, adapter_folder
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server
from xc_ray.errors import RegistryError
from xc_ray.registry.keys import alias_key, version_key
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore


def publish(registry: Registry, folder: Path, *names: str) -> None:
    if not folder.exists():
        adapter_folder(folder)
    for name in names:
        registry.push(folder, name=name, kind="adapter", base=DEMO)


def test_snapshot_resolves_as_the_registry_does(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    publish(registry, tmp_path / "a", "cats", "cats", "dogs")
    registry.promote("cats", [(1, 1)], "prod")
    registry.promote("cats", [(1, 0.5), (2, 0.5)], "canary")
    seen = registry.snapshot()
    digest = seen.manifest("cats", 1).digest
    for ref in ("cats", "cats@1", "cats@2", "cats@prod", "dogs", f"cats@{digest}"):
        assert seen.resolve(ref) == registry.resolve(ref)
    for user in "abcdefgh":
        canary = seen.resolve("cats@canary", sticky=user)
        assert canary == registry.resolve("cats@canary", sticky=user)
    assert seen.names() == registry.names()
    assert seen.alias_names("cats") == registry.alias_names("cats") == ["canary", "prod"]
    assert seen.problems == ()
    assert pickle.loads(pickle.dumps(seen)) == seen


def test_snapshot_of_an_empty_registry_is_empty(store: ObjectStore):
    assert Registry(store).snapshot().names() == []


def test_snapshot_is_of_its_moment(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    publish(registry, tmp_path / "a", "cats", "cats")
    registry.promote("cats", [(1, 1)], "prod")
    before = registry.snapshot()
    registry.promote("cats", [(2, 1)], "prod")
    assert before.resolve("cats").version == 1
    assert registry.snapshot(before).resolve("cats").version == 2


def test_only_what_is_new_is_read(server: S3Server, tmp_path: Path):
    with s3_proxy(server.endpoint) as proxy:
        url = server.url(server.make_bucket(), "p").replace(server.endpoint, proxy.endpoint)
        registry = Registry.open(url)
        publish(registry, tmp_path / "a", *["cats"] * 5)
        registry.promote("cats", [(4, 1)], "prod")

        def reads(previous=None):
            del proxy.requests[:]
            seen = registry.snapshot(previous)
            listings = [asked for asked in proxy.requests if "list-type" in asked.path]
            assert len(listings) == 2
            return seen, len(proxy.requests) - 2

        first, number = reads()
        assert number == 6
        again, number = reads(first)
        assert (again, number) == (first, 0)
        publish(registry, tmp_path / "a", "cats")
        registry.promote("cats", [(6, 1)], "prod")
        newer, number = reads(again)
        assert number == 2
        assert newer.resolve("cats").version == 6


def test_damage_makes_only_itself_unusable(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    publish(registry, tmp_path / "a", "cats", "cats", "dogs")
    registry.promote("cats", [(2, 1)], "prod")
    registry.promote("cats", [(1, 1)], "canary")
    broken = version_key("cats", 2)
    store.put(broken, b"{")
    store.put(alias_key("cats", "canary", 1), b"")
    seen = registry.snapshot()
    assert seen.resolve("dogs").version == 1
    assert seen.resolve("cats@1").version == 1
    assert len(seen.problems) == 2
    with pytest.raises(RegistryError, match=f"manifest '{broken}' in .* is damaged"):
        seen.resolve("cats")
    with pytest.raises(RegistryError, match=r"alias entry 'aliases/cats/canary/.* is damaged"):
        seen.resolve("cats@canary")


def test_alias_keeps_its_head_while_the_new_one_is_damaged(store: ObjectStore, tmp_path: Path):
    registry = Registry(store)
    publish(registry, tmp_path / "a", "cats", "cats")
    registry.promote("cats", [(1, 1)], "prod")
    before = registry.snapshot()
    store.put(alias_key("cats", "prod", 2), b"torn")
    after = registry.snapshot(before)
    assert after.resolve("cats").version == 1
    assert "alias entry 'aliases/cats/prod/00000002.json'" in after.problems[0]
    assert registry.snapshot(after).problems == after.problems
    registry.promote("cats", [(2, 1)], "prod")
    assert registry.snapshot(after).resolve("cats").version == 2
    assert registry.snapshot(after).problems == ()


def test_snapshot_of_a_store_that_is_down_is_an_error(server: S3Server):
    with pytest.raises(RegistryError, match="cannot list 'aliases/'"):
        Registry.open("s3://bucket?endpoint=http://127.0.0.1:1").snapshot()
