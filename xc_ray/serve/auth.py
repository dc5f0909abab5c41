"""Who a caller is, and what it may: keys are known by their digests, and followed as they change.

Authorization ── KeyRing.caller ──> Caller: may it chat, which adapters does it see
key file ── KeyWatch, at the start and every POLL_S ──> KeyRing
"""

import asyncio
import hashlib
import hmac
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from xc_ray.config import Allowance
from xc_ray.errors import ConfigError, Forbidden, Unauthenticated
from xc_ray.keys import KeyEntry, KeyFile, Scope, digest_of, read_bytes

logger = logging.getLogger("ray.serve")

POLL_S: Final = 2.0
ALL_SCOPES: Final[frozenset[Scope]] = frozenset(get_args(Scope))


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: a name for the queue and for limits, and what it may.

    `adapters` are those that it may use, None for every one.
    """

    name: str
    scopes: frozenset[Scope] = ALL_SCOPES
    adapters: frozenset[str] | None = None
    allowance: Allowance | None = None

    @classmethod
    def of(cls, entry: KeyEntry) -> "Caller":
        """The holder of a key."""
        adapters = None if entry.adapters is None else frozenset(entry.adapters)
        return cls(entry.name, frozenset(entry.scopes), adapters, entry.allowance)

    @property
    def is_admin(self) -> bool:
        """Whether it sees all adapters, and what is wrong with them."""
        return "admin" in self.scopes

    def sees(self, adapter: str) -> bool:
        """Whether it may know of an adapter."""
        return self.is_admin or self.adapters is None or adapter in self.adapters

    def check_sees(self, adapter: str | None) -> None:
        """Raises Forbidden if it may not know whether there is such an adapter."""
        if adapter is not None and not self.sees(adapter):
            raise _no_adapter(adapter)

    def check_chat(self, adapter: str | None) -> None:
        """Raises Forbidden if it may not chat, or not with this adapter (None: the base)."""
        if "chat" not in self.scopes:
            raise Forbidden("this key may not chat", code="insufficient_permissions")
        if adapter is not None and self.adapters is not None and adapter not in self.adapters:
            raise _no_adapter(adapter)


def _no_adapter(adapter: str) -> Forbidden:
    return Forbidden(
        f"this key may not use the adapter {adapter!r}; GET /v1/models lists what it may",
        param="model",
        code="insufficient_permissions",
    )


def anybody(authorization: str | None) -> Caller:
    """A caller where there are no keys: whoever sends the same header is the same one."""
    return Caller(hashlib.sha256(authorization.encode()).hexdigest() if authorization else "")


class KeyRing:
    """The keys of one reading of the file."""

    def __init__(self, file: KeyFile) -> None:
        self._known = [
            (digest.encode(), caller)
            for caller, entry in ((Caller.of(entry), entry) for entry in file.keys)
            for digest in entry.sha256
        ]
        self.names = frozenset(entry.name for entry in file.keys)

    def caller(self, authorization: str | None) -> Caller:
        """Whose key an Authorization header holds.

        Raises:
            Unauthenticated: nobody's.
        """
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated(
                "this server wants a key: Authorization: Bearer KEY", code="invalid_api_key"
            )
        digest = digest_of(key.strip()).encode()
        found = None
        for known, caller in self._known:  # all of them: time must not tell which
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated("the key is none of this server's", code="invalid_api_key")
        return found


class KeyWatch:
    """The keys of a file as it is now; of a file that is broken or gone, as it was.

    What changed is told by what the file holds: a file is small, and times and inodes tell less
    where it is a mounted secret or on a network.

    Raises:
        ConfigError: there is no such file at the start, or it is none of keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = read_bytes(path)
        self.ring = KeyRing(KeyFile.parse(self._data, path))
        self._failure = ""

    async def follow(self) -> None:
        """Reads the file again and again, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Reads the file once more."""
        try:
            data = read_bytes(self._path)
            if data != self._data:
                self._change(KeyRing(KeyFile.parse(data, self._path)))
        except ConfigError as e:
            if e.message != self._failure:  # once, not every two seconds
                logger.error("%s; THE KEYS THAT WERE READ BEFORE STAY IN FORCE", e.message)
            self._failure = e.message
            return
        self._data, self._failure = data, ""

    def _change(self, ring: KeyRing) -> None:
        before, self.ring = self.ring, ring
        came, left = sorted(ring.names - before.names), sorted(before.names - ring.names)
        logger.info(
            "keys were read again: %d entries; new: %s; gone: %s",
            len(ring.names),
            ", ".join(came) or "none",
            ", ".join(left) or "none",
        )
