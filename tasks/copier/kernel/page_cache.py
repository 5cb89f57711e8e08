"""The pages of files in memory: writing them out, dropping them, and which of them are there.

Sources: sync_file_range(2), posix_fadvise(2), mincore(2), preadv2(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

from tasks.copier.kernel import syscalls

#: For preadv2(2) and pwritev2(2): leave no page in the cache that was not there before. Since Linux 6.14, on XFS and
#: ext4; others fail with EOPNOTSUPP. <linux/fs.h>.
RWF_DONTCACHE = 0x80
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def begin_write_out(fd: int, start: int, end: int) -> None:
    """Begin to write the dirty pages of [start, end) to the disk. Does nothing on overlayfs. Raises OSError."""
    _sync_range(fd, start, end, _WRITE)


def wait_for_write_out(fd: int, start: int, end: int) -> None:
    """Wait until the pages of [start, end) whose write-out was begun are on the disk. Raises OSError."""
    _sync_range(fd, start, end, _WAIT_BEFORE)


def finish_write_out(fd: int, start: int, end: int) -> None:
    """Write the dirty pages of [start, end) and wait until they are on the disk. Raises OSError.

    A file of overlayfs has no pages itself, and all of it is written.
    """
    if syscalls.filesystem_type(fd) == syscalls.OVERLAYFS:
        os.fdatasync(fd)
    else:
        _sync_range(fd, start, end, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)


def drop(fd: int, start: int, end: int) -> None:
    """Drop the clean pages of [start, end) from the page cache. Raises OSError."""
    os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)


def dirty_bytes() -> int:
    """The bytes of all files of this host that are dirty, as /proc/meminfo counts them.

    0 if there is no such file: proc(5), mount option `subset=pid`.
    """
    try:
        with open("/proc/meminfo", "rb") as meminfo:
            return next((int(line.split()[1]) << 10 for line in meminfo if line.startswith(b"Dirty:")), 0)
    except OSError:
        return 0


def absent_pages(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of pages of [start, end) that is not in the page cache. Raises OSError.

    Yields none if this process may not know: it must own the file or be able to write it.
    """
    begin = start // mmap.PAGESIZE * mmap.PAGESIZE
    address = _libc.mmap(None, end - begin, mmap.PROT_READ, mmap.MAP_SHARED, fd, begin)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        pages = -(-(end - begin) // mmap.PAGESIZE)
        present = ctypes.create_string_buffer(pages)
        if _libc.mincore(address, end - begin, present):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        _libc.munmap(address, end - begin)
    run = None
    for page, state in enumerate([*present.raw, 1]):
        at = begin + page * mmap.PAGESIZE
        if state & 1 and run is not None:
            yield run, at
            run = None
        elif not state & 1 and run is None:
            run = at


def _sync_range(fd: int, start: int, end: int, flags: int) -> None:
    while _libc.sync_file_range(fd, start, end - start, flags):
        number = ctypes.get_errno()
        if number == errno.ENOSYS:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
