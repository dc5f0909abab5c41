"""Which fonts the demo model's samples are printed in: those of training, and others held out.

The training fonts are Pillow's own face, the DejaVu and STIX files that matplotlib carries and the
files of a few freely licensed Debian packages. Whole families are held out, so that a test shows
whether the model reads or remembers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from PIL import ImageFont

from xc_ray.errors import ConfigError

Font: TypeAlias = ImageFont.FreeTypeFont

PILLOW_FACE = ""  # the path of the face inside Pillow (Aileron, CC0)
DEBIAN_FOLDER = Path("/usr/share/fonts")

MATPLOTLIB_FILES = (  # Bitstream Vera / public domain; SIL OFL
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
)
TRAINING_FILES: Mapping[str, tuple[str, ...]] = {  # Debian package: its files
    "fonts-liberation": (  # SIL OFL
        "LiberationSans-Regular.ttf",
        "LiberationSans-Bold.ttf",
        "LiberationSans-Italic.ttf",
        "LiberationSans-BoldItalic.ttf",
        "LiberationSerif-Regular.ttf",
        "LiberationSerif-Bold.ttf",
        "LiberationSerif-Italic.ttf",
        "LiberationSerif-BoldItalic.ttf",
        "LiberationMono-Regular.ttf",
        "LiberationMono-Bold.ttf",
        "LiberationSansNarrow-Regular.ttf",
        "LiberationSansNarrow-Bold.ttf",
    ),
    "fonts-lato": ("Lato-Regular.ttf", "Lato-Bold.ttf"),  # SIL OFL
    "fonts-roboto-unhinted": (  # Apache 2.0
        "Roboto-Regular.ttf",
        "Roboto-Bold.ttf",
        "Roboto-Italic.ttf",
        "RobotoCondensed-Regular.ttf",
    ),
    "fonts-crosextra-carlito": ("Carlito-Regular.ttf",),  # SIL OFL
    "fonts-crosextra-caladea": (  # Apache 2.0
        "Caladea-Regular.ttf",
        "Caladea-Bold.ttf",
        "Caladea-Italic.ttf",
    ),
    "fonts-comic-neue": ("ComicNeue-Regular.otf", "ComicNeue-Bold.otf"),  # SIL OFL
    "fonts-quattrocento": ("Quattrocento-Regular.otf",),  # SIL OFL
    "fonts-inconsolata": ("Inconsolata.otf",),  # SIL OFL
}
HELD_OUT_FILES: Mapping[str, tuple[str, ...]] = {
    # Apache 2.0
    "fonts-open-sans": ("OpenSans-Regular.ttf", "OpenSans-Bold.ttf", "OpenSans-Italic.ttf"),
    "fonts-cantarell": ("Cantarell-Regular.otf", "Cantarell-Bold.otf"),  # SIL OFL
    "fonts-play": ("Play-Regular.ttf", "Play-Bold.ttf"),  # SIL OFL
    "fonts-freefont-ttf": ("FreeSansBold.ttf", "FreeSerifBoldItalic.ttf"),  # GPL, font exception
}


@dataclass(frozen=True)
class Fonts:
    """Paths of font files; `held_out` shares no family with `training`."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def find_fonts(folders: Iterable[str | Path] = (), *, require_all: bool = False) -> Fonts:
    """The fonts found below `folders` (none given: Debian's), with Pillow's and matplotlib's.

    Raises:
        ConfigError: `require_all` and a file is missing; names the packages that have it.
    """
    searched = [Path(folder) for folder in folders] or [DEBIAN_FOLDER]
    found: dict[str, str] = {}
    # Debian has its own DejaVu, of another version: matplotlib's is looked at first.
    for folder in [*_matplotlib_fonts(), *searched]:
        for path in sorted(folder.rglob("*.[ot]tf")):
            found.setdefault(path.name, str(path))
    packages = {"matplotlib": MATPLOTLIB_FILES, **TRAINING_FILES, **HELD_OUT_FILES}
    missing = {p: [n for n in names if n not in found] for p, names in packages.items()}
    lacking = {package: names for package, names in missing.items() if names}
    if require_all and lacking:
        files = ", ".join(name for names in lacking.values() for name in names)
        raise ConfigError(
            f"fonts missing from {', '.join(map(str, searched))}: {files}; "
            f"install {' '.join(lacking)} (all but matplotlib with apt-get)"
        )
    training = (*MATPLOTLIB_FILES, *(n for names in TRAINING_FILES.values() for n in names))
    held_out = tuple(n for names in HELD_OUT_FILES.values() for n in names)
    return Fonts(
        (PILLOW_FACE, *(found[n] for n in training if n in found)),
        tuple(found[n] for n in held_out if n in found),
    )


@lru_cache(maxsize=1024)  # some 160 KB each
def load_font(path: str, size: int) -> Font:
    """The face at `path` (`PILLOW_FACE` for Pillow's own) with `size` pixels to the em."""
    if path == PILLOW_FACE:
        face = ImageFont.load_default(size)
        assert isinstance(face, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return face.font_variant(layout_engine=ImageFont.Layout.BASIC)
    # Basic layout: Raqm, where it is installed, places letters otherwise and takes longer.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _matplotlib_fonts() -> list[Path]:
    """Its folder, found without importing it, which takes a second."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"]
