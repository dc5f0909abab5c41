"""Which credentials a store is reached with: where they come from is told, what they are never.

The clients look for them in the environment and on the instance by themselves. What is missing
there is what every other S3 client reads, the file ~/.aws/credentials: it is read here. The order
is the clients' own, so that what is told is what is used:

    s3   AWS_ACCESS_KEY_ID, the profile of the file, a token file, the container, the instance
    gs   a service account, GOOGLE_APPLICATION_CREDENTIALS, gcloud's own file, the instance
    az   a token, the account's key, a token file, a client's secret, a SAS, the CLI, the instance
"""

import configparser
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xc_ray.errors import RegistryError
from xc_ray.registry.location import Location

INSTANCE: Final = "the role of this instance; none are in the environment or a file"
_GCLOUD: Final = "~/.config/gcloud/application_default_credentials.json"
_TRUE: Final = ("1", "true", "on", "yes", "y")

# Names of the environment, in the order in which the clients look.
_GOOGLE: Final = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
_AZURE: Final = (
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
)
_AWS_LATER: Final = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class Keys:
    """What a profile of the file ~/.aws/credentials holds."""

    key_id: str = field(repr=False)
    secret: str = field(repr=False)
    token: str | None = field(repr=False)


@dataclass(frozen=True)
class Credentials:
    """Where they come from, which may be told; `keys` if the client would not find them itself."""

    source: str
    keys: Keys | None = None


def find_credentials(location: Location) -> Credentials | None:
    """What a client of this place will use; None where there is nothing to ask for.

    Raises:
        RegistryError: what is there is no pair of keys, or a file that is named cannot be read;
            does not quote it.
    """
    match location.scheme:
        case "s3":
            return _amazon()
        case "gs":
            return Credentials(_unsigned("GOOGLE") or _google())
        case "az":
            return Credentials(_unsigned("AZURE") or _azure())
    return None


def _unsigned(cloud: str) -> str | None:
    name = f"{cloud}_SKIP_SIGNATURE"
    skipped = os.environ.get(name, "").lower() in _TRUE
    return f"none, requests are not signed ({name})" if skipped else None


def _amazon() -> Credentials:
    if unsigned := _unsigned("AWS"):
        return Credentials(unsigned)
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SECRET_ACCESS_KEY" in os.environ:
        source = "AWS_ACCESS_KEY_ID of the environment"
        _check(
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment",
            os.environ.get("AWS_ACCESS_KEY_ID", ""),
            os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
            os.environ.get("AWS_SESSION_TOKEN"),
        )
        return Credentials(source)
    return _profile() or Credentials(_named(_AWS_LATER) or INSTANCE)


def _google() -> str:
    found = _named(_GOOGLE)
    if found is None and Path(_GCLOUD).expanduser().is_file():
        return f"the file {_GCLOUD}"
    return found or INSTANCE


def _azure() -> str:
    by_cli = os.environ.get("AZURE_USE_AZURE_CLI", "").lower() in _TRUE
    return _named(_AZURE) or ("the login of the Azure CLI" if by_cli else INSTANCE)


def _named(names: tuple[str, ...]) -> str | None:
    """The first of these that is set."""
    return next((f"{name} of the environment" for name in names if name in os.environ), None)


# ---------------------------------------------------------------- ~/.aws/credentials


def _profile() -> Credentials | None:
    """The keys of `AWS_PROFILE`, else of `default`; None if nobody named any and there are none."""
    wanted, given = os.environ.get("AWS_PROFILE"), os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    name, file = wanted or "default", given or "~/.aws/credentials"
    # No interpolation: a secret may hold '%'.
    profiles = configparser.RawConfigParser()
    try:
        profiles.read_string(Path(file).expanduser().read_text(encoding="utf-8"))
    except configparser.Error:
        # Its own words quote the lines that it cannot read.
        raise RegistryError(
            f"{file} cannot be read as a file of credentials: [PROFILE], then "
            "aws_access_key_id = … and aws_secret_access_key = … on lines of their own"
        ) from None
    except (OSError, RuntimeError, ValueError) as e:  # the last two: `~nobody/`, no text
        if wanted is None and given is None and isinstance(e, OSError | RuntimeError):
            return None
        reason = getattr(e, "strerror", None) or type(e).__name__
        raise RegistryError(f"cannot read the credentials in {file}: {reason}") from None
    values = profiles[name] if profiles.has_section(name) else {}
    key_id, secret = values.get("aws_access_key_id"), values.get("aws_secret_access_key")
    source = f"profile {name!r} of {file}"
    if key_id is None and secret is None:
        if wanted is None and given is None:
            return None
        raise RegistryError(
            f"{source} has no aws_access_key_id and aws_secret_access_key; of a profile by role or "
            "login take the keys: aws configure export-credentials --format env"
        )
    token = values.get("aws_session_token")
    _check(source, key_id or "", secret or "", token)
    return Credentials(source, Keys(key_id or "", secret or "", token))


def _check(source: str, key_id: str, secret: str, token: str | None) -> None:
    # The first and the last travel in headers: obstore panics at a line's end in them.
    for value in (key_id, secret, *([] if token is None else [token])):
        if not value or not value.isascii() or not value.isprintable() or " " in value:
            raise RegistryError(
                f"{source}: one is empty, missing, or not one line of letters, digits and signs"
            )
