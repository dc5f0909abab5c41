"""`xc-ray train`: the options; the work is in `train/job.py`."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from xc_ray.train.job import Summary

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
STOPPED = 3


def add_train(commands: Commands) -> None:
    """Adds the sub-command to the parser of `xc-ray`."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model by LoRA",
        description="Fine-tune a model by LoRA on the conversations that a configuration names, "
        "with the Ray cluster that is there or one on this machine. The whole data set is checked "
        "before a GPU is asked for. Prints a summary and one JSON line. Exit code 3: it was asked "
        "to end before its last step, and --resume goes on.",
    )
    parser.add_argument("config", metavar="FILE", help="such as train_config.yaml")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of the run, or begin if there is none",
    )
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from xc_ray.config import TrainConfig
    from xc_ray.logs import log_to
    from xc_ray.progress import Progress
    from xc_ray.train.job import fit

    config = TrainConfig.read(args.config)
    log_to(sys.stderr)
    with Progress(sys.stderr) as progress:
        summary = fit(config, resume=args.resume, progress=progress)
    print(_text(summary))
    print(json.dumps(asdict(summary), ensure_ascii=False))
    return STOPPED if summary.stopped else 0


def _text(summary: "Summary") -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [
        ("run", summary.folder),
        ("steps", f"{summary.steps} of {summary.num_steps}"),
        ("training loss", number(summary.train_loss)),
        ("validation loss", number(summary.validation_loss)),
        ("speed", f"{summary.tokens:,} tokens in {summary.seconds:.1f} s, "
                  f"{summary.tokens_per_s:,.0f} tokens/s"),
        ("peak memory", f"{summary.peak_memory_bytes / 1e9:.2f} GB"),
    ]  # fmt: skip
    if summary.skipped:
        rows.append(("rows left out", f"{len(summary.skipped)}: {'; '.join(summary.skipped[:5])}"))
    rows.extend(("hung", one) for one in summary.hung)
    if summary.adapter:
        rows.append(("adapter", summary.adapter))
    if summary.promoted is not None:
        rows.append(("alias", "moved" if summary.promoted else "not moved: not good enough"))
    if summary.stopped:
        rows.append(("stopped", "before its last step; --resume goes on"))
    return "\n".join(f"{name:<16} {text}" for name, text in rows)
