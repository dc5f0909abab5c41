import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from xc_ray import cli
from xc_ray.config import ServeFile, TrainConfig
from xc_ray.errors import ConfigError
from xc_ray.k8s import merged, render, stale

ROOT = Path(__file__).parents[1]
SERVE = "k8s/base/serving/serve.generated.yaml"
TRAIN = "k8s/base/training/train.generated.yaml"
BOARD = "k8s/base/serving/board.generated.yaml"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources and manifests, to be changed."""
    for name in ("serve_config.yaml", "train_config.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("grafana", "k8s"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def served(root: Path, overlay: str | None = None) -> dict[str, Any]:
    """The Serve file of the base, or of an overlay."""
    path = root / (f"k8s/overlays/{overlay}/serve.generated.yaml" if overlay else SERVE)
    document = yaml.safe_load(render(root)[path])
    values: dict[str, Any] = yaml.safe_load(document["spec"]["serveConfigV2"])
    return values


def test_what_is_in_the_repository_is_what_is_rendered() -> None:
    assert stale(render(ROOT)) == [], "run `xc-ray k8s render`"
    written = set(ROOT.glob("k8s/**/*.generated.yaml"))
    assert written == set(render(ROOT))


def test_a_change_of_a_source_reaches_every_file_that_is_made_of_it(checkout: Path) -> None:
    change(checkout / "serve_config.yaml", "max_ongoing_requests: 64", "max_ongoing_requests: 65")
    assert {path.name for path in stale(render(checkout))} == {"serve.generated.yaml"}
    assert len(stale(render(checkout))) == len(list(checkout.glob("k8s/**/serve.generated.yaml")))
    change(checkout / "train_config.yaml", "rank: 16", "rank: 8")
    change(checkout / "grafana/xc_ray.json", '"30s"', '"10s"')
    assert len(stale(render(checkout))) == len(list(checkout.glob("k8s/**/*.generated.yaml")))


def test_the_base_is_the_shipped_file_with_an_address_and_keys() -> None:
    shipped = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values = served(ROOT)
    assert values["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert values["proxy_location"] == "EveryNode"
    (ours,), (theirs,) = values["applications"], shipped["applications"]
    assert ours["args"]["keys"].startswith("/etc/xc_ray/keys/")
    assert ours["args"]["model"] == theirs["args"]["model"]
    assert ours["deployments"] == theirs["deployments"]


def test_an_overlay_comes_on_top_of_the_base(checkout: Path) -> None:
    (checkout / "k8s/overlays/mine").mkdir()
    settings = {
        "args": {"decoder": {"max_num_seqs": 64}, "registry": None},
        "deployments": {"Decoder": {"num_replicas": 3}},
        "train": {"name": "mine", "validation": {"every_steps": 5}},
    }
    (checkout / "k8s/overlays/mine/settings.yaml").write_text(yaml.safe_dump(settings))
    (application,) = served(checkout, "mine")["applications"]
    assert application["args"]["decoder"] == {"max_num_seqs": 64}
    assert application["args"]["keys"] == served(checkout)["applications"][0]["args"]["keys"]
    assert "registry" not in application["args"]
    replicas = {d["name"]: d["num_replicas"] for d in application["deployments"]}
    assert replicas == {"Ingress": 1, "Decoder": 3, "VisionEncoder": 1}
    document = yaml.safe_load(render(checkout)[checkout / "k8s/overlays/mine/train.generated.yaml"])
    config = TrainConfig.model_validate(yaml.safe_load(document["data"]["train_config.yaml"]))
    assert (config.name, config.validation.every_steps) == ("mine", 5)
    assert config.storage == "s3://xc-ray/runs"


def test_an_overlay_has_only_files_whose_settings_it_changes(checkout: Path) -> None:
    (checkout / "k8s/overlays/mine").mkdir()
    (checkout / "k8s/overlays/mine/settings.yaml").write_text("train: {name: mine}")
    made = {path.name for path in render(checkout) if path.parent.name == "mine"}
    assert made == {"train.generated.yaml"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("arg: {}", "settings.yaml: unknown key 'arg'; did you mean 'args'?"),
        (
            "args: {modle: demo}",
            "serve_config.yaml with the settings of k8s/: applications.0.args: "
            "unknown key 'modle'; did you mean 'model'?",
        ),
        ("args: {insecure: true}", "keys is /etc/xc_ray/keys/keys.yaml and insecure is true"),
        ("deployments: {Decodr: {}}", "settings.yaml: deployments.Decodr"),
        ("deployments: {Decoder: {num_replica: 2}}", "did you mean 'num_replicas'?"),
        ("train: {lora: {rank: 0}}", "train_config.yaml with the settings of k8s/: lora.rank"),
    ],
)
def test_settings_that_make_no_valid_file_are_refused(
    checkout: Path, settings: str, message: str
) -> None:
    (checkout / "k8s/overlays/kind-cpu/settings.yaml").write_text(settings)
    with pytest.raises(ConfigError) as caught:
        render(checkout)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_mistake_of_a_source_is_told_by_its_own_name(checkout: Path) -> None:
    change(checkout / "train_config.yaml", "rank: 16", "rnk: 16")
    with pytest.raises(ConfigError, match=r"train_config\.yaml: lora: unknown key 'rnk'"):
        render(checkout)


def test_a_folder_without_the_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*settings\.yaml: No such file"):
        render(tmp_path)


def test_a_patch_merges_takes_away_and_replaces() -> None:
    values = {"a": {"b": 1, "c": [1]}, "d": 2, "e": 3}
    patch = {"a": {"b": None, "c": [2]}, "d": {"f": {"g": None, "h": 4}}, "i": None}
    assert merged(values, patch) == {"a": {"c": [2]}, "d": {"f": {"h": 4}}, "e": 3}
    assert values == {"a": {"b": 1, "c": [1]}, "d": 2, "e": 3}


def test_the_board_is_there_to_the_letter() -> None:
    document = yaml.safe_load(render(ROOT)[ROOT / BOARD])
    assert document["data"]["xc_ray.json"] == (ROOT / "grafana/xc_ray.json").read_text()


def test_the_command_writes_what_has_changed_and_says_so(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["k8s", "render", str(checkout)]) == 0
    assert capsys.readouterr().out == ""
    change(checkout / "train_config.yaml", "rank: 16", "rank: 8")
    before = (checkout / TRAIN).read_text()
    assert cli.main(["k8s", "render", "--check", str(checkout)]) == 1
    assert (checkout / TRAIN).read_text() == before
    assert f"{checkout / TRAIN}\n" in capsys.readouterr().out
    assert cli.main(["k8s", "render", str(checkout)]) == 0
    assert "rank: 8" in (checkout / TRAIN).read_text()
    assert cli.main(["k8s", "render", "--check", str(checkout)]) == 0


def test_the_command_tells_a_refusal_in_one_line(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "k8s/base/settings.yaml").write_text("args: {model: [1]}")
    assert cli.main(["k8s", "render", str(checkout)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "applications.0.args.model" in err


def test_every_rendered_file_is_one_that_serve_and_train_read() -> None:
    for path, text in render(ROOT).items():
        document = yaml.safe_load(text)
        if path.name == "serve.generated.yaml":
            ServeFile.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
        elif path.name == "train.generated.yaml":
            TrainConfig.model_validate(yaml.safe_load(document["data"]["train_config.yaml"]))
