"""Where a person says a picture is -> its file bytes: a path, an http(s) or data URL, or bytes.

For people at their own machine: any path and any address. The server's door is `serve/fetch.py`.
"""

import base64
from pathlib import Path
from urllib.parse import unquote_to_bytes

import httpx

from xc_ray.errors import MediaError
from xc_ray.prompt.query import ImageSource

SHOWN_CHARS = 200  # of a source in a message
MAX_DOWNLOAD_BYTES = 20 << 20
DOWNLOAD_TIMEOUT_S = 30.0


def read_source(source: ImageSource) -> bytes:
    """File bytes of a picture from a path, an http(s) or data URL, or as they are.

    Raises:
        MediaError: one line that names the source and what is wrong with it.
    """
    if isinstance(source, bytes):
        return source
    text = str(source)
    if text.lower().startswith(("http://", "https://")):
        return _download(text)
    if text.startswith("data:"):
        return _from_data_url(text)
    try:
        return Path(source).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as e:  # the last two: `~nobody/`, a null byte
        shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
        reason = getattr(e, "strerror", None) or e
        raise MediaError(f"cannot read the picture {shown!r}: {reason}") from None


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError("the data URL has no comma; write data:image/png;base64,…")
    try:
        return (
            base64.b64decode(body, validate=True)
            if head.endswith(";base64")
            else unquote_to_bytes(body)
        )
    except ValueError:  # binascii.Error is one
        raise MediaError("the data URL is not valid base64") from None


def _download(url: str) -> bytes:
    data = bytearray()
    try:
        with httpx.stream(
            "GET", url, timeout=DOWNLOAD_TIMEOUT_S, follow_redirects=True
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    raise MediaError(
                        f"the picture at {url!r} is larger than {MAX_DOWNLOAD_BYTES:,} bytes"
                    )
    except httpx.HTTPStatusError as e:
        raise MediaError(
            f"cannot fetch the picture {url!r}: HTTP {e.response.status_code}"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as e:  # the last: a long host
        raise MediaError(f"cannot fetch the picture {url!r}: {e or type(e).__name__}") from None
    return bytes(data)
