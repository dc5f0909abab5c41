"""What `list`, `show` and `log` print: aligned lines for people, one JSON document for programs."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from xc_ray.progress import amount
from xc_ray.registry.manifest import AliasEntry, Manifest, Target
from xc_ray.registry.snapshot import Snapshot

NOTHING = "-"
SHORT_DIGEST = 19  # characters of "sha256:…" in a table

# ---------------------------------------------------------------- for programs


def models_json(snapshot: Snapshot, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every name with its versions and aliases."""
    return [
        {
            "name": name,
            "kind": manifests[-1].kind,
            "aliases": aliases_json(_aliases(snapshot, name)),
            "versions": [
                {
                    "version": m.version,
                    "digest": m.digest,
                    "size": m.size,
                    "created": m.created.isoformat(),
                    "base": m.base and m.base.model_dump(),
                    "metrics": m.lineage.metrics,
                }
                for m in manifests
            ],
        }
        for name in names
        if (manifests := _manifests(snapshot, name))
    ]


def manifest_json(manifest: Manifest, aliases: Mapping[str, AliasEntry]) -> dict[str, Any]:
    """All that a manifest says, with what is derived from it."""
    fields = manifest.model_dump(mode="json", exclude={"schema_", "nonce"})
    reference = f"{manifest.name}@{manifest.version}"
    derived = {"reference": reference, "digest": manifest.digest, "size": manifest.size}
    return derived | {"aliases": aliases_json(aliases)} | fields


def entry_json(entry: AliasEntry) -> dict[str, Any]:
    """One entry of an alias's log."""
    return entry.model_dump(mode="json", exclude={"schema_", "nonce", "name", "alias"})


def aliases_json(aliases: Mapping[str, AliasEntry]) -> dict[str, Any]:
    """Where aliases point: versions and their shares of the requests."""
    return {a: [t.model_dump() for t in entry.targets] for a, entry in sorted(aliases.items())}


# ---------------------------------------------------------------- for people


def names_table(snapshot: Snapshot, names: Sequence[str]) -> str:
    """A line for each name."""
    rows = [("NAME", "KIND", "NEWEST", "SIZE", "CREATED", "ALIASES")]
    for name in names:
        newest = _manifests(snapshot, name)[-1]
        aliases = (
            f"{alias} -> {targets_text(entry.targets)}"
            for alias, entry in sorted(_aliases(snapshot, name).items())
        )
        row = (name, newest.kind, str(newest.version), size_text(newest.size))
        rows.append((*row, time_text(newest.created), ", ".join(aliases) or NOTHING))
    return _aligned(rows)


def versions_table(snapshot: Snapshot, name: str) -> str:
    """A line for each version of a name, oldest first."""
    rows = [("VERSION", "ALIASES", "SIZE", "CREATED", "DIGEST", "BASE", "METRICS")]
    for m in _manifests(snapshot, name):
        row = (str(m.version), _pointing(_aliases(snapshot, name), m.version))
        base = f"{m.base.name} {m.base.digest[:SHORT_DIGEST]}" if m.base else NOTHING
        metrics = ", ".join(f"{k} {v:g}" for k, v in sorted(m.lineage.metrics.items()))
        about = (size_text(m.size), time_text(m.created), m.digest[:SHORT_DIGEST])
        rows.append((*row, *about, base, metrics or NOTHING))
    return _aligned(rows)


def manifest_text(manifest: Manifest, aliases: Mapping[str, AliasEntry]) -> str:
    """All of a version, without the details of its config."""
    m, lineage = manifest, manifest.lineage
    metrics = ", ".join(f"{k} {v:g}" for k, v in sorted(lineage.metrics.items()))
    config = (f"{k} {_value(v)}" for k, v in m.config.items() if not isinstance(v, dict))
    training = (f"{k} {_value(v)}" for k, v in lineage.training_config.items())
    facts = {
        "digest": m.digest,
        "base": f"{m.base.name} {m.base.digest}" if m.base else "",
        "aliases": _pointing(aliases, m.version),
        "created": time_text(m.created),
        "config": ", ".join(config),
        "metrics": metrics,
        "data set": lineage.dataset_digest or "",
        "code": lineage.code_version or "",
        "parent": lineage.parent or "",
        "training": ", ".join(training),
        "size": size_text(m.size),
    }
    lines = [(name, value) for name, value in facts.items() if value]
    files = [(file.path, size_text(file.size), f"sha256:{file.sha256}") for file in m.files]
    head = f"{m.name}@{m.version}  {m.kind}"
    return "\n".join([head, _indented(_aligned(lines)), "files", _indented(_aligned(files))])


def log_table(entries: Sequence[AliasEntry]) -> str:
    """A line for each entry, the one that counts last."""
    rows = [
        (
            str(entry.number),
            time_text(entry.created),
            entry.action if entry.restores is None else f"rollback to entry {entry.restores}",
            targets_text(entry.targets),
        )
        for entry in entries
    ]
    return _aligned(rows)


def targets_text(targets: Iterable[Target]) -> str:
    """`3`, or `3 (90 %) and 4 (10 %)`."""
    listed = list(targets)
    if len(listed) == 1:
        return str(listed[0].version)
    return " and ".join(f"{t.version} ({_percent(t.weight)})" for t in listed)


def time_text(when: datetime) -> str:
    """A UTC time to the minute."""
    return f"{when:%Y-%m-%d %H:%MZ}"


def size_text(number: int) -> str:
    """Bytes with their unit."""
    return amount(number) if number >= 1000 else f"{number} B"


def _manifests(snapshot: Snapshot, name: str) -> list[Manifest]:
    return [snapshot.manifests[name, version] for version in snapshot.versions(name)]


def _aliases(snapshot: Snapshot, name: str) -> dict[str, AliasEntry]:
    return {alias: entry for (owner, alias), entry in snapshot.aliases.items() if owner == name}


def _pointing(aliases: Mapping[str, AliasEntry], version: int) -> str:
    """The aliases of a version, with its share where it is not all."""
    found = [
        alias if len(entry.targets) == 1 else f"{alias} ({_percent(target.weight)})"
        for alias, entry in sorted(aliases.items())
        for target in entry.targets
        if target.version == version
    ]
    return ", ".join(found) or NOTHING


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _value(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
