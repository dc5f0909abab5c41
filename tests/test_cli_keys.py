"""`xc-ray keys new`: what it prints is a key and an entry that lets it in."""

import pytest
import yaml

from xc_ray import cli
from xc_ray.keys import KeyFile
from xc_ray.serve.auth import Caller, KeyRing


def made(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, Caller]:
    """The key that was printed, and whom the printed entry makes of it."""
    assert cli.main(["keys", "new", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    key, _, rest = out.partition("\n")
    assert key not in rest
    file = KeyFile.model_validate({"keys": yaml.safe_load(rest)})
    return key, KeyRing(file).caller(f"Bearer {key}")


def test_the_printed_entry_lets_the_printed_key_in(capsys: pytest.CaptureFixture[str]) -> None:
    key, caller = made(capsys, "team-a")
    assert caller == Caller("team-a", frozenset({"chat"}))
    assert made(capsys, "team-a")[0] != key


def test_options_are_what_it_may(capsys: pytest.CaptureFixture[str]) -> None:
    assert made(capsys, "ops@example.com", "--admin")[1].is_admin
    assert made(capsys, "a", "--adapters", "cats", "dogs")[1].adapters == frozenset(
        ("cats", "dogs")
    )
    assert made(capsys, "a", "--adapters")[1].adapters == frozenset()
    assert made(capsys, "1e5")[1].name == "1e5"  # YAML would read a number


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a b"], "argument NAME: 'a b' is no name"),
        (["a", "--adapters", "cats@prod"], "--adapters: 'cats@prod' is no name in the registry"),
        ([], "the following arguments are required: NAME"),
    ],
)
def test_wrong_usage_is_told(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["keys", "new", *argv])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
