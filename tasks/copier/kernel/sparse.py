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


class HolesUnknown(OSError):
    """The filesystem does not support SEEK_DATA."""


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each data extent of `fd` within [start, end), in bytes. Raises HolesUnknown, OSError."""
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            if data >= end:
                return
            at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is no data between `at` and the end of the file
                return
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                raise HolesUnknown(error.errno, error.strerror) from None
            raise
        yield data, at


def reports_holes(fd: int) -> bool:
    """Whether the filesystem of `fd` is known to report holes. Raises OSError."""
    return syscalls.filesystem_type(fd) in _REPORT_HOLES


def reports_no_hole(fd: int, size: int) -> bool:
    """Whether the filesystem reports all `size` bytes of a file as data. Raises OSError."""
    return os.lseek(fd, 0, os.SEEK_DATA) == 0 and os.lseek(fd, 0, os.SEEK_HOLE) >= size
