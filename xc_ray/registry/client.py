"""A location made into clients: obstore's for the registry, pyarrow's for Ray Train's checkpoints.

Both get the endpoint, path style and region from the same Location, and look for credentials in the
same places (`credentials.py`). Nothing here does I/O but the making of a local folder at its first
write, and the reading of a file of credentials.
"""

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from xc_ray.errors import ConfigError
from xc_ray.registry.credentials import Keys, find_credentials
from xc_ray.registry.location import Location

if TYPE_CHECKING:
    from obstore.store import AzureConfig, GCSConfig, S3Config, S3Credential

logger = logging.getLogger(__name__)

Client = AzureStore | GCSStore | LocalStore | MemoryStore | S3Store

# One request of an upload may take this long: 8 MiB (store.PART_BYTES) at 28 kB/s. A time without
# an answer cannot bound it, because the answer comes only after the whole body went out.
UPLOAD_S = 300.0
# One download; what bounds it sooner is `timeout_s` without a byte.
DOWNLOAD_S = 3600.0
# With the pauses between them (0.1 s and doubling) a refused connection fails after about 3 s.
MAX_RETRIES = 5


def open_clients(location: Location) -> tuple[Client, Client]:
    """Two clients of one place: for all calls, and for the bodies of large uploads.

    Says in the log which credentials they use.

    Raises:
        RegistryError: the credentials are none.
    """
    match location.scheme:
        case "memory":
            memory = MemoryStore()
            return memory, memory
        case "file":
            # With the folder missing the constructor would fail, also for one who only looks.
            folder = LocalStore(location.prefix, mkdir=True)
            return folder, folder
    found = find_credentials(location)
    assert found is not None
    logger.info("credentials of %s://%s: %s", location.scheme, location.bucket, found.source)
    calls = {"read_timeout": _span(location.timeout_s), "timeout": _span(DOWNLOAD_S)}
    uploads = {"timeout": _span(UPLOAD_S)}
    return (
        _remote(location, found.keys, calls, retry_s=location.timeout_s),
        _remote(location, found.keys, uploads, retry_s=UPLOAD_S),
    )


def _remote(
    location: Location, keys: Keys | None, timeouts: dict[str, timedelta], *, retry_s: float
) -> Client:
    shared: dict[str, Any] = {
        "prefix": location.prefix or None,
        "client_options": {
            **timeouts,
            "connect_timeout": _span(min(location.timeout_s, 5.0)),
            "allow_http": bool(location.endpoint and location.endpoint.startswith("http://")),
        },
        "retry_config": {
            "max_retries": MAX_RETRIES,
            "retry_timeout": _span(retry_s),
            "backoff": {"init_backoff": _span(0.1), "max_backoff": _span(2.0), "base": 2},
        },
    }
    if location.scheme == "gs":
        google: GCSConfig = {"base_url": location.endpoint} if location.endpoint else {}
        return GCSStore(location.bucket, config=google, **shared)
    if location.scheme == "az":
        azure: AzureConfig = {}
        if location.account:
            azure["account_name"] = location.account
        if location.endpoint:
            azure["endpoint"] = location.endpoint
        return AzureStore(location.bucket, config=azure, **shared)
    s3: S3Config = {
        "region": location.region or "us-east-1",
        "virtual_hosted_style_request": not location.path_style,
        "conditional_put": "etag",
        # One DELETE for each key: every server knows it, bulk deletion not.
        "disable_bulk_delete": True,
    }
    if location.endpoint:
        s3["endpoint"] = _s3_endpoint(location, location.endpoint)
    if keys is None:
        return S3Store(location.bucket, config=s3, **shared)

    # Not in the configuration, which would take a session's token from the environment to them.
    def of_file() -> "S3Credential":
        return {
            "access_key_id": keys.key_id,
            "secret_access_key": keys.secret,
            "token": keys.token,
            "expires_at": None,
        }

    return S3Store(location.bucket, config=s3, credential_provider=of_file, **shared)


def _s3_endpoint(location: Location, endpoint: str) -> str:
    """obstore wants the bucket in the host itself, unless the path is to hold it."""
    if location.path_style:
        return endpoint
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{location.bucket}.{parts.netloc}"


def arrow_filesystem(location: Location) -> tuple[Any, str]:
    """A pyarrow filesystem and a path: `RunConfig(storage_filesystem=…, storage_path=…)`.

    Raises:
        ConfigError: a place that other processes cannot see, or an Azure account that is missing.
    """
    # 0.1 s to load, and only training asks. It ships no types.
    from pyarrow import fs

    path = "/".join(part for part in (location.bucket, location.prefix) if part)
    if location.scheme == "file":
        return fs.LocalFileSystem(), path
    if location.scheme == "memory":
        raise ConfigError("storage memory:// cannot hold checkpoints; give a folder or a bucket")
    host: dict[str, Any] = {}
    if location.endpoint:
        parts = urlsplit(location.endpoint)
        host = {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    if location.scheme == "s3":
        s3 = fs.S3FileSystem(
            region=location.region,
            force_virtual_addressing=not location.path_style,
            connect_timeout=min(location.timeout_s, 5.0),
            request_timeout=location.timeout_s,
            **host,
        )
        return s3, path
    if location.scheme == "gs":
        return fs.GcsFileSystem(**host), path
    if not location.account:
        raise ConfigError(
            f"storage {location} names no account; add ?account=NAME or set "
            "AZURE_STORAGE_ACCOUNT_NAME"
        )
    if location.endpoint:
        host = {
            "blob_storage_authority": urlsplit(location.endpoint).netloc,
            "blob_storage_scheme": urlsplit(location.endpoint).scheme,
        }
    key = os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    return fs.AzureFileSystem(location.account, account_key=key, **host), path


def _span(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)
