"""Read leases: whether a file is open for writing, and a signal when a process opens it for writing.

The kernel grants a read lease only while no process of the host has the inode open for writing. A shared writable
mapping keeps it open, and so does a loop device. A later open for writing waits until the lease is given up, and the
holder gets a signal. Sources: fcntl(2), "Leases" and F_SETOWN_EX, and fs/locks.c in the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import time
from contextlib import suppress
from threading import get_native_id

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.processes import effective_capabilities

#: The signal for the holder. By default it is ignored, while SIGIO would end the process.
LEASE_SIGNAL = signal.SIGURG
#: <linux/fcntl.h>, fcntl(2): set the signal of a descriptor; direct it to one thread, with a `struct f_owner_ex`.
_F_SETSIG = 10
_F_SETOWN_EX = 15
_F_OWNER_TID = 0
_F_OWNER_EX = struct.Struct("=ii")
_BCACHEFS = 0xCA451A4E
#: How long to wait for a process that has a write lease, and how often to look, in seconds. The kernel takes a lease
#: away after /proc/sys/fs/lease-break-time, by default 45 s.
_BREAK_SECONDS, _LOOK_SECONDS = 60.0, 0.01

#: Filesystems whose files are opened through this host's kernel only, so that a lease sees every writer. On a network
#: filesystem or FUSE the lease may be granted while another host, or the server, writes. On overlayfs it is granted
#: while a mapping is writable whose descriptor is closed: that keeps the file of the layer open (ovl_mmap).
_SEE_ALL_WRITERS = frozenset(
    {
        syscalls.XFS,
        syscalls.BTRFS,
        syscalls.EXT4,
        syscalls.TMPFS,
        syscalls.RAMFS,
        syscalls.ZFS,
        syscalls.F2FS,
        _BCACHEFS,
    }
)


class LeasesUnknown(OSError):
    """The filesystem has no leases that see every writer, or this process may not take one of this file."""


def take_lease(fd: int, thread: int) -> None:
    """Take a read lease of a file that is open for reading only. It ends when the descriptor is closed.

    The kernel sends LEASE_SIGNAL to the thread with the id `thread` when a process opens the file for writing. Raises
    BlockingIOError if the file is open for writing now; LeasesUnknown; OSError.
    """
    if syscalls.filesystem_type(fd) not in _SEE_ALL_WRITERS:
        raise LeasesUnknown(errno.EOPNOTSUPP, "this filesystem has no leases that see every writer")
    try:
        fcntl.fcntl(fd, _F_SETOWN_EX, _F_OWNER_EX.pack(_F_OWNER_TID, thread))
        fcntl.fcntl(fd, _F_SETSIG, LEASE_SIGNAL)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno == errno.EACCES:
            raise LeasesUnknown(errno.EACCES, "a lease needs the file's owner, or CAP_LEASE") from None
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise LeasesUnknown(error.errno, "this filesystem has no leases") from None
        raise


def holds_lease(fd: int) -> bool:
    """Whether no process has opened the file for writing since `take_lease`. Raises OSError."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK  # F_UNLCK also while an open waits for its end


def give_up_lease(fd: int) -> None:
    """Let processes open the file that wait for the end of the lease. Afterwards `holds_lease` is false."""
    with suppress(OSError):  # the kernel took it away, after /proc/sys/fs/lease-break-time
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def is_open_for_writing(fd: int) -> bool:
    """Whether a process of the host has the file open for writing. `fd` is open for reading only.

    Raises LeasesUnknown, and OSError.
    """
    try:
        take_lease(fd, get_native_id())
    except BlockingIOError:
        return True
    give_up_lease(fd)
    return False


def may_lease_files_of_others() -> bool:
    """Whether this process has CAP_LEASE, without which it may lease only files of its own user. Raises OSError."""
    return bool(effective_capabilities() & 1 << _CAP_LEASE)


#: <linux/capability.h>.
_CAP_LEASE = 28


def open_leased(name: str, flags: int, dir_fd: int) -> int:
    """As os.open with O_NONBLOCK, but waits while another process gives up its write lease (Samba, nfsd).

    The open signals that process, and fails with EAGAIN until then: open(2). Raises OSError.
    """
    end = 0.0
    while True:
        try:
            return os.open(name, flags, dir_fd=dir_fd)
        except BlockingIOError:
            now = time.monotonic()
            end = end or now + _BREAK_SECONDS
            if now > end:
                raise
            time.sleep(_LOOK_SECONDS)
