"""The registry: push a folder as a version, point aliases at it, find it again.

A version is whole or absent: its manifest is written last and never changes. Everything that needs
agreement between processes is one `put_if_absent`: of a version's number, and of an entry's in an
alias log.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from xc_ray.errors import InvalidRequest, RegistryError
from xc_ray.registry.aliases import AliasLog, alias_heads
from xc_ray.registry.gc import GRACE_S, GcReport, collect
from xc_ray.registry.keys import VERSIONS, alias_of, version_key, version_of
from xc_ray.registry.manifest import AliasEntry, BaseRef, FileEntry, Lineage, Manifest, Target
from xc_ray.registry.records import Damaged, read_entries, read_manifest
from xc_ray.registry.reference import Reference, check_name
from xc_ray.registry.resolve import resolve, unknown_name, unknown_version
from xc_ray.registry.snapshot import Snapshot, take_snapshot
from xc_ray.registry.store import Missing, ObjectStore
from xc_ray.registry.upload import Progress, Source, Upload
from xc_ray.registry.verify import verify

# Others who were faster, before one gives up: each of them did publish a version.
RACES = 1_000
_UNREAD = {"size": 0, "sha256": "0" * 64}


class Registry:
    """The models and adapters in one store; safe for many threads."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    @classmethod
    def open(cls, url: str) -> "Registry":
        """The registry that a storage setting names (see `location.py`)."""
        return cls(ObjectStore.open(url))

    def push(
        self,
        folder: Path,
        *,
        name: str,
        kind: Literal["base", "adapter"],
        base: BaseRef | None = None,
        files: Sequence[Path] | None = None,
        config: Mapping[str, Any] | None = None,
        lineage: Lineage | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Publishes a folder as the next version of a name.

        All files below the folder are taken, those in or behind hidden names aside, or just
        `files` (absolute, or relative to the folder). Those that the store has already are not
        sent again, so that a push that broke off is taken up where it was. `progress(path, done,
        total)` counts bytes.

        Raises:
            InvalidRequest: the name, the kind, a file or a value is not as it must be.
            OSError: a file cannot be read.
            RegistryError: the store cannot be reached, or refuses.
        """
        sources = _sources(folder, files)
        values = {
            "name": name,
            "kind": kind,
            "base": base,
            "config": dict(config or {}),
            "lineage": lineage or Lineage(),
        }
        # Once without the files, so that a wrong word is not found after hours of sending.
        _manifest(values, 1, [{**_UNREAD, "path": one.path} for one in sources])
        versions = self.versions(name)
        self._check_kind(name, kind, versions)
        self.store.prove_put_if_absent()  # before hours of sending, too
        upload = Upload(self.store, sources, progress)
        entries = upload.run()
        for _ in range(RACES):
            upload.ensure(entries)
            manifest = _manifest(values, (versions or [0])[-1] + 1, entries)
            if self.store.put_if_absent(version_key(name, manifest.version), manifest.to_bytes()):
                return manifest
            versions = self.versions(name)
            self._check_kind(name, kind, versions)
        raise RegistryError(f"{name!r} got {RACES} versions from others meanwhile; try again")

    def names(self) -> list[str]:
        """Every name with a version, sorted."""
        found = (version_of(one.key) for one in self.store.list(VERSIONS))
        return sorted({place[0] for place in found if place})

    def versions(self, name: str) -> list[int]:
        """The versions of a name, oldest first; empty if the name is unknown."""
        found = self.store.list(f"{VERSIONS}/{check_name(name)}")
        return sorted(place[1] for one in found if (place := version_of(one.key)))

    def manifest(self, name: str, version: int) -> Manifest:
        """One version.

        Raises:
            NotFound: there is none; the message names what there is.
            RegistryError: it is damaged, or the store cannot be reached.
        """
        Reference(name, version=version)  # in the grammar, before it becomes part of a key
        try:
            return read_manifest(self.store, version_key(name, version))
        except Missing as error:
            versions = self.versions(name)
            if not versions:
                raise unknown_name(self, name) from error
            raise unknown_version(name, version, versions) from error

    def resolve(self, ref: Reference | str, *, sticky: str | None = None) -> Manifest:
        """The version that a reference means (rules and errors: `resolve.resolve`)."""
        return resolve(self, Reference.parse(ref) if isinstance(ref, str) else ref, sticky)

    def promote(self, name: str, targets: Sequence[tuple[int, float]], alias: str) -> AliasEntry:
        """Points an alias at one version, or at two with weights (shares of the requests).

        Raises:
            NotFound: a version does not exist.
            InvalidRequest: the alias or the weights are not as they must be.
            RegistryError: a version is damaged, or the store cannot be reached.
        """
        log = AliasLog(self.store, name, alias)
        try:
            # One that is checked in whole, to say what is wrong before anything is looked up.
            wanted = AliasEntry(
                name=name,
                alias=alias,
                number=1,
                targets=tuple(Target(version=number, weight=share) for number, share in targets),
                action="promote",
            )
        except ValidationError as error:
            raise _invalid(f"{name}@{alias}", error) from error
        for target in wanted.targets:
            self.manifest(name, target.version)
        return log.promote(wanted.targets)

    def rollback(self, name: str, alias: str) -> AliasEntry:
        """Points an alias where it pointed before (rules and errors: `AliasLog.rollback`)."""
        return AliasLog(self.store, name, alias).rollback()

    def log(self, name: str, alias: str) -> list[AliasEntry]:
        """Where an alias ever pointed, oldest first (errors: `AliasLog.entries`)."""
        return AliasLog(self.store, name, alias).entries()

    def aliases(self, name: str) -> dict[str, AliasEntry]:
        """Where the aliases of a name point now.

        Raises:
            RegistryError: one is damaged, or the store cannot be reached.
        """
        heads, problems = read_entries(self.store, alias_heads(self.store, check_name(name)))
        if problems:
            raise RegistryError("; ".join(problems.values()))
        return {entry.alias: entry for entry in heads.values()}

    def alias_names(self, name: str) -> list[str]:
        """The aliases of a name, sorted."""
        places = (alias_of(key) for key in alias_heads(self.store, check_name(name)))
        return sorted(place[1] for place in places if place)

    def head(self, name: str, alias: str) -> AliasEntry | None:
        """Where an alias points now; None if there is no such alias."""
        return AliasLog(self.store, name, alias).head()

    def snapshot(self, previous: Snapshot | None = None) -> Snapshot:
        """Everything at once, for those who watch: reads only what `previous` does not have.

        Raises:
            RegistryError: the store cannot be reached, or refuses.
        """
        return take_snapshot(self.store, previous)

    def verify(
        self, names: Sequence[str] | None = None, progress: Progress | None = None
    ) -> list[str]:
        """A sentence for everything that is not as it was written (see `verify.verify`)."""
        for name in names or ():
            if not self.versions(name):
                raise unknown_name(self, name)
        return verify(self.store, names, progress)

    def gc(self, *, grace_s: float = GRACE_S, dry_run: bool = True) -> GcReport:
        """Deletes the blobs that no version names and that are old (see `gc.collect`)."""
        return collect(self.store, grace_s=grace_s, dry_run=dry_run)

    def _check_kind(self, name: str, kind: str, versions: list[int]) -> None:
        for version in reversed(versions):
            try:
                found = self.manifest(name, version)
            except Damaged:  # says nothing; another version does
                continue
            if found.kind != kind:
                raise InvalidRequest(
                    f"{name!r} is of kind {found.kind} (version {version}) and cannot become of "
                    f"kind {kind}; push under another name"
                )
            return


def _sources(folder: Path, files: Sequence[Path] | None) -> list[Source]:
    if not folder.is_dir():
        raise InvalidRequest(f"'{folder}' is not a folder; give the one that holds the files")
    if files is None:
        below = sorted(folder.rglob("*"))
        files = [
            path
            for path in below
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
        ]
    sources = []
    for path in files:
        file = folder / path  # an absolute path stays what it is
        if not file.is_relative_to(folder):
            raise InvalidRequest(f"'{path}' is not in the folder '{folder}'")
        if not file.is_file():
            raise InvalidRequest(f"'{file}' is not a file")
        sources.append(Source(file.relative_to(folder).as_posix(), file))
    if not sources:
        raise InvalidRequest(f"the folder '{folder}' has no files to push")
    return sources


def _manifest(
    values: Mapping[str, Any], version: int, files: Sequence[FileEntry | Mapping[str, Any]]
) -> Manifest:
    try:
        return Manifest.model_validate({**values, "version": version, "files": tuple(files)})
    except ValidationError as error:
        raise _invalid(str(values["name"]), error) from error


def _invalid(what: str, error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{what!r:.100}: {f'{field}: ' if field else ''}{said:.400}")
