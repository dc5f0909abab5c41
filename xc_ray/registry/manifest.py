"""What a version of a model is, and where an alias points: the two kinds of record in the registry.

Both are written once, never changed, and sealed (see `sealed.py`).
"""

import hashlib
import json
import math
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from xc_ray.errors import InvalidRequest, RegistryError
from xc_ray.registry.reference import MAX_VERSION, check_alias, check_name
from xc_ray.registry.sealed import damaged, seal, unseal

SCHEMA = 1  # of Record.schema_
MAX_TARGETS = 2  # an alias points at one version, or at one and its canary


def _named(name: str) -> str:
    try:
        return check_name(name)
    except InvalidRequest as error:
        raise ValueError(error.message) from error


def _aliased(alias: str) -> str:
    try:
        return check_alias(alias)
    except InvalidRequest as error:
        raise ValueError(error.message) from error


def _finite(value: JsonValue) -> JsonValue:
    json.dumps(value, allow_nan=False)  # a ValueError otherwise
    return value


def _within(path: str) -> str:
    """A relative path that stays below the folder it is read against, on any system."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        raise ValueError(f"{path!r:.200} is no relative path of plain names")
    if "\\" in path or not path.isprintable() or ":" in path or len(path) > 1024:
        raise ValueError(f"{path!r:.200} holds a character that a file's name may not have here")
    return path


Name = Annotated[str, AfterValidator(_named)]
Alias = Annotated[str, AfterValidator(_aliased)]
RelativePath = Annotated[str, AfterValidator(_within)]
Version = Annotated[int, Field(ge=1, le=MAX_VERSION, strict=True)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Utc = Annotated[AwareDatetime, AfterValidator(lambda when: when.astimezone(UTC))]
Json = Annotated[JsonValue, AfterValidator(_finite)]


class Strict(BaseModel):
    """Frozen, and no field that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Strict):
    """One file of a version: where it stands in the folder, its bytes, and their sha256 (hex)."""

    path: RelativePath
    size: int = Field(ge=0, strict=True)
    sha256: Sha256


class BaseRef(Strict):
    """The base that an adapter belongs to: what it is called, and what it is."""

    name: str = Field(min_length=1, max_length=200)
    digest: Digest


class Lineage(Strict):
    """Where a version comes from, as far as its publisher says; `parent` is a reference."""

    dataset_digest: str | None = None
    code_version: str | None = None
    training_config: dict[str, Json] = {}
    metrics: dict[str, float] = {}
    parent: str | None = None


class Record(Strict):
    """A sealed object of the registry.

    `nonce` makes it unlike every other, also one with the same content written in the same
    microsecond: a writer that lost the answer to its write knows its own by it.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    name: Name
    created: Utc = Field(default_factory=lambda: datetime.now(UTC))
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex, max_length=64)

    def to_bytes(self) -> bytes:
        """The sealed form."""
        return seal(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """The record that was sealed; `where` names the stored object in the error.

        Raises:
            RegistryError: it is damaged, or written by a newer release.
        """
        values = unseal(data, where)
        if values.get("schema") != SCHEMA:
            raise RegistryError(
                f"{where} has schema {values.get('schema')!r:.40}, this release reads {SCHEMA}; "
                "update xc_ray"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise damaged(where, f"field {field or '(whole)'}: {first['msg']:.300}") from error


class Manifest(Record):
    """One version of a base or an adapter; `base` is an adapter's, and has to be there.

    `config` is a summary for people and for checks before the bytes are there: variant, layers and
    hidden size, or rank, alpha and target linears.
    """

    version: Version
    kind: Literal["base", "adapter"]
    base: BaseRef | None = None
    files: tuple[FileEntry, ...] = Field(min_length=1)
    config: dict[str, Json] = {}
    lineage: Lineage = Lineage()

    @field_validator("files")
    @classmethod
    def _one_folder(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        paths = {file.path for file in files}
        if len(paths) < len(files):
            raise ValueError("two files have the same path")
        for path in paths:
            parts = path.split("/")
            if any("/".join(parts[:end]) in paths for end in range(1, len(parts))):
                raise ValueError(f"{path!r:.200} is below a path that is a file")
        return tuple(sorted(files, key=lambda file: file.path))

    @model_validator(mode="after")
    def _base_of_adapters_only(self) -> Self:
        if (self.base is not None) != (self.kind == "adapter"):
            raise ValueError("an adapter names its base; a base names none")
        return self

    @cached_property
    def digest(self) -> str:
        """What the version *is*: the same for the same files, whatever its name or lineage."""
        return files_digest(self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Target(Strict):
    """A version that an alias points at, and the share of the requests that get it."""

    version: Version
    weight: float = Field(1.0, gt=0)


class AliasEntry(Record):
    """One entry of an alias's log; the one with the highest number says where the alias points.

    A rollback writes a new entry with the targets of an earlier one, whose number is `restores`.
    """

    alias: Alias
    number: Version
    targets: tuple[Target, ...] = Field(min_length=1, max_length=MAX_TARGETS)
    action: Literal["promote", "rollback"]
    restores: Version | None = None

    @field_validator("targets")
    @classmethod
    def _shares(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Weights as shares of 1, older version first."""
        if len({target.version for target in targets}) < len(targets):
            raise ValueError("an alias points at a version once; add up the weights")
        total = sum(target.weight for target in targets)
        if not math.isclose(total, 1.0, rel_tol=0, abs_tol=1e-9):
            targets = tuple(Target(version=t.version, weight=t.weight / total) for t in targets)
        return tuple(sorted(targets, key=lambda target: target.version))

    @model_validator(mode="after")
    def _restores_something(self) -> Self:
        if (self.restores is not None) != (self.action == "rollback"):
            raise ValueError("a rollback says which entry it restores; a promotion restores none")
        return self


def files_digest(files: Iterable[FileEntry]) -> str:
    """`sha256:…` over (path, size, sha256) of every file, by path."""
    listed: list[Any] = sorted([file.path, file.size, file.sha256] for file in files)
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
