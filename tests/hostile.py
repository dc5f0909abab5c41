"""What a hostile client sends, as a table: URLs, files, bodies and names.

A row says what it is and what must happen. What must not have happened is the same for all of them:
no connection to the forbidden listener, no file of the server opened, memory and time bounded, and
the next request served. `tests/e2e/test_hostile.py` sends the rows to a started server;
`tests/serve/test_fetch.py` has the URLs, with names that only its own resolver knows.

To add one: a line in a list here.
"""

import base64
import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xc_ray.keys import digest_of

# URLs. {port} is where a server listens that must never see a connection.

ADDRESSES_INSIDE = [
    "http://127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://0.0.0.0:{port}/",
    "http://127.255.255.254:{port}/",
    "http://10.0.0.1:{port}/",
    "http://172.16.0.1:{port}/",
    "http://192.168.0.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://100.100.100.200/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[fe80::1]:{port}/",
    "http://[ff02::1]:{port}/",
    "http://127。0。0。1:{port}/",
]

# What a name resolves to when somebody wants the server to look into its own network.
NAMES = {
    "inside.test": ["127.0.0.1"],
    "one-of-two.test": ["93.184.215.14", "127.0.0.1"],
    "one-of-two-first.test": ["127.0.0.1", "93.184.215.14"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "6to4.test": ["2002:7f00:1::"],
    "teredo.test": ["2001:0:7f00:1::"],
    "any.test": ["0.0.0.0"],
    "any6.test": ["::"],
    "loopback6.test": ["::1"],
    "scoped.test": ["fe80::1%lo"],
    "metadata.test": ["169.254.169.254"],
    "localhost": ["127.0.0.1", "::1"],
    "127.1": ["127.0.0.1"],  # as the system's resolver reads these three
    "2130706433": ["127.0.0.1"],
    "0x7f000001": ["127.0.0.1"],
}

NAMES_INSIDE = [
    "http://inside.test:{port}/",
    "http://one-of-two.test:{port}/",
    "http://one-of-two-first.test:{port}/",
    "http://mapped.test:{port}/",
    "http://nat64.test:{port}/",
    "http://6to4.test:{port}/",
    "http://teredo.test:{port}/",
    "http://any.test:{port}/",
    "http://any6.test:{port}/",
    "http://loopback6.test:{port}/",
    "http://scoped.test:{port}/",
    "http://metadata.test:{port}/",
]

# Never parsed into a host that is looked up, whatever a laxer reader would make of them.
MALFORMED = [
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://127.0.0.0x1:{port}/",
    "http://127.0.0.1.0:{port}/",
    "http://0:{port}/",
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:{port}/",
    "http://①②⑦.0.0.1:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1%00.test:{port}/",
    "http://inside.test%2f@public.test:{port}/",
    "http://public.test@127.0.0.1:{port}/",
    "http://user:word@inside.test:{port}/",
    "http://@inside.test:{port}/",
    "http://public.test:80@inside.test:{port}/",
    "http://public.test\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: x",
    "http://127.0.0.1:{port}\t/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\x00",
    "http://127.0.0.1:{port}/\u2028",
    "http://inside.test:{port}/\ud800",
    "http://[fe80::1%25lo]:{port}/",
    "http://[::1:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://127.0.0.1:{port}:80/",
    "http://inside.test:0/",
    "http://inside.test:-1/",
    "http://inside.test:65536/",
    "http:///inside.test:{port}/",
    "http:inside.test:{port}/",
    "http://",
    "//127.0.0.1:{port}/",
    "127.0.0.1:{port}/",
    "/etc/passwd",
    "etc/passwd",
    "",
    "file:///etc/passwd",
    "file://127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/",
    "ws://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}/!/",
    "blob:http://127.0.0.1:{port}/",
    "unix:///var/run/docker.sock",
    "javascript:alert(1)",
    "http://" + "a" * 64 + ".test:{port}/",
    "http://" + "a." * 130 + "test:{port}/",
    "http://a..test:{port}/",
    "http://inside.test;a:{port}/",
    "http://127.0.0.1:{port}/" + "a" * 10_000,
]

# Of a public host, on ports of other services; refused before anything is sent.
OTHER_PORTS = [f"http://93.184.215.14:{port}/" for port in (21, 22, 25, 6379, 8080, 9200, 11211)]

# Where an allowed server redirects to. {allowed} is itself, by its address.
REDIRECTED_INSIDE = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "//127.0.0.1:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "{allowed}/to?http://127.0.0.1:{port}/",
    "http://93.184.215.14:22/",
]
REDIRECTED_ASTRAY = [
    "file://{secret}",
    "data:image/png;base64,AAAA",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_GET",
    "http://user:word@127.0.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.0.0.1:99999/",
    "http:\\\\127.0.0.1:{port}\\",
]

# Files of the server: {secret} is one that nobody may open.
LOCAL_PATHS = [
    "{secret}",
    "file://{secret}",
    "file:{secret}",
    "FILE://localhost{secret}",
    "file:///proc/self/environ",
    "../../../../../../../..{secret}",
    "http://{secret}",
    "/dev/zero",
]


# Files


@dataclass(frozen=True)
class File:
    """Bytes that claim to be a picture; `code` of the refusal, None if it is served."""

    what: str
    make: Callable[[], bytes]
    code: str | None = "invalid_image"
    type: str = "png"


def drawn(kind: str, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int = 8, height: int = 8, extra: bytes = b"", pixels: bytes | None = None) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = bytes((3 * width + 1) * height) if pixels is None else pixels
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def exif_bomb() -> bytes:
    """65,535 entries, each of which is the whole block of a megabyte."""
    count, extra = 65_535, 1 << 20
    length = 2 + 12 * count + 4 + extra
    entries = b"".join(struct.pack(">HHLL", i, 1, length, 0) for i in range(1, count + 1))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", count) + entries + bytes(4 + extra)


def gif(width: int, height: int, frame: tuple[int, int] = (8, 8), size: int = 8) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    place = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0)
    return b"GIF89a" + screen + place + bytes([size]) + b"\x02\x4c\x01\0;"


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = drawn("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def many_scans(side: int = 4000, count: int = 50_000) -> bytes:
    data = drawn("JPEG", (side, side), progressive=True, quality=5)
    return data[:-2] + b"\xff\xda\0\x08\1\1\x11\1\x3f\0" * count + data[-2:]


def webp_of(width: int, height: int) -> bytes:
    """An animation whose header claims another size."""
    frame = bytes(6) + struct.pack("<I", 63)[:3] + struct.pack("<I", 47)[:3] + bytes(4)
    frame += drawn("WEBP")[12:]
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    parts = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    parts += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    parts += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def bmp(width: int, height: int, data: bytes = b"", depth: int = 24, packed: int = 0) -> bytes:
    palette = bytes(1024) if depth == 8 else b""
    start = 54 + len(palette)
    head = struct.pack("<IHHI", start + len(data), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, packed, len(data), 0, 0, 0, 0)
    return b"BM" + head + info + palette + data


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(200)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
    return out.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
ENTITY = (
    b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&b;</svg>'
)
LAUGHS = b'<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;&b;">]><svg>&c;</svg>'
SCRIPT = b"<script>fetch('http://127.0.0.1/')</script>"

FILES = [
    # not pictures, whatever they claim
    File("text", lambda: b"GIF? No."),
    File("HTML", lambda: b"<!doctype html><html><img src='http://127.0.0.1/'>"),
    File("an SVG", lambda: SVG, type="svg+xml"),
    File("an SVG that names a file", lambda: ENTITY, type="svg+xml"),
    File("an SVG of a billion laughs", lambda: LAUGHS, type="svg+xml"),
    File("a PDF", lambda: drawn("PDF"), type="jpeg"),
    File("a TIFF", lambda: drawn("TIFF"), type="tiff"),
    File("an ICO", lambda: drawn("ICO"), type="x-icon"),
    File("an EPS, which Pillow would give to Ghostscript", lambda: drawn("EPS")),
    File("a PPM", lambda: drawn("PPM")),
    File("a TGA", lambda: drawn("TGA")),
    File("a JPEG 2000", lambda: drawn("JPEG2000")),
    File("a PSD", lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3)),
    File("a FITS file", lambda: b"SIMPLE  =                    T".ljust(2880)),
    File("a ZIP", zipped),
    File("a gzipped PNG", lambda: gzip.compress(png())),
    File("a program", lambda: b"\x7fELF\2\1\1" + bytes(57)),
    File("a video", lambda: b"\0\0\0\x18ftypmp42" + bytes(100)),
    File("a pickle", lambda: b"cos\nsystem\n(S'true'\ntR."),
    File("a playlist that names a URL", lambda: b"#EXTM3U\nhttp://127.0.0.1/a.png\n"),
    File(
        "a script for ImageMagick", lambda: b"push graphic-context\nfill 'url(http://127.0.0.1/)'"
    ),
    File("zeros", lambda: bytes(1 << 20)),
    File("one byte", lambda: b"\x89"),
    File("no byte", lambda: b"", "invalid_image_url"),
    # damaged ones
    *(
        File(f"half a {kind}", lambda kind=kind: (d := drawn(kind))[: len(d) // 2])  # type: ignore[misc]  # the default binds it
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    ),
    File("a PNG without pixels", lambda: png(pixels=b"")),
    File("a PNG of its signature alone", lambda: png()[:8]),
    File("a PNG of no width", lambda: png(0, 8)),
    File("a PNG with a wrong checksum", lambda: png()[:-20] + b"\xff" * 20),
    File("a PNG with a chunk of 4 GB", lambda: png()[:33] + b"\xff\xff\xff\xffIDAT"),
    File(
        "a JPEG without a scan", lambda: (d := drawn("JPEG"))[: d.index(b"\xff\xda")] + b"\xff\xd9"
    ),
    File("a GIF of a code size that there is not", lambda: gif(8, 8, size=200)),
    File("a BMP whose pixels are beyond its end", lambda: bmp(3000, 3000)),
    # bombs
    File(
        "a PNG of 400 million pixels",
        lambda: png(20_000, 20_000, pixels=bytes(9)),
        "image_too_large",
    ),
    File(
        "a PNG of 4 billion by 4 billion",
        lambda: png(2**31 - 1, 2**31 - 1, pixels=b"0"),
        "image_too_large",
    ),
    File("a PNG just beyond the limit", lambda: png(10_000, 9_000, pixels=b"0"), "image_too_large"),
    File("a JPEG of 65,500 × 65,500", lambda: jpeg_of(65_500, 65_500), "image_too_large"),
    File("a WebP of 16,000 × 16,000", lambda: webp_of(16_000, 16_000), "image_too_large"),
    File("a WebP of 16,777,216 × 255", lambda: webp_of(1 << 24, 255), "image_too_large"),
    File("a GIF of 65,535 × 65,535", lambda: gif(65_535, 65_535), "image_too_large"),
    File(
        "a GIF with a frame larger than itself",
        lambda: gif(8, 8, (60_000, 60_000)),
        "image_too_large",
    ),
    File("a BMP of 2 billion × 2 billion", lambda: bmp(2**31 - 1, 2**31 - 1), "image_too_large"),
    File(
        "a PNG with a text of 64 MB in 64 kB",
        lambda: png(extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20), 9))),
    ),
    File(
        "a PNG with a colour profile of 64 MB in 64 kB",
        lambda: png(extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(64 << 20), 9))),
    ),
    File(
        "a PNG of 500,000 chunks",
        lambda: png(extra=chunk(b"prVt", b"") * 500_000),
        "image_too_complex",
    ),
    File(
        "a JPEG of 500,000 segments",
        lambda: (d := drawn("JPEG"))[:2] + b"\xff\xe5\0\2" * 500_000 + d[2:],
        "image_too_complex",
    ),
    File("a JPEG of 50,000 scans", many_scans, "image_too_complex"),
    File("more bytes than the limit", lambda: bytes((20 << 20) + 1), "image_too_large"),
    # odd ones, which are served
    File("a BMP whose runs jump", lambda: bmp(5000, 5000, b"\0\2\xff\xff" * 99, 8, 1), None),
    File("a JPEG with more pixels than bits", lambda: jpeg_of(9_000, 9_000), None),
    File("a PNG with EXIF entries of 64 GB", lambda: png(extra=chunk(b"eXIf", exif_bomb())), None),
    File(
        "a JPEG with an EXIF block of noise",
        lambda: drawn("JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 999),
        None,
    ),
    File("a CMYK JPEG", lambda: drawn("JPEG", mode="CMYK"), None, "jpeg"),
    File("a gray JPEG", lambda: drawn("JPEG", mode="L"), None),
    File("a PNG of one bit", lambda: drawn("PNG", mode="1"), None),
    File("a GIF of 200 frames", lambda: animated("GIF"), None, "gif"),
    File("a WebP of 200 frames", lambda: animated("WEBP"), None, "webp"),
    File("a PNG of 200 frames", lambda: animated("PNG"), None),
    File("a GIF that is a script, too", lambda: drawn("GIF") + b"/*" + SCRIPT + b"*/", None),
    File("a JPEG that is a ZIP, too", lambda: drawn("JPEG") + zipped(), None),
    File("a PNG that is HTML, too", lambda: png(extra=chunk(b"tEXt", b"a\0" + SCRIPT)), None),
    File("a PNG that is called a JPEG", png, None, "jpeg"),
    File("a picture of one pixel", lambda: png(1, 1), None),
]


# Bodies


@dataclass(frozen=True)
class Body:
    """The bytes of a request; what it is answered with. Status 200: it is served."""

    what: str
    make: Callable[[], bytes]
    status: int = 400
    code: str | None = "invalid_json"
    type: str = "application/json"


def asking(**fields: Any) -> bytes:
    base = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return json.dumps(base | fields).encode()


def raw(name: bytes, value: bytes) -> bytes:
    """A field as its very bytes."""
    return asking()[:-1] + b', "' + name + b'": ' + value + b"}"


def saying(text: bytes) -> bytes:
    return asking().replace(b'"hi"', b'"' + text + b'"')


BODIES = [
    Body("nothing", lambda: b""),
    Body("no JSON", lambda: b"model=demo"),
    Body("half of it", lambda: asking()[:-9]),
    Body("two in one", lambda: asking() * 2),
    Body("a list", lambda: b"[]", code="invalid_type"),
    Body("a number", lambda: b"1e5", code="invalid_type"),
    Body("null", lambda: b"null", code="invalid_type"),
    Body("100,000 lists in each other", lambda: b"[" * 100_000),
    Body("100,000 objects in each other", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    Body("a field 300 deep", lambda: raw(b"stop", b"[" * 300 + b"]" * 300)),
    Body("a field 100 deep", lambda: raw(b"stop", b"[" * 100 + b"]" * 100), code="invalid_value"),
    Body("NaN", lambda: raw(b"temperature", b"NaN")),
    Body("Infinity", lambda: raw(b"temperature", b"Infinity")),
    Body("a number beyond floats", lambda: raw(b"temperature", b"1e999"), code=None),
    Body("a number of 5,000 digits", lambda: raw(b"seed", b"9" * 5000), code=None),
    Body("a number of 4,000 digits", lambda: raw(b"seed", b"9" * 4000), code="invalid_value"),
    Body(
        "a number with a fraction of a million digits",
        lambda: raw(b"temperature", b"0." + b"9" * 1_000_000),
        200,
        None,
    ),
    Body("a lone surrogate", lambda: saying(b"\\ud800")),
    Body("bytes that are no UTF-8", lambda: saying(b"\xff\xfe")),
    Body("an overlong slash", lambda: saying(b"\xc0\xaf")),
    Body("UTF-16", lambda: asking().decode().encode("utf-16")),
    Body("a raw null in a string", lambda: saying(b"\0")),
    Body("an escaped null in a text", lambda: saying(b"a\\u0000b"), 200, None),
    Body(
        "a text of control tokens", lambda: saying(b"</s>[UNUSED_TOKEN_145]<ImageHere>"), 200, None
    ),
    Body("a model twice: the last counts", lambda: raw(b"model", b'"demo"'), 200, None),
    Body(
        "a model twice, the last unknown", lambda: raw(b"model", b'"other"'), 404, "model_not_found"
    ),
    Body("__proto__", lambda: raw(b"__proto__", b"{}"), code="unknown_parameter"),
    Body("a field with a line break", lambda: raw(b"a\\nb", b"1"), code="unknown_parameter"),
    Body(
        "a field of a million characters",
        lambda: raw(b"a" * 1_000_000, b"1"),
        code="unknown_parameter",
    ),
    Body(
        "100,000 fields",
        lambda: asking(**{f"f{i}": 1 for i in range(100_000)}),
        code="unknown_parameter",
    ),
    Body(
        "100,000 messages",
        lambda: asking(messages=[{"role": "user", "content": "a"}] * 100_000),
        code="invalid_value",
    ),
    Body(
        "100,000 parts",
        lambda: asking(
            messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 100_000}]
        ),
        code="invalid_value",
    ),
    Body("messages that are numbers", lambda: asking(messages=[1, 2]), code="invalid_type"),
    Body(
        "a content that is a number",
        lambda: asking(messages=[{"role": "user", "content": 1}]),
        code="invalid_value",
    ),
    Body(
        "a content that is null",
        lambda: asking(messages=[{"role": "user", "content": None}]),
        code="missing_required_parameter",
    ),
    Body(
        "a text of 20 MB",
        lambda: asking(messages=[{"role": "user", "content": "a" * (20 << 20)}]),
        code="context_length_exceeded",
    ),
    Body(
        "33 pictures",
        lambda: asking(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]
                    * 33,
                }
            ]
        ),
        code="too_many_images",
    ),
    Body("a stop string of a megabyte", lambda: asking(stop="a" * (1 << 20)), 200, None),
    Body("a million stop strings", lambda: asking(stop=["a"] * 1_000_000), code="invalid_value"),
    Body("a user of a megabyte", lambda: asking(user="a" * (1 << 20)), 200, None),
    Body("more than 64 MiB", lambda: asking(user="a" * (64 << 20)), 413, "request_too_large"),
    Body("64 MiB of spaces", lambda: b" " * (64 << 20)),
    Body("a form", lambda: b"a=b&c=d", type="application/x-www-form-urlencoded"),
    Body(
        "a form in parts",
        lambda: b"--x\r\n\r\n" + asking() + b"\r\n--x--",
        type="multipart/form-data; boundary=x",
    ),
    Body("the right JSON, called a text", asking, 200, None, "text/plain"),
    Body("gzip", lambda: gzip.compress(asking())),
]

# As `model`, and behind /v1/models/.
MODEL_NAMES = [
    "../../etc/passwd",
    "..",
    "/etc/passwd",
    "demo/../../etc/passwd",
    "demo\\..\\..",
    "file:///etc/passwd",
    "http://127.0.0.1/",
    "demo\0",
    "demo\n",
    "demo\r\nX-Header: 1",
    "demo\u202e",
    "\u0434emo",  # a Cyrillic d
    "DEMO",
    " demo",
    "demo ",
    "a" * 512,
    "${jndi:ldap://127.0.0.1/a}",
    "{{7*7}}",
    "'; DROP TABLE models; --",
    "<script>alert(1)</script>",
    "demo:../../etc/passwd",
    "demo:..",
    "demo:/etc/passwd",
    "demo:a/../b",
    "demo:a\0b",
    "demo:a\nb",
    "demo:cats@../prod",
    "demo:cats@sha256:../../../etc/passwd",
    "demo:cats@-1",
    "demo:cats@99999999999999999999",
    "demo:cats@\u0661",  # an Arabic one
    "demo:CATS",
    "demo:" + "a" * 500,
    "demo:",
    "demo@1",
    "demo:a:b",
    "demo:a@b@c",
]


# Requests that are not what HTTP says


@dataclass(frozen=True)
class Wire:
    """The very bytes of a connection, and the statuses that may answer; None: it is closed."""

    what: str
    send: bytes
    statuses: tuple[int | None, ...] = (400, None)


# The one key of the server, so that it is not that which they are refused for.
KEY = "sk-hostile-0123456789abcdef"
BEARER = f"Authorization: Bearer {KEY}\r\n".encode()
END = b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + BEARER + b"\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + BEARER
WIRE = [
    Wire("less than content-length says", CHAT + b"Content-Length: 500\r\n\r\n{", (408, None)),
    Wire("a content-length that is no number", CHAT + b"Content-Length: x\r\n\r\n{}"),
    Wire("a negative content-length", CHAT + b"Content-Length: -1\r\n\r\n{}"),
    Wire("two lengths", CHAT + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x"),
    Wire(
        "a length and chunks",
        CHAT + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    Wire("a length of a terabyte", CHAT + b"Content-Length: 1099511627776\r\n\r\n{", (413, None)),
    Wire("chunks that are none", CHAT + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    Wire(
        "chunks that do not end",
        CHAT + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        (408, None),
    ),
    Wire(
        "a chunk of a terabyte",
        CHAT + b"Transfer-Encoding: chunked\r\n\r\n10000000000\r\n{",
        (408, None),
    ),
    Wire("no HTTP", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(99)),
    Wire(
        "a header of a megabyte",
        CHAT + b"X-A: " + b"a" * (1 << 20) + b"\r\n\r\n",
        (400, 431, 413, None),
    ),
    Wire("a path of 100 kB", b"GET /" + b"a" * 100_000 + END, (400, 404, 414, None)),
    Wire("a path that leaves the root", b"GET /../../etc/passwd" + END, (404, None)),
    Wire("another server's URL", b"GET http://127.0.0.1/" + END, (404, 400, None)),
    Wire("a tunnel", b"CONNECT 127.0.0.1:80" + END, (400, 404, 405, None)),
]


@dataclass(frozen=True)
class Stranger:
    """Headers, and a query, of somebody without the key."""

    what: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    query: str = ""


def bearer(key: str | bytes) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"authorization", b"Bearer " + (key if isinstance(key, bytes) else key.encode())),)


STRANGERS = [
    Stranger("no header"),
    Stranger("an empty header", ((b"authorization", b""),)),
    Stranger("a scheme alone", ((b"authorization", b"Bearer"),)),
    Stranger("the key alone", ((b"authorization", KEY.encode()),)),
    Stranger("another scheme", ((b"authorization", b"Basic " + KEY.encode()),)),
    Stranger(
        "the key with a user's name",
        ((b"authorization", b"Basic " + base64.b64encode(f":{KEY}".encode())),),
    ),
    Stranger("another key", bearer("sk-another")),
    Stranger("the key without its end", bearer(KEY[:-1])),
    Stranger("the key and more", bearer(KEY + "0")),
    Stranger("the key in capitals", bearer(KEY.upper())),
    Stranger("the key in quotes", bearer(f'"{KEY}"')),
    Stranger("the key twice", bearer(f"{KEY} {KEY}")),
    Stranger("the key in a list", bearer(f"{KEY},{KEY}")),
    Stranger("what the key hashes to", bearer(digest_of(KEY))),
    Stranger("a pattern", bearer("*")),
    Stranger("null", bearer("null")),
    Stranger("bytes that are no text", bearer(b"\xff\xfe\x80")),
    Stranger("a key of 50 kB", bearer("k" * 50_000)),
    Stranger("another key before the right one", bearer("sk-another") + bearer(KEY)),
    Stranger("the key in another header", ((b"x-api-key", KEY.encode()),)),
    Stranger("the key in a proxy's header", ((b"proxy-authorization", b"Bearer " + KEY.encode()),)),
    Stranger("the key in a cookie", ((b"cookie", f"Authorization=Bearer {KEY}".encode()),)),
    Stranger("the key in the query", query=f"?api_key={KEY}&authorization=Bearer%20{KEY}"),
    Stranger("a client that says it is this machine", ((b"x-forwarded-for", b"127.0.0.1"),)),
    Stranger("another path", ((b"x-original-url", b"/healthz"), (b"x-rewrite-url", b"/healthz"))),
]
