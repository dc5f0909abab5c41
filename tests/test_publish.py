import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapters import settings_of, write_adapter
from tests.local_http import serving
from tests.s3_server import credentials, s3_server
from tests.test_hub import ROOT, Hub
from xc_ray.demo.make import demo_config, make_model, save_random, tiny_config, train_tokenizer
from xc_ray.errors import CheckpointError, ConfigError, InvalidRequest, NotFound
from xc_ray.fingerprint import fingerprint
from xc_ray.model.adapter import adapter_summary, load_adapter
from xc_ray.model.config import FAMILIES, Variant
from xc_ray.model.weights import Checkpoint
from xc_ray.publish import base_config, import_checkpoint, owner_of, push_adapter
from xc_ray.registry.cache import LocalCache
from xc_ray.registry.manifest import Lineage, Manifest
from xc_ray.registry.registry import Registry
from xc_ray.registry.store import ObjectStore

CONFIG = tiny_config("2.5")
LAYOUTS = ["one file", "shards", "bin", "bin shards"]
SHARDED_FILES = {
    *(f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)),
    "model.safetensors.index.json",
}


class Counting(ObjectStore):
    """A store that says what was sent to it."""

    sent: list[str]

    @classmethod
    def open(cls, url: str) -> "Counting":
        store = super().open(url)
        assert isinstance(store, Counting)
        store.sent = []
        return store

    def put(self, key: str, data: bytes | Path) -> None:
        self.sent.append(key)
        super().put(key, data)

    def put_chunks(self, key: str, chunks: Iterator[bytes], size: int) -> None:
        self.sent.append(key)
        super().put_chunks(key, chunks, size)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder of each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "xc_ray"


@pytest.fixture
def registry() -> Registry:
    return Registry.open("memory://")


@pytest.fixture
def counted(tmp_path: Path) -> Registry:
    return Registry(Counting.open(str(tmp_path / "store")))


@pytest.fixture
def base(tiny: Callable[[Variant], Path], registry: Registry) -> Manifest:
    """The tiny 2.5 model, imported as `tiny`."""
    return import_checkpoint(tiny("2.5"), registry, "tiny")


def laid_out(folder: Path, layout: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in a layout, code beside it, and its tensors."""
    shard = 200_000 if layout == "shards" else 5_000_000_000
    save_random(folder, CONFIG, max_shard_bytes=shard)
    (folder / "tokenizer.model").write_bytes(train_tokenizer())
    (folder / "modeling.py").write_text("raise SystemExit('remote code ran')")
    (folder / "README.md").write_text("# tiny")
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= {n: t.clone() for n, t in load_file(path).items()}
        if layout.startswith("bin"):
            path.unlink()
    if layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    if layout == "bin shards":
        state["model.layers.0.attention.wo.lora_web_A.weight"] = torch.ones(2, 32)
        weight_map: dict[str, str] = {}
        for i in range(3):
            name = f"pytorch_model-{i + 1:05}-of-00003.bin"
            part = {n: state[n] for n in list(state)[i::3]}
            torch.save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder, state


def pulled(registry: Registry, manifest: Manifest, tmp_path: Path) -> Path:
    return LocalCache(tmp_path / "pulled").fetch(registry.store, manifest).folder


# ---------------------------------------------------------------- bases


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_arrives_as_the_same_model(tmp_path: Path, registry, cache, layout: str):
    folder, state = laid_out(tmp_path / "model", layout)
    manifest = import_checkpoint(folder, registry, "cats")
    weights = SHARDED_FILES if "shards" in layout else {"model.safetensors"}
    assert {f.path for f in manifest.files} == weights | {"config.json", "tokenizer.model"}
    assert (manifest.kind, manifest.version, manifest.base) == ("base", 1, None)
    stored: dict[str, Tensor] = {}
    place = pulled(registry, manifest, tmp_path)
    for path in place.glob("*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[n], t) for n, t in state.items())
    Checkpoint.open(place).load()
    assert manifest.digest == fingerprint(folder) == fingerprint(place)
    assert not list((cache / "converted").glob("*")) if "bin" in layout else True


def test_the_manifest_tells_the_model(tiny, base: Manifest):
    summary = {k: v for k, v in base.config.items() if k != "model"}
    parameters = sum(p.numel() for p in Checkpoint.open(tiny("2.5")).load().parameters())
    assert summary == {
        "variant": "2.5",
        "layers": 2,
        "hidden_size": 32,
        "parameters": parameters,
        "dtype": "float32",
    }


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_models_config_comes_back_from_the_manifest(tiny, registry, variant: Variant):
    manifest = import_checkpoint(tiny(variant), registry, "cats")
    again = Manifest.from_bytes(manifest.to_bytes(), "here")
    assert base_config(again) == Checkpoint.open(tiny(variant)).config


def test_importing_again_sends_nothing_again(tiny, counted: Registry):
    store = counted.store
    assert isinstance(store, Counting)
    first = import_checkpoint(tiny("2.5"), counted, "cats")
    assert len(store.sent) == 3
    second = import_checkpoint(tiny("2.5"), counted, "dogs")
    assert len(store.sent) == 3
    assert first.digest == second.digest


@pytest.mark.parametrize("layout", ["shards", "bin shards"])
def test_an_interrupted_import_goes_on_where_it_was(
    tmp_path: Path, counted: Registry, cache, layout: str
):
    store = counted.store
    assert isinstance(store, Counting)
    folder, _ = laid_out(tmp_path / "model", layout)
    converted: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("convert"):
            converted.append(what)
        elif what.endswith(".safetensors"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(folder, counted, "cats", progress=interrupt)
    for thread in threading.enumerate():  # what was on its way when it was interrupted
        if "ThreadPool" in thread.name:
            thread.join()
    assert counted.versions("cats") == []
    before = {
        path: path.stat().st_mtime_ns for path in (cache / "converted").rglob("*.safetensors")
    }
    assert len(before) == (3 if "bin" in layout else 0)
    manifest = import_checkpoint(folder, counted, "cats")
    assert sorted(store.sent) == sorted(set(store.sent))
    assert len(store.sent) == len(manifest.files) == 6
    assert not list((cache / "converted").glob("*")) if before else True


def test_a_conversion_that_was_killed_goes_on_and_leaves_nothing(
    tmp_path: Path, registry: Registry, cache: Path
):
    folder, _ = laid_out(tmp_path / "model", "bin shards")
    script = """
import os, sys
from xc_ray.publish import import_checkpoint
from xc_ray.registry.registry import Registry
def die(what, done, total):
    if "00002" in what:
        os.kill(os.getpid(), 9)
import_checkpoint(sys.argv[1], Registry.open(sys.argv[2]), "cats", progress=die)
"""
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "store")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    kept = sorted((cache / "converted").rglob("*.safetensors"))
    assert [path.name for path in kept] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    (kept[0].parent.with_suffix(".part-x")).mkdir()  # what a file in the making leaves
    times = [path.stat().st_mtime_ns for path in kept]
    seen: list[int] = []

    def look(what: str, done: int, total: int) -> None:
        if "00003" in what and not seen:
            seen.extend(path.stat().st_mtime_ns for path in kept)

    import_checkpoint(folder, registry, "cats", progress=look)
    assert seen == times
    assert not list((cache / "converted").glob("*"))


def test_what_another_killed_import_left_is_removed(tmp_path: Path, registry, cache: Path):
    left = cache / "converted" / "0123"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x")
    (cache / "converted" / "0123.lock").touch()
    import_checkpoint(laid_out(tmp_path / "model", "bin")[0], registry, "cats")
    assert not list((cache / "converted").glob("*"))


def test_a_disk_without_room_for_the_conversion_is_refused(
    tmp_path: Path, registry, monkeypatch: pytest.MonkeyPatch
):
    class Small:
        free = 1000

    folder, _ = laid_out(tmp_path / "model", "bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Small)
    with pytest.raises(
        ConfigError, match=r"converting to safetensors needs .* which has 1,000 left"
    ):
        import_checkpoint(folder, registry, "cats")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_checkpoint_is_refused_before_anything_is_sent(
    tmp_path: Path, counted: Registry, layout: str
):
    store = counted.store
    assert isinstance(store, Counting)
    folder, state = laid_out(tmp_path / "model", layout)
    path = max(folder.glob("*.bin" if "bin" in layout else "*.safetensors"))
    part = torch.load(path) if "bin" in layout else load_file(path)
    gone = next(n for n in part if n in state and "lora" not in n)
    del part[gone]
    torch.save(part, path) if "bin" in layout else save_file(part, path)
    with pytest.raises(CheckpointError, match=f"1 missing: {re.escape(gone)}"):
        import_checkpoint(folder, counted, "cats")
    assert store.sent == []


def test_a_shard_that_is_cut_short_is_refused(tiny, tmp_path: Path, registry: Registry):
    folder = Path(shutil.copytree(tiny("2.5"), tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        import_checkpoint(folder, registry, "cats")


@pytest.mark.parametrize("source", ["nowhere", "cats@3"])
def test_a_reference_is_not_a_source(registry: Registry, source: str):
    with pytest.raises(
        CheckpointError, match=f"{source} is no folder here; give a folder or a hub"
    ):
        import_checkpoint(source, registry, "cats")


def test_a_name_outside_the_grammar_is_refused_before_anything_is_read(registry: Registry):
    with pytest.raises(InvalidRequest, match="'Cats' is no name in the registry"):
        import_checkpoint("/nowhere", registry, "Cats")


def test_a_real_s3_server_takes_both_kinds(tiny, tmp_path: Path):
    with s3_server() as server, credentials(server):
        registry = Registry.open(server.url(server.make_bucket(), "models"))
        owner = import_checkpoint(tiny("2.5"), registry, "tiny")
        lora = write_adapter(tmp_path / "a", CONFIG)
        adapter = push_adapter(lora, registry, "cats", "tiny")
        assert registry.resolve("cats").base == adapter.base
        assert adapter.base is not None
        assert adapter.base.digest == owner.digest
        Checkpoint.open(pulled(registry, owner, tmp_path))


IMPORT = """
import sys
from xc_ray.errors import XcRayError
from xc_ray.publish import import_checkpoint
from xc_ray.registry.registry import Registry
try:
    print(import_checkpoint(sys.argv[1], Registry.open(sys.argv[2]), "cats").digest)
except XcRayError as e:
    print(f"{type(e).__name__}: {e}")
"""


@pytest.mark.parametrize("prefix", ["", "modelscope:"])
def test_a_hub_id_is_imported_without_its_code(tiny, tmp_path: Path, prefix: str):
    if prefix:
        pytest.importorskip("modelscope")
    folder, _ = laid_out(tmp_path / "model", "bin shards")
    stand_in = Hub({p.name: p.read_bytes() for p in folder.iterdir()}, tmp_path)
    with serving(stand_in.answer) as stand_in.served:
        environment = {
            **os.environ,
            "HOME": str(tmp_path),
            "HF_ENDPOINT": stand_in.served.url,
            "HF_HOME": str(tmp_path / "hugging-face"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
            "MODELSCOPE_ENDPOINT": stand_in.served.url,
            "MODELSCOPE_CACHE": str(tmp_path / "modelscope"),
        }
        command = [sys.executable, "-c", IMPORT, f"{prefix}org/name", str(tmp_path / "store")]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == fingerprint(folder)
    assert "modeling.py" not in stand_in.downloads
    manifest = Registry.open(str(tmp_path / "store")).resolve("cats")
    assert not [f.path for f in manifest.files if f.path.endswith((".py", ".bin", ".md"))]


# ---------------------------------------------------------------- adapters


def test_an_adapter_arrives_with_its_base_summary_and_lineage(
    tmp_path: Path, registry: Registry, base: Manifest
):
    folder = write_adapter(tmp_path / "a", CONFIG, rank=3, linears=["attention.wo"])
    for name in ("README.md", "optimizer.pt", "train.py"):
        (folder / name).write_text("x")
    lineage = Lineage(dataset_digest="sha256:1", metrics={"loss": 0.5})
    told: list[str] = []
    manifest = push_adapter(
        folder,
        registry,
        "cats",
        "tiny",
        lineage=lineage,
        progress=lambda what, *_: told.append(what),
    )
    assert [f.path for f in manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert (manifest.kind, manifest.lineage) == ("adapter", lineage)
    assert manifest.base is not None
    assert (manifest.base.name, manifest.base.digest) == ("tiny", base.digest)
    assert manifest.config == adapter_summary(folder)
    assert set(told) == {"adapter_config.json", "adapter_model.safetensors"}
    place = pulled(registry, manifest, tmp_path)
    assert load_adapter(place, CONFIG, digest=manifest.digest, dtype=torch.float32).rank == 3


def test_a_pickled_adapter_becomes_safetensors(tmp_path: Path, registry, base: Manifest):
    folder = write_adapter(tmp_path / "a", CONFIG)
    expected = load_adapter(folder, CONFIG, digest="", dtype=torch.float32)
    tensors = {n: t.clone() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    manifest = push_adapter(folder, registry, "cats", "tiny")
    assert [f.path for f in manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]
    found = load_adapter(
        pulled(registry, manifest, tmp_path), CONFIG, digest="", dtype=torch.float32
    )
    assert all(torch.equal(found.pairs[p].b, expected.pairs[p].b) for p in expected.pairs)


def test_folders_may_be_relative(
    tiny, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny(), tmp_path / "base")
    write_adapter(tmp_path / "adapter", CONFIG)
    monkeypatch.chdir(tmp_path)
    base = import_checkpoint("./base", registry, "base")
    adapter = push_adapter("adapter", registry, "cats", "base@1")
    assert adapter.base is not None
    assert adapter.base.digest == base.digest


@pytest.mark.parametrize("how", ["tiny", "tiny@1", "tiny@prod", "digest", "folder", "path"])
def test_the_base_is_named_by_reference_or_by_its_folder(
    tiny, registry: Registry, base: Manifest, how: str
):
    registry.promote("tiny", [(1, 1.0)], "prod")
    folder = tiny("2.5")
    given = {"digest": f"tiny@{base.digest}", "folder": str(folder), "path": folder}.get(how, how)
    assert owner_of(registry, given) == base


def test_a_folder_that_nobody_imported_is_not_a_base(tiny, tmp_path: Path, registry, base):
    other = make_model(tmp_path / "other", "2.5", seed=5)
    with pytest.raises(NotFound, match=r"no base in the registry holds the files of .*other"):
        push_adapter(write_adapter(tmp_path / "a", CONFIG), registry, "cats", other)


def test_an_adapter_is_not_a_base(tmp_path: Path, registry: Registry, base: Manifest):
    folder = write_adapter(tmp_path / "a", CONFIG)
    push_adapter(folder, registry, "cats", "tiny")
    with pytest.raises(InvalidRequest, match="cats is an adapter of tiny; name a base"):
        push_adapter(folder, registry, "dogs", "cats")


def test_an_unknown_base_is_named(tmp_path: Path, registry: Registry, base: Manifest):
    with pytest.raises(NotFound, match="nothing"):
        push_adapter(write_adapter(tmp_path / "a", CONFIG), registry, "cats", "nothing")


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_sent(
    tiny, tmp_path: Path, counted: Registry
):
    store = counted.store
    assert isinstance(store, Counting)
    import_checkpoint(tiny("2.5"), counted, "tiny")
    sent = len(store.sent)
    folder = write_adapter(tmp_path / "a", demo_config())
    with pytest.raises(CheckpointError, match=r"not an adapter for this base: .* of another shape"):
        push_adapter(folder, counted, "cats", "tiny")
    content = settings_of() | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="use_dora is true"):
        push_adapter(folder, counted, "cats", "tiny")
    assert len(store.sent) == sent
    assert counted.versions("cats") == []


def test_a_base_whose_manifest_does_not_tell_its_sizes_is_refused(
    tiny, tmp_path: Path, registry: Registry
):
    registry.push(tiny("2.5"), name="bare", kind="base")
    with pytest.raises(CheckpointError, match="bare@1 does not tell its model's sizes; import it"):
        push_adapter(write_adapter(tmp_path / "a", CONFIG), registry, "cats", "bare")


def test_a_base_does_not_become_an_adapter(tmp_path: Path, registry: Registry, base: Manifest):
    with pytest.raises(InvalidRequest, match="'tiny' is of kind base"):
        push_adapter(write_adapter(tmp_path / "a", CONFIG), registry, "tiny", "tiny")


def test_many_versions_share_what_is_the_same(tmp_path: Path, counted: Registry, tiny):
    import_checkpoint(tiny("2.5"), counted, "tiny")
    store: Any = counted.store
    store.sent.clear()
    folder = write_adapter(tmp_path / "a", CONFIG)
    versions = [push_adapter(folder, counted, "cats", "tiny").version for _ in range(3)]
    assert versions == [1, 2, 3]
    assert len(store.sent) == 2
