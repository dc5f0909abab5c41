"""A small data set of texts and pictures, checked and stored for the tiny model; a run of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from xc_ray.config import DataFile, DataOptions
from xc_ray.model.weights import Checkpoint
from xc_ray.prompt.tokenizer import TOKENIZER_FILE, Tokenizer
from xc_ray.train.preflight import preflight
from xc_ray.train.rows import CheckedRow
from xc_ray.train.store import write_rows


@pytest.fixture(scope="session")
def checked_rows(lessons: Path, tiny: Callable[..., Path]) -> list[CheckedRow]:
    """Its rows for the tiny 2.5 model."""
    folder = tiny("2.5")
    options = DataOptions.model_validate({"train": str(lessons), "max_tiles": 4})
    config = Checkpoint.open(folder).config
    tokenizer = Tokenizer(folder / TOKENIZER_FILE)
    return preflight([DataFile(path=str(lessons))], options, config, tokenizer).rows


@pytest.fixture(scope="session")
def stored(checked_rows: list[CheckedRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a worker reads them."""
    path = tmp_path_factory.mktemp("stored") / "rows.arrow"
    write_rows(fs.LocalFileSystem(), str(path), checked_rows)
    return path


@pytest.fixture
def values(tmp_path: Path, tiny: Callable[..., Path], lessons: Path) -> dict[str, Any]:
    """A sound configuration, to be broken."""
    return {
        "model": str(tiny("2.5")),
        "name": "run",
        "storage": str(tmp_path / "runs"),
        "registry": str(tmp_path / "registry"),
        "data": {"train": str(lessons), "max_tiles": 2},
    }
