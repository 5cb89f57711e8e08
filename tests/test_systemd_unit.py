"""The systemd unit: systemd accepts it, and a worker runs under its restrictions."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import (
    ROOT,
    RunForkvm,
    StartWorker,
    end_group,
    forkvm_script,
    program_environment,
    wait_until,
)
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_guest
from tests.support.outcome import LOGS
from tests.support.requirements import require, require_command

UNIT = ROOT / "deploy" / "systemd" / "forkvm-worker@.service"


def _lines() -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in UNIT.read_text().splitlines() if line[:1] not in ("", "#", "["))


def _analyze(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `systemd-analyze ARGUMENTS` for an instance of the unit whose program exists here."""
    command = require_command("systemd-analyze", "the check of the unit")
    unit = directory / "forkvm-worker@rack-7.service"
    unit.write_text(UNIT.read_text().replace("/opt/forkvm/bin/forkvm", forkvm_script()))
    return subprocess.run([command, *arguments, str(unit)], capture_output=True, text=True, timeout=60)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    done = _analyze(tmp_path, "verify")

    assert done.returncode == 0, done.stderr
    assert "forkvm" not in done.stderr  # no warning either


def test_exposure_of_the_unit_is_under_three(tmp_path: Path) -> None:
    done = _analyze(tmp_path, "security", "--no-pager", "--offline=true", "--threshold=29")

    assert done.returncode == 0, done.stdout[-200:]
    assert "Overall exposure level" in done.stdout


def test_sigterm_of_the_unit_reaches_the_worker_alone_and_a_failed_worker_is_started_again() -> None:
    lines = _lines()

    assert lines["KillMode"] == "mixed"
    assert lines["Restart"] == "on-failure"
    assert int(lines["TimeoutStopSec"]) >= 60
    assert lines["ExecStart"].endswith("forkvm worker")


def test_an_instance_of_the_unit_serves_the_domain_of_its_name_if_its_file_names_no_other() -> None:
    text = UNIT.read_text()

    assert "\nEnvironment=FORKVM_DOMAIN=%i\nEnvironmentFile=/etc/forkvm/%i.env\n" in text


#: Everything is read-only except what systemd leaves writable under ProtectSystem=strict (/dev, /proc, /sys), and the
#: guests.
_READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
for mount in $(awk '{print $2}' /proc/mounts); do
    case $mount in /dev*|/proc*|/sys*|"$1"*) ;; *) mount -o remount,ro,bind "$mount" 2>/dev/null || true ;; esac
done
[ -z "$NO_SHM" ] || mount -t tmpfs -o ro tmpfs /dev/shm
cd /
shift
exec "$@"
"""


@pytest.fixture
def guests(fresh: Fresh) -> Path:
    require(os.geteuid() == 0, "root", "private mounts")
    guests = fresh("xfs")
    make_guest(guests / "a")
    return guests


def _read_only(guests: Path) -> list[str]:
    return [require_command("unshare", "private mounts"), "-m", "sh", "-c", _READ_ONLY, "sh", str(guests)]


def test_worker_runs_where_only_the_guests_are_writable_and_exits_on_sigterm(
    guests: Path, redis_server: RedisServer, run_forkvm: RunForkvm, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    log = tmp_path / "worker.log"
    request.node.stash[LOGS].append(log)
    environment = program_environment(redis_server, guests)
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [*_read_only(guests), forkvm_script(), "worker", "--concurrency", "1"],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: " ready." in log.read_text() or worker.poll() is not None, "the worker")

        done = run_forkvm("submit", guests / "a", guests / "b", "--wait", env=environment)
        worker.send_signal(signal.SIGTERM)

        assert done.returncode == 0, done.stderr
        assert worker.wait(30) == 0
    finally:
        end_group(worker)


def test_worker_without_a_directory_for_temporary_files_exits_with_a_message(
    guests: Path, redis_server: RedisServer
) -> None:
    done = subprocess.run(
        [*_read_only(guests), forkvm_script(), "worker", "--concurrency", "1"],
        env=program_environment(redis_server, guests) | {"NO_SHM": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "forkvm: no temporary directory is writable: set TMPDIR to a writable one"


@pytest.mark.parametrize("command", ["forkvm", "celery"])
def test_worker_that_cannot_continue_exits_with_an_error_code(
    start_worker: StartWorker, tmp_path: Path, command: str
) -> None:
    """The pool cannot be created: too few open files."""
    worker = start_worker(tmp_path, 8, command="forkvm" if command == "forkvm" else "celery", wait=False)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (24, 24))  # long before it makes its pool

    assert worker.wait() == 1
    assert "Too many open files" in worker.output()
