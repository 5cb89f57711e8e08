"""The published packages: the sdist contains what its tests need, and the wheel works alone in an empty environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import click
import pytest

from tests.fixtures.processes import ROOT, end_group, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_guest
from tests.support.made_once import made_once
from worker.cli import cli

#: Directories of the repository, and files at its top, that tests and users need.
_DIRECTORIES = ("worker", "tasks", "tests", "benchmarks", "scripts", "docs", "deploy")
_FILES = (
    *("LICENSE", "README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("pyproject.toml", "constraints.txt", "Makefile", "Dockerfile"),
    *(".dockerignore", ".gitignore", "docker-compose.yml"),
)
_COMMANDS = cli.list_commands(click.Context(cli))


#: The first test that needs the installation makes it, and the others wait for that.
pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, as they would be published."""

    def build(directory: Path) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(directory)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    directory = made_once(tmp_path_factory, "distributions", build)
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` directory of an environment with the wheel and its dependencies, and nothing else."""

    def install(directory: Path) -> None:
        venv.create(directory, with_pip=True, symlinks=True)
        constraints = str(ROOT / "constraints.txt")
        # Not all is compiled: what a command imports is compiled when it first runs.
        command = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        command += ["-c", constraints]
        done = subprocess.run([*command, str(distributions[0])], cwd="/", capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "environment", install) / "bin"


def _run(command: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(directory)} | environment
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=120)


def test_sdist_contains_the_files_that_its_tests_need(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    needed = {
        str(path.relative_to(ROOT))
        for directory in _DIRECTORIES
        for path in (ROOT / directory).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    with tarfile.open(distributions[1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}

    assert (needed | set(_FILES)) - held == set()
    subprocess.run(["tar", "-xzf", str(distributions[1]), "-C", str(tmp_path)], check=True)
    (unpacked,) = tmp_path.iterdir()
    some = ["tests/unit/test_settings.py", "tests/test_systemd_unit.py", "tests/test_deployment.py"]
    chosen = ["-k", "settings or unit or image", "-q", "-p", "no:cacheprovider"]
    done = _run([sys.executable, "-m", "pytest", *some, *chosen], unpacked)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_wheel_has_its_metadata_and_is_typed(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        fields = BytesParser().parsebytes(wheel.read(metadata))

    assert {"worker/py.typed", "tasks/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"worker", "tasks", metadata.partition("/")[0]}
    assert any(url.startswith("Repository, https://") for url in fields.get_all("Project-URL", []))
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in fields.get_all("Classifier", [])


def test_installation_is_complete_and_each_command_has_help(installed: Path, tmp_path: Path) -> None:
    checked = _run([str(installed / "python"), "-m", "pip", "check"], tmp_path)
    listed = _run([str(installed / "forkvm"), "--help"], tmp_path)
    explained = [_run([str(installed / "forkvm"), command, "--help"], tmp_path) for command in _COMMANDS]

    assert checked.returncode == 0, checked.stdout
    assert listed.returncode == 0, listed.stderr
    assert all(f"\n  {command} " in listed.stdout for command in _COMMANDS)
    assert [done.returncode for done in explained] == [0] * len(_COMMANDS)
    assert not list((installed.parent / "lib").glob("python*/site-packages/pytest"))


def test_each_command_of_an_installation_works(installed: Path, redis_server: RedisServer, tmp_path: Path) -> None:
    # Given
    forkvm = str(installed / "forkvm")
    source = str(make_guest(tmp_path / "a"))
    environment = {"FORKVM_BROKER_URL": redis_server.broker_url, "FORKVM_ROOTS": str(tmp_path)}

    def run(*arguments: str, code: int = 0) -> str:
        done = _run([forkvm, *arguments], tmp_path, **environment)
        assert done.returncode == code, (arguments, done.stderr)
        return done.stdout

    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [forkvm, "worker", "--concurrency", "1"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]} | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        # When and then: through Redis
        wait_until(lambda: " ready." in log.read_text() or worker.poll() is not None, "the worker")
        assert json.loads(run("submit", source, f"{tmp_path}/b", "--id", "f", "--wait", "--json"))["fork_id"] == "f"
        assert "SUCCESS" in run("status", "f", "--json")
        assert run("files", "f")
        run("cancel", "f", code=1)  # it has succeeded
        to = ("--to", f"{tmp_path}/c-{{n}}", "--count", "3")
        assert json.loads(run("campaign", source, *to, "--id", "c", "--wait", "--json"))["forks"]["succeeded"] == 3
        assert len(run("forks", "c", "--json").splitlines()) == 3
        run("doctor")
        # and without Redis
        run("fork", source, f"{tmp_path}/d")
        run("campaign", source, "--to", f"{tmp_path}/e-{{n}}", "--count", "2", "--local")
        assert "are the same" in run("verify", source, f"{tmp_path}/d")
        assert "0 removed" in run("gc")
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        end_group(worker)


def test_demo_of_an_installation_works(installed: Path, mounts: Path, tmp_path: Path) -> None:
    done = _run([str(installed / "forkvm"), "demo"], tmp_path, TMPDIR=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert "are the same" in done.stdout
