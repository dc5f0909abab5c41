"""From a data set to an answer over HTTP: `xc-ray train` beside a server that runs all the time.

All of it is real: `serve run` with the demo model, the command that trains it on the same Ray, one
registry in a folder between the two, and `xc-ray registry`. What is taught is one word.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serve_run import ServeRun, ask, serve_run, text_of
from tests.e2e.train_run import Training
from xc_ray.registry.registry import Registry

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTION = "Say the word."
POLL_S = 0.5
SWITCH_LIMIT_S = 15.0  # the aim at the default interval, 5 s; of a loaded machine here
DEPLOYMENTS = ("Ingress", "Decoder", "VisionEncoder")


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
    before = text_of(ask(server, QUESTION))
    processes = {name: server.replica(name) for name in DEPLOYMENTS}

    first = teach(tmp_path, server, registry, "pineapple", below=0.1)
    assert (first["adapter"], first["promoted"]) == ("word@1", True)
    assert first["train_loss"] < 0.1
    wait_for_answer(server, "pineapple")

    # A loss can hardly be below that: the second version is pushed, and prod stays where it is.
    second = teach(tmp_path, server, registry, "umbrella", below=1e-9)
    assert (second["adapter"], second["promoted"]) == ("word@2", False)
    assert said(server, "demo:word@prod") == "pineapple"
    assert said(server, "demo:word@2") == "umbrella"

    registry_command(registry, "promote", "word@2", "prod")
    wait_for_answer(server, "umbrella")
    registry_command(registry, "rollback", "word@prod")
    wait_for_answer(server, "pineapple")

    assert said(server, "demo") == before
    assert before not in ("pineapple", "umbrella")
    assert {name: server.replica(name) for name in DEPLOYMENTS} == processes


def teach(
    folder: Path, server: ServeRun, registry: Registry, word: str, below: float
) -> dict[str, Any]:
    """Trains an adapter to answer with a word; gives the summary."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": word}]
    data = folder / f"{word}.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    config = {
        "model": "demo",
        "name": word,
        "storage": str(folder / "runs"),
        "registry": registry.store.url,
        "data": {"train": str(data)},
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "training": {"max_steps": 40, "batch_size": 8, "learning_rate": 0.01},
        "workers": {"num": 1, "num_cpus": 0.5},
        "publish": {
            "adapter": "word",
            "import_base": True,
            "promote": {"alias": "prod", "metric": "train_loss", "below": below},
        },
    }
    # Ray notes there which cluster runs: the server's is used, and no other.
    of_server = {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(server.log.parent)}
    with Training(folder, config, env=of_server) as training:
        summary = training.wait()
        assert "Ray: the running cluster" in training.text
        return summary


def said(server: ServeRun, model: str) -> str:
    return text_of(ask(server, QUESTION, model=model))


def wait_for_answer(server: ServeRun, word: str) -> None:
    """Until the alias means the version that says it; meanwhile every answer is some version's."""
    deadline = time.monotonic() + SWITCH_LIMIT_S
    while (answer := answer_of_prod(server)) != word:
        assert answer in (None, "pineapple", "umbrella")
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)


def answer_of_prod(server: ServeRun) -> str | None:
    """None while the server does not know the adapter yet."""
    response = ask(server, QUESTION, model="demo:word@prod")
    return None if response.status_code == httpx.codes.NOT_FOUND else text_of(response)


def registry_command(registry: Registry, *words: str) -> None:
    """`xc-ray registry`."""
    command = Path(sys.executable).with_name("xc-ray")
    options = ("--registry", registry.store.url)
    subprocess.run([command, "registry", *words, *options], check=True, timeout=120)
