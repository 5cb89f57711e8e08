"""Child processes that share the work of this one, which waits for them.

They inherit this process's descriptors and its locks on the staging. The parent answers to signals; a child ends when
its work is done, when the staging says stop, or with its parent. One that is stopped (SIGSTOP, a debugger) would hold
its locks forever, so it is killed.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.processes import ignore_ending_signals, is_stopped

#: Exit code of a child that met an error in this program; errnos, its other exit codes, are smaller.
PROGRAM_ERROR = 255
#: How often the parent looks at its children.
_LOOK_MILLISECONDS = 100
#: A child that is stopped for longer than this, in seconds, is killed.
STOPPED_SECONDS = 10.0
#: How long a child that is to end has for it before it is killed, in seconds: most of it for one system call.
_END_SECONDS = 30.0
#: What fork(2) answers where there is no process or no memory to spare.
_NONE_TO_SPARE = frozenset({errno.EAGAIN, errno.ENOMEM})


class ChildProcesses:
    """Children of this process that are running or not yet waited for."""

    def __init__(self) -> None:
        #: Each child's pid, and when it was first seen stopped, in seconds of the monotonic clock.
        self._stopped_since: dict[int, float | None] = {}
        #: What the first child met that met an error in this program: in memory that children share with the parent.
        self._report = mmap.mmap(-1, mmap.PAGESIZE)

    def __len__(self) -> int:
        return len(self._stopped_since)

    def spawn(self, work: Callable[[], int]) -> bool:
        """Start a child that ends with the exit code `work` returns, or with the errno of its OSError.

        Returns False where the system has no process to spare. Raises OSError.
        """
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            if error.errno in _NONE_TO_SPARE:
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
            self._note(error)
        finally:
            os._exit(code)

    def program_error(self, path: str) -> ForkError:
        """What a child met that ended with PROGRAM_ERROR; the same error of several children is one."""
        what = self._report[:].rstrip(b"\0").decode(errors="replace")
        return ForkError(Code.IO_ERROR, f"a child met an error in this program: {what}", path)

    def _note(self, error: BaseException) -> None:
        if self._report[0] == 0:
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"
            words = ascii(str(error))[1:-1]  # names come from guests
            text = f"{type(error).__name__} in {place}: {words}".encode("ascii", "replace")[: mmap.PAGESIZE]
            self._report[: len(text)] = text

    def wait(self, poll: Callable[[], None]) -> list[int]:
        """Wait until all children have ended: their exit codes, negative for a signal.

        `look` is called about ten times a second; what it raises ends the waiting, not the children.
        """
        return self._wait(poll, STOPPED_SECONDS)

    def reap(self) -> list[int]:
        """As `wait`, for children that are to end: one that is stopped, or takes too long, is killed."""
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
                for fd, _ in poller.poll(_LOOK_MILLISECONDS):
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
        now = time.monotonic()
        for pid, since in self._stopped_since.items():
            if not is_stopped(pid):
                self._stopped_since[pid] = None
            elif since is None:
                self._stopped_since[pid] = now
            if since is not None and now - since >= after:
                os.kill(pid, signal.SIGKILL)  # not waited for yet, so no other process has its pid


def _run(work: Callable[[], int], parent: int) -> int:
    ignore_ending_signals()
    syscalls.die_with_parent(signal.SIGKILL)  # a child without its parent would hold the locks forever
    return work() if os.getppid() == parent else 0
