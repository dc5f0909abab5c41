"""The Dockerfile: its rules, and its steps as far as they go without a container engine."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRAIN = ROOT / "docker/drain-node"


@dataclass
class Stage:
    """`FROM base AS name`, and its instructions with their lines joined."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def stages() -> dict[str, Stage]:
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", "")
    arguments = dict(re.findall(r"(?m)^ARG (\w+)=(\S+)$", text))
    found: dict[str, Stage] = {}
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            for argument, value in arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            found[name] = Stage(name, base)
        elif instruction != "ARG":
            list(found.values())[-1].steps.append((instruction, rest.strip()))
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out; the last line that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line.startswith("#") or not line:
            continue
        if pattern.startswith("**/"):
            fits = pattern.removeprefix("**/") in Path(path).parts
        else:
            fits = pattern in ("*", path) or path.startswith(f"{pattern}/")
        if fits:
            out = not line.startswith("!")
    return out


# ---------------------------------------------------------------- rules


def test_bases_are_public_and_pinned() -> None:
    made = stages()
    bases = {stage.base for stage in made.values()} - made.keys()
    (base,) = bases
    image, _, tag = base.partition(":")
    assert image == "python"
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert re.fullmatch(rf"{re.escape(needs.removeprefix('>='))}\.\d+-slim-\w+", tag)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_without_root_and_without_what_builds_them(target: str) -> None:
    stage = stages()[target]
    assert stage.base == "runtime"
    assert stage.steps[-1] == ("USER", "1000:1000")
    copied = [text for text in stage.of("COPY") if text.startswith("--from")]
    assert copied == [
        f"--from=packages-{target} /install /usr/local",
        "--from=package /install /usr/local",  # last: the one that changes
    ]


def test_the_last_stage_is_what_a_build_without_a_target_makes() -> None:
    assert list(stages())[-1] == "cpu"


def test_no_step_names_a_secret_or_keeps_a_cache() -> None:
    for stage in stages().values():
        assert stage.of("ADD") == []
        for instruction, text in stage.steps:
            assert not re.search(r"(?i)password|secret|token|_key\b|netrc", text), text
            if instruction == "RUN" and "apt-get install" in text:
                assert "--no-install-recommends" in text
                assert "rm -rf /var/lib/apt/lists/*" in text
    assert "PIP_NO_CACHE_DIR=1" in stages()["requirements"].of("ENV")[0]


def test_the_image_has_the_commands_that_probes_and_hooks_run() -> None:
    (run,) = stages()["runtime"].of("RUN")
    assert {"procps", "wget"} <= set(run.split())
    (health,) = stages()["runtime"].of("HEALTHCHECK")
    probed = re.findall(r"http://\S+_healthz", health)
    manifest = (ROOT / "k8s/base/serving/ray-service.yaml").read_text()
    assert probed
    assert all(url in manifest for url in probed)
    (copied,) = stages()["runtime"].of("COPY")
    assert copied.split()[1:] == ["docker/drain-node", "/usr/local/bin/drain-node"]
    assert "command: [/usr/local/bin/drain-node, " in manifest


def test_only_what_is_copied_is_sent_to_the_engine() -> None:
    copied = {
        source
        for stage in stages().values()
        for text in stage.of("COPY")
        if not text.startswith("--from")
        for source in [word for word in text.split() if not word.startswith("--")][:-1]
    }
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert not ignored(source), source
    for path in (".git/config", "tests/conftest.py", "xc_ray/__pycache__/cli.pyc", "keys.yaml"):
        assert ignored(path), path
    assert not ignored("xc_ray/demo/model/config.json")


# ---------------------------------------------------------------- drain-node


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes `ray` and `pgrep` that say what was asked of them; gives the environment."""

    def make(*, ray: str = "exit 0", pgrep: str = "exit 1") -> dict[str, str]:
        for name, body in (("ray", ray), ("pgrep", pgrep)):
            path = tmp_path / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n{body}\n')
            path.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    return make


def drain(environment: dict[str, str], *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [DRAIN, *argv], env=environment, check=False, capture_output=True, text=True, timeout=60
    )


def test_a_node_without_replicas_ends_at_once(
    commands: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    done = drain(commands(), "640")
    assert (done.returncode, done.stderr) == (0, "")
    asked = (tmp_path / "asked").read_text()
    assert "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in asked
    assert "--deadline-remaining-seconds 640" in asked


def test_it_waits_for_replicas_to_go(
    commands: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    done = drain(commands(pgrep=f"[ $(grep -c pgrep {tmp_path}/asked) -lt 3 ]"), "640")
    assert done.returncode == 0
    assert (tmp_path / "asked").read_text().count("pgrep") == 3


def test_it_gives_up_in_time_and_waits_though_ray_is_gone(
    commands: Callable[..., dict[str, str]],
) -> None:
    began = time.monotonic()
    done = drain(commands(ray="exit 1", pgrep="exit 0"), "2")
    assert 1 < time.monotonic() - began < 30
    assert done.returncode == 0
    assert "Ray was not told" in done.stderr


def test_its_pattern_finds_replicas_and_proxies_and_not_itself() -> None:
    (pattern,) = re.findall(r"pgrep -f '(.+)'", DRAIN.read_text())
    for title in ("ray::ServeReplica:xc_ray:Decoder.handle_request", "ray::ProxyActor.ready"):
        assert re.search(pattern, title)
    for title in (f"pgrep -f {pattern}", "ray::IDLE", "ray::ServeController.run_control_loop"):
        assert not re.search(pattern, title)


def test_it_takes_options_that_this_ray_has() -> None:
    from ray.scripts.scripts import drain_node

    known = {option for parameter in drain_node.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", DRAIN.read_text())) <= known


# ---------------------------------------------------------------- its steps


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_steps_install_a_package_that_runs(tmp_path: Path) -> None:
    """The RUN steps that build what is copied into an image, in folders of their own.

    Left out are apt-get and useradd, which need the image; and the index of CPU builds of torch:
    pip takes torch from where this machine takes packages from.
    """
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "python"], check=True)
    build, install = tmp_path / "build", tmp_path / "install"
    build.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{tmp_path / 'python/bin'}:{os.environ['PATH']}",
    }
    made = stages()
    for name in ("requirements", "packages-cuda", "package"):
        assert made[name].base in ("requirements", made["requirements"].base)
        for instruction, text in made[name].steps:
            if instruction == "COPY":
                *sources, target = text.split()
                for source in sources:
                    copy(ROOT / source, build / (source if target == "./" else target))
            elif instruction == "RUN":
                step = text.replace("/install", str(install))
                subprocess.run(["sh", "-ec", step], cwd=build, env=environment, check=True)
    (packages,) = install.glob("lib/python3*/site-packages")
    run = {**environment, "PYTHONPATH": str(packages), "HOME": str(tmp_path)}
    for command in (["ray", "--version"], ["xc-ray", "--help"], ["serve", "--help"]):
        script = [str(tmp_path / "python/bin/python"), str(install / "bin" / command[0])]
        subprocess.run([*script, *command[1:]], cwd=tmp_path, env=run, check=True, timeout=120)
    demo = "from xc_ray.pipeline import Pipeline; print(Pipeline.load('demo').chat('Hello')[0])"
    done = subprocess.run(
        [tmp_path / "python/bin/python", "-c", demo],
        cwd=tmp_path, env=run, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip()


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, ignore=leave_out)
    else:
        shutil.copy(source, target)
