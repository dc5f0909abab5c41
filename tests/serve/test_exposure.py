"""What is public, what is said about it at the start, and a server that has no keys there."""

import logging

import pytest

from xc_ray.serve import exposure
from xc_ray.serve.exposure import is_public, tell_exposure


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_loopback_is_this_machines_alone(host: str) -> None:
    assert not is_public(host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "*",
        "",
        None,
        "10.0.0.7",
        "192.168.1.2",
        "169.254.1.1",
        "8.8.8.8",
        "fe80::1",
        "gpu-1.example.com",
        "localhost.example.com",
        "127.0.0.1.nip.io",
        "127.1",
    ],
)
def test_all_else_is_public_and_so_is_what_nobody_knows(host: str | None) -> None:
    assert is_public(host)


@pytest.mark.parametrize("token", [True, False])
def test_an_open_ray_is_told_loudly(
    token: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exposure, "is_token_auth_enabled", lambda: token)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        tell_exposure("127.0.0.1", has_keys=False, insecure=False)
    assert ("RAY IS OPEN" in caplog.text) == (not token)
    assert ("RAY_AUTH_MODE=token" in caplog.text) == (not token)


@pytest.mark.parametrize(
    ("host", "has_keys", "insecure", "told"),
    [
        ("127.0.0.1", False, False, None),
        ("0.0.0.0", True, False, None),
        ("0.0.0.0", False, True, "INSECURE: whoever reaches 0.0.0.0"),
        ("0.0.0.0", False, False, "NOT SERVING on 0.0.0.0"),
    ],
)
def test_a_public_address_without_keys_is_told_with_what_to_do(
    host: str,
    has_keys: bool,
    insecure: bool,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(exposure, "is_token_auth_enabled", lambda: True)
    with caplog.at_level(logging.INFO, "ray.serve"):
        tell_exposure(host, has_keys=has_keys, insecure=insecure)
    if told is None:
        assert caplog.text == ""
    else:
        assert told in caplog.text
        assert ("`insecure: true`" in caplog.text) == (not insecure)
