"""The key file: what it may hold, what is refused, and that no message quotes a key."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from xc_ray.config import Allowance
from xc_ray.errors import ConfigError
from xc_ray.keys import PREFIX, KeyFile, digest_of, new_key

PATH = Path("/etc/xc_ray/keys.yaml")
A, B = "a" * 64, "b" * 64


def parse(*entries: Any) -> KeyFile:
    return KeyFile.parse(yaml.safe_dump({"keys": list(entries)}).encode(), PATH)


def refusal(data: Any) -> str:
    data = data if isinstance(data, bytes) else yaml.safe_dump(data).encode()
    with pytest.raises(ConfigError) as caught:
        KeyFile.parse(data, PATH)
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix(f"the key file {PATH}: ")


def test_an_entry_needs_a_name_and_a_digest() -> None:
    (entry,) = parse({"name": "team-a", "sha256": A}).keys
    assert (entry.name, entry.sha256, entry.scopes) == ("team-a", (A,), ("chat",))
    assert (entry.adapters, entry.allowance) == (None, None)


def test_an_entry_holds_what_its_key_may() -> None:
    (entry,) = parse(
        {
            "name": "ops@example.com",
            "sha256": [A, B],
            "scopes": ["chat", "admin"],
            "adapters": ["cats"],
            "allowance": {"concurrent": 8},
        }
    ).keys
    assert entry.sha256 == (A, B)
    assert entry.scopes == ("chat", "admin")
    assert entry.adapters == ("cats",)
    assert entry.allowance == Allowance(concurrent=8)


def test_json_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "a", "sha256": A}]}), encoding="utf-8")
    assert KeyFile.read(path).keys[0].name == "a"


def test_no_keys_are_nobody_and_an_empty_file_is_a_mistake() -> None:
    assert parse().keys == ()
    assert refusal(b"") == "Input should be a valid dictionary or instance of KeyFile"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a"}, "keys.0.sha256: Field required"),
        ({"sha256": A}, "keys.0.name: Field required"),
        ({"name": "a b", "sha256": A}, "keys.0.name: String should match pattern"),
        ({"name": "a", "sha256": A.upper()}, "keys.0.sha256.0: String should match pattern"),
        ({"name": "a", "sha256": A[1:]}, "keys.0.sha256.0: String should match pattern"),
        ({"name": "a", "sha256": []}, "keys.0.sha256: Tuple should have at least 1 item"),
        ({"name": "a", "sha256": A, "scopes": ["root"]}, "keys.0.scopes.0: Input should be 'chat'"),
        ({"name": "a", "sha256": A, "scopes": []}, "keys.0.scopes: Tuple should have at least 1"),
        (
            {"name": "a", "sha256": A, "adapter": ["cats"]},
            "keys.0: unknown key 'adapter'; did you mean 'adapters'?",
        ),
        (
            {"name": "a", "sha256": A, "adapters": ["cats@prod"]},
            "keys.0.adapters: adapters are names, without @VERSION: 'cats@prod' is no name",
        ),
        (
            {"name": "a", "sha256": A, "allowance": {"concurrent": 0}},
            "keys.0.allowance.concurrent: Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_wrong_entry_is_refused_by_its_place(entry: Any, message: str) -> None:
    assert refusal({"keys": [entry]}).startswith(message)


def test_two_entries_are_two_names_and_two_keys() -> None:
    twice = {"name": "a", "sha256": A}
    assert refusal({"keys": [twice, {"name": "a", "sha256": B}]}) == "two entries are called 'a'"
    assert (
        refusal({"keys": [twice, {"name": "b", "sha256": [B, A]}]})
        == "'a' and 'b' have the same key"
    )


@pytest.mark.parametrize(
    "data",
    [
        {"keys": [{"name": "a", "sha256": "{key}"}]},
        {"keys": [{"name": "a", "sha256": {"{key}": 1}}]},
        {"keys": [{"name": "{key} ", "sha256": A}]},
        {"keys": [{"name": "a", "sha256": A, "{key}": 1}]},
        {"keys": [{"name": "a", "sha256": A, "adapters": ["{key}"]}]},
        {"keys": [{"name": "a", "sha256": A, "scopes": ["{key}"]}]},
        {"keys": ["{key}"]},
        {"keys": "{key}"},
        {"{key}": []},
        ["{key}"],
        b"{key}",
        b"keys: [{name: a, sha256: {key}: b]",
        b"{key}\xff",
        b"{key}: [\n",
    ],
)
def test_a_key_that_stands_where_none_belongs_is_not_quoted(data: Any) -> None:
    key = new_key()
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    message = refusal(raw.replace(b"{key}", key.encode()))
    assert key not in message
    assert key.removeprefix(PREFIX) not in message


def test_a_file_that_is_not_yaml_is_told_by_its_line() -> None:
    assert refusal(b"keys:\n- name: [") == f"the key file {PATH} is not YAML (line 2)"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyFile.read(tmp_path / "none")
    assert caught.value.message == (
        f"cannot read the key file {tmp_path / 'none'}: No such file or directory"
    )


@given(st.binary(max_size=200))
@example(b"2026-99-99")
@example(b"!!bool x")
@example(b"!!timestamp x")
def test_whatever_a_file_holds_it_is_keys_or_one_error_of_ours(data: bytes) -> None:
    assert refusal(data)  # none of these is a key file


def test_a_new_key_is_random_and_its_digest_is_plain_sha256() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert key.startswith(PREFIX)
        assert len(key) == len(PREFIX) + 43  # 256 bits in base64
        assert key.isascii()
        assert digest_of(key) == hashlib.sha256(key.encode()).hexdigest()
