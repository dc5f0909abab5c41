"""Writes the small subset of a golden folder that is committed as the parity tests' default.

    python -m tests.parity.subset GOLDEN [--out tests/data/golden]

The layout stays. Checkpoints are whole (two thirds of the size). Pictures are those that other
cases use, and one of each mode and orientation. Of long lists and tensors every nth entry stays.
No `tokenizer.model` is written: the tests that need it are skipped, or run with `--tokenizer FILE`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.golden import Golden, Variant

DEFAULT_OUT = Path(__file__).parent.parent / "data" / "golden"
MAX_PICTURE_BYTES = 30_000
MAX_PICTURE_TOKENS = 1300  # of stored embeddings
MAX_SAMPLE_TOKENS = 1300  # of training samples, all rows together
SETTINGS = 3  # of a picture, from the least tokens
PROBES = 6  # pixels of a picture
GRID_CASES = 40
POSITIONS = 6  # rows of logits
STEPS = 6  # of cached decoding


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a small subset of golden data.")
    parser.add_argument("golden", type=Path, help="the whole folder")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args()
    golden = Golden(options.golden)
    shutil.rmtree(options.out, ignore_errors=True)
    for number, variant in enumerate(golden.variants):
        write_variant(variant, options.out / variant.folder.name, padded=number == 0)
    for name in ("cases", "prompts"):
        cases = golden.text_cases(name)
        cases.pop("ms_swift", None)
        write_json(options.out / "tokenizer" / f"{name}.json", cases)


def write_variant(variant: Variant, out: Path, *, padded: bool) -> None:
    """One variant's folder; the padded batch (d) is kept of one variant only."""
    shutil.copytree(
        variant.folder / "checkpoint", out / "checkpoint", copy_function=shutil.copyfile
    )
    samples = [s for s in variant.json("loss")["samples"] if sample_tokens(s) <= MAX_SAMPLE_TOKENS]
    names = {f"{sample['name']}." for sample in samples}
    rows = {n: t for n, t in variant.loss_rows.items() if n.startswith(tuple(names))}
    chat = variant.json("chat")
    pictures = choose_pictures(variant, samples, chat["cases"])
    write_json(out / "loss.json", {**variant.json("loss"), "samples": samples})
    write_tensors(out / "loss.safetensors", rows)
    write_json(out / "chat.json", chat)
    write_preprocess(variant, out, pictures)
    write_vision(variant, out, pictures)
    write_json(out / "decoder.json", variant.decoder_cases)
    write_tensors(out / "decoder.safetensors", decoder_tensors(variant.decoded, padded=padded))


def choose_pictures(variant: Variant, samples: list[Any], chats: list[Any]) -> list[str]:
    """The pictures that other cases use, and the smallest file of each mode and orientation."""
    about = variant.preprocess["images"]
    used = {name for sample in samples for row in sample["images"] for name in row}
    used |= {variant.json("vision")["debug"]["image"].rpartition(".")[0]}
    for segment in variant.decoder_cases["b"]["segments"]:
        _, found, picture = segment.partition(" image ")
        used |= {picture.rpartition(".")[0]} if found else set()
    for case in chats:
        image = case["call"].get("image") or []
        used |= {image} if isinstance(image, str) else set(image)
    size_of = {name: (variant.folder / a["file"]).stat().st_size for name, a in about.items()}
    kinds = {kind_of(about[name]) for name in used}
    for name in sorted(about, key=size_of.__getitem__):
        kind = kind_of(about[name])
        if kind not in kinds and size_of[name] <= MAX_PICTURE_BYTES:
            kinds.add(kind)
            used.add(name)
    return [name for name in about if name in used]


def kind_of(about: dict[str, Any]) -> tuple[str, bool, bool]:
    width, height = about["size_wh"]
    return about["mode"], width > height, width < height


def write_preprocess(variant: Variant, out: Path, pictures: list[str]) -> None:
    whole = variant.preprocess
    sampled = variant.json("vision")["debug"]["image"]
    kept: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in pictures:
        about = whole["images"][name]
        copy(variant.folder / about["file"], out / about["file"])
        few = sorted(about["settings"], key=lambda s: about["settings"][s]["image_tokens"])[
            :SETTINGS
        ]
        settings = {s: dict(data) for s, data in about["settings"].items() if s in few}
        for setting, data in settings.items():
            data["probe_yx_rgb"] = every(data["probe_yx_rgb"], PROBES)
            stored = data.get("processed_png")
            if stored and (variant.folder / stored).stat().st_size <= MAX_PICTURE_BYTES:
                copy(variant.folder / stored, out / stored)
            else:
                data.pop("processed_png", None)
            if f"{name}.{setting}" == sampled:
                key = data["normalised"]["subsample_key"]
                tensors[key] = variant.normalised[key]
        kept[name] = {**about, "settings": settings}
    grid_cases = every(whole.get("grid_cases") or [], GRID_CASES)
    write_json(out / "preprocess.json", {**whole, "images": kept, "grid_cases": grid_cases})
    write_tensors(out / "preprocess.safetensors", tensors)


def write_vision(variant: Variant, out: Path, pictures: list[str]) -> None:
    told = variant.json("vision")
    kept = {"debug": told["debug"]}
    for name in pictures:
        fitting = {
            key: data["tokens"]
            for key, data in told.items()
            if key.startswith(f"{name}.") and data["tokens"] <= MAX_PICTURE_TOKENS
        }
        if fitting:
            largest = max(fitting, key=fitting.__getitem__)
            kept[largest] = told[largest]
    parts = ("row_norms", "first8", "last8")
    wanted = {f"{name}.{part}" for name in kept for part in parts}
    tensors = {n: t for n, t in variant.embedded.items() if n in wanted or n.startswith("debug.")}
    write_json(out / "vision.json", kept)
    write_tensors(out / "vision.safetensors", tensors)


def decoder_tensors(golden: dict[str, Tensor], *, padded: bool) -> dict[str, Tensor]:
    """The decoder's cases with fewer rows of logits, hidden states and steps."""
    last = max(int(n.split(".")[2]) for n in golden if n.startswith("b.hidden."))
    kept = {}
    for name, tensor in golden.items():
        case, _, what = name.partition(".")
        if case == "g" or name in ("b.inputs_embeds", "b.position_ids", "d.left.logits"):
            continue  # `g` is not read, the others are large
        if what.startswith("short_after_long"):
            continue
        if (case == "d" and not padded) or (
            what.startswith("hidden.") and f".{last}." not in name + "."
        ):
            continue
        kept[name] = tensor
    for case in ("a", "b", "e.prefill"):
        rows = kept.pop(f"{case}.logits", None)
        positions = kept.pop(f"{case}.positions", None)
        if rows is None:
            rows = kept.pop(f"{case}.logits_at")
        count = rows.shape[1]
        chosen = torch.tensor(every(range(count), POSITIONS))
        kept[f"{case}.logits_at"] = rows[:, chosen]
        kept[f"{case}.positions"] = chosen.int() if positions is None else positions[chosen]
    for name in ("c.generated", "c.step_logits", "e.decode.step_logits"):
        kept[name] = kept[name][:STEPS]
    return kept


def sample_tokens(sample: dict[str, Any]) -> int:
    return sum(row["length"] for row in sample.get("rows", []))


def every(values: Sequence[Any], count: int) -> list[Any]:
    """About `count` of the values, evenly spread, the last included."""
    step = max(1, -(-len(values) // count))
    return list(values[::-1][::step][::-1])


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main()
