"""What a parent learns of its children."""

from __future__ import annotations

import pytest

from tasks.copier.child_processes import PROGRAM_ERROR, ChildProcesses
from tasks.copier.errors import Code


def test_an_error_in_the_program_is_reported_once_and_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError("no number: \x1b[31m")

    processes = ChildProcesses()
    for _ in range(3):
        assert processes.spawn(fail)

    codes = processes.wait(lambda: None)

    error = processes.program_error("/guests/vm-1")
    assert codes == [PROGRAM_ERROR] * 3
    assert (error.code, error.path) == (Code.IO_ERROR, "/guests/vm-1")
    assert error.message.startswith("a child met an error in this program: ValueError in test_child_processes.py:")
    assert error.message.endswith("no number: \\x1b[31m")
    assert capfd.readouterr() == ("", "")
