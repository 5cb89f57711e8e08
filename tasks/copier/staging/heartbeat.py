"""Heartbeats: a thread of this process touches the lock file of each staging that the process works in.

A thread touches it during a long system call too. It stops together with its process, and the locks of a process that
dies are released. One thread serves all forks of the process, because starting and joining a thread takes 0.1 to
0.3 ms, a tenth of the time of a small fork in a worker.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tasks.copier.kernel import processes, syscalls

#: Seconds between two heartbeats of a process that holds a staging.
HEARTBEAT_SECONDS = 2.0

#: A line of the lock file that names a holder: the kernel and pid namespace, the pid, and when that process started.
_HOLDER = re.compile(rb"^holder ([0-9a-f-]+/\d+) ([1-9]\d{0,17}) ([1-9]\d{0,17})$", re.MULTILINE)


class _Heartbeats:
    """The thread, which ends when no file is left to touch, and the files that it touches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: list[int] = []
        #: The files to which this process has added its line.
        self._signed: set[int] = set()
        self._has_thread = False

    def add(self, fd: int) -> None:
        """Begin to touch the open file `fd`."""
        with self._lock:
            self._files.append(fd)
            if not self._has_thread:
                # Without a thread the work goes on; if it takes long, another process may take it over.
                with suppress(RuntimeError):
                    threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
                    self._has_thread = True

    def remove(self, fd: int) -> None:
        """Stop touching `fd`. When this returns, it is not touched any more."""
        with self._lock:
            self._files.remove(fd)
            self._signed.discard(fd)

    def _run(self) -> None:
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            with self._lock:
                for fd in self._files:
                    with suppress(OSError):  # the next heartbeat may succeed; without any, the work is taken over
                        os.utime(fd)
                        if fd not in self._signed:
                            syscalls.append_lines(fd, _own_line())
                            self._signed.add(fd)
                if not self._files:
                    self._has_thread = False
                    return


_heartbeats = _Heartbeats()


def _reset_in_child() -> None:
    """Start empty in a forked child: it has none of its parent's threads, and works in no staging of its own yet."""
    global _heartbeats
    _heartbeats = _Heartbeats()


def _pid_scope() -> str:
    """Where the pid of this process is valid: the running kernel and pid namespace. Raises OSError without /proc."""
    return f"{processes.boot_id()}/{processes.pid_namespace()}"


def _own_line() -> bytes:
    pid = os.getpid()
    return f"holder {_pid_scope()} {pid} {processes.start_time(pid)}\n".encode("ascii")


def names_living_holder(notes: bytes) -> bool:
    """Whether one of the holders that the notes of a lock file name may be alive.

    The mtime of a lock file proves little, because any process of the same user can set it. So a holder adds a line
    with its first heartbeat. A process on another host or in another container cannot be checked and counts as alive;
    so does every process if there is no /proc. Only heartbeats show it then.
    """
    holders = _HOLDER.findall(notes)
    try:
        here = _pid_scope()
    except OSError:
        return bool(holders)
    return any(
        scope.decode("ascii") != here or processes.start_time(int(pid)) == int(started)
        for scope, pid, started in reversed(holders)
    )


os.register_at_fork(after_in_child=_reset_in_child)


@contextmanager
def with_heartbeat(fd: int) -> Iterator[None]:
    """Touch the open file `fd` every `HEARTBEAT_SECONDS` within the context."""
    heartbeats = _heartbeats
    heartbeats.add(fd)
    try:
        yield
    finally:
        heartbeats.remove(fd)
