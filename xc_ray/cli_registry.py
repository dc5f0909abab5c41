"""`xc-ray registry COMMAND`: the options; what the commands do is in `cli_registry_run.py`.

Only what reads them is imported here, so that `--help` answers at once.
"""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from xc_ray.errors import XcRayError

if TYPE_CHECKING:
    from xc_ray.registry.reference import Reference

T = TypeVar("T")
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_registry(commands: Commands) -> None:
    """Adds the sub-commands to the parser of `xc-ray`."""
    parser = commands.add_parser(
        "registry",
        help="keep models and adapters in object storage",
        description="Keep models and adapters in object storage: versions that never change, and "
        "aliases that move. REF is NAME, NAME@VERSION, NAME@ALIAS or NAME@sha256:DIGEST; a bare "
        "NAME is its alias prod if it has one, else its newest version. Credentials come from the "
        "environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a file "
        "(~/.aws/credentials, AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE), never from an option; "
        "which ones are used is said, and they are never shown.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_publishing(verbs)
    _add_looking(verbs)
    _add_aliases(verbs)
    _add_folders(verbs)
    _add_care(verbs)


def _add(
    verbs: Commands, name: str, help: str, more: str = "", *, new: bool = False
) -> argparse.ArgumentParser:
    """One sub-command; `new`: it needs no registry to be there yet."""
    text = f"{help[0].upper()}{help[1:]}. {more}".strip()
    parser = verbs.add_parser(name, help=help, description=text)
    where = parser.add_argument_group("store").add_mutually_exclusive_group()
    where.add_argument(
        "--registry",
        metavar="URL",
        help="a folder, s3://BUCKET/PREFIX?endpoint=…, gs://… or az://… (default: a folder in the "
        "user's data)",
    )
    where.add_argument(
        "--config", metavar="FILE", help="takes `registry:` from a serve or train config"
    )
    parser.set_defaults(run=_run, verb=name, new=new)
    return parser


def _run(args: argparse.Namespace) -> int:
    from xc_ray.cli_registry_run import run

    return run(args)


def _add_publishing(verbs: Commands) -> None:
    again = "make a new version though the newest one holds the same files"
    parser = _add(
        verbs,
        "import",
        "publish a checkpoint as a new version of a base",
        "Old .bin shards become safetensors. Prints NAME@VERSION. What the newest version holds "
        "already is not published again; an interrupted import goes on where it was.",
        new=True,
    )
    parser.add_argument("source", metavar="PATH_OR_ID", help="demo, a folder or a hub id")
    parser.add_argument("--name", type=_name, required=True, help="what it is called here")
    parser.add_argument("--force", action="store_true", help=again)

    parser = _add(
        verbs,
        "push",
        "publish a LoRA folder of peft as a new version of an adapter",
        "It is checked against the base first. Prints NAME@VERSION.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="adapter_config.json and its weights")
    parser.add_argument("--name", type=_name, required=True, help="what it is called here")
    parser.add_argument("--base", required=True, metavar="REF", help="or a folder imported before")
    parser.add_argument("--force", action="store_true", help=again)
    came = parser.add_argument_group("lineage", "Where it comes from; kept with the version.")
    came.add_argument(
        "--metric", action="append", type=_metric, default=[], metavar="NAME=VALUE", help="repeat"
    )
    came.add_argument("--dataset-digest", metavar="TEXT")
    came.add_argument("--code-version", metavar="TEXT")
    came.add_argument("--training-config", metavar="FILE", help="YAML or JSON")
    came.add_argument("--parent", type=_reference, metavar="REF", help="the version it began from")


def _add_looking(verbs: Commands) -> None:
    parser = _add(verbs, "list", "list names, or the versions of one")
    parser.add_argument("name", nargs="?", type=_name, metavar="NAME")
    _add_json(parser)
    parser = _add(verbs, "show", "show one version: files, base, config, lineage")
    parser.add_argument("ref", type=_reference, metavar="REF")
    _add_json(parser)
    parser = _add(verbs, "log", "show where an alias ever pointed, oldest first")
    parser.add_argument("alias", type=_alias_reference, metavar="NAME@ALIAS")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _add_aliases(verbs: Commands) -> None:
    parser = _add(
        verbs,
        "promote",
        "point an alias at a version; running decoders follow within seconds",
        "`promote cats@4 prod --canary 5=0.1` gives version 5 a tenth of the users, each user "
        "always the same version.",
    )
    parser.add_argument("ref", type=_reference, metavar="NAME@VERSION", help="or another alias")
    parser.add_argument("alias", type=_alias, metavar="ALIAS", help="such as prod or canary")
    parser.add_argument(
        "--canary", type=_canary, metavar="VERSION=SHARE", help="a second version, and its share"
    )
    parser = _add(
        verbs,
        "rollback",
        "point an alias where it pointed before",
        "A second rollback goes one further back.",
    )
    parser.add_argument("alias", type=_alias_reference, metavar="NAME@ALIAS")


def _add_folders(verbs: Commands) -> None:
    parser = _add(verbs, "pull", "copy a version's files into a new folder")
    parser.add_argument("ref", type=_reference, metavar="REF")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="(NAME-VERSION)")
    parser = _add(
        verbs,
        "export",
        "write a base with an adapter folded into it as a plain checkpoint",
        "Its logits are compared with those of base and adapter before it gets its name.",
        new=True,
    )
    parser.add_argument(
        "--merge", action="store_true", required=True, help="fold the adapter into the base"
    )
    parser.add_argument("base", metavar="BASE", help="REF, folder or hub id")
    parser.add_argument("adapter", metavar="ADAPTER", help="REF or folder")
    parser.add_argument("folder", metavar="FOLDER", help="a new one")
    parser.add_argument("--device", default="cpu", help="where logits are compared (cpu)")


def _add_care(verbs: Commands) -> None:
    parser = _add(
        verbs,
        "verify",
        "read everything, and say what is not as it was written",
        "Exit code 1 if something is not.",
    )
    parser.add_argument("name", nargs="?", type=_name, metavar="NAME", help="(all)")
    _add_json(parser)
    parser = _add(
        verbs,
        "gc",
        "delete files that no version needs, as interrupted pushes leave them",
        "Says what it would delete, unless --delete is given. Versions are never deleted.",
    )
    parser.add_argument("--delete", action="store_true", help="do delete")
    parser.add_argument(
        "--grace",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="keep what is younger (24); less only while nobody publishes",
    )
    _add_json(parser)


# ---------------------------------------------------------------- values of options


def _reference(text: str) -> "Reference":
    from xc_ray.registry.reference import Reference

    return _checked(Reference.parse, text)


def _alias_reference(text: str) -> tuple[str, str]:
    reference = _reference(text)
    if reference.alias is None:
        raise argparse.ArgumentTypeError(f"{text!r} names no alias; write NAME@ALIAS")
    return reference.name, reference.alias


def _name(text: str) -> str:
    from xc_ray.registry.reference import check_name

    return _checked(check_name, text)


def _alias(text: str) -> str:
    from xc_ray.registry.reference import check_alias

    return _checked(check_alias, text)


def _checked(read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except XcRayError as e:
        raise argparse.ArgumentTypeError(e.message) from None


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    number = _number(value)
    if not name or number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
    return name, number


def _canary(text: str) -> tuple[int, float]:
    version, _, share = text.partition("=")
    number = _number(share)
    if not version.isdecimal() or number is None or not 0 < number < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not VERSION=SHARE with a share between 0 and 1, such as 5=0.1"
        )
    return int(version), number


def _hours(text: str) -> float:
    number = _number(text)
    if number is None or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours")
    return number


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
