"""State, signals, open files, identity and I/O priority of processes (proc(5))."""

from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import suppress
from functools import cache

from tasks.copier.kernel import syscalls

#: CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER as bits: <linux/capability.h>.
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 3
#: The map of a user namespace with all users, user_namespaces(7).
_ALL_USERS = [b"0", b"0", b"4294967295"]
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


def has_all_rights() -> bool:
    """Whether this process may own, change and remove files of all users. Without /proc, root counts as such.

    Root may not if its capabilities are dropped, or in a user namespace that maps some users only.
    """
    if os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/uid_map", "rb") as uid_map:
            users = uid_map.read().split()
        return users == _ALL_USERS and effective_capabilities() & _FILE_RIGHTS == _FILE_RIGHTS
    except OSError:
        return True


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


#: ioprio_set(2), which glibc has no function for. Sources: arch/x86/entry/syscalls/syscall_64.tbl and
#: include/uapi/asm-generic/unistd.h.
_NUMBERS = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "loongarch64": 30}
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
_BEST_EFFORT, _IDLE = 2, 3


def set_idle() -> None:
    """Give this thread and the processes that it forks I/O only while no other process has any.

    Raises OSError, also ENOSYS on an unknown architecture.
    """
    _set(_IDLE, 0)


def set_best_effort(level: int) -> None:
    """Give this thread and the processes that it forks an I/O priority from 0, the highest, to 7.

    Raises OSError, as `set_idle` does.
    """
    _set(_BEST_EFFORT, level)


def _set(priority_class: int, level: int) -> None:
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    syscalls.call(number, _WHO_PROCESS, 0, priority_class << _CLASS_SHIFT | level)
