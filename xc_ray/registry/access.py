"""What went wrong at the store, in one sentence: the place, the key, the status, what to do.

obstore says what failed in prose that holds addresses, ids of requests and the server's answer. Of
that only the HTTP status, the store's error code and the network's reason are passed on, so that no
secret that a server repeats back can come through.
"""

import re

from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError

from xc_ray.errors import RegistryError
from xc_ray.registry.location import Location

_STATUS = re.compile(r"status code: (\d{3})")
_REDIRECT = "Received redirect"  # where a bucket of another region is asked for
_CODE = re.compile(r"<Code>\s*(\w{1,60})\s*</Code>", re.IGNORECASE)
# Where credentials come from when none are in the environment: the cloud's own address for that.
_INSTANCE = re.compile(r"169\.254\.|metadata\.google|/token|IMDS|service account", re.IGNORECASE)
# Values of a file of credentials, as those who cannot read it quote them.
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`')
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")

# The network's reasons, by what stands in obstore's message for them.
_REASONS = {
    "ConnectionRefused": "the connection was refused",
    "dns error": "the host name is unknown",
    "TimedOut": "no answer in time",
    "ConnectionReset": "the connection was cut",
    "IncompleteMessage": "the connection was cut",
    "UnexpectedEof": "the connection was cut",
    "IncompleteBody": "the connection was cut",
    "certificate": "its TLS certificate is not trusted",
    "InvalidContentType": "it does not speak TLS; write http:// if that is meant",
}

KEYS_OF = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN for keys that expire) "
    "or a profile of ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


def is_missing(error: Exception) -> bool:
    """Whether the store says that there is no such object (and not: no such bucket)."""
    return isinstance(error, FileNotFoundError) and _code(str(error)) not in _NO_BUCKET


def failure(verb: str, location: Location, key: str, error: Exception | None) -> RegistryError:
    """The RegistryError of a call that failed: `verb` says what was tried on `key`."""
    text = str(error)
    status, code = _STATUS.search(text), _code(text)
    number = int(status[1]) if status else None
    answer = (
        f"HTTP {number}" + (f" {code}" if code else "")
        if number
        else _reason(location, error, text)
    )
    advice = _advice(location, number, code, error, text)
    return RegistryError(f"cannot {verb} '{key}' in {location.place}: {answer}; {advice}")


def _code(text: str) -> str | None:
    found = _CODE.search(text)
    return found[1] if found else None


def _reason(location: Location, error: Exception | None, text: str) -> str:
    for mark, reason in _REASONS.items():
        if mark in text:
            return reason
    if _REDIRECT in text:
        return "it sent us elsewhere"
    if not text:
        return type(error).__name__
    # The first line tells a folder's error in the system's words; no request was made.
    line = " ".join(text.splitlines()[0].split())
    return (line if location.scheme == "file" else _QUOTED.sub("…", line))[:300]


def _advice(
    location: Location, status: int | None, code: str | None, error: Exception | None, text: str
) -> str:
    if location.scheme == "file":
        return "check that the folder may be written, has room, and allows hard links"
    if location.scheme == "memory":
        return "this is a fault in the program that uses it"
    keys = KEYS_OF[location.scheme]
    if code in _NO_BUCKET:
        return f"create the {'container' if location.scheme == 'az' else 'bucket'} or correct it"
    if _INSTANCE.search(text.split("Debug source")[0]):
        return f"no credentials were found; set {keys}, or run where the instance has a role"
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if status in (401, 403) or refused:
        return f"check {keys}, and that they may list, read, write and delete here"
    if location.scheme == "s3" and (status == 400 or _REDIRECT in text):
        return f"check the region (now {location.region}) and path_style"
    if status in (409, 412):
        return "another writer was busy with the same object; try again"
    if status == 416:
        return "the object is shorter than it was said to be; run `xc-ray registry verify`"
    if status in (405, 501) or isinstance(error, NotSupportedError):
        return "this server lacks what the registry needs (conditional writes, ranges, listings)"
    if status is None:
        return "check the endpoint and that the network reaches it"
    return "try again; if it stays, look into the store's own log"
