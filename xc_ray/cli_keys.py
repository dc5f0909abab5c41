"""`xc-ray keys new`: a key for whom a server shall know, and what its key file says of it.

Only what reads the options is imported at the top, so that `--help` answers at once.
"""

import argparse
import json
import re
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_keys(commands: Commands) -> None:
    """Adds the sub-commands to the parser of `xc-ray`."""
    parser = commands.add_parser(
        "keys",
        help="make keys for a server",
        description="Make keys for a server, which knows them by their digests alone: `keys:` in "
        "the args of serve_config.yaml names a file of them.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    new = verbs.add_parser(
        "new",
        help="print a new key, and the entry for the key file",
        description="Print a new key on the first line, and the entry for the key file below it. "
        "Nothing is written or remembered: the key is seen this one time.",
    )
    new.add_argument("name", metavar="NAME", type=_name, help="whose key it is")
    new.add_argument(
        "--adapters",
        nargs="*",
        type=_adapter,
        metavar="ADAPTER",
        help="names of those that it may use; none: the base alone (default: every one)",
    )
    new.add_argument(
        "--admin", action="store_true", help="sees all adapters, and what is wrong with them"
    )
    new.set_defaults(run=_new)


def _new(args: argparse.Namespace) -> int:
    from xc_ray.keys import digest_of, new_key

    key = new_key()
    entry = [f"- name: {json.dumps(args.name)}", f'  sha256: "{digest_of(key)}"']
    if args.admin:
        entry.append("  scopes: [chat, admin]")
    if args.adapters is not None:
        entry.append(f"  adapters: {json.dumps(args.adapters)}")
    print(key)
    print("\n# For the list `keys:` of the key file; the key above is not in it.")
    print("\n".join(entry))
    return 0


def _name(text: str) -> str:
    from xc_ray.keys import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} is no name: up to 64 letters, digits, '.', '_', '@' and '-'"
        )
    return text


def _adapter(text: str) -> str:
    from xc_ray.errors import InvalidRequest
    from xc_ray.registry.reference import check_name

    try:
        return check_name(text)
    except InvalidRequest as e:
        raise argparse.ArgumentTypeError(e.message) from None
