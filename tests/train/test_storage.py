"""Ray Train's checkpoints in the registry's store: one setting for both, over a real S3 server."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.s3_server import credentials, s3_server
from xc_ray.registry.store import ObjectStore

# One worker reports two checkpoints; the second run of the same name goes on from the last.
TRAIN = """
    import json, os, sys, tempfile
    from pathlib import Path
    import ray
    from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from xc_ray.registry.store import ObjectStore

    def loop(config):
        import ray.train
        start = 0
        if before := ray.train.get_checkpoint():
            with before.as_directory() as folder:
                start = json.loads(Path(folder, "step.json").read_text())
        for step in range(start + 1, start + 3):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "step.json").write_text(json.dumps(step))
                ray.train.report(
                    {"step": step, "start": start}, checkpoint=Checkpoint.from_directory(folder)
                )

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20,
             log_to_driver=False)
    filesystem, path = ObjectStore.open(sys.argv[1]).filesystem()
    steps = []
    for _ in range(2):
        result = TorchTrainer(
            loop,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(
                name="run", storage_filesystem=filesystem, storage_path=path + "/runs",
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()
        steps.append([result.metrics["start"], result.metrics["step"]])
    print(json.dumps({"steps": steps, "path": result.checkpoint.path}))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_run_keeps_its_checkpoints_in_the_store_and_resumes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAIN))
    with s3_server() as server:
        url = server.url(server.make_bucket(), "registry")
        env = {
            **os.environ,
            **server.env,
            "RAY_AUTH_MODE": "disabled",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
        done = subprocess.run(
            [sys.executable, str(script), url],
            env=env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["steps"] == [[0, 2], [2, 4]]
        with credentials(server):
            store = ObjectStore.open(url)
            kept = [e.key for e in store.list("runs/run/") if e.key.endswith("step.json")]
            assert len(kept) == 2
            assert json.loads(store.get(kept[-1])) == 4
            assert told["path"].endswith(kept[-1].removesuffix("/step.json"))
