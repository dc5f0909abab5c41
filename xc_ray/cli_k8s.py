"""`xc-ray k8s render`: the options; the work is in `k8s.py`."""

import argparse
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_k8s(commands: Commands) -> None:
    """Adds the sub-commands to the parser of `xc-ray`."""
    parser = commands.add_parser(
        "k8s",
        help="keep the Kubernetes manifests in step with the configuration",
        description="Keep the manifests below k8s/ in step with serve_config.yaml, "
        "train_config.yaml and the board in grafana/.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    render = verbs.add_parser(
        "render",
        help="write the generated files below k8s/",
        description="Write every *.generated.yaml below k8s/base and k8s/overlays: the "
        "configuration files with the settings.yaml of base and overlay on top. Prints the files "
        "that have changed.",
    )
    render.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="a checkout (.)"
    )
    render.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a file would change"
    )
    render.set_defaults(run=_render)


def _render(args: argparse.Namespace) -> int:
    from xc_ray.k8s import render, stale

    files = render(args.folder)
    changed = stale(files)
    for path in changed:
        print(path)
        if not args.check:
            path.write_text(files[path], encoding="utf-8")
    return 1 if args.check and changed else 0
