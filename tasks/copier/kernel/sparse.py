"""Where the data of a file is, and where its holes are: SEEK_DATA and SEEK_HOLE of lseek(2)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from tasks.copier.kernel import syscalls

#: Filesystems that report the holes of their files. Others (FUSE, NFS before 4.2, CIFS) may report only data.
_REPORT_HOLES = frozenset(
    {syscalls.XFS, syscalls.BTRFS, syscalls.EXT4, syscalls.TMPFS, syscalls.ZFS, syscalls.OVERLAYFS}
)

#: How many bytes are read to find out whether a reported hole is one.
_LOOK_BYTES = 64 << 10


class HolesUnknown(OSError):
    """The filesystem does not support SEEK_DATA."""


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each data extent of `fd` within [start, end), in bytes. Raises HolesUnknown, OSError.

    If the filesystem hides data, that is one extent.
    """
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            if data >= end:
                return
            hole = os.lseek(fd, data, os.SEEK_HOLE)
            at = min(hole, end) if hole > data else end  # a filesystem that reports both at one place makes no progress
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is no data between `at` and the end of the file
                if at == start and hides_data(fd, start):
                    yield start, end
                return
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                raise HolesUnknown(error.errno, error.strerror) from None
            raise
        yield data, at


def reports_holes(fd: int) -> bool:
    """Whether the filesystem of `fd` is known to report holes. Raises OSError."""
    return syscalls.filesystem_type(fd) in _REPORT_HOLES


def reports_no_hole(fd: int, size: int) -> bool:
    """Whether the filesystem reports all `size` bytes of a file as data, or none of its data. Raises OSError."""
    try:
        return os.lseek(fd, 0, os.SEEK_DATA) == 0 and os.lseek(fd, 0, os.SEEK_HOLE) >= size
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return True


def hides_data(fd: int, at: int) -> bool:
    """Whether the filesystem reports data as a hole: no data from `at` on, which SEEK_DATA said, nor in the whole file.

    A virtiofs of macOS does that with every file (docker/sbx-releases issue 526). To find it, the first bytes of the
    file and those from `at` are read. Raises OSError.
    """
    if reports_holes(fd):
        return False
    if at > 0 and _has_data(fd):
        return False
    return any(any(os.pread(fd, _LOOK_BYTES, offset)) for offset in {0, at})


def _has_data(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True
