"""Every command works in any directory, also in one with a user's own tasks.py or package `worker`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.processes import RunForkvm, end_group, forkvm_script, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.foreign_modules import make_foreign_modules
from tests.support.guests import make_guest


def _run(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "FORKVM_BROKER_URL": "redis+socket:///nonexistent"} | environment
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("python_path", [None, "/nonexistent:"])
def test_local_commands_import_nothing_from_the_working_directory(tmp_path: Path, python_path: str | None) -> None:
    # An empty entry of PYTHONPATH is the working directory, so Python finds a package `worker` there first.
    here = make_foreign_modules(tmp_path / "here", with_worker=python_path is None)
    source = str(make_guest(tmp_path / "a"))
    environment = {} if python_path is None else {"PYTHONPATH": python_path}

    fork = _run(here, forkvm_script(), "fork", source, f"{tmp_path}/b", **environment)
    campaign = ("campaign", source, "--to", f"{tmp_path}/c-{{n}}", "--count", "2", "--local")
    local = _run(here, forkvm_script(), *campaign, **environment)
    asked = _run(here, forkvm_script(), "status", "x", **environment)

    assert fork.returncode == 0, fork.stderr
    assert local.returncode == 0, local.stderr
    assert asked.returncode == 3, asked.stderr


def test_worker_cli_module_imports_nothing_else_from_the_working_directory(tmp_path: Path) -> None:
    here = make_foreign_modules(tmp_path / "here", with_worker=False)

    done = _run(here, sys.executable, "-m", "worker.cli", "gc", str(tmp_path))

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["forkvm", "celery"])
def test_worker_serves_from_a_directory_with_a_tasks_py(
    redis_server: RedisServer, run_forkvm: RunForkvm, tmp_path: Path, command: str
) -> None:
    here = make_foreign_modules(tmp_path / "here", with_worker=command == "forkvm")
    make_guest(tmp_path / "a")
    environment = program_environment(redis_server, tmp_path)
    start = {
        "forkvm": [forkvm_script(), "worker"],
        "celery": [str(Path(forkvm_script()).parent / "celery"), "-A", "worker.app", "worker", "-Q", "forkvm"],
    }[command]
    log = tmp_path / "log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [*start, "--concurrency", "1", "--loglevel", "INFO"],
            cwd=here,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: " ready." in log.read_text() or worker.poll() is not None, "the worker")

        done = run_forkvm("submit", tmp_path / "a", tmp_path / "b", "--wait", env=environment)

        assert done.returncode == 0, done.stderr + log.read_text()
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        end_group(worker)


@pytest.mark.parametrize("command", ["forkvm gc", "celery -A worker.app report"])
def test_foreign_package_on_the_import_path_is_named_in_one_line(tmp_path: Path, command: str) -> None:
    elsewhere = make_foreign_modules(tmp_path / "elsewhere", with_worker=False)
    for path in elsewhere.iterdir():
        if path.name != "tasks.py":
            path.unlink()
    name, *arguments = command.split()

    done = _run(tmp_path, str(Path(forkvm_script()).parent / name), *arguments, PYTHONPATH=str(elsewhere))

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"forkvm: {elsewhere}/tasks.py would be imported instead of ")
