"""Where the registry keeps what: keys of the store, built from checked names only.

blobs/sha256/ab/<64 hex>              the bytes of a file, under their digest
versions/NAME/00000001.json           a Manifest
aliases/NAME/ALIAS/00000001.json      an AliasEntry
probes/<32 hex>                       see store.py; gone after a second
"""

import re

from xc_ray.registry.reference import ALIAS, NAME

BLOBS, VERSIONS, ALIASES = "blobs", "versions", "aliases"

_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_NUMBERED = re.compile(r"0*([1-9][0-9]*)\.json")


def blob_key(sha256: str) -> str:
    """Where the bytes with this sha256 (64 hex digits) are."""
    return f"{BLOBS}/sha256/{sha256[:2]}/{sha256}"


def blob_of(key: str) -> str | None:
    """The sha256 that a key names; None if it is no key of a blob."""
    found = _BLOB.fullmatch(key)
    return found[2] if found else None


def version_key(name: str, version: int) -> str:
    """Where the manifest of a version is."""
    return f"{VERSIONS}/{name}/{version:08}.json"


def version_of(key: str) -> tuple[str, int] | None:
    """The name and version that a key is for; None if it is no key of a manifest."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != VERSIONS or not NAME.fullmatch(parts[1]):
        return None
    number = _number(parts[2])
    return (parts[1], number) if number and key == version_key(parts[1], number) else None


def alias_key(name: str, alias: str, number: int) -> str:
    """Where an entry of an alias's log is."""
    return f"{ALIASES}/{name}/{alias}/{number:08}.json"


def alias_of(key: str) -> tuple[str, str, int] | None:
    """The name, alias and number that a key is for; None if it is no key of an entry."""
    parts = key.split("/")
    if len(parts) != 4 or parts[0] != ALIASES:
        return None
    if not (NAME.fullmatch(parts[1]) and ALIAS.fullmatch(parts[2])):
        return None
    number = _number(parts[3])
    sound = number and key == alias_key(parts[1], parts[2], number)
    return (parts[1], parts[2], number) if number and sound else None


def _number(text: str) -> int | None:
    found = _NUMBERED.fullmatch(text)
    return int(found[1]) if found else None
