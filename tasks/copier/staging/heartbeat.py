"""Signs of life: a thread of this process touches the lock file of each staging that the process works in.

A thread, so that they come also within a system call that takes long: a process that is stopped stops its threads, and
one that dies lets go of its locks. One that serves one fork after the other, since starting and joining a thread takes
0.1 to 0.3 ms, a tenth of a small fork's time in a worker.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tasks.copier.kernel import processes

#: How often a holder gives a sign of life, in seconds.
PULSE_SECONDS = 2.0


#: A line of the lock file that names a holder: where its pid counts, the pid, and when that process started.
_HOLDER = re.compile(rb"^holder ([0-9a-f-]+/\d+) ([1-9]\d{0,17}) ([1-9]\d{0,17})$", re.MULTILINE)


class _Heart:
    """The thread, which ends when it finds nothing to touch, and what it touches."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: list[int] = []
        #: Those of them that have the line of this process.
        self._signed: set[int] = set()
        self._beats = False

    def hold(self, fd: int) -> None:
        with self._guard:
            self._held.append(fd)
            if not self._beats:
                # Without a thread to spare the work goes on; if it takes long, another process may take it over.
                with suppress(RuntimeError):
                    threading.Thread(target=self._beat, name="pulse", daemon=True).start()
                    self._beats = True

    def let_go(self, fd: int) -> None:
        """When this returns, `fd` is not touched any more."""
        with self._guard:
            self._held.remove(fd)
            self._signed.discard(fd)

    def _beat(self) -> None:
        while True:
            time.sleep(PULSE_SECONDS)
            with self._guard:
                for fd in self._held:
                    with suppress(OSError):  # the next one may come through; without any, the work is taken over
                        os.utime(fd)
                        if fd not in self._signed:
                            os.pwritev(fd, [_own_line()], 0, os.RWF_APPEND)
                            self._signed.add(fd)
                if not self._held:
                    self._beats = False
                    return


_heart = _Heart()


def _renew() -> None:
    """Begin anew in a forked child: it has no thread of its parent's, and holds nothing of its own yet."""
    global _heart
    _heart = _Heart()


def _place() -> str:
    """Where a pid of this process counts: the running kernel and the pid namespace. Raises OSError without /proc."""
    return f"{processes.boot_id()}/{processes.pid_namespace()}"


def _own_line() -> bytes:
    pid = os.getpid()
    return f"holder {_place()} {pid} {processes.start_time(pid)}\n".encode("ascii")


def names_living_holder(notes: bytes) -> bool:
    """Whether one of the holders that the notes of a lock file name may live.

    The time of a lock file can be set by any process of its user, also by one that is no worker and that never lets go.
    A holder adds a line with its first heartbeat. One of another host or container cannot be looked at: its heartbeats
    alone count then, as they do without /proc.
    """
    holders = _HOLDER.findall(notes)
    try:
        here = _place()
    except OSError:
        return bool(holders)
    return any(
        place.decode("ascii") != here or processes.start_time(int(pid)) == int(started)
        for place, pid, started in reversed(holders)
    )


os.register_at_fork(after_in_child=_renew)


@contextmanager
def with_heartbeat(fd: int) -> Iterator[None]:
    """Touch the open file `fd` every `PULSE_SECONDS`."""
    heart = _heart
    heart.hold(fd)
    try:
        yield
    finally:
        heart.let_go(fd)
