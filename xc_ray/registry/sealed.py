"""JSON objects that know when they were damaged: one canonical form, with its own sha256 inside.

    {"checksum":"sha256:…","created":…,…}     keys sorted, no spaces, UTF-8

The checksum is over the same object without `checksum`. As only the canonical form is read, every
changed byte is seen, in a number's spelling as well as in the checksum itself.
"""

import hashlib
import json
from typing import Any

from xc_ray.errors import RegistryError


def seal(values: dict[str, Any]) -> bytes:
    """The canonical bytes of a JSON object, checksum included.

    Raises:
        ValueError: a value that JSON does not know (NaN among them).
    """
    return _canonical({**values, "checksum": _checksum(values)})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that was sealed; `where` names the stored object in the error.

    Raises:
        RegistryError: a byte is not as it was written.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"it is no JSON ({len(data)} bytes)") from error
    if not isinstance(values, dict) or "checksum" not in values:
        raise damaged(where, "it has no checksum")
    rest = {key: value for key, value in values.items() if key != "checksum"}
    try:
        sound = values["checksum"] == _checksum(rest) and _canonical(values) == data
    except ValueError:  # a half of a surrogate pair, or NaN
        sound = False
    if not sound:
        raise damaged(where, "its bytes do not fit its checksum")
    return rest


def damaged(where: str, what: str) -> RegistryError:
    """The error of a stored object that is not as it was written."""
    return RegistryError(
        f"{where} is damaged: {what}; restore it from a copy of the store, or publish anew "
        "(`xc-ray registry verify` lists all damage)"
    )


def _checksum(values: dict[str, Any]) -> str:
    return f"sha256:{hashlib.sha256(_canonical(values)).hexdigest()}"


def _canonical(values: dict[str, Any]) -> bytes:
    text = json.dumps(
        values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()
