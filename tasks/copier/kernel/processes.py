"""Processes, as the kernel sees them: their state, their signals, their open files."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from functools import cache

#: Signals that ask a command to end: from a user, a service manager, a closed terminal.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped: by SIGSTOP, a debugger or a frozen terminal. False for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read() or b""  # None where the kernel has nothing yet (EAGAIN)
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])  # "pid (name) state ..."


def ignore_ending_signals() -> None:
    """Leave ending signals to the parent process: a terminal sends them to every process of the command."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def open_files_limit() -> int:
    """How many files this process may have open at once (RLIMIT_NOFILE, getrlimit(2))."""
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
    """When a process started, in clock ticks since the boot; 0 for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read()
    except OSError:
        return 0
    return int(status.rpartition(b")")[2].split()[19])  # field 22; the first two are left out


@cache
def boot_id() -> str:
    """The random id of the running kernel (random(4)). Raises OSError without /proc."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@cache
def pid_namespace() -> int:
    """The number of this process's pid namespace (pid_namespaces(7)). Raises OSError without /proc."""
    return os.stat("/proc/self/ns/pid").st_ino
