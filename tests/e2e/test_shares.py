"""Encoders and decoders that share the GPUs of one machine: each decoder gets a GPU."""

import json
import subprocess

import httpx
import pytest
import yaml

from tests.e2e.ray_cluster import BIN, ray_cluster
from tests.e2e.serve_run import ROOT, free_port
from xc_ray.config import ServeFile

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_GPUS = 3
HEAD = "# controller_options:"


def test_with_the_packing_of_serve_config_each_decoder_has_a_gpu() -> None:
    """The block that stands there as a comment. Ray is only told of GPUs, nothing uses them."""
    port = free_port()
    config = {
        "http_options": {"port": port},
        **yaml.safe_load(packing()),
        "applications": [
            {
                "name": "shares",
                "import_path": "tests.e2e.shares_app:build",
                "args": {"num": NUM_GPUS},
            }
        ],
    }
    gpus = json.dumps({"GPU": NUM_GPUS})
    with ray_cluster(4, RAY_OVERRIDE_RESOURCES=gpus, PYTHONPATH=str(ROOT)) as cluster:
        file = cluster.home / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        subprocess.run(
            [BIN / "serve", "deploy", "-a", cluster.dashboard, str(file)],
            env=dict(cluster.environment),
            check=True,
            capture_output=True,
            timeout=60,
        )
        found: dict[str, list[list[int]]] = {}

        def all_are_there() -> bool:
            answer = httpx.get(f"http://127.0.0.1:{port}", timeout=5)
            found.update(answer.raise_for_status().json())
            return all(len(found[name]) == NUM_GPUS for name in ("decoder", "encoder"))

        cluster.wait_until(all_are_there, cluster.nodes[0])
    everywhere = [[i] for i in range(NUM_GPUS)]
    assert sorted(found["decoder"]) == everywhere
    assert sorted(found["encoder"]) == everywhere


def packing() -> str:
    """The lines, without their "# "."""
    lines = (ROOT / "serve_config.yaml").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(HEAD))
    block = []
    for line in lines[start:]:
        if not line.startswith("# "):
            break
        block.append(line.removeprefix("# "))
    return "\n".join(block)


def test_the_block_is_one_that_serve_file_knows() -> None:
    text = (ROOT / "serve_config.yaml").read_text()
    whole = yaml.safe_load(packing()) | yaml.safe_load(text)
    assert ServeFile.model_validate(whole).controller_options is not None
