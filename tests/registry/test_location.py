"""The storage setting: what it may be, what is refused, and in which words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.errors import ConfigError
from xc_ray.registry.location import Location, default_url

PREFIXES = st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True), max_size=3).map("/".join)


@pytest.fixture(autouse=True)
def _no_aws(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)


@given(
    prefix=PREFIXES,
    endpoint=st.sampled_from([None, "http://127.0.0.1:9000", "https://minio.example"]),
    region=st.sampled_from(["us-east-1", "eu-west-3"]),
    path_style=st.booleans(),
    timeout_s=st.sampled_from([10.0, 0.5, 30.0]),
)
def test_s3_setting_is_read_as_it_is_written(prefix, endpoint, region, path_style, timeout_s):
    one = Location("s3", "models", prefix, endpoint, region, path_style, None, timeout_s)
    assert Location.parse(str(one)) == one


@pytest.mark.parametrize(
    "text",
    [
        "memory://",
        "gs://bucket",
        "gs://bucket/a/b",
        "az://container/a?account=me",
        "file:///data/with%20space/%23x",
    ],
)
def test_other_settings_are_read_as_they_are_written(text: str):
    assert str(Location.parse(text)) == text
    assert Location.parse(str(Location.parse(text))) == Location.parse(text)


def test_plain_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Location.parse("models") == Location("file", prefix=str(tmp_path / "models"))
    assert Location.parse("~/models") == Location("file", prefix=str(tmp_path / "home/models"))
    assert Location.parse(str(tmp_path)) == Location.parse(tmp_path.as_uri())


def test_server_with_an_endpoint_is_asked_by_path_and_aws_by_host():
    assert Location.parse("s3://bucket?endpoint=http://127.0.0.1:9000").path_style
    assert not Location.parse("s3://bucket").path_style
    assert not Location.parse("s3://bucket?endpoint=https://s3.example&path_style=false").path_style


def test_endpoint_and_region_come_from_the_environment_where_the_setting_has_none(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-south-2")
    found = Location.parse("s3://bucket")
    assert (found.endpoint, found.region) == ("http://127.0.0.1:9", "eu-south-2")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert Location.parse("s3://bucket").region == "eu-north-1"
    assert Location.parse("s3://bucket?region=ap-east-1").region == "ap-east-1"


def test_default_is_below_the_users_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_url() == f"file://{tmp_path}/xc_ray/registry"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_url() == "file:///home/somebody/.local/share/xc_ray/registry"


def test_place_names_endpoint_and_bucket():
    one = Location.parse("s3://models/team?endpoint=http://127.0.0.1:9000")
    assert one.place == "bucket 'models', prefix 'team' at http://127.0.0.1:9000"
    assert "https://s3.eu-west-1.amazonaws.com" in Location.parse("s3://abc?region=eu-west-1").place
    assert "https://me.blob.core.windows.net" in Location.parse("az://abc?account=me").place
    assert Location.parse("/data").place == "folder /data"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket?endpont=http://x", "option 'endpont' is unknown for s3://; did you mean end"),
        (
            "gs://bucket?region=x",
            "option 'region' is unknown for gs://; known: endpoint, timeout_s",
        ),
        ("s3://bucket?region=a&region=b", "option region is given twice"),
        ("s3://bucket?region=", "option region is empty"),
        ("s3://bucket?path_style=yes", "path_style is true or false (found 'yes')"),
        ("s3://bucket?timeout_s=0", "timeout_s is 0.1 to 60 s"),
        ("s3://bucket?timeout_s=nan", "timeout_s is 0.1 to 60 s"),
        ("s3://bucket?endpoint=127.0.0.1:9000", "is not http(s)://host[:port]"),
        ("s3://bucket?endpoint=http://x/bucket", "is not http(s)://host[:port]"),
        ("s3://bucket?endpoint=http://x:99999", "is not http(s)://host[:port]"),
        ("s3://", "'' is no name of a bucket"),
        ("az://a%2Fb", "is no name of a container"),
        ("s3://bucket/a/../b", "'..' cannot be in a prefix"),
        ("s3://bucket/a//b", "'' cannot be in a prefix"),
        ("s3://bucket/a b", "'a b' cannot be in a prefix"),
        ("s3://bucket#x", "has a part after '#'"),
        ("http://127.0.0.1:9000/bucket", "for an S3 server write s3://bucket?endpoint="),
        ("ftp://x", "no such scheme; it is a folder, file:///…, s3://"),
        ("file://data/models", "names the host 'data'; a folder of this machine is file:///data/m"),
        ("file:///a/../b", "is not an absolute folder without '..'"),
        ("memory://x", "memory:// takes nothing after it"),
        ("", "storage '' is empty"),
    ],
)
def test_setting_that_cannot_be_is_refused(text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        Location.parse(text)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "s3://key:hunter2@bucket/prefix",
        "s3://hunter2@bucket",
        "s3://bucket?endpoint=http://key:hunter2@127.0.0.1:9000",
    ],
)
def test_credentials_in_a_setting_are_refused_and_not_repeated(text: str):
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        Location.parse(text)
    assert "hunter2" not in caught.value.message
