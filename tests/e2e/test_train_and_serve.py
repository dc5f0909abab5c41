"""From a data set to an answer over HTTP: `xc-ray train` beside a server that runs all the time.

All of it is real: `serve run` with the demo model, the command that trains it on the same Ray, one
registry in a folder between the two, and `xc-ray registry`. Two lessons become two versions of one
adapter: a word, in seconds, and what train_config.yaml teaches as it stands.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from tests.e2e.serve_run import ROOT, ServeRun, ask, image, serve_run, text_of
from tests.e2e.train_run import Training
from xc_ray.demo.drawn.fonts import find_fonts
from xc_ray.demo.drawn.tasks import Sample, held_out_sample
from xc_ray.demo.lesson import lesson_sample
from xc_ray.registry.registry import Registry

LESSON_LIMIT_S = 1200.0  # of a loaded machine; two idle cores take about six minutes
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(LESSON_LIMIT_S + 600)]

QUESTION, WORD = "Say the word.", "pineapple"
POLL_S = 0.5
SWITCH_LIMIT_S = 15.0  # the aim at the default interval, 5 s; of a loaded machine here
DEPLOYMENTS = ("Ingress", "Decoder", "VisionEncoder")
PROD = "demo:json@prod"
NUM = 10  # pictures of each kind
MOST_WRONG = 1
OTHER_SEED = 5  # than the lesson's


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry.open(str(tmp_path_factory.mktemp("registry")))


@pytest.fixture(scope="module")
def server(registry: Registry) -> Iterator[ServeRun]:
    """The demo model, and a registry in which there is nothing yet."""
    args = {"registry": registry.store.url, "adapters": {"poll_s": POLL_S}}
    with serve_run(args) as running:
        yield running


def test_what_is_taught_is_answered_at_once_and_taken_back_by_a_rollback(
    tmp_path: Path, server: ServeRun, registry: Registry
) -> None:
    lesson = [lesson_sample(OTHER_SEED, index) for index in range(NUM)]
    ordinary = ordinary_samples()
    before = [said(server, "demo", sample) for sample in (*lesson, *ordinary)]
    assert num_right(before[:NUM], lesson) == 0
    processes = {name: server.replica(name) for name in DEPLOYMENTS}

    # A loss can hardly be below that: the first version is pushed, and there is no alias yet.
    first = train(tmp_path, word_lesson(tmp_path), server, registry, below=1e-9)
    assert (first["adapter"], first["promoted"]) == ("json@1", False)
    assert first["train_loss"] < 0.1
    registry_command(registry, "promote", "json@1", "prod")
    wait_for_version(server, 1)
    assert word_of(server) == WORD

    second = train(tmp_path, shipped(), server, registry)
    assert (second["adapter"], second["promoted"]) == ("json@2", True)
    wait_for_version(server, 2)
    taught = [said(server, PROD, sample) for sample in lesson]
    assert num_right(taught, lesson) >= NUM - MOST_WRONG, taught
    still = [said(server, PROD, sample) for sample in ordinary]
    assert num_right(still, ordinary) >= num_right(before[NUM:], ordinary) - MOST_WRONG, still
    assert word_of(server) != WORD

    registry_command(registry, "rollback", "json@prod")
    wait_for_version(server, 1)
    assert word_of(server) == WORD
    assert said(server, "demo:json@2", lesson[0]) == taught[0]

    assert [said(server, "demo", sample) for sample in (*lesson, *ordinary)] == before
    assert {name: server.replica(name) for name in DEPLOYMENTS} == processes


# ---------------------------------------------------------------- training


def word_lesson(folder: Path) -> dict[str, Any]:
    """A configuration that teaches to answer with the word."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": WORD}]
    data = folder / "word.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    return {
        "model": "demo",
        "name": "word",
        "data": {"train": str(data)},
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "training": {"max_steps": 40, "batch_size": 8, "learning_rate": 0.01},
        "workers": {"num": 1, "num_cpus": 0.5},
        "publish": {
            "adapter": "json",
            "import_base": True,
            "promote": {"alias": "prod", "metric": "train_loss"},
        },
    }


def shipped() -> dict[str, Any]:
    """train_config.yaml as it stands."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "train_config.yaml").read_text())
    assert {"registry", "storage"}.isdisjoint(config)
    return config


def train(
    folder: Path,
    config: Mapping[str, Any],
    server: ServeRun,
    registry: Registry,
    **promote: float,
) -> dict[str, Any]:
    """Trains an adapter on the server's Ray, into the server's registry; gives the summary."""
    places = {"storage": str(folder / "runs"), "registry": registry.store.url}
    publish = config["publish"] | {"promote": config["publish"]["promote"] | promote}
    # Ray notes there which cluster runs: the server's is used, and no other.
    env = {
        "RAY_ADDRESS": "auto",
        "RAY_TMPDIR": str(server.log.parent),
        "XDG_CACHE_HOME": str(folder / "cache"),  # the lesson is drawn anew
    }
    with Training(folder, {**config, **places, "publish": publish}, env=env) as training:
        training.process.wait(LESSON_LIMIT_S)
        summary = training.wait()
        assert "Ray: the running cluster" in training.text
        return summary


def registry_command(registry: Registry, *words: str) -> None:
    """`xc-ray registry`."""
    command = Path(sys.executable).with_name("xc-ray")
    options = ("--registry", registry.store.url)
    subprocess.run([command, "registry", *words, *options], check=True, timeout=120)


# ---------------------------------------------------------------- asking


def ordinary_samples() -> list[Sample]:
    """Questions of one turn that the demo model was made for."""
    tasks = ("shape", "colour", "chinese_colour", "exists", "add_text_2_digits")
    fonts = find_fonts([])
    return [held_out_sample(task, OTHER_SEED, i, fonts) for task in tasks for i in range(2)]


def word_of(server: ServeRun) -> str:
    """What the alias's version says to the question of the first lesson."""
    return text_of(ask(server, QUESTION, model=PROD, max_tokens=32))


def said(server: ServeRun, model: str, sample: Sample) -> str:
    ((question, _),) = sample.turns
    pictures = [image(png(picture)) for picture in sample.pictures]
    return text_of(ask(server, *pictures, question, model=model, max_tokens=80))


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def num_right(answers: list[str], samples: list[Sample]) -> int:
    return sum(a == s.turns[-1][1] for a, s in zip(answers, samples, strict=True))


def wait_for_version(server: ServeRun, version: int) -> None:
    """Until the alias means it for whoever asks."""
    deadline = time.monotonic() + SWITCH_LIMIT_S
    while version_of_prod(server) != f"demo:json@{version}":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def version_of_prod(server: ServeRun) -> str | None:
    """None while the server does not know the adapter yet."""
    response = ask(server, QUESTION, model=PROD, max_tokens=1)
    if response.status_code == httpx.codes.NOT_FOUND:
        return None
    return str(response.raise_for_status().json()["model"])
