"""The storage setting: one string for CLI, serving and training, parsed into where the bytes are.

    /data/models · file:///data/models     a folder (the embedded default, below the user's data)
    s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1&path_style=true
    gs://bucket/prefix                     Google Cloud Storage
    az://container/prefix?account=NAME     Azure Blob Storage
    memory://                              this process only, for tests

Credentials come from the environment, a file or the instance (`credentials.py`); a setting that
holds some is refused, so that it can be printed, logged and stored.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from xc_ray.errors import ConfigError

KEYS: dict[str, tuple[str, ...]] = {
    "file": (),
    "memory": (),
    "s3": ("endpoint", "region", "path_style", "timeout_s"),
    "gs": ("endpoint", "timeout_s"),
    "az": ("endpoint", "account", "timeout_s"),
}
EXAMPLES = "a folder, file:///…, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
# Seconds without a byte from the store after which a call fails; see `client.py` for the retries.
TIMEOUT_S = 10.0
MAX_TIMEOUT_S = 60.0  # bounds how long a deletion can be on its way, see upload.SETTLE_S

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_SEGMENT = re.compile(r"[A-Za-z0-9._=+@-]+")


@dataclass(frozen=True)
class Location:
    """A storage setting, taken apart; `str()` gives it back in its one full form.

    `prefix` is what stands before every key: segments without slashes at the ends, or the absolute
    folder of a `file` location. `endpoint` is an http(s) address without a path.
    """

    scheme: str
    bucket: str = ""
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    account: str | None = None
    timeout_s: float = TIMEOUT_S

    @classmethod
    def parse(cls, text: str) -> "Location":
        """The location that a setting names.

        Raises:
            ConfigError: an unknown scheme or option, credentials in it, or a name out of grammar.
        """
        if "://" not in text:
            return _folder(text)
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise ConfigError(f"storage {text!r:.200} is not an address ({error})") from error
        if parts.username is not None or parts.password is not None or "@" in parts.netloc:
            # Without the setting itself: what is wrong with it is that it holds a secret.
            raise ConfigError(
                f"storage {parts.scheme}://…@… holds credentials; leave them out of the setting "
                "and give them in the environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        if parts.scheme not in KEYS:
            hint = "; for an S3 server write s3://bucket?endpoint=…" if "http" in text[:5] else ""
            raise ConfigError(f"storage {text!r:.200}: no such scheme; it is {EXAMPLES}{hint}")
        if parts.fragment:
            raise ConfigError(f"storage {text!r:.200} has a part after '#'; leave it out")
        options = _options(parts, text)
        if parts.scheme == "memory":
            if parts.netloc or parts.path.strip("/"):
                raise ConfigError(f"storage {text!r:.200}: memory:// takes nothing after it")
            return cls("memory")
        if parts.scheme == "file":
            return _file(parts, text)
        return _bucket(parts, options, text)

    def __str__(self) -> str:
        if self.scheme == "memory":
            return "memory://"
        if self.scheme == "file":
            return f"file://{quote(self.prefix)}"
        options = {"endpoint": self.endpoint, "region": self.region, "account": self.account}
        shown = {key: value for key, value in options.items() if value is not None}
        if self.scheme == "s3":
            shown["path_style"] = str(self.path_style).lower()
        if self.timeout_s != TIMEOUT_S:
            shown["timeout_s"] = f"{self.timeout_s:g}"
        base = f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        return f"{base}?{urlencode(shown, safe=':/')}" if shown else base

    @property
    def place(self) -> str:
        """Where it is, for error messages: endpoint and bucket, or the folder."""
        match self.scheme:
            case "memory":
                return "memory://"
            case "file":
                return f"folder {self.prefix}"
            case "s3":
                where = self.endpoint or f"https://s3.{self.region}.amazonaws.com"
            case "gs":
                where = self.endpoint or "https://storage.googleapis.com"
            case _:
                host = f"https://{self.account or '(no account)'}.blob.core.windows.net"
                where = self.endpoint or host
        kind = "container" if self.scheme == "az" else "bucket"
        prefix = f", prefix '{self.prefix}'" if self.prefix else ""
        return f"{kind} '{self.bucket}'{prefix} at {where}"


def default_url() -> str:
    """The setting when none is given: a folder below the user's data."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(_folder(str(Path(home) / "xc_ray" / "registry")))


def _folder(text: str) -> Location:
    if not text.strip() or "\0" in text:
        raise ConfigError(f"storage {text!r} is empty; it is {EXAMPLES}")
    # `abspath` and not `resolve`: a link in the way is the user's, and may move.
    return Location("file", prefix=os.path.abspath(Path(text).expanduser()))


def _file(parts: SplitResult, text: str) -> Location:
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"storage {text!r:.200} names the host {parts.netloc!r}; a folder of this machine is "
            f"file:///{parts.netloc}{parts.path} (three slashes)"
        )
    path = unquote(parts.path)
    if not path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ConfigError(f"storage {text!r:.200} is not an absolute folder without '..'")
    return _folder(path)


def _options(parts: SplitResult, text: str) -> dict[str, str]:
    known = KEYS[parts.scheme]
    found: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ConfigError(f"storage option {key!r} is unknown for {parts.scheme}://; {hint}")
        if key in found or not value:
            what = "is given twice" if key in found else "is empty"
            raise ConfigError(f"storage {text!r:.200}: option {key} {what}")
        found[key] = value
    return found


def _bucket(parts: SplitResult, options: dict[str, str], text: str) -> Location:
    if not _BUCKET.fullmatch(parts.netloc):
        kind = "container" if parts.scheme == "az" else "bucket"
        raise ConfigError(
            f"storage {text!r:.200}: {parts.netloc!r} is no name of a {kind} "
            "(3 to 63 letters, digits, '.', '_' and '-')"
        )
    prefix = unquote(parts.path).strip("/")
    for segment in prefix.split("/") if prefix else ():
        if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
            raise ConfigError(
                f"storage {text!r:.200}: {segment!r} cannot be in a prefix "
                "(letters, digits, '.', '_', '-', '=', '+' and '@', between single slashes)"
            )
    endpoint, region = options.get("endpoint"), options.get("region")
    if parts.scheme == "s3":
        # What every S3 client reads. Said once here, so that obstore and pyarrow agree.
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or None
        region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        region = region or "us-east-1"
    account = options.get("account")
    if parts.scheme == "az":
        account = account or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or None
    return Location(
        parts.scheme,
        bucket=parts.netloc,
        prefix=prefix,
        endpoint=_endpoint(endpoint) if endpoint else None,
        region=region,
        # Servers of one's own rarely have a name for every bucket; AWS has.
        path_style=_flag(options.get("path_style"), default=endpoint is not None),
        account=account,
        timeout_s=_seconds(options.get("timeout_s")),
    )


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        sound = False
    if "@" in text:
        raise ConfigError("the storage endpoint holds credentials; give them in the environment")
    if not sound or parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(
            f"storage endpoint {text!r:.200} is not http(s)://host[:port]; the bucket goes first: "
            "s3://bucket/prefix?endpoint=http://127.0.0.1:9000"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _flag(text: str | None, *, default: bool) -> bool:
    if text is None:
        return default
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"storage option path_style is true or false (found {text!r:.80})")
    return text.lower() == "true"


def _seconds(text: str | None) -> float:
    try:
        seconds = TIMEOUT_S if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= MAX_TIMEOUT_S:
        raise ConfigError(
            f"storage option timeout_s is 0.1 to {MAX_TIMEOUT_S:g} s (found {text!r:.80})"
        )
    return seconds
