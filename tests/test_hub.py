import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file

import xc_ray
from tests.adapters import write_adapter
from tests.local_http import Asked, Reply, Served, json_reply, serving
from xc_ray.errors import CheckpointError
from xc_ray.fingerprint import fingerprint
from xc_ray.hub import find_base, resolve_model
from xc_ray.model.weights import Checkpoint
from xc_ray.pipeline import Pipeline
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HAS_MODELSCOPE = importlib.util.find_spec("modelscope") is not None

# Both hubs read their address when they are imported: each question is a process of its own.
RESOLVE = """
import sys
from xc_ray.errors import XcRayError
from xc_ray.hub import resolve_model
try:
    print(resolve_model(sys.argv[1]))
except XcRayError as e:
    print(f"{type(e).__name__}: {e}")
"""


@dataclass
class Hub:
    """A stand-in of both hubs with one repository, `org/name`; `files` by path."""

    files: dict[str, bytes]
    cache: Path
    override: Callable[[Asked], Reply | None] = lambda asked: None
    served: Served = field(default_factory=lambda: Served(""))

    @property
    def downloads(self) -> set[str]:
        """The files whose content was asked for."""
        paths = set()
        for asked in self.served.asked:
            url = urlsplit(asked.path)
            if asked.method == "GET" and "/resolve/" in url.path:
                paths.add(url.path.split("/", 5)[5])
            paths.update(parse_qs(url.query).get("FilePath", []))
        return paths

    @property
    def revisions(self) -> set[str]:
        paths = [urlsplit(asked.path) for asked in self.served.asked]
        hugging_face = {m[1] for p in paths if (m := re.search(r"/revision/(.+)", p.path))}
        modelscope = {r for p in paths for r in parse_qs(p.query).get("Revision", [])}
        return hugging_face | modelscope

    def answer(self, asked: Asked) -> Reply:
        reply = self.override(asked)
        if reply is not None:
            return reply
        url = urlsplit(asked.path)
        path = unquote(url.path)
        if path.startswith("/api/models/org/name/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            return json_reply({"id": "org/name", "sha": COMMIT, "siblings": siblings})
        if path.startswith("/api/models/org/name/tree/"):
            return json_reply(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)[:40]}
                    for name, data in self.files.items()
                ]
            )
        if match := re.fullmatch(r"/org/name/resolve/[^/]+/(.+)", path):
            return self.file(match[1], {"x-repo-commit": COMMIT})
        if path == "/api/v1/models/org/name/repo/files":
            return json_reply({"Code": 200, "Success": True, "Data": {"Files": self.listing()}})
        if path == "/api/v1/models/org/name/repo":
            return self.file(parse_qs(url.query)["FilePath"][0], {})
        missing = {"Code": 10010205001, "Message": "not found", "error": "Repository not found"}
        return Reply(json_reply(missing).body, 404, {"x-error-code": "RepoNotFound"})

    def file(self, name: str, headers: dict[str, str]) -> Reply:
        if name not in self.files:
            return Reply(b"", 404, {"x-error-code": "EntryNotFound"})
        data = self.files[name]
        return Reply(data, 200, {"etag": f'"{digest(data)}"', **headers})

    def listing(self) -> list[dict[str, Any]]:
        return [
            {
                "Name": name,
                "Path": name,
                "Type": "blob",
                "Size": len(data),
                "Sha256": digest(data),
                "Revision": COMMIT,
                "CommittedDate": 1,
            }
            for name, data in self.files.items()
        ]

    def resolve(self, name: str, **environment: str) -> str:
        """What another process says of a name: a folder, or an error."""
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, name],
            cwd=ROOT,
            env={
                **os.environ,
                "HOME": str(self.cache),
                "HF_ENDPOINT": self.served.url,
                "HF_HOME": str(self.cache / "hugging-face"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": "",
                "MODELSCOPE_ENDPOINT": self.served.url,
                "MODELSCOPE_CACHE": str(self.cache / "modelscope"),
                **environment,
            },
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(tiny, tmp_path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny("2.5").iterdir()}
    assert {"config.json", "tokenizer.model"} < files.keys()
    files |= {"modeling.py": b"raise SystemExit('remote code ran')", "README.md": b"# name"}
    stand_in = Hub(files, tmp_path)
    with serving(stand_in.answer) as stand_in.served:
        yield stand_in


@pytest.fixture
def bin_hub(hub: Hub, tiny) -> Hub:
    """The same repository with its weights as `.bin` only."""
    for name in [n for n in hub.files if n.endswith((".safetensors", ".safetensors.index.json"))]:
        del hub.files[name]
    tensors = {}
    for path in tiny("2.5").glob("*.safetensors"):
        tensors.update(load_file(path))
    saved = hub.cache / "weights.bin"
    torch.save(tensors, saved)
    hub.files["pytorch_model.bin"] = saved.read_bytes()
    hub.files["training_args.bin"] = b"no weights"
    saved.unlink()
    return hub


# ---------------------------------------------------------------- names that need no hub


def test_demo_is_a_part_of_the_package_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = resolve_model("demo")
    assert folder.is_relative_to(Path(xc_ray.__file__).parent)
    names = {"config.json", "model.safetensors", "tokenizer.model"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(tmp_path.iterdir()) == []


def test_the_demo_model_is_found_without_loading_torch():
    command = [sys.executable, "-X", "importtime", "-c", RESOLVE, "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_dir()
    assert "xc_ray.hub" in done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_a_folder_is_itself_even_if_its_name_looks_like_an_id(tiny, tmp_path, monkeypatch):
    assert resolve_model(str(tiny("2.5"))) == tiny("2.5")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b/c",
        "./no/such",
        "/no/such",
        "../up",
        "org/na me",
        "org/name@",
        "https://huggingface.co/org/name",
        "hf:name",
        "modelscope:name",
        "github:org/name",
        "org/name\n",
        "a\0b",
        "x" * 5000,
    ],
)
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    expected = (
        f"model {name!r} is neither 'demo', nor an existing folder, nor a hub id like ORG/NAME, "
        "nor a base of the registry like NAME@prod"
    )
    assert str(caught.value) == expected


# ---------------------------------------------------------------- the registry


@pytest.fixture
def registry(
    tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Registry:
    """A registry with the tiny model as `base`, version 1, alias prod; and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry = Registry.open(str(tmp_path / "registry"))
    import_checkpoint(tiny(), registry, "base")
    registry.promote("base", [(1, 1.0)], "prod")
    return registry


@pytest.mark.parametrize("name", ["base", "base@1", "base@prod"])
def test_a_reference_gives_a_folder_with_the_files_of_the_import(registry, tiny, name):
    folder = resolve_model(name, registry.store.url)
    assert fingerprint(folder) == fingerprint(tiny()) == registry.manifest("base", 1).digest
    assert Checkpoint.open(folder).config == Checkpoint.open(tiny()).config


def test_a_pinned_reference_stays_what_it_was(registry, tiny):
    pinned = find_base("base@prod", registry.store.url).pinned
    import_checkpoint(tiny("2.0"), registry, "base")
    registry.promote("base", [(2, 1.0)], "prod")
    assert find_base(pinned, registry.store.url).manifest.version == 1
    assert find_base("base@prod", registry.store.url).manifest.version == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "'other' is not in the registry; there is base"),
        ("base@7", "'base' has no version 7; it has 1"),
        ("base@canary", "'base' has no alias 'canary'; it has prod"),
    ],
)
def test_a_reference_that_means_nothing_says_what_there_is(registry, name, message):
    with pytest.raises(CheckpointError, match=r"nor a base of the registry .*" + message) as caught:
        resolve_model(name, registry.store.url)
    assert "\n" not in str(caught.value)


def test_an_adapter_is_no_model_to_load(registry, tiny, tmp_path):
    push_adapter(
        write_adapter(tmp_path / "a", Checkpoint.open(tiny()).config), registry, "cats", "base"
    )
    with pytest.raises(CheckpointError, match=r"'cats' is an adapter .* serve its base \(base\)"):
        resolve_model("cats", registry.store.url)


def test_without_a_registry_none_is_made_by_asking(tmp_path):
    place = tmp_path / "registry"
    with pytest.raises(CheckpointError, match=rf"NAME@prod \(file://{place} is not there\)"):
        resolve_model("base@prod", str(place))
    assert not place.exists()


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_hugging_face_id_gives_a_folder_that_loads(prefix, hub, tiny):
    folder = Path(hub.resolve(f"{prefix}org/name"))
    assert folder.is_relative_to(hub.cache / "hugging-face")
    wanted = {n for n in hub.files if n.endswith((".json", ".safetensors", ".model"))}
    assert {path.name for path in folder.iterdir()} == wanted == hub.downloads
    answers = [
        Pipeline.load(f, device="cpu").chat("hi", temperature=0, max_tokens=8)
        for f in (folder, tiny("2.5"))
    ]
    assert answers[0] == answers[1]
    assert hub.revisions == {"main"}


def test_a_hugging_face_revision_is_asked_for(hub):
    assert Path(hub.resolve("org/name@v1.0")).is_dir()
    assert hub.revisions == {"v1.0"}


def test_weights_as_bin_are_taken_where_there_are_no_others(bin_hub, tiny):
    folder = Path(bin_hub.resolve("org/name"))
    names = {path.name for path in folder.iterdir()}
    assert "pytorch_model.bin" in names
    assert not names & {"training_args.bin", "modeling.py", "README.md"}
    loaded = Checkpoint.open(folder).load(device="cpu", dtype=torch.float32).state_dict()
    same = Checkpoint.open(tiny("2.5")).load(device="cpu", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], same[name]) for name in same)


def test_what_was_downloaded_once_needs_no_hub(hub):
    folder = hub.resolve("org/name")
    asked = len(hub.served.asked)
    assert hub.resolve("org/name", HF_HUB_OFFLINE="1") == folder
    assert hub.resolve("org/name", HF_ENDPOINT="http://127.0.0.1:9") == folder
    assert len(hub.served.asked) == asked


def test_an_unknown_hugging_face_id_is_one_line_that_says_so(hub):
    said = hub.resolve("org/other")
    start = (
        "CheckpointError: no folder 'org/other' here, and Hugging Face does not give 'org/other': "
    )
    assert said.startswith(start)
    assert "Repository Not Found" in said


def test_a_revision_that_does_not_exist_is_one_line_that_says_so(hub):
    hub.override = lambda asked: (
        Reply(b"", 404, {"x-error-code": "RevisionNotFound"})
        if "/revision/" in asked.path
        else None
    )
    assert "Revision Not Found" in hub.resolve("org/name@v9")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached_is_one_line(offline, hub):
    said = hub.resolve("org/name", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
    assert said.startswith("CheckpointError: no folder 'org/name' here, and Hugging Face does not")


@pytest.mark.parametrize("body", [b"<html>a login page</html>", b"[]", b"{}"])
def test_a_hub_that_answers_nonsense_is_one_line(body, hub):
    hub.override = lambda asked: Reply(body, 200)
    assert hub.resolve("org/name").startswith("CheckpointError: no folder 'org/name' here")


def test_a_download_that_fails_is_one_line(hub):
    hub.override = lambda asked: (
        Reply(b"", 403) if asked.path.endswith("/tokenizer.model") else None
    )
    assert hub.resolve("org/name").startswith("CheckpointError: no folder 'org/name' here")


# ---------------------------------------------------------------- ModelScope


def test_a_modelscope_id_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("modelscope:org/name")
    expected = "a ModelScope id needs the package modelscope: pip install 'xc-ray[modelscope]'"
    assert str(caught.value) == expected


needs_modelscope = pytest.mark.skipif(
    not HAS_MODELSCOPE, reason="modelscope is not installed (extra `modelscope`)"
)


@needs_modelscope
def test_a_modelscope_id_gives_a_folder_that_loads(hub, tiny):
    folder = Path(hub.resolve("modelscope:org/name"))
    assert folder.is_relative_to(hub.cache / "modelscope")
    wanted = {n for n in hub.files if n.endswith((".json", ".safetensors", ".model"))}
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == wanted
    assert hub.downloads == wanted
    assert hub.revisions == {"master"}
    answers = [
        Pipeline.load(f, device="cpu").chat("hi", temperature=0, max_tokens=8)
        for f in (folder, tiny("2.5"))
    ]
    assert answers[0] == answers[1]


@needs_modelscope
def test_a_modelscope_revision_is_asked_for(hub):
    assert Path(hub.resolve("modelscope:org/name@v1.0")).is_dir()
    assert hub.revisions == {"v1.0"}


@needs_modelscope
def test_modelscope_weights_as_bin_are_taken_where_there_are_no_others(bin_hub):
    names = {path.name for path in Path(bin_hub.resolve("modelscope:org/name")).iterdir()}
    assert "pytorch_model.bin" in names
    assert not names & {"training_args.bin", "modeling.py", "README.md"}


@needs_modelscope
def test_an_unknown_modelscope_id_is_one_line(hub):
    said = hub.resolve("modelscope:org/other")
    assert said.startswith("CheckpointError: ModelScope does not give 'org/other': ")
    assert "not found" in said


@needs_modelscope
def test_a_modelscope_that_cannot_be_reached_is_one_line(hub):
    said = hub.resolve("modelscope:org/name", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("CheckpointError: ModelScope does not give 'org/name': ")
