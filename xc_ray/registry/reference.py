"""How models are named: a strict grammar, so that no name ever becomes a path by accident.

NAME[@VERSION|@ALIAS|@sha256:DIGEST]     in the registry: cats, cats@3, cats@prod
BASE[:ADAPTER][@…]                       in requests: what is served, and an adapter on it
"""

import re
from dataclasses import dataclass

from xc_ray.errors import InvalidRequest

NAME = re.compile(r"[a-z0-9](?!.*\.\.)[a-z0-9._-]{0,95}")
ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
VERSION = re.compile(r"[1-9][0-9]{0,7}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_VERSION = 10**8 - 1

GRAMMAR = "NAME, NAME@VERSION, NAME@ALIAS or NAME@sha256:DIGEST"
NAME_GRAMMAR = "1 to 96 of a-z, 0-9, '.', '_' and '-', a letter or digit first, no '..'"
ALIAS_GRAMMAR = "1 to 32 of a-z, 0-9, '_' and '-', a letter first"


@dataclass(frozen=True)
class Reference:
    """A name in the registry, and at most one of version, alias and digest."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if sum(x is not None for x in (self.version, self.alias, self.digest)) > 1:
            raise InvalidRequest(
                f"a reference to {self.name!r} takes one of version, alias, digest"
            )
        if self.version is not None and not 1 <= self.version <= MAX_VERSION:
            raise InvalidRequest(
                f"version {self.version} of {self.name!r} is not 1 to {MAX_VERSION}"
            )
        if self.alias is not None:
            check_alias(self.alias)
        if self.digest is not None and not DIGEST.fullmatch(self.digest):
            raise InvalidRequest(
                f"digest {self.digest!r:.100} is not sha256: and 64 of 0-9 and a-f"
            )

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """The reference that a text is.

        Raises:
            InvalidRequest: it is none; the message quotes it and says what one looks like.
        """
        name, at, selector = text.partition("@")
        if not at:
            return cls(name)
        if VERSION.fullmatch(selector):
            return cls(name, version=int(selector))
        if DIGEST.fullmatch(selector):
            return cls(name, digest=selector)
        if ALIAS.fullmatch(selector):
            return cls(name, alias=selector)
        raise InvalidRequest(
            f"{text!r:.200} is no reference: {selector!r:.100} is neither a version (1 to "
            f"{MAX_VERSION}), nor an alias ({ALIAS_GRAMMAR}), nor sha256: and 64 hex digits; "
            f"write {GRAMMAR}"
        )

    @property
    def selector(self) -> str | None:
        """What stands behind the '@', or None."""
        return str(self.version) if self.version is not None else self.alias or self.digest

    def __str__(self) -> str:
        return self.name if self.selector is None else f"{self.name}@{self.selector}"


@dataclass(frozen=True)
class ModelName:
    """The `model` of a request: a served base, and perhaps an adapter of the registry on it.

    The base is what the server calls itself: it may hold capitals, slashes and colons, so that the
    last ':' parts the two (the one of `@sha256:` aside).
    """

    base: str
    adapter: Reference | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """The name that a text is.

        Raises:
            InvalidRequest: the adapter is no reference, or the base is empty or has an '@'.
        """
        # The colon of a digest belongs to the reference that it ends.
        at = text.rfind("@sha256:")
        front, digest = (text, "") if at < 0 else (text[:at], text[at:])
        base, colon, adapter = front.rpartition(":")
        if not colon:
            base, adapter = front, ""
        if not colon and (digest or "@" in base):
            raise InvalidRequest(
                f"model {text!r:.200} asks for a version of the base, but the server has one base "
                "only; leave out '@…', or name an adapter: BASE:ADAPTER@VERSION",
                param="model",
            )
        if not base or "@" in base:
            raise InvalidRequest(
                f"model {text!r:.200} has no base without '@' before the ':'; write BASE, "
                "BASE:ADAPTER, BASE:ADAPTER@VERSION or BASE:ADAPTER@ALIAS",
                param="model",
            )
        if not colon:
            return cls(base)
        try:
            return cls(base, Reference.parse(adapter + digest))
        except InvalidRequest as error:
            raise InvalidRequest(f"model {text!r:.200}: {error.message}", param="model") from error

    def __str__(self) -> str:
        return self.base if self.adapter is None else f"{self.base}:{self.adapter}"


def check_name(name: str) -> str:
    """The name, if it may stand in the registry.

    Raises:
        InvalidRequest: it may not.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r:.200} is no name in the registry; it is {NAME_GRAMMAR}")
    return name


def check_alias(alias: str) -> str:
    """The alias, if it may be one.

    Raises:
        InvalidRequest: it may not.
    """
    if not ALIAS.fullmatch(alias):
        raise InvalidRequest(f"{alias!r:.100} is no alias; it is {ALIAS_GRAMMAR}")
    return alias
