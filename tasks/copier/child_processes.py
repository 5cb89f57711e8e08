"""The supervisor of child processes: it starts them, waits for them, and kills a child that is stopped.

`forkvm fork` and `forkvm campaign --local` share their work among children. The children inherit the descriptors of
their parent and its locks on the staging. The parent handles the signals that end a command. A child ends when its
work is done, when the staging says stop, or when its parent dies. A stopped child (SIGSTOP, a debugger) would keep the
locks without an end, so it is killed.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from tasks.copier.errors import Code, ForkError, from_errno
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.processes import ignore_ending_signals, is_stopped

#: Exit code of a child that met an error in this program; errnos, the other exit codes, are smaller.
PROGRAM_ERROR = 255
#: How long the parent waits for its children before it polls again.
_POLL_MILLISECONDS = 100
#: A child that is stopped for longer than this, in seconds, is killed.
STOPPED_SECONDS = 10.0
#: How long a child that is told to end may take before it is killed, in seconds: enough for one long system call.
_END_SECONDS = 30.0
#: What fork(2) returns when the system has no process or no memory left.
_NONE_LEFT = frozenset({errno.EAGAIN, errno.ENOMEM})
#: Two numbers of one child, each of 16 bytes: the sizes of sparse files may exceed 63 bits together.
_COUNTERS = struct.Struct("16s16s")


class SharedCounters:
    """Two numbers for each child, in memory that the children share with their parent."""

    def __init__(self, children: int) -> None:
        self._children = children
        self._memory = mmap.mmap(-1, _COUNTERS.size * children)

    def get(self, child: int) -> tuple[int, int]:
        """The numbers of one child."""
        first, second = _COUNTERS.unpack_from(self._memory, child * _COUNTERS.size)
        return int.from_bytes(first, "little"), int.from_bytes(second, "little")

    def set(self, child: int, first: int, second: int) -> None:
        """Set the numbers of one child."""
        numbers = first.to_bytes(16, "little"), second.to_bytes(16, "little")
        _COUNTERS.pack_into(self._memory, child * _COUNTERS.size, *numbers)

    def sums(self) -> tuple[int, int]:
        """The sums over all children."""
        counters = [self.get(child) for child in range(self._children)]
        return sum(first for first, _ in counters), sum(second for _, second in counters)


class ChildProcesses:
    """The children of this process that have not been waited for."""

    def __init__(self) -> None:
        #: Each child's pid, and when it was first seen stopped, in seconds of the monotonic clock.
        self._stopped_since: dict[int, float | None] = {}
        #: Describes the first error in this program that a child met, in memory shared with the children: mapped for
        #: the first child, because a small fork has none.
        self._report: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._stopped_since)

    def start(self, count: int, work: Callable[[int], int]) -> None:
        """Start up to `count` children. Each calls `work` with its number, counted from 0.

        Fewer are started, perhaps none, when the system has no process left. Raises OSError.
        """
        for number in range(count):
            if not self.spawn(partial(work, number)):
                return

    def spawn(self, work: Callable[[], int]) -> bool:
        """Start one child. It exits with the code that `work` returns, or with the errno of the OSError it raises.

        Returns False when the system has no process left. Raises OSError.
        """
        parent = os.getpid()
        if self._report is None:
            self._report = mmap.mmap(-1, mmap.PAGESIZE)
        report = self._report
        try:
            pid = os.fork()
        except OSError as error:
            if error.errno in _NONE_LEFT:
                return False
            raise
        if pid:
            self._stopped_since[pid] = None
            return True
        code = PROGRAM_ERROR
        try:
            code = _run(work, parent)
        except OSError as error:
            code = error.errno or errno.EIO
        except BaseException as error:
            _describe(error, report)
        finally:
            os._exit(code)

    def error_in(self, codes: Collection[int], source: str, staging: str) -> ForkError | None:
        """The error that the exit codes of children report, if any. A signal is not an error: the work is repeated.

        `source` and `staging` are the paths that the error names: of a program error, and of a failed system call.
        """
        if PROGRAM_ERROR in codes and self._report is not None:
            what = self._report[:].rstrip(b"\0").decode(errors="replace")
            return ForkError(Code.IO_ERROR, f"a child process met an error in this program: {what}", source)
        for code in codes:
            if code > 0:
                return from_errno(code, "working in the staging directory", staging)
        return None

    def wait(self, poll: Callable[[], None]) -> list[int]:
        """Wait until all children have ended. Returns their exit codes, negative for a signal.

        Calls `poll` about ten times a second. An exception of `poll` ends the waiting, not the children.
        """
        return self._wait(poll, STOPPED_SECONDS)

    def reap(self) -> list[int]:
        """Wait for children that were told to end. One that is stopped, or takes too long, is killed."""
        deadline = time.monotonic() + _END_SECONDS

        def poll() -> None:
            if time.monotonic() > deadline:
                for pid in self._stopped_since:
                    os.kill(pid, signal.SIGKILL)

        return self._wait(poll, stopped_seconds=0.0)

    def _wait(self, poll: Callable[[], None], stopped_seconds: float) -> list[int]:
        codes: list[int] = []
        poller, running = select.poll(), dict[int, int]()
        try:
            for pid in self._stopped_since:
                fd = os.pidfd_open(pid)
                running[fd] = pid
                poller.register(fd, select.POLLIN)
            while running:
                poll()
                for fd, _ in poller.poll(_POLL_MILLISECONDS):
                    poller.unregister(fd)
                    os.close(fd)
                    pid = running.pop(fd)
                    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    del self._stopped_since[pid]
                self._kill_stopped(stopped_seconds)
            poll()
        finally:
            for fd in running:
                with suppress(OSError):
                    os.close(fd)
        return codes

    def _kill_stopped(self, after: float) -> None:
        """Kill the children that have been stopped for `after` seconds. None is reaped, so no pid has been reused."""
        now = time.monotonic()
        for pid, since in self._stopped_since.items():
            if not is_stopped(pid):
                self._stopped_since[pid] = None
            elif since is None:
                self._stopped_since[pid] = now
            if since is not None and now - since >= after:
                os.kill(pid, signal.SIGKILL)


def _run(work: Callable[[], int], parent: int) -> int:
    ignore_ending_signals()
    syscalls.die_with_parent(signal.SIGKILL)  # a child without its parent would keep the locks
    return work() if os.getppid() == parent else 0


def _describe(error: BaseException, report: mmap.mmap) -> None:
    """Write what happened into the shared memory, unless another child did."""
    if report[0] == 0:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"
        words = ascii(str(error))[1:-1]  # names come from guests
        text = f"{type(error).__name__} in {place}: {words}".encode("ascii", "replace")[: mmap.PAGESIZE]
        report[: len(text)] = text
