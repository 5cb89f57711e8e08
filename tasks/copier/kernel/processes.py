"""State, signals, open files and identity of processes (proc(5))."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from functools import cache

#: Signals that request the end of a command: from a user, a service manager, or a closed terminal.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by SIGSTOP, a debugger or its terminal. False if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read() or b""  # None on EAGAIN
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])  # "pid (name) state ..."


def ignore_ending_signals() -> None:
    """Ignore the ending signals in a child. A terminal sends them to all processes; the parent handles them."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def effective_capabilities() -> int:
    """The effective capabilities of this process as bits; see <linux/capability.h>. Raises OSError without /proc."""
    with open("/proc/self/status", "rb") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith(b"CapEff:"))


def open_files_limit() -> int:
    """The most files that this process may have open at once (RLIMIT_NOFILE, getrlimit(2))."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def can_open(count: int) -> bool:
    """Whether this process can open `count` more files now."""
    taken: list[int] = []
    try:
        with suppress(OSError):
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            while len(taken) < count:
                taken.append(os.dup(taken[0]))
        return len(taken) == count
    finally:
        for fd in taken:
            os.close(fd)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read()
    except OSError:
        return 0
    return int(status.rpartition(b")")[2].split()[19])  # field 22 of the line, whose first two fields were removed


@cache
def boot_id() -> str:
    """The random id of this boot of the kernel (random(4)). Raises OSError without /proc."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@cache
def pid_namespace() -> int:
    """The inode of this process's pid namespace (pid_namespaces(7)). Raises OSError without /proc."""
    return os.stat("/proc/self/ns/pid").st_ino
