"""The modules that a command imports.

An import takes longer than a small fork: 0.1 s for pydantic, 0.3 s for Celery.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.processes import ROOT, StartWorker
from tests.fixtures.redis_server import RedisServer

#: Runs the command in its arguments, and prints the names of the imported modules on its last line.
_RUN = """
import atexit, sys
atexit.register(lambda: print("", *sys.modules))
from worker.cli import main
sys.argv[0] = "forkvm"
main()
"""
_SLOW = {"asyncio", "celery", "kombu", "prometheus_client", "pydantic", "pydantic_core", "redis", "rich"}


def _imported(*arguments: str, **environment: str) -> set[str]:
    """The modules that `forkvm ARGUMENTS` imports. Fails unless it succeeds."""
    command = [sys.executable, "-c", _RUN, *arguments]
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_a_local_fork_imports_neither_the_queue_nor_the_validation_of_options(tmp_path: Path) -> None:
    (tmp_path / "vm-1").mkdir()

    imported = _imported("fork", str(tmp_path / "vm-1"), str(tmp_path / "vm-2"), FORKVM_ROOTS=str(tmp_path))

    assert (tmp_path / "vm-2").is_dir()
    assert imported.isdisjoint(_SLOW)


def test_verify_imports_nothing_of_the_queue(tmp_path: Path) -> None:
    for name in ("vm-1", "vm-2"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (86_400, 86_400))

    assert _imported("verify", str(tmp_path / "vm-1"), str(tmp_path / "vm-2")).isdisjoint(_SLOW)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("campaign", "--help"), ("completion", "bash")])
def test_help_and_version_import_neither_the_queue_nor_the_engine(arguments: tuple[str, ...]) -> None:
    assert _imported(*arguments).isdisjoint(_SLOW | {"tasks.copier.fork", "tasks.copier.staging"})


def test_shell_completion_imports_neither_the_queue_nor_the_engine() -> None:
    words = {"_FORKVM_COMPLETE": "bash_complete", "COMP_WORDS": "forkvm fork --ref", "COMP_CWORD": "2"}

    assert _imported(**words).isdisjoint(_SLOW | {"tasks.copier.fork", "tasks.copier.staging"})


def test_commands_of_the_queue_import_neither_the_engine_nor_the_worker(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    addresses = {"FORKVM_BROKER_URL": redis_server.broker_url, "FORKVM_RESULT_BACKEND": redis_server.backend_url}

    of_submit = _imported("submit", str(tmp_path / "a"), str(tmp_path / "b"), "--id", "f", **addresses)
    of_status = _imported("status", "f", **addresses)

    assert (of_submit | of_status).isdisjoint({"celery.worker", "tasks.copier.fork.lifecycle", "tasks.fork.tasks"})
    assert "pydantic" not in of_status
    with redis_server.client() as client:
        client.delete("forkvm")


def test_a_worker_imports_no_commands_of_celery(start_worker: StartWorker, tmp_path: Path) -> None:
    """They and their plugins, such as Flower and a shell, take as long to import as a third of the worker's start."""
    worker = start_worker(tmp_path, 1, command="forkvm", env={"PYTHONPROFILEIMPORTTIME": "1"})

    imported = {line.rpartition("|")[2].strip() for line in worker.output().splitlines() if "import time:" in line}
    assert "celery.apps.worker" in imported
    assert not [name for name in imported if name.startswith(("celery.bin", "click_repl", "flower"))]
