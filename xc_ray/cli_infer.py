"""`xc-ray infer`: a data set answered, beside its own answers.

What computes is imported inside the command, so that `--help` answers at once.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from xc_ray.cli_values import at_least_one, check_device, sampling
from xc_ray.errors import XcRayError

if TYPE_CHECKING:
    from xc_ray.infer.job import Job, Summary

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
SHOWN_ERRORS = 10


def add_infer(commands: Commands) -> None:
    """Adds the command to the parser of `xc-ray`."""
    parser = commands.add_parser(
        "infer",
        help="answer a data set, and compare with its own answers",
        description="Answer a data set with a model and an adapter, many rows at once, and compare "
        "with its own answers: exact match and ROUGE-L. Each row is written as it ends; the same "
        "command goes on where it was interrupted. Exit code 1 if a row could not be answered.",
    )
    parser.set_defaults(run=_infer, fail=parser.error)
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_answer(
        parser.add_argument_group(
            "answer", "Greedy unless told; what has no option is the model family's default."
        )
    )


def _add_model(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--model",
        required=True,
        metavar="BASE",
        help="demo, a folder, a hub id or a base of the registry",
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--adapter", metavar="REF_OR_FOLDER", help="of the registry (NAME@…), or a folder of peft"
    )
    one.add_argument(
        "--checkpoint",
        "--ckpt-dir",
        "--ckpt_dir",
        metavar="DIR",
        help="a checkpoint of xc-ray train, or a folder of peft",
    )
    group.add_argument(
        "--registry", metavar="URL", help="where NAME@… is (default: in the user's data)"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    group.add_argument(
        "--batch-size",
        type=at_least_one,
        metavar="N",
        help="rows that run at once, as far as the key/value cache goes (64 on a GPU, 16 on CPU)",
    )


def _add_data(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--dataset", metavar="FILE", help="or another name of a data set")
    group.add_argument(
        "--load-dataset-config",
        "--load_dataset_config",
        type=_boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="the rows that the checkpoint's run kept for validation",
    )
    group.add_argument(
        "--max-samples", type=at_least_one, metavar="N", help="the first N rows alone"
    )
    group.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON Lines")
    group.add_argument(
        "--overwrite", action="store_true", help="begin anew where the output is there already"
    )


def _add_answer(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--max-new-tokens",
        type=sampling("max_tokens", int),
        metavar="N",
        help="most of one answer, as far as the model has room (512)",
    )
    group.add_argument(
        "--temperature", type=sampling("temperature", float), metavar="T", help="(0: greedy)"
    )
    group.add_argument("--top-p", type=sampling("top_p", float), metavar="P")
    group.add_argument(
        "--seed", type=sampling("seed", int), metavar="N", help="row i draws by N + i (0)"
    )
    group.add_argument(
        "--system", metavar="TEXT", help='for rows without a system text; "" for none'
    )
    group.add_argument(
        "--max-tiles", type=at_least_one, metavar="N", help="tile budget of each picture"
    )


def _infer(args: argparse.Namespace) -> int:
    job = _job(args)
    if args.device:
        check_device(args.device)
    summary = _run(job)
    for place, message in summary.errors[:SHOWN_ERRORS]:
        print(f"xc-ray: warning: {place}: {' '.join(message.split())}", file=sys.stderr)
    if summary.failed > SHOWN_ERRORS:
        print(
            f"xc-ray: warning: {summary.failed - SHOWN_ERRORS} more in the output", file=sys.stderr
        )
    print(table(summary))
    figures = {name: value for name, value in asdict(summary).items() if name != "errors"}
    print(json.dumps({**figures, "output": str(job.output)}))
    return 1 if summary.failed else 0


def _run(job: "Job") -> "Summary":
    from xc_ray.infer.job import infer
    from xc_ray.interrupt import interruptible
    from xc_ray.progress import Progress

    progress = Progress(sys.stderr)
    try:
        with interruptible(progress.stop), progress:
            return infer(job, progress)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except OSError as e:
        raise XcRayError(f"{e.filename or 'the disk'}: {e.strerror or e}") from None


def _job(args: argparse.Namespace) -> "Job":
    if args.load_dataset_config and not args.checkpoint:
        args.fail("--load-dataset-config takes the rows of a checkpoint; give a --checkpoint")
    if bool(args.dataset) == args.load_dataset_config:
        args.fail("give a --dataset, or --load-dataset-config with a --checkpoint")
    from xc_ray.infer.engine import Options
    from xc_ray.infer.job import Job

    wanted = {
        "max_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "system": args.system,
        "max_tiles": args.max_tiles,
    }
    return Job(
        model=args.model,
        output=args.output,
        dataset=args.dataset,
        adapter=args.adapter,
        checkpoint=args.checkpoint,
        registry=args.registry,
        max_samples=args.max_samples,
        options=Options(**{name: value for name, value in wanted.items() if value is not None}),
        batch_size=args.batch_size,
        device=args.device,
        overwrite=args.overwrite,
    )


def table(summary: "Summary") -> str:
    """The figures as a person reads them."""
    rows = f"{summary.rows:,}, {summary.answered:,} answered"
    if summary.failed:
        rows += f", {summary.failed:,} with an error"
    lines = [("rows", rows)]
    if summary.compared:
        lines += [
            ("exact match", f"{summary.exact_match:.4f} of {summary.compared:,} with a reference"),
            ("ROUGE-L", f"{summary.rouge_l:.4f} (F1, mean)"),
        ]
    if summary.tokens_per_s is not None:
        speed = (
            f"{summary.tokens_per_s:,.1f} ({summary.new_tokens:,} tokens of {summary.new_rows:,} "
            f"rows in {summary.seconds:,.1f} s)"
        )
        lines.append(("tokens/s", speed))
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


# ---------------------------------------------------------------- values of options


def _boolean(text: str) -> bool:
    known = {"true": True, "false": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]
