"""Counts the blocks that two files share on disk, as FIEMAP reports them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.sparse import HolesUnknown, data_extents
from tasks.copier.kernel.syscalls import Extent

_NO_FIEMAP = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})
#: Extents without blocks: not written to disk yet, or stored in the metadata tree (small files on btrfs).
_WITHOUT_BLOCKS = syscalls.FIEMAP_EXTENT_UNKNOWN | syscalls.FIEMAP_EXTENT_DATA_INLINE


class Blocks(NamedTuple):
    """Bytes of one file on disk, and how many of them are in blocks shared with another file."""

    mapped: int
    shared: int


def measure(source_fd: int, clone_fd: int) -> Blocks | None:
    """The blocks of `clone_fd`, and those that it shares with `source_fd`; None if the filesystem has no FIEMAP.

    Raises OSError.
    """
    try:
        source = _extents(source_fd) if _is_one_filesystem(source_fd, clone_fd) else iter(())
        return _overlap(source, _extents(clone_fd))
    except OSError as error:
        if error.errno in _NO_FIEMAP:
            return None
        raise


def count_extents(fd: int, size: int) -> int:
    """The number of extents of a file of `size` bytes. Raises OSError.

    Where the filesystem has no FIEMAP, that of its data extents. Dirty pages are not written for it.
    """
    try:
        return syscalls.fiemap_count(fd)
    except OSError as error:
        if error.errno not in _NO_FIEMAP:
            raise
    try:
        return sum(1 for _ in data_extents(fd, 0, size))
    except HolesUnknown:
        return 1


def _extents(fd: int) -> Iterator[Extent]:
    return (extent for extent in syscalls.fiemap(fd) if not extent.flags & syscalls.FIEMAP_EXTENT_UNWRITTEN)


def _is_one_filesystem(a_fd: int, b_fd: int) -> bool:
    """Whether equal block addresses mean equal blocks. On btrfs each subvolume has its own device number."""
    if os.fstat(a_fd).st_dev == os.fstat(b_fd).st_dev:
        return True
    return syscalls.filesystem_type(a_fd) == syscalls.filesystem_type(b_fd) == syscalls.BTRFS


def _overlap(source: Iterator[Extent], clone: Iterator[Extent]) -> Blocks:
    """The bytes of `clone`, and those that have the same offset in both files and the same place on disk.

    Both iterators are ordered by offset. One extent of each is in memory.
    """
    mapped = shared = 0
    other = next(source, None)
    for extent in clone:
        mapped += extent.length
        end = extent.logical + extent.length
        while other is not None and other.logical < end:
            shared += _common(extent, other)
            if other.logical + other.length > end:
                break  # it extends into the next extent of the clone
            other = next(source, None)
    return Blocks(mapped, shared)


def _common(extent: Extent, other: Extent) -> int:
    if (extent.flags | other.flags) & _WITHOUT_BLOCKS:
        return 0
    if other.physical - other.logical != extent.physical - extent.logical:
        return 0
    start = max(extent.logical, other.logical)
    end = min(extent.logical + extent.length, other.logical + other.length)
    return max(0, end - start)
