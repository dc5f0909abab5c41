"""The key file: who may use a server. It holds digests of keys, never a key.

    keys:
      - name: team-a               in the queue, in limits and in the log
        sha256: "9f86d0…"          of the key; a list while an old and a new one are both in use
        scopes: [chat]             chat; admin sees all adapters, and what is wrong with them
        adapters: [cats]           which it may use beside the base; every one if this is left out
        allowance: {concurrent: 8} in place of limits.per_key

A key is 256 random bits. Nobody can try so many, so one round of SHA-256 hides it as well as a slow
hash would, which is for what people make up, and costs a request a microsecond.
"""

import hashlib
import re
import secrets
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from xc_ray.config import Allowance, Strict
from xc_ray.errors import ConfigError, InvalidRequest
from xc_ray.registry.reference import check_name

PREFIX: Final = "xcr_"  # says what it is, to people and to scanners for secrets
KEY_BYTES: Final = 32
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"

Scope: TypeAlias = Literal["chat", "admin"]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class KeyEntry(Strict):
    """A holder of keys, and what they may do; the fields are told above."""

    name: str = Field(pattern=NAME_PATTERN)
    sha256: Annotated[tuple[_Digest, ...], BeforeValidator(_one_or_several)] = Field(min_length=1)
    scopes: tuple[Scope, ...] = Field(("chat",), min_length=1)
    adapters: tuple[str, ...] | None = None
    allowance: Allowance | None = None

    @field_validator("adapters")
    @classmethod
    def _names(cls, adapters: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in adapters or ():
            try:
                check_name(name)
            except InvalidRequest as e:
                raise ValueError(f"adapters are names, without @VERSION: {e.message}") from None
        return adapters


class KeyFile(Strict):
    """All that may use a server; `keys: []` is nobody."""

    keys: tuple[KeyEntry, ...]

    @model_validator(mode="after")
    def _each_is_one(self) -> Self:
        names: set[str] = set()
        holders: dict[str, str] = {}
        for entry in self.keys:
            if entry.name in names:
                raise ValueError(f"two entries are called {entry.name!r}")
            names.add(entry.name)
            for digest in entry.sha256:
                other = holders.setdefault(digest, entry.name)
                if other != entry.name:
                    raise ValueError(f"{other!r} and {entry.name!r} have the same key")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and checks a file, YAML or JSON.

        Raises:
            ConfigError: one line: the entry, and what was expected.
        """
        return cls.parse(read_bytes(path), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Checks what was read from `path`; raises as `read` does."""
        # Whoever mistakes the file for one of keys must not find them in the log: no error here
        # quotes what it found.
        try:
            values = yaml.safe_load(data)
        except Exception as e:  # noqa: BLE001 - PyYAML lets all kinds out, such as KeyError for !!bool x
            mark = getattr(e, "problem_mark", None)
            line = f" (line {mark.line + 1})" if mark else ""
            raise ConfigError(f"the key file {path} is not YAML{line}") from None
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise ConfigError(f"the key file {path}: {_complaint(e)}") from None


def read_bytes(path: Path) -> bytes:
    """What a key file holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read the key file {path}: {e.strerror or e}") from None


def new_key() -> str:
    """A key that nobody has."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: str) -> str:
    """What a key file holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return re.sub(rf"{PREFIX}[\w-]+", f"{PREFIX}…", f"{where + ': ' if where else ''}{message}")
