"""More than the server can do: who is refused and how, and what becomes of those who are not."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import httpx
import pytest

from tests.e2e.serve_run import ServeRun, assert_right, body, image, text_of, until
from tests.pictures import shapes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the server, too
]

ARGS = {
    "decoder": {"max_num_seqs": 2},
    "limits": {"max_waiting": 4},
}
NUM_INSIDE = 3  # two lanes and one on standby
NUM_WAITING = 4
TALK: dict[str, Any] = {"ignore_eos": True, "max_tokens": 60}


@dataclass
class Reply:
    """A response, and the seconds that it took."""

    response: httpx.Response
    seconds: float

    @property
    def status(self) -> int:
        return self.response.status_code


def send(server: ServeRun, key: str, *parts: Any, **fields: Any) -> Reply:
    started = time.monotonic()
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body(*parts, **fields),
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
        trust_env=False,
    )
    return Reply(response, time.monotonic() - started)


@contextmanager
def flood(server: ServeRun, num: int) -> Iterator[list[Reply]]:
    """So many clients of one key that send one request after the other; their replies."""
    replies: list[Reply] = []
    leave = Event()

    def keep_sending() -> None:
        while not leave.is_set():
            replies.append(send(server, "flood", "Who are you?", **TALK))

    with ThreadPoolExecutor(num) as pool:
        for _ in range(num):
            pool.submit(keep_sending)
        try:
            until(lambda: any(reply.status == 429 for reply in list(replies)), 60, server)
            yield replies
        finally:
            leave.set()


def test_who_finds_no_place_is_told_at_once_when_to_come_again(server: ServeRun) -> None:
    with flood(server, 12) as replies:
        until(lambda: sum(reply.status == 200 for reply in list(replies)) >= 3, 60, server)
    refused = [reply for reply in replies if reply.status == 429]
    served = [reply for reply in replies if reply.status == 200]
    assert len(refused) + len(served) == len(replies)
    for reply in refused:
        assert 1 <= int(reply.response.headers["retry-after"]) <= 60
        error = reply.response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    for reply in served:
        assert reply.response.json()["usage"]["completion_tokens"] == TALK["max_tokens"]
    # The decoder says that it is full, and the ingress answers for it meanwhile.
    messages = [reply.response.json()["error"]["message"] for reply in refused]
    assert sum("every decoder" in message for message in messages) > len(messages) / 4
    # A refusal costs nobody a turn; of a machine under load, hence no 0.1 s (benchmarks/load.py).
    assert sorted(reply.seconds for reply in refused)[len(refused) // 2] < 0.5
    assert_right(server)


def test_another_key_gets_its_turn_while_one_floods(server: ServeRun) -> None:
    """Its pictures, too; it waits for those inside and for one in turn, not for the whole line."""
    red = image(shapes("red circle", size=(90, 60)))
    with flood(server, 20) as replies:
        quiet = [send(server, "quiet", red, "What is it?") for _ in range(3)]
        quiet += [send(server, "quiet", "12 + 30 = ", max_tokens=20) for _ in range(3)]
    answers = [text_of(reply.response) for reply in quiet]
    assert answers == ["A red circle."] * 3 + ["12 + 30 = 42"] * 3
    longest = max(reply.seconds for reply in replies if reply.status == 200)
    assert sorted(reply.seconds for reply in quiet)[3] < longest


def test_nothing_stays_behind(server: ServeRun) -> None:
    """After all that there is room for as many as before."""
    with ThreadPoolExecutor(NUM_INSIDE + NUM_WAITING) as pool:
        replies = list(
            pool.map(
                lambda _: send(server, "a", "Who are you?", **TALK),
                range(NUM_INSIDE + NUM_WAITING),
            )
        )
    assert [reply.status for reply in replies] == [200] * (NUM_INSIDE + NUM_WAITING)
