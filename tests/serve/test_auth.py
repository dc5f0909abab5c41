"""Keys: who is known, what each may, and a file that changes, breaks or vanishes meanwhile."""

import asyncio
import hmac
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.config import Allowance
from xc_ray.errors import ConfigError, Forbidden, Unauthenticated
from xc_ray.keys import KeyFile, digest_of, new_key
from xc_ray.serve import auth
from xc_ray.serve.auth import Caller, KeyRing, KeyWatch, anybody

KEY, OTHER = new_key(), new_key()
Write = Callable[..., Path]


def entry(name: str, *keys: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": [digest_of(key) for key in keys], **more}


def ring(*entries: dict[str, Any]) -> KeyRing:
    return KeyRing(KeyFile.model_validate({"keys": list(entries)}))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes the key file."""

    def write(*entries: dict[str, Any]) -> Path:
        path = tmp_path / "keys.yaml"
        path.write_text(yaml.safe_dump({"keys": list(entries)}), encoding="utf-8")
        return path

    return write


class TestKeyRing:
    def test_a_key_is_its_holders(self) -> None:
        keys = ring(entry("a", KEY), entry("b", OTHER, allowance={"concurrent": 2}))
        assert keys.caller(f"Bearer {KEY}").name == "a"
        assert keys.caller(f"bearer  {OTHER} ") == Caller(
            "b", frozenset({"chat"}), None, Allowance(concurrent=2)
        )

    def test_an_old_and_a_new_key_are_the_same_holders(self) -> None:
        keys = ring(entry("a", KEY, OTHER))
        assert keys.caller(f"Bearer {KEY}") == keys.caller(f"Bearer {OTHER}")

    @pytest.mark.parametrize(
        "header",
        [None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer{KEY}"],
        ids=["none", "empty", "scheme", "blank", "key", "basic", "joined"],  # KEY is new each time
    )
    def test_without_a_key_it_is_said_how_to_send_one(self, header: str | None) -> None:
        with pytest.raises(Unauthenticated, match="Authorization: Bearer KEY") as caught:
            ring(entry("a", KEY)).caller(header)
        assert caught.value.code == "invalid_api_key"
        assert KEY not in str(caught.value)

    def test_nobody_is_known_where_there_are_no_entries(self) -> None:
        with pytest.raises(Unauthenticated):
            ring().caller(f"Bearer {KEY}")

    def test_a_digest_is_no_key(self) -> None:
        with pytest.raises(Unauthenticated):
            ring(entry("a", KEY)).caller(f"Bearer {digest_of(KEY)}")

    @given(st.text(max_size=80))
    def test_whatever_else_is_sent_is_nobodys_and_is_not_repeated(self, text: str) -> None:
        keys = ring(entry("a", KEY), entry("b", OTHER))
        for header in (text, f"Bearer {text}", f"Bearer {KEY}{text.strip()}x"):
            try:
                header.encode()
            except UnicodeEncodeError:
                continue
            with pytest.raises(Unauthenticated) as caught:
                keys.caller(header)
            assert caught.value.message in (
                "this server wants a key: Authorization: Bearer KEY",
                "the key is none of this server's",
            )

    def test_each_digest_is_compared_whole_whichever_fits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared: list[bytes] = []

        def compare(a: bytes, b: bytes) -> bool:
            compared.append(a)
            return a == b

        keys = ring(entry("a", KEY), entry("b", OTHER), entry("c", new_key()))
        monkeypatch.setattr(hmac, "compare_digest", compare)
        for key in (KEY, OTHER):
            keys.caller(f"Bearer {key}")
        assert len(compared) == 6

    def test_no_key_is_kept(self) -> None:
        keys = ring(entry("a", KEY))
        found = keys.caller(f"Bearer {KEY}")
        assert KEY not in f"{vars(keys)}{found!r}{KeyFile.model_validate({'keys': []})!r}"


class TestCaller:
    def test_without_keys_everybody_may_everything(self) -> None:
        for header in (None, "Bearer x"):
            caller = anybody(header)
            caller.check_chat("cats")
            assert caller.is_admin
            assert caller.sees("cats")
        assert anybody(None).name == anybody("").name == ""
        assert anybody("Bearer x").name == anybody("Bearer x").name != anybody("Bearer y").name
        assert "secret" not in repr(anybody("Bearer secret"))

    @given(
        scopes=st.sets(st.sampled_from(["chat", "admin"]), min_size=1),
        adapters=st.none() | st.sets(st.sampled_from(["cats", "dogs"])),
        asked=st.sampled_from([None, "cats", "dogs", "cows"]),
    )
    def test_who_may_chat_and_who_sees(
        self, scopes: set[Any], adapters: set[str] | None, asked: str | None
    ) -> None:
        caller = Caller("a", frozenset(scopes), None if adapters is None else frozenset(adapters))
        own = asked is None or adapters is None or asked in adapters
        assert allowed(caller.check_chat, asked) == ("chat" in scopes and own)
        assert allowed(caller.check_sees, asked) == ("admin" in scopes or own)

    def test_what_it_may_not_is_told_the_same_whether_it_exists_or_not(self) -> None:
        caller = Caller("a", frozenset({"chat"}), frozenset({"cats"}))
        for check in (caller.check_chat, caller.check_sees):
            with pytest.raises(Forbidden) as caught:
                check("dogs")
            assert caught.value.message == (
                "this key may not use the adapter 'dogs'; GET /v1/models lists what it may"
            )
            assert (caught.value.status, caught.value.code) == (403, "insufficient_permissions")


def allowed(check: Callable[[str | None], None], adapter: str | None) -> bool:
    try:
        check(adapter)
    except Forbidden:
        return False
    return True


class TestKeyWatch:
    def test_a_file_that_is_none_is_refused_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            KeyWatch(tmp_path / "none")
        (tmp_path / "empty").touch()
        with pytest.raises(ConfigError, match="valid dictionary"):
            KeyWatch(tmp_path / "empty")

    def test_a_change_holds_from_the_next_look(
        self, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        keys = KeyWatch(write(entry("a", KEY)))
        write(entry("b", OTHER))
        assert keys.ring.caller(f"Bearer {KEY}").name == "a"
        with caplog.at_level(logging.INFO, "ray.serve"):
            keys.look()
        assert keys.ring.caller(f"Bearer {OTHER}").name == "b"
        with pytest.raises(Unauthenticated):
            keys.ring.caller(f"Bearer {KEY}")
        assert "1 entries; new: b; gone: a" in caplog.text

    def test_the_last_key_can_be_taken_away(self, write: Write) -> None:
        keys = KeyWatch(write(entry("a", KEY)))
        write()
        keys.look()
        with pytest.raises(Unauthenticated):
            keys.ring.caller(f"Bearer {KEY}")

    def test_a_file_of_the_same_size_and_time_is_read_as_well(self, write: Write) -> None:
        path = write(entry("a", KEY))
        keys, before = KeyWatch(path), path.stat()
        write(entry("b", KEY))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        keys.look()
        assert keys.ring.names == {"b"}

    def test_a_mounted_secret_is_followed_through_its_links(
        self, write: Write, tmp_path: Path
    ) -> None:
        for version, key in (("1", KEY), ("2", OTHER)):
            (tmp_path / version).mkdir()
            write(entry("a", key)).rename(tmp_path / version / "keys.yaml")
        link, path = tmp_path / "data", tmp_path / "data" / "keys.yaml"
        link.symlink_to("1")
        keys = KeyWatch(path)
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").rename(link)
        keys.look()
        assert keys.ring.caller(f"Bearer {OTHER}").name == "a"

    @pytest.mark.parametrize("fault", ["broken", "cut short", "gone", "a folder", "no text"])
    def test_a_fault_leaves_the_old_keys_and_is_told_loudly_and_once(
        self, fault: str, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write(entry("a", KEY))
        keys = KeyWatch(path)
        if fault == "broken":
            path.write_text(f"keys: [{{name: a, sha256: {KEY}}}]")
        elif fault == "cut short":
            path.write_bytes(path.read_bytes()[:-40])
        elif fault == "no text":
            path.write_bytes(b"\xff\x00")
        else:
            path.unlink()
            if fault == "a folder":
                path.mkdir()
        for _ in range(3):
            keys.look()
        assert keys.ring.caller(f"Bearer {KEY}").name == "a"
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert str(path) in record.message
        assert "STAY IN FORCE" in record.message
        assert KEY not in record.message
        if path.is_dir():
            path.rmdir()
        write(entry("b", OTHER))
        keys.look()
        assert keys.ring.names == {"b"}

    async def test_the_file_is_followed_until_cancelled(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "POLL_S", 0.01)
        path = write(entry("a", KEY))
        keys = KeyWatch(path)
        following = asyncio.create_task(keys.follow())
        path.unlink()
        await asyncio.sleep(0.05)
        write(entry("b", OTHER))
        async with asyncio.timeout(5):
            while keys.ring.names != {"b"}:
                await asyncio.sleep(0.01)
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following
