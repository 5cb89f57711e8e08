"""Which blocks two files share on disk, as FIEMAP tells."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.syscalls import Extent

_NO_FIEMAP = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})
#: Extents without blocks of their own: not yet written out, or within the filesystem's tree (small files on btrfs).
_WITHOUT_BLOCKS = syscalls.FIEMAP_EXTENT_UNKNOWN | syscalls.FIEMAP_EXTENT_DATA_INLINE


class Blocks(NamedTuple):
    """Bytes on disk of one file, and how many of them are the very blocks of another."""

    mapped: int
    shared: int


def measure(source_fd: int, clone_fd: int) -> Blocks | None:
    """The blocks of `clone_fd` and those among them that are `source_fd`'s; None where the filesystem cannot tell.

    Raises OSError.
    """
    try:
        clone = _extents(clone_fd)
        source = _extents(source_fd) if _is_one_filesystem(source_fd, clone_fd) else []
    except OSError as error:
        if error.errno in _NO_FIEMAP:
            return None
        raise
    return Blocks(sum(extent.length for extent in clone), _overlap(source, clone))


def _extents(fd: int) -> list[Extent]:
    return [extent for extent in syscalls.fiemap(fd) if not extent.flags & syscalls.FIEMAP_EXTENT_UNWRITTEN]


def _is_one_filesystem(a_fd: int, b_fd: int) -> bool:
    """Whether equal block addresses mean equal blocks. btrfs gives each subvolume a device number of its own."""
    if os.fstat(a_fd).st_dev == os.fstat(b_fd).st_dev:
        return True
    return syscalls.filesystem_type(a_fd) == syscalls.filesystem_type(b_fd) == syscalls.BTRFS


def _overlap(source: list[Extent], clone: list[Extent]) -> int:
    """Bytes at the same offset in both files that lie at the same place on disk."""
    shared, n = 0, 0
    for extent in clone:
        if extent.flags & _WITHOUT_BLOCKS:
            continue
        while n < len(source) and source[n].logical + source[n].length <= extent.logical:
            n += 1
        m = n
        while m < len(source) and source[m].logical < extent.logical + extent.length:
            other = source[m]
            if not other.flags & _WITHOUT_BLOCKS and other.physical - other.logical == extent.physical - extent.logical:
                start = max(extent.logical, other.logical)
                end = min(extent.logical + extent.length, other.logical + other.length)
                shared += end - start
            m += 1
    return shared
