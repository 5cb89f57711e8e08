"""CPU use of processes as the kernel counts it: time that they waited for a CPU or used one, and whether they sleep.

Tests of time limits use these instead of the wall clock: when other tests run at the same time, a process waits for a
CPU longer than it works.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tests.fixtures.processes import wait_until

#: The number of polls of `wait_until`, 20 ms apart, that must find all threads asleep. They take more than twice the
#: poll interval of a worker's children, so that a child that only sleeps between polls is noticed.
_QUIET_POLLS = 30
_NANOSECONDS = 1e9


class LoadFreeStopwatch:
    """Seconds since its creation, without the time in which threads of the processes were ready to run and had no CPU.

    The processes are those that act one after another in the measured part; this process is always one of them. If
    several act at once, too much is subtracted: on a busy machine the limit is then less strict, but never fails
    wrongly.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._began = time.monotonic()
        self._waited_before = _seconds_without_processor(self._all_pids())

    def seconds(self) -> float:
        took = time.monotonic() - self._began
        before = self._waited_before
        after = _seconds_without_processor(self._all_pids())
        return took - sum(seconds - before.get(thread, 0.0) for thread, seconds in after.items())

    def _all_pids(self) -> set[int]:
        return {os.getpid(), *self._pids()}


def processor_seconds(pid: int) -> float:
    """The CPU time that a process's threads have used so far (proc(5): utime and stime in /proc/PID/stat)."""
    fields = _stat_after_name(Path(f"/proc/{pid}/stat"))
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def wait_until_asleep(pids: Callable[[], Iterable[int]], what: str, timeout: float = 60.0) -> None:
    """Return when the processes are idle: all their threads wait for an event, in many polls in a row.

    A thread that is ready to run and has no CPU is not asleep, so that a busy machine does not look idle.
    """
    quiet_polls = [0]

    def asleep() -> bool:
        quiet_polls[0] = 0 if any(map(_is_busy, pids())) else quiet_polls[0] + 1
        return quiet_polls[0] >= _QUIET_POLLS

    wait_until(asleep, what, timeout)


def _is_busy(pid: int) -> bool:
    """Whether a thread of a process runs, is ready to run, or waits for a disk."""
    for thread in _threads(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            if _stat_after_name(thread / "stat")[0] in "RD":
                return True
    return False


def _seconds_without_processor(pids: Iterable[int]) -> dict[Path, float]:
    """For each thread, the time that it was ready to run and did not run: the second number in schedstat of proc(5)."""
    waited = {}
    for pid in pids:
        for thread in _threads(pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                waited[thread] = int((thread / "schedstat").read_text().split()[1]) / _NANOSECONDS
    return waited


def _threads(pid: int) -> list[Path]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []


def _stat_after_name(path: Path) -> list[str]:
    """The fields of a stat file from the state on: "pid (name) state ...", where the name may contain " " and ")"."""
    return path.read_text().rpartition(")")[2].split()
