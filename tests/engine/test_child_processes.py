"""How a parent process learns how its children ended."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from tasks.copier import child_processes
from tasks.copier.child_processes import PROGRAM_ERROR, ChildProcesses
from tasks.copier.errors import Code
from tests.support.engine.child_processes import children_of_this_process


def test_an_error_in_the_program_is_reported_once_and_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError("no number: \x1b[31m")

    processes = ChildProcesses()
    for _ in range(3):
        assert processes.spawn(fail)

    codes = processes.wait(lambda: None)

    error = processes.error_in(codes, "/guests/vm-1", "/guests/vm-2")
    assert error is not None
    assert codes == [PROGRAM_ERROR] * 3
    assert (error.code, error.path) == (Code.IO_ERROR, "/guests/vm-1")
    assert error.message.startswith(
        "a child process met an error in this program: ValueError in test_child_processes.py:"
    )
    assert error.message.endswith("no number: \\x1b[31m")
    assert capfd.readouterr() == ("", "")


def test_a_failed_system_call_is_reported_with_the_staging_and_a_signal_is_not() -> None:
    processes = ChildProcesses()

    error = processes.error_in([0, -signal.SIGKILL, errno.ENOSPC], "/guests/vm-1", "/guests/vm-2")

    assert error is not None
    assert (error.code, error.path, error.errno) == (Code.NO_SPACE, "/guests/vm-2", errno.ENOSPC)
    assert processes.error_in([0, -signal.SIGKILL], "/guests/vm-1", "/guests/vm-2") is None


@pytest.mark.parametrize("stopping", [False, True])
def test_a_stopped_child_is_killed_and_reaped_before_the_wait_ends(
    monkeypatch: pytest.MonkeyPatch, stopping: bool
) -> None:
    monkeypatch.setattr(child_processes, "STOPPED_SECONDS", 0.3)
    before = children_of_this_process()

    def stop_after_the_work(child: int) -> int:
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return 0

    processes = ChildProcesses()
    processes.start(2, stop_after_the_work)
    began = time.monotonic()
    codes = processes.reap() if stopping else processes.wait(lambda: None)

    assert sorted(codes) == [-signal.SIGKILL, 0]
    assert children_of_this_process() == before
    assert time.monotonic() - began < 10
