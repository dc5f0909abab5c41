"""Writes the generated files of k8s/ from the YAML files that are used everywhere else.

    serve_config.yaml  + settings.yaml -> serve.generated.yaml, the serveConfigV2 of the RayService
    train_config.yaml  + settings.yaml -> train.generated.yaml, the ConfigMap that the RayJob reads
    grafana/xc_ray.json                -> board.generated.yaml, the ConfigMap of the board

A `settings.yaml` holds what differs on Kubernetes; that of an overlay comes on top of that of the
base. They are JSON merge patches (RFC 7386): `null` takes a key away.
"""

from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import Field, ValidationError

from xc_ray.config import ServeFile, Strict, TrainConfig, first_of, read_as
from xc_ray.errors import ConfigError

SERVICE: Final = "xc-ray"
TRAINING: Final = "xc-ray-train"
BOARD: Final = "xc-ray-board"
SETTINGS: Final = "settings.yaml"
SERVE_FILE: Final = "serve_config.yaml"
TRAIN_FILE: Final = "train_config.yaml"
BOARD_FILE: Final = "xc_ray.json"
HEADER: Final = "# Written by `xc-ray k8s render` from {}.\n"


class Settings(Strict):
    """What differs on Kubernetes from serve_config.yaml and train_config.yaml.

    `serve` is for keys at the top of the Serve file, `args` and `deployments` (by name) for those
    of its application; `train` for those of the training file.
    """

    serve: dict[str, Any] = Field(default_factory=dict)
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: dict[Literal["Ingress", "Decoder", "VisionEncoder"], dict[str, Any]] = Field(
        default_factory=dict
    )
    train: dict[str, Any] = Field(default_factory=dict)


def render(root: Path) -> dict[Path, str]:
    """Every generated file of a checkout, by its path.

    An overlay has those files whose settings it changes.

    Raises:
        ConfigError: a source that is missing, or settings that make an invalid file.
    """
    base, overlays = root / "k8s/base", root / "k8s/overlays"
    shared = read_as(Settings, base / SETTINGS)
    files = {
        base / "serving/serve.generated.yaml": _service(root, [shared]),
        base / "training/train.generated.yaml": _training(root, [shared]),
        base / "serving/board.generated.yaml": _board(root),
    }
    for path in sorted(overlays.glob(f"*/{SETTINGS}")):
        own = read_as(Settings, path)
        if own.serve or own.args or own.deployments:
            files[path.with_name("serve.generated.yaml")] = _service(root, [shared, own])
        if own.train:
            files[path.with_name("train.generated.yaml")] = _training(root, [shared, own])
    return files


def stale(files: dict[Path, str]) -> list[Path]:
    """Those of `files` that are not there with this content."""
    return [
        path
        for path, text in files.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def merged(values: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`values` with a JSON merge patch on top (RFC 7386)."""
    result = dict(values)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            below = result.get(key)
            result[key] = merged(below if isinstance(below, dict) else {}, value)
        else:
            result[key] = value
    return result


def _service(root: Path, layers: list[Settings]) -> str:
    values = _values(ServeFile, root / SERVE_FILE)
    (application,) = values.pop("applications")
    for layer in layers:
        values = merged(values, layer.serve)
        application = merged(application, {"args": layer.args})
        application["deployments"] = [
            merged(deployment, layer.deployments.get(deployment["name"], {}))
            for deployment in application["deployments"]
        ]
    values["applications"] = [application]
    _check(ServeFile, values, SERVE_FILE)
    patch = _object("RayService", "ray.io/v1", SERVICE)
    return _text(patch | {"spec": {"serveConfigV2": _yaml(values)}}, SERVE_FILE)


def _training(root: Path, layers: list[Settings]) -> str:
    values = _values(TrainConfig, root / TRAIN_FILE)
    for layer in layers:
        values = merged(values, layer.train)
    _check(TrainConfig, values, TRAIN_FILE)
    config_map = _object("ConfigMap", "v1", TRAINING)
    return _text(config_map | {"data": {TRAIN_FILE: _yaml(values)}}, TRAIN_FILE)


def _board(root: Path) -> str:
    path = root / "grafana" / BOARD_FILE
    try:
        board = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror or e}") from None
    config_map = _object("ConfigMap", "v1", BOARD)
    config_map["metadata"]["labels"] = {"grafana_dashboard": "1"}  # what Grafana's sidecar takes
    return _text(config_map | {"data": {BOARD_FILE: board}}, f"grafana/{BOARD_FILE}")


def _object(kind: str, version: str, name: str) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}


def _values(model: type[Strict], path: Path) -> dict[str, Any]:
    read_as(model, path)  # a mistake of the file itself is told by its name
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def _check(model: type[Strict], values: dict[str, Any], source: str) -> None:
    try:
        model.model_validate(values)
    except ValidationError as e:
        raise ConfigError(f"{source} with the settings of k8s/: {first_of(e)}") from None


def _text(document: dict[str, Any], source: str) -> str:
    return HEADER.format(f"{source} and settings.yaml") + _yaml(document)


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, which people can read in a diff."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent)
