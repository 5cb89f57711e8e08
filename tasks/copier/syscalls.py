"""The Linux system calls that Python does not offer: thin, typed, without policy.

Each raises OSError with the kernel's errno. Sources: openat2(2), renameat2(2), syncfs(2), statfs(2),
ioctl_ficlone(2), prctl(2), and the kernel's Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

#: _IOW(0x94, 9, int). A wrong number answers ENOTTY and means a silent full copy for ever, so a test pins it.
FICLONE = 0x40049409
#: _IOWR('f', 11, struct fiemap).
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_FLAG_SYNC = 0x1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2
FIEMAP_EXTENT_DATA_INLINE = 0x200
FIEMAP_EXTENT_UNWRITTEN = 0x800
FIEMAP_EXTENT_SHARED = 0x2000

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RENAME_NOREPLACE = 0x1
PR_SET_PDEATHSIG = 1

#: f_type of statfs(2), from include/uapi/linux/magic.h and OpenZFS.
OVERLAYFS = 0x794C7630
ZFS = 0x2FC12FC1
BTRFS = 0x9123683E

#: The same number on every architecture (unlike renameat2, for which glibc has a function).
_SYS_OPENAT2 = 437
#: openat2 answers EAGAIN when a rename raced with the lookup (openat2(2)); a few more tries settle it.
_OPENAT2_TRIES = 100

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _uninterrupted(function: Callable[..., int], *arguments: object) -> int:
    """Call again after EINTR, as Python does for the calls that it offers itself (PEP 475)."""
    while True:
        try:
            return _check(function(*arguments))
        except InterruptedError:
            continue


def openat2(dir_fd: int, path: str, flags: int, resolve: int) -> int:
    """Open `path` below `dir_fd` under the `resolve` rules; always O_CLOEXEC. Returns the file descriptor."""
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve), 24)
    name = ctypes.c_char_p(os.fsencode(path))
    for _ in range(_OPENAT2_TRIES):
        try:
            return _check(_libc.syscall(_SYS_OPENAT2, dir_fd, name, how, ctypes.c_size_t(24)))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def release(fd: int) -> None:
    """Close a descriptor that nothing was written through.

    close(2) frees it whatever it answers, and the answer would be about writing: no reason to call work undone that
    is done.
    """
    with suppress(OSError):
        os.close(fd)


def rename_noreplace(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str) -> None:
    """Rename, and fail with EEXIST when anything stands at `dst`, be it a dangling symlink."""
    _check(_libc.renameat2(src_dir_fd, os.fsencode(src), dst_dir_fd, os.fsencode(dst), RENAME_NOREPLACE))


def syncfs(fd: int) -> None:
    """Write the whole filesystem that holds `fd` to its disk."""
    _uninterrupted(_libc.syncfs, fd)


def filesystem_type(fd: int) -> int:
    """f_type of the filesystem that holds `fd`."""
    buffer = ctypes.create_string_buffer(256)
    _uninterrupted(_libc.fstatfs, fd, buffer)
    return int(struct.unpack_from("@l", buffer)[0]) & 0xFFFFFFFF


def die_with_parent(signal: int) -> None:
    """Have the kernel send `signal` to this process when its parent ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0))


def ficlone(dst_fd: int, src_fd: int) -> None:
    """Make the file `dst_fd` share all extents of `src_fd`. Atomic against writers of the source."""
    fcntl.ioctl(dst_fd, FICLONE, src_fd)


class Extent(NamedTuple):
    """One mapped extent, in bytes; `flags` are FIEMAP_EXTENT_*."""

    logical: int
    physical: int
    length: int
    flags: int


_FIEMAP_HEADER = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT = struct.Struct("=QQQQQLLLL")
_EXTENTS_A_CALL = 1024


def fiemap(fd: int) -> Iterator[Extent]:
    """Yield the mapped extents of a file in order, after writing its dirty pages out.

    Without FIEMAP_FLAG_SYNC btrfs can report extents that are not yet what they will be.
    """
    start = 0
    while True:
        header = _FIEMAP_HEADER.pack(start, 2**64 - 1 - start, FIEMAP_FLAG_SYNC, 0, _EXTENTS_A_CALL, 0)
        buffer = bytearray(header + bytes(_FIEMAP_EXTENT.size * _EXTENTS_A_CALL))
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        mapped = _FIEMAP_HEADER.unpack_from(buffer)[3]
        for n in range(mapped):
            logical, physical, length, _, _, flags, _, _, _ = _FIEMAP_EXTENT.unpack_from(
                buffer, _FIEMAP_HEADER.size + n * _FIEMAP_EXTENT.size
            )
            yield Extent(logical, physical, length, flags)
            start = logical + length
            if flags & FIEMAP_EXTENT_LAST:
                return
        if mapped == 0:
            return
