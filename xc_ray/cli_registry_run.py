"""What the commands of `xc-ray registry` do.

Results go to standard output; the store in use, and how far things are, to standard error. Every
command may be interrupted or killed at any moment, and run again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from xc_ray import cli_listing as listing
from xc_ray.config import ServeFile
from xc_ray.errors import ConfigError, InvalidRequest, NotFound, RegistryError, XcRayError
from xc_ray.hub import in_registry, is_there, local_cache, open_store, resolve_model
from xc_ray.interrupt import interruptible
from xc_ray.progress import Progress
from xc_ray.pull import pull
from xc_ray.registry.manifest import AliasEntry, Lineage, Manifest, files_digest
from xc_ray.registry.records import Damaged
from xc_ray.registry.reference import Reference
from xc_ray.registry.registry import Registry
from xc_ray.registry.resolve import unknown_name

HOUR_S = 3600.0
Command: TypeAlias = Callable[[argparse.Namespace, Registry, Progress], int]


def run(args: argparse.Namespace) -> int:
    """One command on the store that its options name; gives the exit code."""
    store = open_store(_configured(args.config) if args.config else args.registry)
    if store.location.scheme == "memory":
        raise ConfigError("memory:// ends with this command; give a folder or a bucket")
    print(f"registry: {store.url}", file=sys.stderr)
    if not args.new and not is_there(store):
        raise _nothing_there(store.url)
    progress = Progress(sys.stderr)
    try:
        with interruptible(progress.stop), progress:
            return COMMANDS[args.verb](args, Registry(store), progress)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except BrokenPipeError:
        raise
    except OSError as e:
        raise XcRayError(f"{e.filename or 'the disk'}: {e.strerror or e}") from None


def _configured(path: str) -> str | None:
    """The `registry:` of a serve config's application, or at the top of another file."""
    values = _yaml(path)
    if "applications" in values:
        found = {application.args.registry for application in ServeFile.read(path).applications}
        if len(found) > 1:
            raise ConfigError(f"{path}: its applications have different registries; use --registry")
        return found.pop()
    setting = values.get("registry")
    if not isinstance(setting, str):
        raise ConfigError(f"{path} has neither `applications:` nor `registry:`; use --registry")
    return setting


def _yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys with values")
    return values


def _nothing_there(url: str) -> NotFound:
    return NotFound(
        f"there is no registry at {url}; xc-ray registry import PATH_OR_ID --name NAME begins one"
    )


# ---------------------------------------------------------------- import, push


def _import(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    from xc_ray.publish import import_checkpoint

    # A reference is refused by the import, with its reason.
    source = args.source if in_registry(args.source) else resolve_model(args.source).absolute()
    newest = _newest(registry, args.name)
    if isinstance(source, Path) and newest is not None and newest.kind == "base":
        from xc_ray.fingerprint import fingerprint

        if not args.force and fingerprint(source) == newest.digest:
            return _published(newest, "holds these files already; --force makes a new version")
    return _published(import_checkpoint(source, registry, args.name, progress=progress))


def _push(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    from xc_ray.publish import owner_of, push_adapter

    lineage, folder = _lineage(args, registry), Path(args.folder).absolute()
    newest = None if args.force else _newest(registry, args.name)
    if newest is not None and newest.base is not None:
        base = owner_of(registry, args.base)
        if newest.base.digest == base.digest and _adapter_digest(folder) == newest.digest:
            return _published(newest, "holds these files already; --force makes a new version")
    done = push_adapter(folder, registry, args.name, args.base, lineage=lineage, progress=progress)
    return _published(done)


def _lineage(args: argparse.Namespace, registry: Registry) -> Lineage:
    training = _yaml(args.training_config) if args.training_config else {}
    try:
        json.dumps(training, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{args.training_config} holds what JSON cannot: {e}") from None
    parent = registry.resolve(args.parent) if args.parent else None
    return Lineage(
        dataset_digest=args.dataset_digest,
        code_version=args.code_version,
        training_config=training,
        metrics=dict(args.metric),
        parent=parent and f"{parent.name}@{parent.version}",
    )


def _newest(registry: Registry, name: str) -> Manifest | None:
    versions = registry.versions(name)
    try:
        return registry.manifest(name, versions[-1]) if versions else None
    except Damaged:  # no reason not to publish the next one
        return None


def _adapter_digest(folder: Path) -> str | None:
    """What the version of an adapter's folder would be; None if files are missing."""
    from xc_ray.fingerprint import file_entries
    from xc_ray.model.adapter import ADAPTER_BIN_FILE, ADAPTER_FILE
    from xc_ray.model.adapter_config import ADAPTER_CONFIG_FILE
    from xc_ray.model.shards import PublishedFile

    config, weights = folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_FILE
    if not weights.exists():
        weights = folder / ADAPTER_BIN_FILE
    if not config.is_file() or not weights.is_file():
        return None
    files = [PublishedFile(config.name, config), PublishedFile(ADAPTER_FILE, weights)]
    return files_digest(file_entries(files))


def _published(manifest: Manifest, note: str = "") -> int:
    reference = f"{manifest.name}@{manifest.version}"
    print(reference)
    says = note or f"published, {listing.size_text(manifest.size)} in {len(manifest.files)} files"
    print(f"{reference} {says} ({manifest.digest})", file=sys.stderr)
    return 0


# ---------------------------------------------------------------- list, show, log


def _list(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    snapshot = registry.snapshot()
    names = [args.name] if args.name else snapshot.names()
    if args.name and not snapshot.versions(args.name):
        raise unknown_name(snapshot, args.name)
    for problem in snapshot.problems:
        print(f"xc-ray: warning: {problem}", file=sys.stderr)
    if args.json:
        models = listing.models_json(snapshot, names)
        return _print_json(registry, models=models, problems=list(snapshot.problems))
    if not names:
        print("it is empty", file=sys.stderr)
    else:
        print(
            listing.versions_table(snapshot, *names)
            if args.name
            else listing.names_table(snapshot, names)
        )
    return 0


def _show(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    manifest = registry.resolve(args.ref)
    aliases = registry.aliases(manifest.name)
    if args.json:
        return _print_json(registry, **listing.manifest_json(manifest, aliases))
    print(listing.manifest_text(manifest, aliases))
    return 0


def _log(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    name, alias = args.alias
    entries = registry.log(name, alias)
    if args.json:
        listed = [listing.entry_json(entry) for entry in entries]
        return _print_json(registry, name=name, alias=alias, entries=listed)
    print(listing.log_table(entries))
    return 0


def _print_json(registry: Registry, **values: Any) -> int:
    print(json.dumps({"registry": registry.store.url, **values}, indent=2))
    return 0


# ---------------------------------------------------------------- promote, rollback


def _promote(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    version = _one_version(args.ref, registry)
    targets = [(version, 1.0)]
    if args.canary:
        canary, share = args.canary
        targets = [(version, 1 - share), (canary, share)]
    head = registry.head(args.ref.name, args.alias)
    if head is not None and {t.version: t.weight for t in head.targets} == dict(targets):
        print(f"{head.name}@{head.alias} -> {listing.targets_text(head.targets)} already")
        return 0
    return _moved(registry.promote(args.ref.name, targets, args.alias), head)


def _one_version(ref: Reference, registry: Registry) -> int:
    if ref.selector is None:
        raise InvalidRequest(f"say which version of {ref.name}: {ref.name}@VERSION")
    if ref.alias is not None:
        head = registry.head(ref.name, ref.alias)
        if head is not None and len(head.targets) > 1:
            both = " or ".join(f"{ref.name}@{target.version}" for target in head.targets)
            raise InvalidRequest(f"{ref} points at two versions; say which: {both}")
    return registry.resolve(ref).version


def _rollback(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    name, alias = args.alias
    head = registry.head(name, alias)
    return _moved(registry.rollback(name, alias), head)


def _moved(entry: AliasEntry, before: AliasEntry | None) -> int:
    was = f" (was {listing.targets_text(before.targets)})" if before else ""
    print(f"{entry.name}@{entry.alias} -> {listing.targets_text(entry.targets)}{was}")
    return 0


# ---------------------------------------------------------------- pull, export


def _pull(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    manifest = registry.resolve(args.ref)
    target = Path(args.folder or f"{manifest.name}-{manifest.version}").absolute()
    pull(registry.store, manifest, target, progress)
    print(target)
    return 0


def _export(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    from xc_ray.merge import export_merged

    with ExitStack() as leases:
        if in_registry(args.base):
            digest, base = _fetched(args.base, "base", registry, progress, leases)
        else:
            digest, base = None, resolve_model(args.base)
        adapter = Path(args.adapter).expanduser()
        if not adapter.is_dir():
            owner, adapter = _fetched(args.adapter, "adapter", registry, progress, leases)
            _check_owner(args, owner, digest or _digest(base))
        proof = export_merged(
            base, adapter, Path(args.folder), device=args.device, progress=progress
        )
    print(f"{args.folder}: {proof}")
    return 0


def _fetched(
    text: str, kind: str, registry: Registry, progress: Progress, leases: ExitStack
) -> tuple[str, Path]:
    """The digest of a version (of the base, where it is an adapter), and its folder."""
    reference = Reference.parse(text)
    if not is_there(registry.store):
        raise _nothing_there(registry.store.url)
    manifest = registry.resolve(reference)
    if manifest.kind != kind:
        raise InvalidRequest(f"{text} is of kind {manifest.kind}, expected the {kind} here")
    lease = local_cache().fetch(registry.store, manifest, progress)
    leases.enter_context(lease)
    return manifest.base.digest if manifest.base else manifest.digest, lease.folder


def _digest(folder: Path) -> str:
    from xc_ray.fingerprint import fingerprint

    return fingerprint(folder)


def _check_owner(args: argparse.Namespace, owner: str, base: str) -> None:
    if owner != base:
        raise InvalidRequest(
            f"{args.adapter} was trained on the base {owner}, and {args.base} is {base}; name its "
            "own base (xc-ray registry show tells it)"
        )


# ---------------------------------------------------------------- verify, gc


def _verify(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    problems = registry.verify([args.name] if args.name else None, progress)
    if args.json:
        _print_json(registry, sound=not problems, problems=problems)
    else:
        print("\n".join(problems) or "everything is as it was written")
    if problems:
        raise RegistryError(f"{len(problems)} problems in the registry {registry.store.url}")
    return 0


def _gc(args: argparse.Namespace, registry: Registry, progress: Progress) -> int:
    report = registry.gc(grace_s=args.grace * HOUR_S, dry_run=not args.delete)
    if args.json:
        return _print_json(
            registry,
            deleted=args.delete,
            blobs=list(report.blobs),
            size=report.size,
            waiting=report.waiting,
            leftovers=[str(path) for path in report.leftovers],
            probes=report.probes,
        )
    verb = "deleted" if args.delete else "would delete"
    rest = len(report.leftovers) + report.probes
    found = (
        f"{len(report.blobs)} blobs ({listing.size_text(report.size)}) and {rest} temporary files"
    )
    print(f"{verb} {found}; {report.waiting} blobs are younger than {args.grace:g} hours")
    return 0


COMMANDS: dict[str, Command] = {
    "import": _import,
    "push": _push,
    "list": _list,
    "show": _show,
    "log": _log,
    "promote": _promote,
    "rollback": _rollback,
    "pull": _pull,
    "export": _export,
    "verify": _verify,
    "gc": _gc,
}
