"""`python -m xc_ray train` as a process of its own, with a Ray cluster of its own unless told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

WAIT_S = 240.0
STEPS = 60
_WORKER = re.compile(r"pid=(\d+)\) world_rank=(\d+)")


def base_config(folder: Path, model: Path | str, data: Path | str, **more: Any) -> dict[str, Any]:
    """A run of 60 steps by two workers, on CPU, with a checkpoint each ten."""
    return {
        "model": str(model),
        "name": "run",
        "storage": str(folder / "runs"),
        "registry": str(folder / "registry"),
        "data": {"train": str(data), "max_tiles": 2},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 0.01},
        "checkpoints": {"every_steps": 10},
        "validation": {"every_steps": 20, "max_tokens": 8},
        "workers": {"num": 2, "num_cpus": 0.5},
    } | more


class Training:
    """One start of the command; a context that ends the processes it began."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *options: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        # A cluster of its own, whatever other tests have running.
        ray = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
        file = folder / "train.yaml"
        file.write_text(yaml.safe_dump(dict(config)))
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        self.out = self.log.with_suffix(".out")
        with self.log.open("w") as log, self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xc_ray", "train", str(file), *options],
                stdout=out,
                stderr=log,
                env={**os.environ, **ray, **(env or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.config["storage"], self.config["name"])

    @property
    def text(self) -> str:
        return self.log.read_text() + self.out.read_text()

    @property
    def workers(self) -> list[int]:
        """The workers' pids by rank, of the last start of the group."""
        found = {int(rank): int(pid) for pid, rank in _WORKER.findall(self.text)}
        return [found[rank] for rank in sorted(found)]

    def wait_for_checkpoints(self, count: int) -> None:
        """Until so many have been made."""
        self.wait_until(lambda: self.text.count("saved a checkpoint") >= count)

    def wait_until(self, true: Any) -> None:
        end = time.monotonic() + WAIT_S
        while not true():
            assert self.process.poll() is None, self.text[-4000:]
            assert time.monotonic() < end, self.text[-4000:]
            time.sleep(0.1)

    def wait(self, code: int = 0) -> dict[str, Any]:
        """The summary, once the command has ended."""
        found = self.process.wait(WAIT_S)
        assert found == code, self.text[-6000:]
        if code not in (0, 3):
            return {}
        summary: dict[str, Any] = json.loads(self.out.read_text().splitlines()[-1])
        return summary


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a finished run's metrics say, without the times."""
    timed = ("tokens_per_s", "samples_per_s", "step_s", "peak_memory_bytes", "time")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in record.items() if k not in timed}
        for record in found
        if record["kind"] == kind
    ]
