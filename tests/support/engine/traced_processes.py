"""Child processes whose system calls fail on demand: strace is attached when the child is about to start its work.

Python and the program are loaded by then, so that one run costs hundredths of a second, and hundreds of calls can be
made to fail in turn.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from tests.support.engine.child_processes import Child

T = TypeVar("T")

#: Calls that are not the engine's: memory, threads, signals, and the calls of this module and of `Child`. And calls
#: that cannot fail (getuid(2)).
_NOT_THE_ENGINES = re.compile(
    r"gete?[ug]id|mmap|munmap|mremap|madvise|brk|futex|rt_sig|get[gpt]?pid|gettid|getrandom|sched_yield"
    r"|exit|clone|wait4|restart_syscall|set_robust_list"
)
_CALL = re.compile(r"(\d+) +(\w+)\(")
_CLOSED_PIPE = re.compile(r"\d+ +close\(\d+<pipe:")
#: Marks the end of the engine's part of a recorded run: a call that the engine never makes.
_END = "sched_yield"


class Call(NamedTuple):
    """The `number`th call (from 1) of a name that a process makes."""

    name: str
    number: int


class TracedChild(Generic[T]):
    """A child under strace that starts `work` on request.

    `calls`, `inject` and `paths` as in strace(1): the calls that are recorded, those that fail and how, and the files
    that they must affect, if any are given.
    """

    def __init__(
        self,
        strace: str,
        log: Path,
        work: Callable[[], T],
        *,
        calls: str = "all",
        inject: Iterable[str] = (),
        paths: Iterable[Path] = (),
    ) -> None:
        self._log = log
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            self._child = Child(lambda: _wait_and(work))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        command = [strace, "-f", "-y", "-o", os.fspath(log), "-p", str(self._child.pid), "-e", f"trace={calls}"]
        command += [part for expression in inject for part in ("-e", f"inject={expression}")]
        command += [part for path in paths for part in ("-P", os.fspath(path))]
        self._strace = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert self._strace.stderr is not None
        line = self._strace.stderr.readline()
        # From now on strace stops the child at its next call.
        assert b"attached" in line, line + self._strace.stderr.read()

    def begin(self) -> None:
        """Let the child continue."""
        os.kill(self._child.pid, signal.SIGUSR1)

    def result(self) -> T:
        """The return value of the work. Raises as `Child.result` does."""
        try:
            return self._child.result()
        except AssertionError:  # the child has ended
            raise
        except BaseException:  # the time of the test is over; strace would wait for the child without end
            self._strace.kill()
            os.kill(self._child.pid, signal.SIGKILL)
            os.waitpid(self._child.pid, 0)
            raise
        finally:
            assert self._strace.stderr is not None
            self._strace.stderr.close()
            self._strace.wait()

    def trace(self) -> list[str]:
        """The recorded calls of the work; available after `result`."""
        lines = self._log.read_text(errors="replace").splitlines()
        end = next((n for n, line in enumerate(lines) if f" {_END}(" in line), len(lines))
        return lines[:end]


def _wait_and(work: Callable[[], T]) -> T:
    signal.sigwait({signal.SIGUSR1})
    try:
        return work()
    finally:
        os.sched_yield()


def calls_of(trace: Iterable[str]) -> list[Call]:
    """The engine's calls in a trace, each with its number among the calls of that name in its process.

    Calls that close a pipe are omitted: an injected error leaves it open, which the kernel never does (close(2)), and
    the process at its other end would wait for the end of file.
    """
    counts: Counter[tuple[str, str]] = Counter()
    of_pipes: set[Call] = set()
    for line in trace:
        found = _CALL.match(line)
        if found is not None and not _NOT_THE_ENGINES.match(found[2]):
            counts[found[1], found[2]] += 1
            if _CLOSED_PIPE.match(line):
                of_pipes.add(Call(found[2], counts[found[1], found[2]]))
    most: dict[str, int] = {}
    for (_, name), count in counts.items():
        most[name] = max(count, most.get(name, 0))
    calls = [Call(name, number) for name, count in most.items() for number in range(1, count + 1)]
    return [call for call in calls if call not in of_pipes]
