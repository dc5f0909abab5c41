"""The examples that talk to a server, with one that runs; the others are in tests/test_examples.py.

The server reads the registry of the user's data, as the commands of an example do.
"""

import json
from pathlib import Path

import pytest

from tests.e2e.serve_run import ServeRun
from tests.test_examples import DESCRIPTION, DESCRIPTION_ZH, SWITCHED, run

pytestmark = pytest.mark.ray

ARGS = {"adapters": {"poll_s": 0.5}}  # of the server: a promotion is waited for three times


@pytest.fixture
def user(server: ServeRun, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody on the server's machine, with its data folder and its Ray."""
    home = server.log.parent
    return {
        "TMPDIR": str(tmp_path),
        "RAY_TMPDIR": str(home),
        "RAY_AUTH_MODE": "disabled",
        "XDG_DATA_HOME": str(home / "data"),
        "NO_PROXY": "127.0.0.1",
    }


def test_curl_gets_the_picture_described(server: ServeRun, user: dict[str, str]) -> None:
    (line,) = run("01_curl.sh", server.url, **user)
    answer = json.loads(line)
    assert answer["model"] == "demo"
    assert answer["choices"][0]["message"]["content"] == DESCRIPTION


def test_the_openai_client_asks_in_two_languages(server: ServeRun, user: dict[str, str]) -> None:
    lines = run("02_openai_client.py", server.url, **user)
    assert lines == [
        "model: demo",
        "Is there a red circle? Yes.",
        "What shape is green? A triangle.",
        f"描述一下这张图片。 {DESCRIPTION_ZH}",
    ]


def test_a_streamed_question_leans_on_the_one_before(
    server: ServeRun, user: dict[str, str]
) -> None:
    assert run("05_stream_with_history.py", server.url, **user) == [DESCRIPTION, "One."]


@pytest.mark.slow  # two starts of Ray Train take about a minute
def test_a_running_server_answers_as_it_was_taught_and_by_the_old_version_after_a_rollback(
    server: ServeRun, user: dict[str, str], tmp_path: Path
) -> None:
    lines = run("06_fine_tune_and_switch.sh", server.url, **user)
    assert lines == SWITCHED
    assert not list(tmp_path.iterdir())  # it has tidied up
