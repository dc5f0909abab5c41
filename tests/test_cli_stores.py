"""Commands that reach a store say which credentials they use, once, and never show them."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.local_http import Reply, serving
from tests.s3_server import S3Server
from xc_ray import cli

KEY_ID, SECRET, TOKEN = "KEYIDoftheStore", "sEcReToftheStore", "tOkEnoftheStore"
VALUES = (KEY_ID, SECRET, TOKEN)
ROOT = Path(__file__).parents[1]
FILE = f"""[team]
aws_access_key_id = {KEY_ID}
aws_secret_access_key = {SECRET}
aws_session_token = {TOKEN}
"""
COMMANDS = ("registry list", "registry import", "chat", "infer", "data check", "train")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's folders of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def in_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The keys are in the environment; gives what is said of them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    return "AWS_ACCESS_KEY_ID of the environment"


@pytest.fixture
def in_file(server: S3Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    """The keys are in ~/.aws/credentials; gives what is said of them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "team")
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").write_text(FILE)
    return "profile 'team' of ~/.aws/credentials"


def argv_of(command: str, url: Callable[[str], str], tiny: Path, folder: Path) -> list[str]:
    """A command that reaches the store; most end with an error, which they say only after that."""
    match command:
        case "registry list":
            return ["registry", "list", "--registry", url("models")]
        case "registry import":
            return ["registry", "import", str(tiny), "--name", "xc", "--registry", url("models")]
        case "chat":
            return ["chat", "--model", "xc@1", "--registry", url("models")]
        case "infer":
            output = ["--dataset", "demo-json", "--output", str(folder / "answers.jsonl")]
            model = ["--model", "demo", "--adapter", "cats@1", "--registry", url("models")]
            return ["infer", *model, *output]
        case "data check":
            return ["data", "check", url("set/train.jsonl")]
    config = {
        "model": "xc@1",
        "name": "run",
        "storage": url("runs"),
        "registry": url("models"),
        "data": {"train": [{"path": url("set/train.jsonl")}]},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return ["train", str(folder / "train.yaml")]


@pytest.mark.usefixtures("root_logger_as_it_was")
@pytest.mark.parametrize("where", ["in_environment", "in_file"])
@pytest.mark.parametrize("command", COMMANDS)
def test_which_credentials_are_used_is_said_once_and_they_are_not_shown(
    command: str,
    where: str,
    server: S3Server,
    request: pytest.FixtureRequest,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, bucket = request.getfixturevalue(where), server.make_bucket()
    argv = argv_of(command, lambda path: server.url(bucket, path), tiny("2.5"), tmp_path)
    caplog.set_level(logging.DEBUG)
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert err.count(f"xc-ray: credentials of s3://{bucket}: {source}\n") == 1
    assert err.count("credentials of") == 1
    assert code == (0 if command.startswith("registry") else 1)
    for value in VALUES:
        assert value not in out + err + caplog.text


@pytest.mark.usefixtures("root_logger_as_it_was")
@pytest.mark.parametrize("where", ["in_environment", "in_file"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_that_repeats_what_it_was_sent_does_not_show_it_through_us(
    command: str,
    where: str,
    request: pytest.FixtureRequest,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = request.getfixturevalue(where)
    body = f"<Error><Code>AccessDenied</Code><Message>{' '.join(VALUES)}</Message></Error>"
    caplog.set_level(logging.DEBUG)
    with serving(lambda _: Reply(body.encode(), 403)) as store:
        url = f"s3://place/{{}}?endpoint={store.url}&timeout_s=1"
        code = cli.main(argv_of(command, url.format, tiny("2.5"), tmp_path))
    out, err = capsys.readouterr()
    assert code == 1
    assert f"xc-ray: credentials of s3://place: {source}\n" in err
    assert "HTTP 403 AccessDenied; check AWS_ACCESS_KEY_ID" in out + err
    assert any(KEY_ID in asked.headers.get("authorization", "") for asked in store.asked)
    for value in VALUES:
        assert value not in out + err + caplog.text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_show_them(
    command: str, in_environment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    out, err = capsys.readouterr()
    assert "usage" in out
    for value in VALUES:
        assert value not in out + err


def test_a_process_of_its_own_shows_them_neither(in_file: str, server: S3Server) -> None:
    """What the store's client may write by itself, beside Python's streams, is seen too."""
    bucket = server.make_bucket()
    ended = subprocess.run(
        [sys.executable, "-m", "xc_ray", "registry", "list", "--registry", server.url(bucket)],
        cwd=ROOT, text=True, capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    first, second, *_ = ended.stderr.splitlines()
    assert first == f"registry: {server.url(bucket)}"
    assert second == f"xc-ray: credentials of s3://{bucket}: {in_file}"
    for value in VALUES:
        assert value not in ended.stdout + ended.stderr


def test_keys_that_are_none_are_one_line(
    in_file: str, server: S3Server, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / ".aws" / "credentials").write_text(f"{FILE}\n{SECRET} and more\n")
    assert cli.main(["registry", "list", "--registry", server.url("bucket")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("xc-ray: ~/.aws/credentials cannot be read as a file")
    assert SECRET not in err


def test_a_folder_says_nothing_of_credentials(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["registry", "import", str(tiny("2.5")), "--name", "xc", "--registry", str(tmp_path)]
    assert cli.main(argv) == 0
    assert "credentials" not in capsys.readouterr().err
