from pathlib import Path

import pytest

from xc_ray.demo.drawn.fonts import (
    HELD_OUT_FILES,
    MATPLOTLIB_FILES,
    PILLOW_FACE,
    TRAINING_FILES,
    find_fonts,
    load_font,
)
from xc_ray.errors import ConfigError


def test_pillow_and_matplotlib_are_enough_to_train_with(tmp_path: Path):
    fonts = find_fonts([tmp_path])
    assert fonts.training[0] == PILLOW_FACE
    assert [Path(path).name for path in fonts.training[1:]] == list(MATPLOTLIB_FILES)
    assert fonts.held_out == ()


def test_files_are_found_wherever_below_the_folders_they_lie(tmp_path: Path):
    for i, name in enumerate(("Lato-Bold.ttf", "Play-Bold.ttf", "Other.ttf")):
        (tmp_path / str(i) / "deep").mkdir(parents=True)
        (tmp_path / str(i) / "deep" / name).write_bytes(b"")
    fonts = find_fonts([tmp_path / "0", tmp_path / "1", tmp_path / "2"])
    assert [Path(path).name for path in fonts.training[-1:]] == ["Lato-Bold.ttf"]
    assert [Path(path).name for path in fonts.held_out] == ["Play-Bold.ttf"]


def test_missing_fonts_are_named_with_their_packages(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Lato-Bold\.ttf.*install .*fonts-lato"):
        find_fonts([tmp_path], require_all=True)


def test_held_out_families_are_not_in_training():
    training = {name[:5] for names in TRAINING_FILES.values() for name in names}
    training |= {name[:5] for name in MATPLOTLIB_FILES}
    assert not training & {name[:5] for names in HELD_OUT_FILES.values() for name in names}


def test_a_font_is_loaded_once_for_a_size():
    assert load_font(PILLOW_FACE, 20) is load_font(PILLOW_FACE, 20)
    assert load_font(PILLOW_FACE, 20).size == 20
    dejavu = next(path for path in find_fonts([]).training if path.endswith("DejaVuSans.ttf"))
    assert load_font(dejavu, 33).getname() == ("DejaVu Sans", "Book")
