"""`forkvm gc` removes the staging of killed processes and keeps the staging of running ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import (
    RunForkvm,
    StartWorker,
    ended_at_exit,
    forkvm_script,
    program_environment,
    wait_until,
)
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_slow_file


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """A directory with a guest that takes at least a second to copy."""
    workdir = fresh("tmpfs")
    (workdir / "vm-1").mkdir()
    for n in range(4):
        make_slow_file(workdir / "vm-1" / f"disk-{n}")
    return workdir


def stagings(workdir: Path) -> list[str]:
    return sorted(path.name for path in workdir.iterdir() if path.name.startswith(".forkvm-"))


def begun(workdir: Path) -> bool:
    """Whether a fork has made its tree and copies into it."""
    return any(any(path.iterdir()) for path in workdir.glob(".forkvm-*.*"))


@pytest.fixture
def background_fork(workdir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A fork that has started to copy."""
    command = [forkvm_script(), "fork", str(workdir / "vm-1"), str(workdir / "vm-2")]
    with ended_at_exit(subprocess.Popen(command)) as process:
        wait_until(lambda: begun(workdir), "a running fork")
        yield process


def test_the_staging_of_a_killed_fork_is_removed(
    run_forkvm: RunForkvm, workdir: Path, background_fork: subprocess.Popen[bytes]
) -> None:
    background_fork.send_signal(signal.SIGKILL)
    background_fork.wait()
    assert len(stagings(workdir)) == 2

    def collected() -> bool:  # the kernel ends the children shortly after their parent
        return "1 removed, 0 kept" in run_forkvm("gc", workdir).stdout

    wait_until(collected, "the removal of the staging")

    assert stagings(workdir) == []
    assert not (workdir / "vm-2").exists()
    assert "0 removed, 0 kept" in run_forkvm("gc", workdir).stdout


def test_a_live_fork_is_never_touched(
    run_forkvm: RunForkvm, workdir: Path, background_fork: subprocess.Popen[bytes]
) -> None:
    while background_fork.poll() is None:
        found = json.loads(run_forkvm("gc", workdir, "--json").stdout)
        assert [finding for finding in found if finding["verdict"] == "removed"] == []

    assert background_fork.returncode == 0
    assert run_forkvm("verify", workdir / "vm-1", workdir / "vm-2").returncode == 0


def test_a_copy_of_a_staging_directory_is_not_removed(
    run_forkvm: RunForkvm, workdir: Path, background_fork: subprocess.Popen[bytes]
) -> None:
    control = min(stagings(workdir), key=len)
    elsewhere = workdir / "backup"
    elsewhere.mkdir()
    shutil.copytree(workdir / control, elsewhere / control)
    background_fork.wait()

    done = run_forkvm("gc", workdir)

    assert "0 removed, 1 kept" in done.stdout
    assert (elsewhere / control / "journal").exists()


def test_gc_checks_the_queue_before_it_removes_staging_of_a_queue(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)
    worker = start_worker(workdir)
    assert run_forkvm("submit", workdir / "vm-1", workdir / "vm-2", "--id", "f1", env=environment).returncode == 0
    wait_until(lambda: begun(workdir), "a running fork")
    worker.kill()
    assert stagings(workdir)

    known = run_forkvm("gc", env=environment)
    away = run_forkvm("gc", env={**environment, "FORKVM_BROKER_URL": "redis+socket:///nowhere"})
    with redis_server.client() as client:
        client.flushall()
    forgotten = run_forkvm("gc", env=environment)

    assert "0 removed, 1 kept" in known.stdout
    assert "0 removed, 1 kept" in away.stdout
    assert "no broker" in away.stderr
    assert "1 removed, 0 kept" in forgotten.stdout
    assert stagings(workdir) == []


def test_gc_without_a_directory_is_a_bad_call(run_forkvm: RunForkvm) -> None:
    done = run_forkvm("gc")

    assert done.returncode == 2
    assert "FORKVM_ROOTS" in done.stderr


def test_a_control_directory_without_a_journal_is_kept_until_it_is_old(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    control = workdir / ".forkvm-0123456789abcdef"
    control.mkdir(mode=0o700)

    assert "0 removed, 1 kept" in run_forkvm("gc", workdir).stdout
    os.utime(control / "lock", (0, 0))
    os.utime(control, (0, 0))
    assert "1 removed, 0 kept" in run_forkvm("gc", workdir).stdout
    assert stagings(workdir) == []
