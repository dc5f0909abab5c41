"""`xc-ray registry`: its own process where that matters, else in this one, which is quicker."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from tests.adapters import peft_model, write_adapter
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server
from xc_ray import cli
from xc_ray.cli_registry_run import COMMANDS
from xc_ray.demo.make import demo_config, make_model, tiny_config
from xc_ray.pipeline import Pipeline
from xc_ray.registry.keys import blob_key
from xc_ray.registry.registry import Registry

ROOT = Path(__file__).parents[1]
GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 8}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path: Path) -> Path:
    """A user's folders of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "xc_ray", "registry", *argv]


def process(*argv: str) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own."""
    return subprocess.run(
        command(*argv), cwd=ROOT, text=True, capture_output=True, timeout=200, check=False
    )


def started(*argv: str, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command(*argv), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


Run = Callable[..., str]


@pytest.fixture
def run(capsys, store: str) -> Run:
    """A command on the test's store, in this process; gives what it prints."""

    def run(*argv: str, code: int = 0) -> str:
        assert cli.main(["registry", *argv, "--registry", store]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith(f"registry: file://{store}\n")
        out: str = captured.out
        return out

    return run


def fails(capsys, *argv: str) -> tuple[int, str]:
    """Exit code and the last line on standard error of a command that prints nothing else."""
    try:
        code = cli.main(["registry", *argv])
    except SystemExit as e:  # argparse
        code = int(e.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err.splitlines()[-1]


@pytest.fixture
def filled(run: Run, tiny, tmp_path: Path) -> Run:
    """The store holds base `xc`, and versions 1 to 3 of its adapter `cats`."""
    run("import", str(tiny("2.5")), "--name", "xc")
    for seed in (1, 2, 3):
        folder = write_adapter(tmp_path / f"lora-{seed}", tiny_config("2.5"), seed=seed)
        metric = ("--metric", f"loss=0.{seed}")
        assert (
            run("push", str(folder), "--name", "cats", "--base", "xc", *metric) == f"cats@{seed}\n"
        )
    return run


# ---------------------------------------------------------------- the whole story


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_base_and_an_adapter_go_through_an_s3_server_to_a_merged_checkpoint(
    server: S3Server, tiny, tmp_path: Path
):
    where = ("--registry", server.url(server.make_bucket(), "models"))
    base, merged = tiny("2.5"), tmp_path / "merged"
    wrapped = peft_model(base).float()
    wrapped.save_pretrained(tmp_path / "lora")

    def says(*argv: str) -> str:
        done = process(*argv, *where)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"registry: {where[1]}\n")
        assert "testing-secret" not in done.stderr + done.stdout
        return done.stdout

    assert says("import", str(base), "--name", "xc") == "xc@1\n"
    push = ("push", str(tmp_path / "lora"), "--name", "cats", "--base", "xc@1")
    assert says(*push, "--metric", "loss=0.5") == "cats@1\n"
    assert says(*push, "--force", "--parent", "cats@1") == "cats@2\n"
    assert says("promote", "cats@1", "prod") == "cats@prod -> 1\n"
    assert says("promote", "cats@prod", "prod", "--canary", "2=0.1") == (
        "cats@prod -> 1 (90 %) and 2 (10 %) (was 1)\n"
    )
    assert says("rollback", "cats@prod") == "cats@prod -> 1 (was 1 (90 %) and 2 (10 %))\n"
    entries = json.loads(says("log", "cats@prod", "--json"))["entries"]
    assert [(e["action"], e["restores"]) for e in entries] == [
        ("promote", None),
        ("promote", None),
        ("rollback", 1),
    ]
    assert says("verify") == "everything is as it was written\n"
    proof = says("export", "--merge", "xc", "cats@prod", str(merged))
    assert re.search(r"logits differ by at most \S+ \(tolerance", proof)

    batch = AutoProcessor.from_pretrained(base).apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": "What is a lake?"}]}]],
        tokenize=True,
        return_dict=True,
    )
    with torch.no_grad():
        made = wrapped.generate(**batch, max_new_tokens=8, do_sample=False, repetition_penalty=1.0)
    pipe = Pipeline.load(merged, device="cpu")
    expected = pipe.tokenizer.decode(made[0, batch["input_ids"].shape[1] :].tolist())
    answer, _ = pipe.chat("What is a lake?", **GREEDY)
    assert answer == expected
    assert answer != Pipeline.load(base, device="cpu").chat("What is a lake?", **GREEDY)[0]


def test_the_commands_of_the_documentation_run_as_they_stand(home: Path, monkeypatch, capsys):
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Registry\n(.*?)^## ", page, re.M | re.S)
    commands = re.findall(r"^    xc-ray registry (.+)$", section, re.M)
    assert {line.split()[0] for line in commands} == set(COMMANDS)
    for seed in (1, 2):
        write_adapter(home / "runs" / str(seed), demo_config(), seed=seed)
    monkeypatch.chdir(home)
    for line in commands:
        assert cli.main(["registry", *line.split()]) == 0, (line, capsys.readouterr().err)
    assert "cats@prod -> 1 (90 %) and 2 (10 %) (was 2)\n" in capsys.readouterr().out
    for folder in ("merged", "my-copy"):
        assert Path(home, folder).is_dir()


# ---------------------------------------------------------------- import and push


def test_a_finished_import_is_not_published_again_unless_forced(run: Run, tiny, tmp_path: Path):
    argv = ("import", str(tiny("2.5")), "--name", "xc")
    assert [run(*argv), run(*argv), run(*argv, "--force")] == ["xc@1\n", "xc@1\n", "xc@2\n"]
    other = make_model(tmp_path / "other", "2.5", seed=5)
    assert run("import", str(other), "--name", "xc") == "xc@3\n"
    assert run(*argv) == "xc@4\n"  # old bytes, but not those of the newest version


def test_a_relative_folder_is_taken_as_it_is_written(run: Run, tiny, home: Path, monkeypatch):
    shutil.copytree(tiny("2.5"), home / "some" / "model")
    monkeypatch.chdir(home)
    assert run("import", "some/model", "--name", "xc") == "xc@1\n"
    assert run("import", "./some/model", "--name", "xc") == "xc@1\n"


def test_it_is_said_that_the_newest_version_holds_the_files_already(tiny, capsys, store: str):
    argv = ["registry", "import", str(tiny("2.5")), "--name", "xc", "--registry", store]
    assert [cli.main(argv), cli.main(argv)] == [0, 0]
    first, second = re.findall(r"^xc@1 .*$", capsys.readouterr().err, re.M)
    assert re.fullmatch(r"xc@1 published, [\d.]+ kB in 3 files \(sha256:\w{64}\)", first)
    assert second.startswith("xc@1 holds these files already; --force makes a new version")


def test_a_finished_push_is_not_published_again_unless_forced_or_for_another_base(
    filled: Run, tmp_path: Path
):
    argv = ("push", str(tmp_path / "lora-3"), "--name", "cats", "--base")
    assert [filled(*argv, "xc"), filled(*argv, "xc", "--force")] == ["cats@3\n", "cats@4\n"]
    other = make_model(tmp_path / "other", "2.5", seed=5)
    filled("import", str(other), "--name", "other")
    assert filled(*argv, str(other)) == "cats@5\n"
    about = json.loads(filled("show", "cats@5", "--json"))
    assert about["base"]["name"] == "other"


def test_lineage_is_kept_with_the_version(filled: Run, tmp_path: Path):
    (tmp_path / "train.yaml").write_text("lr: 1.0e-4\nlora: {rank: 4}\n")
    lora = write_adapter(tmp_path / "new", tiny_config("2.5"), seed=9)
    filled(
        *("push", str(lora), "--name", "cats", "--base", "xc", "--parent", "cats@2"),
        *("--metric", "loss=0.25", "--metric", "rouge=l=0.5", "--dataset-digest", "sha256:abc"),
        *("--code-version", "v1.2", "--training-config", str(tmp_path / "train.yaml")),
    )
    assert json.loads(filled("show", "cats@4", "--json"))["lineage"] == {
        "dataset_digest": "sha256:abc",
        "code_version": "v1.2",
        "training_config": {"lr": 1e-4, "lora": {"rank": 4}},
        "metrics": {"loss": 0.25, "rouge=l": 0.5},
        "parent": "cats@2",
    }


# ---------------------------------------------------------------- looking


def test_list_shows_names_and_the_versions_of_one(filled: Run):
    filled("promote", "cats@1", "prod", "--canary", "3=0.25")
    head, cats, xc = filled("list").splitlines()
    assert head.split() == ["NAME", "KIND", "NEWEST", "SIZE", "CREATED", "ALIASES"]
    assert re.match(
        r"cats  adapter  3 +[\d.]+ kB +\S+ \S+Z  prod -> 1 \(75 %\) and 3 \(25 %\)$", cats
    )
    assert re.match(r"xc    base     1 +[\d.]+ kB +\S+ \S+Z  -$", xc)
    head, *versions = filled("list", "cats").splitlines()
    assert head.split() == ["VERSION", "ALIASES", "SIZE", "CREATED", "DIGEST", "BASE", "METRICS"]
    assert [re.split(r"  +", line)[:2] for line in versions] == [
        ["1", "prod (75 %)"],
        ["2", "-"],
        ["3", "prod (25 %)"],
    ]
    assert versions[0].endswith("loss 0.1")


def test_list_as_json_has_all_versions_and_aliases(filled: Run, store: str):
    filled("promote", "cats@2", "prod")
    document = json.loads(filled("list", "--json"))
    assert (document["registry"], document["problems"]) == (f"file://{store}", [])
    cats, xc = document["models"]
    assert (cats["name"], cats["kind"], xc["kind"]) == ("cats", "adapter", "base")
    assert cats["aliases"] == {"prod": [{"version": 2, "weight": 1.0}]}
    assert [v["version"] for v in cats["versions"]] == [1, 2, 3]
    assert {v["base"]["digest"] for v in cats["versions"]} == {xc["versions"][0]["digest"]}
    assert json.loads(filled("list", "cats", "--json"))["models"] == [cats]


def test_show_tells_files_config_lineage_and_aliases(filled: Run):
    filled("promote", "cats@2", "prod")
    text = filled("show", "cats")
    assert text.startswith("cats@2  adapter\n  digest   sha256:")
    for part in ("base     xc sha256:", "aliases  prod", "metrics  loss 0.2", "rank 4"):
        assert part in text
    assert re.search(r"files\n  adapter_config.json +\d+ B +sha256:", text)
    document = json.loads(filled("show", "cats@2", "--json"))
    assert document["reference"] == "cats@2"
    assert {f["path"] for f in document["files"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert filled("show", f"cats@{document['digest']}") == text


def test_a_damaged_version_is_a_warning_in_a_list(filled: Run, store: str, capsys):
    key = Path(store, "versions/cats/00000002.json")
    key.write_bytes(key.read_bytes().replace(b"adapter", b"adopter"))
    assert cli.main(["registry", "list", "cats", "--json", "--registry", store]) == 0
    captured = capsys.readouterr()
    assert "xc-ray: warning: " in captured.err
    document = json.loads(captured.out)
    assert [v["version"] for v in document["models"][0]["versions"]] == [1, 3]
    assert "00000002.json" in document["problems"][0]


def test_an_empty_bucket_is_an_empty_list(server: S3Server, capsys):
    url = server.url(server.make_bucket())
    assert cli.main(["registry", "list", "--registry", url]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err.splitlines()[-1]) == ("", "it is empty")


# ---------------------------------------------------------------- aliases


def test_promote_and_rollback_say_what_they_moved(filled: Run):
    assert filled("promote", "cats@1", "prod") == "cats@prod -> 1\n"
    assert filled("promote", "cats@2", "prod") == "cats@prod -> 2 (was 1)\n"
    assert filled("promote", "cats@2", "prod") == "cats@prod -> 2 already\n"
    assert filled("promote", "cats@2", "prod", "--canary", "3=0.1") == (
        "cats@prod -> 2 (90 %) and 3 (10 %) (was 2)\n"
    )
    assert filled("promote", "cats@2", "prod", "--canary", "3=0.1").endswith("already\n")
    assert filled("rollback", "cats@prod").startswith("cats@prod -> 2 (was 2 (90 %)")
    assert filled("rollback", "cats@prod") == "cats@prod -> 1 (was 2)\n"
    lines = [re.split(r"  +", line) for line in filled("log", "cats@prod").splitlines()]
    assert [[number, action, targets] for number, _, action, targets in lines] == [
        ["1", "promote", "1"],
        ["2", "promote", "2"],
        ["3", "promote", "2 (90 %) and 3 (10 %)"],
        ["4", "rollback to entry 2", "2"],
        ["5", "rollback to entry 1", "1"],
    ]


def test_an_alias_may_be_promoted_to_where_another_one_points(filled: Run, capsys, store: str):
    filled("promote", "cats@2", "canary")
    assert filled("promote", "cats@canary", "prod") == "cats@prod -> 2\n"
    filled("promote", "cats@2", "canary", "--canary", "3=0.5")
    code, line = fails(capsys, "promote", "cats@canary", "prod", "--registry", store)
    assert (code, line) == (
        1,
        "xc-ray: cats@canary points at two versions; say which: cats@2 or cats@3",
    )


# ---------------------------------------------------------------- folders


def test_pull_makes_a_folder_that_peft_and_the_pipeline_read(filled: Run, home: Path, monkeypatch):
    monkeypatch.chdir(home)
    assert filled("pull", "cats@1") == f"{home / 'cats-1'}\n"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (home / "cats-1" / name).read_bytes() == (home / "lora-1" / name).read_bytes()
    assert filled("pull", "xc", "model") == f"{home / 'model'}\n"
    assert Pipeline.load(home / "model", device="cpu").chat("Hi", **GREEDY)[0]


def test_export_takes_folders_as_well_and_needs_no_registry_then(
    tiny, home: Path, capsys, store: str
):
    lora = write_adapter(home / "lora", tiny_config("2.5"))
    argv = ("export", "--merge", str(tiny("2.5")), str(lora), str(home / "merged"))
    assert cli.main(["registry", *argv, "--registry", store]) == 0
    assert capsys.readouterr().out.startswith(f"{home / 'merged'}: logits differ by at most ")
    assert not Path(store).exists()
    assert Pipeline.load(home / "merged", device="cpu").chat("Hi", **GREEDY)[0]


def test_an_adapter_is_merged_into_its_own_base_only(
    filled: Run, tmp_path: Path, capsys, store: str, tiny
):
    other = make_model(tmp_path / "other", "2.5", seed=5)
    filled("import", str(other), "--name", "other")
    for base in ("other", str(other)):
        argv = ("export", "--merge", base, "cats", str(tmp_path / "m"), "--registry", store)
        code, line = fails(capsys, *argv)
        assert code == 1
        assert re.fullmatch(
            rf"xc-ray: cats was trained on the base sha256:\w+, and {base} is sha256:\w+; name its "
            r"own base \(xc-ray registry show tells it\)",
            line,
        )
    assert filled("export", "--merge", str(tiny("2.5")), "cats", str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        ("cats", "cats", "cats is of kind adapter, expected the base here"),
        ("xc", "xc", "xc is of kind base, expected the adapter here"),
        ("xc", "dogs", "'dogs' is not in the registry"),
        ("xc", "no/where", "'no/where' is no name in the registry"),
    ],
)
def test_export_says_what_is_not_the_kind_that_it_needs(
    filled: Run, capsys, store: str, tmp_path: Path, base: str, adapter: str, message: str
):
    argv = ("export", "--merge", base, adapter, str(tmp_path / "m"), "--registry", store)
    code, line = fails(capsys, *argv)
    assert (code, message in line) == (1, True)


# ---------------------------------------------------------------- verify and gc


def test_verify_names_the_damage_and_exits_with_1(filled: Run, store: str, capsys):
    assert filled("verify") == "everything is as it was written\n"
    assert json.loads(filled("verify", "cats", "--json"))["sound"] is True
    (file, *_) = json.loads(filled("show", "cats@2", "--json"))["files"]
    Path(store, blob_key(file["sha256"])).write_bytes(b"no")
    assert cli.main(["registry", "verify", "--json", "--registry", store]) == 1
    captured = capsys.readouterr()
    assert captured.err.endswith(f"xc-ray: 1 problems in the registry file://{store}\n")
    document = json.loads(captured.out)
    assert document["sound"] is False
    assert f"cats@2 {file['path']}" in document["problems"][0]


def test_gc_only_says_what_it_would_delete_until_told_to(filled: Run, store: str):
    stray, young = (Path(store, blob_key(c * 64)) for c in "ab")
    for path in (stray, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 2_500)
    os.utime(stray, (time.time() - 100_000,) * 2)
    would = "blobs (2.5 kB) and 0 temporary files; 1 blobs are younger than 24 hours\n"
    assert filled("gc") == f"would delete 1 {would}"
    assert json.loads(filled("gc", "--json")) == {
        "registry": f"file://{store}",
        "deleted": False,
        "blobs": [blob_key("a" * 64)],
        "size": 2500,
        "waiting": 1,
        "leftovers": [],
        "probes": 0,
    }
    assert filled("gc", "--delete") == f"deleted 1 {would}"
    assert (stray.exists(), young.exists()) == (False, True)
    assert filled("gc", "--delete", "--grace", "0").startswith("deleted 1 blobs")
    assert not young.exists()
    assert filled("verify") == "everything is as it was written\n"


# ---------------------------------------------------------------- which store


def test_the_users_own_folder_is_the_default(tiny, home: Path, capsys):
    assert cli.main(["registry", "import", str(tiny("2.5")), "--name", "xc"]) == 0
    assert capsys.readouterr().err.startswith(f"registry: file://{home}/data/xc_ray/registry\n")
    assert (home / "data/xc_ray/registry/versions/xc/00000001.json").exists()


def test_the_store_may_come_from_a_serve_or_another_config(filled: Run, home: Path, capsys, store):
    serve = home / "serve.yaml"
    serve.write_text(
        "applications:\n  - name: xc_ray\n    import_path: xc_ray.serve.app:build\n"
        f"    args: {{model: demo, registry: {store}}}\n"
    )
    train = home / "train.yaml"
    train.write_text(f"base: xc\nregistry: file://{store}\n")
    for config in (serve, train):
        assert cli.main(["registry", "show", "cats@1", "--config", str(config)]) == 0
        assert capsys.readouterr().err == f"registry: file://{store}\n"


def test_the_shipped_config_means_the_users_own_folder(home: Path, capsys):
    code, line = fails(capsys, "list", "--config", str(ROOT / "serve_config.yaml"))
    assert (code, f"there is no registry at file://{home}/data/xc_ray/registry" in line) == (
        1,
        True,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: demo\n", "has neither `applications:` nor `registry:`; use --registry"),
        ("applications: [{nam: x}]\n", "unknown key 'nam'; did you mean 'name'?"),
        ("- 1\n", "holds no keys with values"),
        ("a: [\n", "is not YAML"),
        (None, "cannot read"),
    ],
)
def test_a_config_without_a_store_is_told(home: Path, capsys, text: str | None, message: str):
    path = home / "c.yaml"
    if text is not None:
        path.write_text(text)
    code, line = fails(capsys, "list", "--config", str(path))
    assert (code, message in line) == (1, True)


@pytest.mark.parametrize(
    "argv",
    [
        ("list",),
        ("show", "cats"),
        ("promote", "cats@1", "prod"),
        ("rollback", "cats@prod"),
        ("log", "cats@prod"),
        ("pull", "cats"),
        ("push", "x", "--name", "cats", "--base", "xc"),
        ("export", "--merge", "xc", "cats", "out"),
        ("verify",),
        ("gc", "--delete"),
    ],
)
def test_a_folder_that_nobody_published_to_is_named_and_not_made(
    capsys, store: str, argv: tuple[str, ...]
):
    code, line = fails(capsys, *argv, "--registry", store)
    assert (code, line) == (
        1,
        f"xc-ray: there is no registry at file://{store}; xc-ray registry import PATH_OR_ID --name "
        "NAME begins one",
    )
    assert not Path(store).exists()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["lst"], "invalid choice: 'lst'"),
        (["import", "demo"], "the following arguments are required: --name"),
        (["import", "demo", "--name", "Xc"], "--name: 'Xc' is no name in the registry; it is 1 to"),
        (["show", "cats@@1"], "'cats@@1' is no reference"),
        (["show", "cats@0"], "'0' is neither a version"),
        (["log", "cats"], "'cats' names no alias; write NAME@ALIAS"),
        (["rollback", "cats@3"], "'cats@3' names no alias; write NAME@ALIAS"),
        (["promote", "cats@1", "Prod"], "'Prod' is no alias"),
        (["promote", "cats@1", "prod", "--canary", "2"], "'2' is not VERSION=SHARE"),
        (["promote", "cats@1", "prod", "--canary", "2=1"], "with a share between 0 and 1"),
        (["push", "x", "--name", "c", "--base", "b", "--metric", "loss"], "is not NAME=NUMBER"),
        (["push", "x", "--name", "c", "--base", "b", "--metric", "loss=nan"], "is not NAME=NUMBER"),
        (["gc", "--grace", "-1"], "'-1' is not a number of hours"),
        (["export", "xc", "cats", "out"], "the following arguments are required: --merge"),
        (["list", "--registry", "x", "--config", "y"], "not allowed with argument --registry"),
    ],
)
def test_wrong_usage_is_told_with_exit_code_2(argv: list[str], message: str, capsys):
    code, line = fails(capsys, *argv)
    assert (code, line.startswith("xc-ray registry")) == (2, True)
    assert message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "dogs"], "'dogs' is not in the registry"),
        (["show", "cat"], "did you mean cats?"),
        (["show", "cats@4"], "'cats' has no version 4; it has"),
        (["show", "cats@prod"], "'cats' has no alias 'prod'"),
        (["list", "dogs"], "'dogs' is not in the registry"),
        (["log", "cats@prod"], "'cats' has no alias 'prod'"),
        (["rollback", "cats@prod"], "'cats' has no alias 'prod'"),
        (["promote", "cats", "prod"], "say which version of cats: cats@VERSION"),
        (["promote", "cats@9", "prod"], "'cats' has no version 9"),
        (["promote", "cats@1", "prod", "--canary", "9=0.1"], "'cats' has no version 9"),
        (["promote", "cats@1", "prod", "--canary", "1=0.1"], "points at a version once"),
        (["pull", "cats@1", "/no/where/x"], "/no/where is not a folder; make it first"),
        (["import", "no-such", "--name", "xc"], "no-such is no folder here"),
        (["import", "demo", "--name", "cats"], "'cats' is of kind adapter"),
        (["push", "no-such", "--name", "cats", "--base", "xc"], "no-such"),
        (["push", "no-such", "--name", "dogs", "--base", "cats"], "cats is an adapter of xc"),
        (["push", "x", "--name", "dogs", "--base", "xc", "--parent", "cats@9"], "no version 9"),
        (["verify", "dogs"], "'dogs' is not in the registry"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(filled: Run, capsys, store, argv, message):
    before = sorted(p for p in Path(store).rglob("*") if "blobs" not in p.parts)
    code, line = fails(capsys, *argv, "--registry", store)
    assert (code, line.startswith("xc-ray: ")) == (1, True)
    assert message in line
    assert sorted(p for p in Path(store).rglob("*") if "blobs" not in p.parts) == before


def test_a_disk_that_cannot_be_written_is_one_line(filled: Run, capsys, store: str):
    code, line = fails(capsys, "pull", "cats@1", "/proc/x", "--registry", store)
    assert code == 1
    assert re.fullmatch(r"xc-ray: \S*/proc/\S+: No such file or directory", line)


def test_keys_in_a_setting_are_refused_and_never_printed(capsys):
    code, line = fails(capsys, "list", "--registry", "s3://AKIA:tops3cret@bucket/x")
    assert (code, "holds credentials" in line, "tops3cret" in line) == (1, True, False)


def test_memory_is_no_store_for_a_command(capsys):
    code, line = fails(capsys, "import", "demo", "--name", "xc", "--registry", "memory://")
    assert (code, line) == (
        1,
        "xc-ray: memory:// ends with this command; give a folder or a bucket",
    )


def test_a_bucket_that_is_missing_is_named_with_what_to_do(server: S3Server, capsys):
    code, line = fails(capsys, "list", "--registry", server.url("no-such-bucket"))
    assert code == 1
    for part in ("'no-such-bucket'", server.endpoint, "HTTP 404 NoSuchBucket", "create the bucket"):
        assert part in line


@pytest.mark.parametrize("answers", [False, True])
def test_a_wrong_endpoint_is_told_within_a_bounded_time(server: S3Server, answers: bool):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:  # connections, but never a byte
            listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        done = process("list", "--registry", f"s3://bucket?endpoint={endpoint}&timeout_s=1")
        took = time.monotonic() - began
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(
        rf"xc-ray: cannot list '.*' in bucket 'bucket' at {endpoint}", last(done.stderr)
    )
    assert "check the endpoint" in last(done.stderr)
    assert took < 30


def last(text: str) -> str:
    return text.splitlines()[-1]


# ---------------------------------------------------------------- killed, interrupted, watched


def test_help_answers_without_loading_anything_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command("import", "--help")[1:]],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout.split()[:4]) == (
        0,
        ["usage:", "xc-ray", "registry", "import"],
    )
    loaded = set(re.findall(r"\|\s+([a-zA-Z]\w*)", done.stderr))
    assert "argparse" in loaded
    assert not loaded & {"torch", "obstore", "numpy", "ray", "transformers"}


def test_looking_and_promoting_load_no_torch(filled: Run, store: str):
    for argv in (("list",), ("show", "cats"), ("promote", "cats@1", "prod"), ("gc",)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command(*argv, "--registry", store)[1:]],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0
        loaded = set(re.findall(r"\|\s+([a-zA-Z]\w*)", done.stderr))
        assert "obstore" in loaded
        assert not loaded & {"torch", "ray", "transformers"}


def test_an_import_that_is_killed_is_whole_or_absent_and_runs_again(tiny, store: str):
    draw = random.Random(seed := random.SystemRandom().randrange(10**6))
    argv = ("import", str(tiny("2.5")), "--name", "xc", "--registry", store)
    began = time.monotonic()
    assert process(*argv).returncode == 0
    whole_s = time.monotonic() - began
    shutil.rmtree(store)
    registry = Registry.open(store)
    for _ in range(3):
        running = started(*argv)
        # Most of the time goes into loading torch; what is interesting is at the end.
        time.sleep(whole_s * draw.uniform(0.6, 1.0))
        running.kill()
        running.communicate(timeout=60)
        assert registry.verify() == [], seed
        assert registry.versions("xc") in ([], [1]), seed
    again = process(*argv)
    assert (again.returncode, again.stdout) == (0, "xc@1\n"), seed
    assert registry.verify() == []


def test_ctrl_c_ends_an_import_that_waits_for_the_store_and_it_runs_again(server: S3Server, tiny):
    bucket = server.make_bucket()
    argv = ("import", str(tiny("2.5")), "--name", "xc", "--registry")
    with s3_proxy(server.endpoint) as proxy:
        # Uploads get no answer: their threads cannot end by themselves.
        proxy.fault = lambda asked: (
            "hang" if asked.method == "PUT" and "/blobs/" in asked.path else None
        )
        running = started(*argv, server.url(bucket, endpoint=proxy.endpoint))
        wait_for(lambda: any("/blobs/" in r.path for r in proxy.requests if r.method == "PUT"))
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = running.communicate(timeout=60)
        took = time.monotonic() - began
    assert (running.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert took < 10
    done = process(*argv, server.url(bucket))
    assert (done.returncode, done.stdout) == (0, "xc@1\n")


def test_ctrl_c_ends_a_pull_and_it_runs_again(server: S3Server, tiny, tmp_path: Path):
    bucket, target = server.make_bucket(), tmp_path / "pulled"
    where = ("--registry", server.url(bucket))
    assert process("import", str(tiny("2.5")), "--name", "xc", *where).returncode == 0
    with s3_proxy(server.endpoint) as proxy:
        proxy.fault = lambda asked: "hang_body" if asked.is_blob else None
        url = server.url(bucket, endpoint=proxy.endpoint)
        running = started("pull", "xc", str(target), "--registry", url)
        wait_for(lambda: any(asked.is_blob for asked in proxy.requests))
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 130
    assert not target.exists()
    done = process("pull", "xc", str(target), *where)
    assert (done.returncode, done.stdout) == (0, f"{target}\n")
    assert {p.name for p in target.iterdir()} == {p.name for p in tiny("2.5").iterdir()}
    assert [p.name for p in tmp_path.iterdir() if "pulled" in p.name] == ["pulled"]


def wait_for(true: Callable[[], bool], limit_s: float = 100) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def test_a_terminal_shows_a_bar_and_results_stay_apart_from_it(filled: Run, store: str):
    ours, theirs = os.openpty()
    running = subprocess.Popen(
        command("verify", "--registry", store), cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    out, _ = running.communicate(timeout=100)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # the end of a terminal
        pass
    os.close(ours)
    assert (running.returncode, out) == (0, b"everything is as it was written\n")
    assert re.search(rb"\r\[#+-*\] +\d+%  [\d.]+ of [\d.]+ kB", shown)
    assert shown.endswith(b"\r\x1b[K")
