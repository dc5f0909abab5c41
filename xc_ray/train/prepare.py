"""What a run stands on before a worker is asked for: storage, base, checked rows, and its record.

The record is kept as `run.json`; a run goes on only with what it was begun with.
"""

import hashlib
import logging
import os
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xc_ray.config import DataFile, TrainConfig
from xc_ray.errors import ConfigError, RegistryError
from xc_ray.fingerprint import fingerprint
from xc_ray.hub import find_base, in_registry, resolve_model
from xc_ray.model.config import XComposerConfig
from xc_ray.model.layout import check_layout, read_layout
from xc_ray.prompt.tokenizer import Tokenizer, load_tokenizer
from xc_ray.registry.store import ObjectStore
from xc_ray.train.preflight import Checked, Report, overlap, preflight
from xc_ray.train.publisher import Progress, code_version
from xc_ray.train.rows import CheckedRow

logger = logging.getLogger(__name__)

SHOWN_OVERLAPS = 5


@dataclass(frozen=True)
class Base:
    """The model that is fine-tuned: a name that every node resolves to these files."""

    name: str
    digest: str
    folder: Path
    config: XComposerConfig
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Data:
    """Checked rows; `report` tells of all that was read for them, None where another's does."""

    rows: list[CheckedRow]
    digest: str
    report: Report | None


def open_base(config: TrainConfig) -> Base:
    """The base's files, and what they are called.

    Raises:
        CheckpointError: there is no such model, or it is not whole.
    """
    name = config.model
    if in_registry(name):
        found = find_base(name, config.registry)
        name, digest = found.pinned, found.manifest.digest
        folder = resolve_model(name, config.registry)
    else:
        folder = resolve_model(name)
        if os.path.isdir(os.path.expanduser(name)):
            name = str(folder.absolute())
        digest = fingerprint(folder)
    layout = read_layout(folder)
    check_layout(layout)
    tokenizer = load_tokenizer(folder, layout.config.decoder.vocab_size)
    return Base(name, digest, folder, layout.config, tokenizer)


def read_data(
    config: TrainConfig, base: Base, progress: Progress | None = None
) -> tuple[Data, Data | None]:
    """The training rows and those to validate on, all checked.

    Raises:
        DataError: rows that cannot be learnt from.
    """
    options = config.data

    def shown(what: str, done: int, total: int) -> None:
        if progress is not None:  # which takes large totals for bytes
            progress(f"{what}, {done:,} of {total:,}", done * 100 // (total or 1), 100)

    def checked(files: Sequence[DataFile]) -> Checked:
        return preflight(files, options, base.config, base.tokenizer, progress=shown)

    train = checked(options.train)
    data = Data(train.rows, train.digest, train.report)
    if options.validation is not None:
        other = checked(options.validation)
        for found in overlap(train, other)[:SHOWN_OVERLAPS]:
            logger.warning("%s", found)
        return data, Data(other.rows, other.digest, other.report)
    if options.validation_split:
        return split(data, options.validation_split, config.training.seed)
    return data, None


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Rows to train on and, drawn by the seed, a share of them to validate on; at least one each.

    Raises:
        ConfigError: there is only one row.
    """
    if len(data.rows) < 2:
        raise ConfigError(
            f"data.validation_split is {share:g}, and there is {len(data.rows)} row to divide; "
            "leave it out",
            param="data.validation_split",
        )
    count = min(len(data.rows) - 1, max(1, round(share * len(data.rows))))
    drawn = set(random.Random(seed).sample(range(len(data.rows)), count))
    parts = []
    for name, taken in (("train", False), ("validation", True)):
        rows = [row for i, row in enumerate(data.rows) if (i in drawn) == taken]
        text = f"{data.digest} {name} {share} {seed}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        parts.append(Data(rows, digest, None if taken else data.report))
    return parts[0], parts[1]


def check_writable(store: ObjectStore, name: str) -> None:
    """Writes to the folder of the run `name`, and takes it back.

    Raises:
        ConfigError: the storage cannot be written, or would not outlive this process.
    """
    if store.location.scheme == "memory":
        raise ConfigError("storage memory:// ends with its process; give a folder or a bucket")
    key = f"{name}/probe-{uuid.uuid4().hex}"
    try:
        store.put(key, b"")
        store.delete([key])
    except RegistryError as e:
        raise ConfigError(f"the run's storage cannot be written: {e.message}") from None


def record_of(
    config: TrainConfig, base: Base, data: Data, validation: Data | None
) -> dict[str, Any]:
    """What `run.json` keeps of a run that is begun like this."""
    return {
        "model": config.model,
        "base_digest": base.digest,
        "data_digest": data.digest,
        "validation_digest": validation and validation.digest,
        "weights": [file.weight for file in config.data.train],
        "lora": config.lora.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
        "workers": config.workers.model_dump(mode="json")["num"],
        "config": config.model_dump(mode="json"),
        "code_version": code_version(),
        "begun": time.time(),
    }


def check_same(before: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Refuses to go on with another base, other data or another recipe; both are records.

    Raises:
        ConfigError: names all that differs.
    """
    words = {
        "base_digest": "the base",
        "data_digest": "the training data",
        "validation_digest": "the validation data",
    }
    problems = []
    for key, what in words.items():
        if before.get(key) != now[key]:
            models = f" ({before['model']} then, {now['model']} now)" if "base" in key else ""
            problems.append(f"{what} is another{models}: {before.get(key)} then, {now[key]} now")
    if before.get("weights") != now["weights"]:
        problems.append(
            f"the data sets' weights were {before.get('weights')}, are {now['weights']}"
        )
    for group in ("lora", "training"):
        then = before.get(group, {})
        for key, value in now[group].items():
            if then.get(key) != value:
                problems.append(f"{group}.{key} was {then.get(key)} and is {value}")
    if problems:
        raise ConfigError(
            f"run {name!r} cannot go on: {'; '.join(problems)}. Put it back, or give the new run "
            "another name"
        )
