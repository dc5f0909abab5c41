"""Where the application can be reached from, and whether Ray itself is open to whoever can."""

import logging
from ipaddress import ip_address
from typing import Final

from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.serve.context import _get_global_client

logger = logging.getLogger("ray.serve")

CLOSED: Final = (
    "the server has a public address and no keys, so it serves nobody; its operator sets `keys` in "
    "its `args`, or a loopback `http_options.host`, or `insecure: true`"
)


def served_host() -> str | None:
    """The address that Serve listens on, as its controller has it; HAProxy and replicas use it too.

    It is that of the running Serve: what a later file says does not move it.
    """
    client = _get_global_client()
    assert client is not None, "a replica runs in Serve"
    host: str | None = client.http_config.host
    return host


def is_public(host: str | None) -> bool:
    """Whether others than this machine reach `host`; so does what is not known to be loopback."""
    if host == "localhost":
        return False
    try:
        return not ip_address(host or "").is_loopback
    except ValueError:
        return True


def tell_exposure(host: str | None, *, has_keys: bool, insecure: bool) -> None:
    """Says in the log what is open to whoever reaches it."""
    if not is_token_auth_enabled():
        logger.warning(
            "RAY IS OPEN: this cluster has no token authentication, so whoever reaches Ray's own "
            "ports (6379, 8265, 10001) runs code on its nodes. Start Ray with RAY_AUTH_MODE=token "
            "(docs/operations.md, Security)."
        )
    if has_keys or not is_public(host):
        return
    if insecure:
        logger.warning("INSECURE: whoever reaches %s may use this server; there are no keys", host)
    else:
        logger.error("NOT SERVING on %s: %s (docs/operations.md, Security)", host, CLOSED)
