"""The key that a command sends to a server: from a file or the environment, and never shown."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xc_ray.errors import XcRayError

VARIABLE: Final = "OPENAI_API_KEY"


@dataclass(frozen=True)
class ApiKey:
    """A key, and where it came from, which may be told."""

    value: str = field(repr=False)
    source: str


def find_key(file: str | None) -> ApiKey | None:
    """The key in `file`, else that of the environment, else None.

    Raises:
        XcRayError: the file cannot be read, or what is there is no key; does not quote it.
    """
    if file is not None:
        try:
            value = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, RuntimeError, ValueError) as e:  # the last two: `~nobody/`, a null byte
            reason = getattr(e, "strerror", None) or type(e).__name__
            raise XcRayError(f"cannot read the key file {file[:200]!r}: {reason}") from None
        return _checked(ApiKey(value, f"the file {file}"))
    value = os.environ.get(VARIABLE, "").strip()
    return _checked(ApiKey(value, f"${VARIABLE}")) if value else None


def _checked(key: ApiKey) -> ApiKey:
    # What a header carries; whoever sends anything else has taken another file.
    if not key.value or not key.value.isascii() or not key.value.isprintable() or " " in key.value:
        raise XcRayError(f"{key.source} holds no key: one line of letters, digits and signs")
    return key
