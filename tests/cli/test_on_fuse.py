"""Commands on filesystems that keep an unlinked open file in its directory (FUSE, NFS): they end and clean up."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Bindfs, Passthrough
from tests.fixtures.processes import RunForkvm, forkvm_script
from tests.support.guests import GuestSizes, make_guest
from tests.support.requirements import require_command

SMALL = GuestSizes(overlay=8 << 20, overlay_data=1 << 20, memory=8 << 20, memory_data=1 << 20)


@pytest.fixture(params=["bindfs", "silly"])
def kind(request: pytest.FixtureRequest) -> str:
    """bindfs refuses RENAME_NOREPLACE, so no fork can be published there."""
    return str(request.param)


@pytest.fixture
def workdir(kind: str, passthrough: Passthrough, bindfs: Bindfs, fresh: Fresh) -> Path:
    """A directory on FUSE with a guest."""
    backing = fresh("xfs")
    make_guest(backing / "vm-1", SMALL)
    return bindfs(backing) if kind == "bindfs" else passthrough(backing, "silly")


def hidden(workdir: Path) -> list[str]:
    """The names that a command must not leave behind."""
    return [name for name in os.listdir(workdir) if name.startswith(".")]


def test_fork_and_campaign_leave_nothing_but_their_forks(run_forkvm: RunForkvm, kind: str, workdir: Path) -> None:
    expected = 1 if kind == "bindfs" else 0

    fork = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2", timeout=30)
    campaign = run_forkvm(
        "campaign", workdir / "vm-1", "--to", workdir / "c-{n}", "--count", "5", "--local", timeout=60
    )

    assert (fork.returncode, campaign.returncode) == (expected, expected), (fork.stderr, campaign.stderr)
    assert hidden(workdir) == []
    if not expected:
        assert run_forkvm("verify", workdir / "vm-1", workdir / "vm-2").returncode == 0
        assert run_forkvm("verify", workdir / "vm-1", workdir / "c-5").returncode == 0


def test_failed_fork_leaves_nothing(run_forkvm: RunForkvm, workdir: Path) -> None:
    os.mkfifo(workdir / "vm-1/fifo")

    done = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2", timeout=30)

    assert done.returncode == 1
    assert hidden(workdir) == []
    assert not (workdir / "vm-2").exists()


def test_doctor_ends_and_leaves_nothing(run_forkvm: RunForkvm, workdir: Path) -> None:
    environment = {**os.environ, "FORKVM_ROOTS": str(workdir), "FORKVM_BROKER_URL": "redis+socket:///nowhere"}

    done = run_forkvm("doctor", env=environment, timeout=30)

    assert f"root {workdir}" in done.stdout
    assert hidden(workdir) == []


def test_gc_removes_what_a_killed_fork_left(run_forkvm: RunForkvm, workdir: Path) -> None:
    strace = require_command("strace", "a fork that is killed")
    killed = ["-e", "inject=utimensat:signal=KILL", "-e", "trace=utimensat"]
    subprocess.run(
        [strace, "-f", "-o", "/dev/null", *killed, forkvm_script(), "fork", workdir / "vm-1", workdir / "vm-2"],
        timeout=30,
    )

    done = run_forkvm("gc", workdir, timeout=30)

    assert done.returncode == 0
    assert hidden(workdir) == []


def test_interrupt_ends_a_fork_and_leaves_nothing(workdir: Path) -> None:
    with (workdir / "vm-1/large").open("wb") as file:
        file.truncate(1 << 40)  # a filesystem that does not report holes: all bytes are data, so the copy takes long
    with subprocess.Popen([forkvm_script(), "fork", str(workdir / "vm-1"), str(workdir / "vm-2")]) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0

    assert hidden(workdir) == []
