"""A cluster with Ray's token authentication, as docs/operations.md (Security) starts one.

Its commands are run as they stand, with a home folder of their own. Who has no token, or another
one, runs nothing; who has it does all of it; and the application, which has no keys here, serves on
its loopback address without Ray's token.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.ray_cluster import BIN
from tests.e2e.serve_cluster import ServeCluster, serve_cluster
from tests.e2e.serve_run import ROOT, body, serve_run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test waits for the cluster, too
]

COMMAND_LIMIT_S = 120.0
OPEN = "RAY IS OPEN"
# As `xc-ray train` does it.
JOB = """
import ray
ray.init(address="auto")
print(ray.get(ray.remote(lambda: "a task of the job ran").remote()))
"""


@dataclass
class Guarded:
    """The running cluster, what was deployed to it, and its token."""

    served: ServeCluster
    home: Path
    token: str

    @property
    def address(self) -> str:
        return self.served.cluster.dashboard

    def run(self, *command: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """A command of somebody on this machine whose home folder is empty, but for `env`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.run(
            [BIN / command[0], *command[1:]],
            cwd=ROOT,
            env=kept | {"HOME": str(self.home / "nobody")} | env,
            text=True,
            capture_output=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """`ray get-auth-token --generate`, `ray start --head`, `serve deploy`."""
    home = tmp_path_factory.mktemp("homes")
    for name in ("operator", "nobody"):
        (home / name).mkdir()
    mine = str(home / "operator")
    subprocess.run(
        [BIN / "ray", "get-auth-token", "--generate"],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": mine},
        capture_output=True,
        check=True,
    )
    token = (home / "operator" / ".ray" / "auth_token").read_text().strip()
    assert len(token) > 30
    with serve_cluster({}, token=token, RAY_AUTH_MODE="token", HOME=mine) as served:
        yield Guarded(served, home, token)


def test_the_documentation_says_these_commands() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Security\n(.*)", page, re.M | re.S)
    for command in (
        "    ray get-auth-token --generate ",
        "    RAY_AUTH_MODE=token ray start --head ",
        "    RAY_AUTH_MODE=token serve deploy serve_config.yaml\n",
        "    RAY_AUTH_MODE=token ray job submit ",
    ):
        assert command in section


def test_the_application_answers_without_rays_token(guarded: Guarded) -> None:
    asked = body("12 + 30 = ", max_tokens=20)
    url = f"{guarded.served.url}/v1/chat/completions"
    answer = httpx.post(url, json=asked, timeout=120, trust_env=False)
    assert answer.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer another"}], ids=["none", "other"])
@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/", "/api/serve/applications/"])
def test_the_dashboard_wants_it(guarded: Guarded, path: str, header: dict[str, str]) -> None:
    answer = httpx.get(f"{guarded.address}{path}", headers=header, timeout=30, trust_env=False)
    # Which of the two: there is none, or it is not this one.
    assert answer.status_code == (403 if header else 401)
    assert guarded.served.cluster.ask(path).status_code == 200


@pytest.mark.parametrize(
    "env",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token-of-another-cluster"},
    ],
    ids=["none", "other"],
)
def test_who_has_no_token_runs_nothing(guarded: Guarded, env: dict[str, str]) -> None:
    marker = guarded.home / "ran"
    cluster = guarded.served.cluster
    join = f"import ray; ray.init(address='127.0.0.1:{cluster.port}', log_to_driver=False)"
    task = "ray.get(ray.remote(lambda: 1).remote())"
    before = guarded.served.status()
    for command in (
        ("serve", "deploy", "-a", guarded.address, "serve_config.yaml"),
        ("serve", "status", "-a", guarded.address),
        ("serve", "shutdown", "-y", "-a", guarded.address),
        ("ray", "job", "submit", "--address", guarded.address, "--", "touch", str(marker)),
        ("python", "-c", f"{join}; {task}; open({str(marker)!r}, 'w')"),
    ):
        ended = guarded.run(*command, **env)
        said = ended.stdout + ended.stderr
        # `serve shutdown` says that it was refused, and calls that a success.
        assert ended.returncode != 0 or command[1] == "shutdown", (command, said)
        assert re.search("[Uu]nauth|authentication|401|403", said), (command, said[-2000:])
        assert guarded.token not in said
    assert not marker.exists()
    assert guarded.served.status()["deployments"].keys() == before["deployments"].keys()
    assert guarded.served.status()["status"] == "RUNNING"


@pytest.mark.parametrize("given", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"])
def test_who_has_it_does_what_the_documentation_says(guarded: Guarded, given: str) -> None:
    """In the environment, in a file that it names, or in ~/.ray/auth_token."""
    operator = guarded.home / "operator"
    value = {"RAY_AUTH_TOKEN": guarded.token, "HOME": str(operator)}.get(
        given, str(operator / ".ray" / "auth_token")
    )
    env = {"RAY_AUTH_MODE": "token", given: value}
    status = guarded.run("serve", "status", "-a", guarded.address, **env)
    assert status.returncode == 0, status.stderr
    assert "xc_ray:" in status.stdout
    assert "status: RUNNING" in status.stdout
    if given == "HOME":
        folder = guarded.home / "job"
        folder.mkdir()
        (folder / "job.py").write_text(JOB)
        submit = ("ray", "job", "submit", "--address", guarded.address)
        job = guarded.run(*submit, "--working-dir", str(folder), "--", "python", "job.py", **env)
        assert job.returncode == 0, job.stdout + job.stderr
        assert "a task of the job ran\n" in job.stdout


def test_nothing_is_said_of_an_open_cluster_and_no_log_holds_the_token(guarded: Guarded) -> None:
    logs = list((guarded.served.cluster.home / "ray").glob("session_2*/logs/**/*"))
    texts = {path: path.read_text(errors="replace") for path in logs if path.is_file()}
    assert any("replica_xc_ray_Ingress" in path.name for path in texts)
    assert not [path for path, text in texts.items() if OPEN in text]
    assert not [path for path, text in texts.items() if guarded.token in text]


def test_a_cluster_that_is_open_says_so_loudly(tmp_path: Path) -> None:
    with serve_run({}, HOME=str(tmp_path), RAY_AUTH_MODE="disabled") as server:
        assert OPEN in server.log.read_text()


def test_a_cluster_of_serve_runs_own_is_not_open(tmp_path: Path) -> None:
    """Ray turns authentication on by itself, and keeps the token that it made."""
    with serve_run({}, HOME=str(tmp_path), RAY_AUTH_MODE=None) as server:
        assert OPEN not in server.log.read_text()
        assert (tmp_path / ".ray" / "auth_token").is_file()
