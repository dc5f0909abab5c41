"""Which credentials a store is reached with: what is told is what is sent, and never shown."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_http import Asked, Reply, serving
from xc_ray.errors import RegistryError
from xc_ray.registry import client
from xc_ray.registry.credentials import INSTANCE, Credentials, find_credentials
from xc_ray.registry.location import Location
from xc_ray.registry.store import ObjectStore

SECRET = "sEcReT/of+the%store"
FILE = f"""
[default]
aws_access_key_id = DEFAULTKEY
aws_secret_access_key = {SECRET}
[team]
aws_access_key_id = TEAMKEY
aws_secret_access_key = {SECRET}
aws_session_token = TEAMTOKEN
[login]
sso_session = corporate
[half]
aws_access_key_id = HALFKEY
[broken]
aws_access_key_id = BROKEN KEY
aws_secret_access_key = {SECRET}
"""
S3 = {"AWS_ACCESS_KEY_ID": "ENVKEY", "AWS_SECRET_ACCESS_KEY": SECRET}
AZURE_KEY, AZURE_SAS = {"AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}, {"AZURE_STORAGE_SAS_TOKEN": "sig=x"}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user of the test's own, and an environment without any cloud's names."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    # No retries, and no time to fail in: only what was asked for counts.
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    return tmp_path


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, home: Path) -> Callable[..., None]:
    """A function that sets names of the environment, and writes ~/.aws/credentials if told."""

    def given(env: dict[str, str], file: str | None = None) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        if file is not None:
            (home / ".aws").mkdir()
            (home / ".aws" / "credentials").write_text(file)

    return given


def told(url: str) -> str:
    found = find_credentials(Location.parse(url))
    assert found is not None
    assert SECRET not in repr(found)
    return found.source


def sent(scheme: str) -> tuple[str, Asked]:
    """What is told at the first call of a store, and the request that it makes."""
    with serving(lambda _: Reply(b"", 404)) as answering:
        account = "&account=me" if scheme == "az" else ""
        store = ObjectStore.open(f"{scheme}://place?endpoint={answering.url}{account}")
        with pytest.raises(RegistryError) as caught:
            store.get("k")
        assert SECRET not in caught.value.message
        return told(store.url), answering.asked[0]


@pytest.mark.parametrize(
    ("env", "file", "source", "key", "token"),
    [
        (S3, None, "AWS_ACCESS_KEY_ID of the environment", "ENVKEY", None),
        (S3, FILE, "AWS_ACCESS_KEY_ID of the environment", "ENVKEY", None),
        (
            S3 | {"AWS_SESSION_TOKEN": "ENVTOKEN"},
            FILE,
            "AWS_ACCESS_KEY_ID of the environment",
            "ENVKEY",
            "ENVTOKEN",
        ),
        ({}, FILE, "profile 'default' of ~/.aws/credentials", "DEFAULTKEY", None),
        (
            {"AWS_PROFILE": "team"},
            FILE,
            "profile 'team' of ~/.aws/credentials",
            "TEAMKEY",
            "TEAMTOKEN",
        ),
        # A token of other keys does not come to those of the file.
        (
            {"AWS_SESSION_TOKEN": "STRAY"},
            FILE,
            "profile 'default' of ~/.aws/credentials",
            "DEFAULTKEY",
            None,
        ),
    ],
    ids=["env", "env before file", "env with token", "default", "named", "stray token"],
)
def test_of_several_keys_for_s3_the_ones_told_are_sent(
    given: Callable[..., None],
    env: dict[str, str],
    file: str | None,
    source: str,
    key: str,
    token: str | None,
) -> None:
    given(env, file)
    found, asked = sent("s3")
    assert found == source
    assert f"Credential={key}/" in asked.headers["authorization"]
    assert asked.headers.get("x-amz-security-token") == token


def test_a_file_may_be_elsewhere(given: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text(FILE)
    given({"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "mounted"), "AWS_PROFILE": "team"})
    found, asked = sent("s3")
    assert found == f"profile 'team' of {tmp_path}/mounted"
    assert "Credential=TEAMKEY/" in asked.headers["authorization"]


def test_pyarrow_takes_the_same(given: Callable[..., None]) -> None:
    """It looks by itself, so that no key travels with a run's configuration to its workers."""
    given({"AWS_PROFILE": "team", "AWS_EC2_METADATA_DISABLED": "true"}, FILE)
    with serving(lambda _: Reply(b"", 404)) as answering:
        url = f"s3://place?endpoint={answering.url}&timeout_s=2"
        filesystem, path = ObjectStore.open(url).filesystem()
        with pytest.raises(FileNotFoundError):
            filesystem.open_input_file(f"{path}/k")
    assert "Credential=TEAMKEY/" in answering.asked[0].headers["authorization"]
    assert answering.asked[0].headers["x-amz-security-token"] == "TEAMTOKEN"


@pytest.mark.parametrize(
    ("env", "source", "sign"),
    [
        (AZURE_KEY | AZURE_SAS, "AZURE_STORAGE_ACCOUNT_KEY of the environment", "SharedKey me:"),
        (
            AZURE_KEY | {"AZURE_STORAGE_TOKEN": "TOKEN"},
            "AZURE_STORAGE_TOKEN of the environment",
            "Bearer TOKEN",
        ),
        (AZURE_SAS, "AZURE_STORAGE_SAS_TOKEN of the environment", None),
        (
            AZURE_KEY | {"AZURE_SKIP_SIGNATURE": "true"},
            "none, requests are not signed (AZURE_SKIP_SIGNATURE)",
            None,
        ),
    ],
    ids=["key before SAS", "token before key", "SAS", "unsigned"],
)
def test_of_several_for_azure_the_one_told_is_sent(
    given: Callable[..., None], env: dict[str, str], source: str, sign: str | None
) -> None:
    given(env)
    found, asked = sent("az")
    assert found == source
    assert asked.headers.get("authorization", "none").startswith(sign or "none")
    assert ("sig=x" in asked.path) == (env == AZURE_SAS)


def test_unsigned_requests_are_told_as_such(given: Callable[..., None]) -> None:
    given(S3 | {"AWS_SKIP_SIGNATURE": "true"}, FILE)
    found, asked = sent("s3")
    assert found == "none, requests are not signed (AWS_SKIP_SIGNATURE)"
    assert "authorization" not in asked.headers


def test_what_is_left_is_the_instance(given: Callable[..., None], home: Path) -> None:
    assert {told("s3://bucket"), told("gs://bucket"), told("az://container")} == {INSTANCE}
    given({"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "GOOGLE_APPLICATION_CREDENTIALS": "/x.json"})
    assert told("s3://bucket") == "AWS_WEB_IDENTITY_TOKEN_FILE of the environment"
    assert told("gs://bucket") == "GOOGLE_APPLICATION_CREDENTIALS of the environment"


def test_gclouds_own_file_is_told(home: Path) -> None:
    (home / ".config/gcloud").mkdir(parents=True)
    (home / ".config/gcloud/application_default_credentials.json").write_text("{}")
    assert told("gs://bucket") == "the file ~/.config/gcloud/application_default_credentials.json"


def test_a_folder_wants_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ObjectStore.open(str(tmp_path)).put("k", b"v")
    assert find_credentials(Location.parse(str(tmp_path))) is None
    assert "credentials" not in caplog.text


@pytest.mark.parametrize(
    ("env", "file", "message"),
    [
        ({"AWS_PROFILE": "none"}, FILE, "profile 'none' of ~/.aws/credentials has no aws_access"),
        ({"AWS_PROFILE": "login"}, FILE, "aws configure export-credentials --format env"),
        ({"AWS_PROFILE": "half"}, FILE, "profile 'half' of ~/.aws/credentials: one is empty"),
        ({"AWS_PROFILE": "broken"}, FILE, "not one line of letters, digits and signs"),
        ({"AWS_PROFILE": "team"}, None, "cannot read the credentials in ~/.aws/credentials: No su"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "/none"}, FILE, "cannot read the credentials in /none: "),
        ({}, f"[default]\n{SECRET}\n", "~/.aws/credentials cannot be read as a file of credential"),
        ({}, SECRET, "~/.aws/credentials cannot be read as a file of credentials: [PROFILE]"),
        ({"AWS_ACCESS_KEY_ID": "KEY"}, FILE, "AWS_SECRET_ACCESS_KEY of the environment: one is e"),
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, FILE, "AWS_SECRET_ACCESS_KEY of the environment: on"),
        (S3 | {"AWS_ACCESS_KEY_ID": f"{SECRET}\n"}, None, "not one line of letters, digits and s"),
        (S3 | {"AWS_SESSION_TOKEN": f"{SECRET}\n"}, None, "not one line of letters, digits and s"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_does_not_quote_it(
    given: Callable[..., None], env: dict[str, str], file: str | None, message: str
) -> None:
    given(env, file)
    with pytest.raises(RegistryError) as caught:
        ObjectStore.open("s3://bucket?endpoint=http://127.0.0.1:1").get("k")
    assert message in caught.value.message
    for value in (SECRET, "HALFKEY", "BROKEN"):
        assert value not in caught.value.message


@pytest.mark.parametrize("text", ['"SECRET"', '{"type": "SECRET"}', '{"private_key": ["SECRET"]}'])
def test_what_a_client_quotes_of_its_own_file_is_cut(
    given: Callable[..., None], tmp_path: Path, text: str
) -> None:
    (tmp_path / "key.json").write_text(text)
    given({"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json")})
    with pytest.raises(RegistryError) as caught:
        ObjectStore.open("gs://bucket?endpoint=http://127.0.0.1:1").get("k")
    assert "SECRET" in str(caught.value.__cause__) or "private_key" in text
    assert "SECRET" not in caught.value.message
    assert "set GOOGLE_APPLICATION_CREDENTIALS" in caught.value.message


def test_a_profile_without_keys_that_nobody_named_is_passed_over(
    given: Callable[..., None],
) -> None:
    given({}, "[team]\naws_access_key_id = K\naws_secret_access_key = s\n")
    assert find_credentials(Location.parse("s3://bucket")) == Credentials(INSTANCE)
