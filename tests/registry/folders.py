"""Small folders to publish: as large as a test needs, with the names that peft gives its files."""

import os
from pathlib import Path

from xc_ray.registry.manifest import BaseRef

DEMO = BaseRef(name="demo", digest="sha256:" + "d" * 64)


def adapter_folder(folder: Path, *, size: int = 3_000) -> Path:
    """Two files: a config that is always the same, and random bytes for the weights."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(size))
    return folder
