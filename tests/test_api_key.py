"""The key that a command sends: where it is looked for, and that no message shows it."""

from pathlib import Path

import pytest

from xc_ray.api_key import ApiKey, find_key
from xc_ray.errors import XcRayError


def test_a_file_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_text("from-file\n")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert find_key(None) is None
    assert find_key(str(path)) == ApiKey("from-file", f"the file {path}")
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert find_key(None) == ApiKey("from-environment", "$OPENAI_API_KEY")
    assert find_key(str(path)) == ApiKey("from-file", f"the file {path}")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert find_key(None) is None


def test_what_it_is_called_does_not_hold_it() -> None:
    assert "secret" not in repr(ApiKey("secret", "$OPENAI_API_KEY"))


@pytest.mark.parametrize("text", ["", " \n", "two\nlines", "two words", "schlüssel", "a\tb"])
def test_what_is_no_key_is_refused_and_not_quoted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(XcRayError) as caught:
        find_key(str(path))
    assert caught.value.message == (
        f"the file {path} holds no key: one line of letters, digits and signs"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none", "No such file or directory"), (".", "Is a directory"), ("nul\0", "ValueError")],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(XcRayError, match=f"^cannot read the key file .+: {reason}$"):
        find_key(str(tmp_path / name))


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    with pytest.raises(XcRayError, match=r": UnicodeDecodeError$"):
        find_key(str(tmp_path / "key"))
