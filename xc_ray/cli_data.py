"""`xc-ray data check`: the options, and what the command does.

Only what reads the options is imported at the top, so that `--help` answers at once.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from xc_ray.cli_values import at_least
from xc_ray.errors import XcRayError

if TYPE_CHECKING:
    from xc_ray.config import DataOptions
    from xc_ray.train.preflight import Checked

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
TRAIN, VALIDATION = "train", "validation"
# What a train config says, where one is given.
_CONFIGURED = (
    "files",
    "model",
    "registry",
    "max_length",
    "on_long",
    "max_tiles",
    "image_transform",
)


def add_data(commands: Commands) -> None:
    """Adds the sub-commands to the parser of `xc-ray`."""
    parser = commands.add_parser(
        "data",
        help="check data sets before training",
        description="Check data sets before training.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(verbs)


def _add_check(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "check",
        help="read every row and open every picture of a data set",
        description="Read every row and open every picture of data sets, count tokens, and list "
        "the rows that cannot be learnt from. Exit code 1 if there is one.",
    )
    parser.set_defaults(run=_check, fail=parser.error)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE_OR_NAME",
        help="JSON or JSON Lines, a folder, an address, hf:ORG/NAME[:SPLIT], "
        "modelscope:ORG/NAME[:SPLIT], demo-json or coco-en-mini",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a train config: its data sets, under its options"
    )
    model = parser.add_argument_group("model", "Whose tokens and tiles are counted.")
    model.add_argument("--model", help="demo, a folder, a hub id or a base of the registry (demo)")
    model.add_argument("--registry", metavar="URL", help="where a model NAME@… is")
    rules = parser.add_argument_group("options of training")
    rules.add_argument("--max-length", type=at_least(16), metavar="N", help="tokens of a row")
    rules.add_argument(
        "--on-long", choices=("fail", "skip", "cut_history"), help="what becomes of longer ones"
    )
    rules.add_argument(
        "--max-tiles", type=at_least(1), metavar="N", help="tile budget of each picture"
    )
    rules.add_argument(
        "--image-transform",
        choices=("serving", "family"),
        help="how a picture becomes tiles; family: as the original fine-tuning code does",
    )
    result = parser.add_argument_group("result")
    result.add_argument("--report", metavar="FILE", help="write everything found as JSON")
    result.add_argument("--json", action="store_true", help="print one JSON document")


def _check(args: argparse.Namespace) -> int:
    from xc_ray.interrupt import interruptible
    from xc_ray.progress import Progress

    model, registry, options = _asked(args)
    progress = Progress(sys.stderr)
    with interruptible(progress.stop), progress:
        checked = _checked(model, registry, options, progress)
    found = {name: {**one.report.to_dict(), "digest": one.digest} for name, one in checked.items()}
    if args.report:
        _write(args.report, found)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        for name, one in checked.items():
            print(*([f"{name}:"] if len(checked) > 1 else []), one.report, sep="\n")
    return _exit_code(checked)


def _asked(args: argparse.Namespace) -> "tuple[str, str | None, DataOptions]":
    """The model, its registry, and what is checked under which options."""
    from xc_ray.config import DataOptions, TrainConfig

    given = {name: value for name in _CONFIGURED if (value := getattr(args, name))}
    if args.config:
        if given:
            first = next(iter(given)).replace("_", "-")
            said = "the data sets" if first == "files" else f"--{first}"
            args.fail(f"--config says {said} already; change it in {args.config}")
        config = TrainConfig.read(args.config)
        return config.model, config.registry, config.data
    if not args.files:
        args.fail("name a data set, or give the --config of a training")
    options = DataOptions(
        train=args.files,
        **{name: value for name, value in given.items() if name in DataOptions.model_fields},
    )
    return args.model or "demo", args.registry, options


def _checked(
    model: str, registry: str | None, options: "DataOptions", progress: Callable[..., None]
) -> "dict[str, Checked]":
    from xc_ray.hub import resolve_model
    from xc_ray.model.layout import read_layout
    from xc_ray.prompt.tokenizer import load_tokenizer
    from xc_ray.train.preflight import check_rows, overlap

    folder = resolve_model(model, registry)
    config = read_layout(folder).config
    tokenizer = load_tokenizer(folder, config.decoder.vocab_size)

    def shown(what: str, done: int, total: int) -> None:
        # Of so many rows the share is shown: Progress takes large totals for bytes.
        progress(f"{what}, {done:,} of {total:,}", done * 100 // (total or 1), 100)

    sets = {TRAIN: options.train, VALIDATION: options.validation or ()}
    checked = {
        name: check_rows(files, options, config, tokenizer, progress=shown)
        for name, files in sets.items()
        if files
    }
    if VALIDATION in checked:
        one = checked[VALIDATION]
        warnings = (*one.report.warnings, *overlap(checked[TRAIN], one))
        checked[VALIDATION] = replace(one, report=replace(one.report, warnings=warnings))
    return checked


def _exit_code(checked: "dict[str, Checked]") -> int:
    reports = [one.report for one in checked.values()]
    for name, one in checked.items():
        if not one.report.num_good:
            print(f"{name}: there is no row that can be learnt from", file=sys.stderr)
    return int(any(report.problems or not report.num_good for report in reports))


def _write(path: str, found: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", "utf-8")
    except OSError as e:
        raise XcRayError(f"cannot write {path}: {e.strerror or e}") from None
