"""Shared fixtures: tiny real checkpoints, a few real pictures, and an S3 server."""

import io
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

# Before torch loads, and for every process that a test starts: on tiny matrices threads of several
# processes only fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shells start background jobs with SIGINT ignored, and children inherit that: the tests that press
# Ctrl-C would press it in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.s3_server import S3Server, credentials, s3_server  # noqa: E402 - as below
from xc_ray.demo.make import make_model  # noqa: E402 - after the settings above
from xc_ray.model.config import FAMILIES, Variant  # noqa: E402 - as above

VARIANTS: tuple[Variant, ...] = tuple(FAMILIES)
COLOURS = ("red", "green", "blue", "orange", "black")


@pytest.fixture
def root_logger_as_it_was() -> Iterator[None]:
    """For tests of what sets the process's log up: afterwards it is as before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Path]:
    """A function that gives the folder of a tiny random checkpoint, made once for each variant."""
    made: dict[Variant, Path] = {}

    def folder(variant: Variant = "2.5") -> Path:
        if variant not in made:
            made[variant] = make_model(tmp_path_factory.mktemp(f"tiny-{variant}"), variant)
        return made[variant]

    return folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A function that draws a picture of a size and gives its file bytes, PNG unless told."""

    def draw(
        width: int = 90, height: int = 60, colour: str = "red", file_format: str = "PNG"
    ) -> bytes:
        image = Image.new("RGB", (width, height), "white")
        box = (width // 8, height // 8, width * 5 // 8, height * 7 // 8)
        ImageDraw.Draw(image).ellipse(box, fill=colour)
        out = io.BytesIO()
        image.save(out, file_format)
        return out.getvalue()

    return draw


@pytest.fixture(scope="session")
def lessons(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> Path:
    """A data set of 45 rows: texts, one picture, two of them, of several sizes."""
    folder = tmp_path_factory.mktemp("lessons")
    for i, colour in enumerate(COLOURS):
        data = picture(40 + 30 * i, 60, colour)
        (folder / f"{colour}.png").write_bytes(data)
    lines = []
    for i in range(45):
        colour, other = COLOURS[i % 5], COLOURS[(i + 2) % 5]
        match i % 3:
            case 0:
                images, question = [], f"Say {colour} {i} times, please." + " Thank you." * (i % 7)
            case 1:
                images, question = [f"{colour}.png"], "<image>Which colour is this?"
            case _:
                images = [f"{colour}.png", f"{other}.png"]
                question = "<image>This and <image> that?"
        answer = " ".join([f"It is {colour}."] * (1 + i % 4))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": images}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def running_server() -> Iterator[S3Server]:
    """A real S3 server, one process for all tests; each takes a bucket of its own."""
    with s3_server() as running:
        yield running


@pytest.fixture
def server(running_server: S3Server) -> Iterator[S3Server]:
    """The server, with its keys in the environment while the test runs."""
    with credentials(running_server):
        yield running_server
