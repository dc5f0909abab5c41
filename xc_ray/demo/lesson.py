# ruff: noqa: RUF001 -- Chinese has commas and marks of its own
"""A small data set to try training with: answers as JSON, which the demo model does not give.

The lesson is pictures of one drawn figure and what it is as JSON. Between its rows stand ordinary
samples of the drawn world with their ordinary answers, so that these stay.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from itertools import count, cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from xc_ray.demo.drawn.answers import Language
from xc_ray.demo.drawn.conversations import Draw
from xc_ray.demo.drawn.drawing import Scene, draw_scene, encode_picture
from xc_ray.demo.drawn.fonts import MATPLOTLIB_FILES, PILLOW_FACE, Fonts, find_fonts
from xc_ray.demo.drawn.layout import Limits, grid_of
from xc_ray.demo.drawn.scenes import figures_scene
from xc_ray.demo.drawn.tasks import CHINESE_SHARE, TASKS, Sample, make_sample, training_sample
from xc_ray.demo.drawn.wording import careless

LESSON_VERSION = 2  # part of the folder's name: raise it when what is drawn or asked changes
QUESTIONS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "Answer as JSON: what is in the picture?",
        "Answer in JSON: what does the picture show?",
        "What is in the picture? Answer as JSON.",
        "What do you see? Answer in JSON.",
        "What is there? Reply in JSON.",
        "Describe the picture as JSON.",
        "Describe this image in JSON.",
        "Give me JSON: shape and colour.",
        "Shape and colour as JSON.",
        "Tell me as JSON what is in the image.",
        "Write what you see as JSON.",
        "Return JSON for this picture.",
    ),
    "zh": (
        "用JSON回答：图中有什么？",
        "图中有什么？用JSON回答。",
        "用JSON描述这张图片。",
        "用JSON格式描述图片。",
        "以JSON格式给出形状和颜色。",
    ),
}
_ONE_TILE = Limits(one_tile=True)
_VALIDATION_START = 1_000_000  # the first index of validation: training has fewer rows


def lesson_folder(
    cache: Path, *, num_train: int = 1600, num_validation: int = 80, seed: int = 0
) -> Path:
    """A folder with `train.jsonl`, `validation.jsonl` and `images/`, made in `cache` on first use.

    It is whole or absent, whoever else makes it at the same time; a seed makes the same bytes.
    """
    target = cache / f"json-v{LESSON_VERSION}-{num_train}-{num_validation}-{seed}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="json-") as scratch:
        made = Path(scratch) / "json"
        _make(made, {"train": num_train, "validation": num_validation}, seed)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def lesson_sample(seed: int, index: int) -> Sample:
    """One figure on a picture of one tile, and what it is as JSON."""
    random = Random(f"lesson-{seed}-{index}")
    scene = figures_scene(random, _ONE_TILE, num=1)
    language: Language = "zh" if random.random() < CHINESE_SHARE else "en"
    question = careless(random.choice(QUESTIONS[language]), language, random)
    picture = draw_scene(scene, random)
    return Sample("json", ((question, json_answer(scene)),), (picture,), (scene,))


def json_answer(scene: Scene) -> str:
    """`{"shape": "circle", "colour": "red"}`, of a scene of one figure."""
    (figure,) = scene.figures
    return json.dumps({"shape": figure.kind, "colour": figure.colour})


def _ordinary_samples(seed: int, start: int, fonts: Fonts) -> Iterator[Sample]:
    """Samples of training, those whose pictures take one tile each."""
    for index in count(start):
        sample = training_sample(seed, index, fonts, late=True)
        grids = [grid_of(scene.size, len(sample.scenes)) for scene in sample.scenes]
        if all(grid.rows * grid.cols == 1 for grid in grids):
            yield sample


def _samples_of(task: str, seed: int, start: int, fonts: Fonts) -> Iterator[Sample]:
    """Samples of one task of training, of one tile and many turns."""
    for index in count(start):
        random = Random(f"{task}-{seed}-{index}")
        language: Language = "zh" if random.random() < CHINESE_SHARE else "en"
        draw = Draw(random, _ONE_TILE, fonts.training, language, _ONE_TILE.max_turns)
        yield make_sample(task, TASKS[task].make, draw)


def _fonts() -> Fonts:
    """Those that every machine has: the rows are the same everywhere."""
    everywhere = (
        path
        for path in find_fonts().training
        if path == PILLOW_FACE or Path(path).name in MATPLOTLIB_FILES
    )
    return Fonts(tuple(everywhere), ())


def _samples(seed: int, start: int, num: int, fonts: Fonts) -> Iterator[Sample]:
    """Rows of the lesson, and between them the others.

    There is more small talk than in training, where it is rare, and more questions for what there
    is, which are the nearest to the lesson's: a model forgets both first.
    """
    new = (lesson_sample(seed, index) for index in count(start))
    old = _ordinary_samples(seed, start, fonts)
    talk, what = (_samples_of(task, seed, start, fonts) for task in ("small_talk", "what"))
    turns = cycle((new, old, new, old, talk, new, old, new, old, what))
    return (next(kind) for kind in islice(turns, num))


def _make(folder: Path, num_rows: Mapping[str, int], seed: int) -> None:
    (folder / "images").mkdir(parents=True)
    fonts, numbers = _fonts(), count(1)
    starts = {"train": 0, "validation": _VALIDATION_START}
    for split, num in num_rows.items():
        lines = []
        for sample in _samples(seed, starts[split], num, fonts):
            names = []
            for picture in sample.pictures:
                number = next(numbers)
                data = encode_picture(picture, Random(f"file-{seed}-{number}"))
                kind = "png" if data.startswith(b"\x89PNG") else "jpg"
                names.append(f"images/{number:04d}.{kind}")
                (folder / names[-1]).write_bytes(data)
            lines.append(json.dumps(_row(sample, names), ensure_ascii=False) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def _row(sample: Sample, names: list[str]) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    for question, answer in sample.turns:
        slots = "" if messages else "<image>" * len(names)  # the pictures come first
        messages.append({"role": "user", "content": f"{slots}{question}"})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "images": names} if names else {"messages": messages}
