"""What the kernel tells of other processes (proc(5))."""

from __future__ import annotations


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped: by SIGSTOP, a debugger or a frozen terminal. False for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read() or b""  # None where the kernel has nothing yet (EAGAIN)
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])  # "pid (name) state ..."
