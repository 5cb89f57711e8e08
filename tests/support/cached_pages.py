"""The pages of a file in the page cache: cachestat(2), since Linux 6.5."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import NamedTuple

_SYS_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)


class CachedPages(NamedTuple):
    """Numbers of pages of one file."""

    cached: int
    dirty: int
    in_writeback: int


def cached_pages(path: Path, start: int = 0, length: int = 0) -> CachedPages:
    """The pages of `length` bytes from `start`; 0: to the end of the file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = ctypes.create_string_buffer(40)
        wanted = ctypes.create_string_buffer(struct.pack("=QQ", start, length), 16)
        if _libc.syscall(_SYS_CACHESTAT, fd, wanted, found, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        return CachedPages(*struct.unpack_from("=QQQ", found))
    finally:
        os.close(fd)


def evict(path: Path) -> None:
    """Write a file to disk, and drop its pages."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
