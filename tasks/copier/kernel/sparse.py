"""The sparse copy: the data extents of a file, and its holes kept.

copy_file_range per data extent, and pread/pwrite from where it refuses. Where the filesystem reports all bytes as data
although st_blocks says that there are holes, zero blocks are found by reading, as GNU cp does. Sources:
copy_file_range(2), lseek(2), openzfs issues 15526 and 15728 (holes reported over dirty data).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.zeros import BLOCK, nonzero_runs

#: One call copies at most so many bytes. The kernel's own cap is 2 GiB, past which corruption was seen
#: (glibc 2.41); less lets a cancellation through within a fraction of a second.
_CALL_BYTES = 256 << 20
#: Bytes of the one buffer that pread and pwrite share: larger ones are slower, a fresh one an extent far slower.
_BUFFER_BYTES = 256 << 10
#: Extents of so many bytes and more get their blocks before their data where that is faster: ext4 else reserves them
#: page by page. Not elsewhere: btrfs would not compress them, XFS is no faster, and tmpfs neither.
_ALLOCATED_BYTES = 128 << 10

#: Refusals of copy_file_range that pread/pwrite can follow, and of fallocate that can be done without; ENOENT is CIFS.
_REFUSED = frozenset(
    {
        errno.ENOSYS,
        errno.EXDEV,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ETXTBSY,
        errno.EPERM,
        errno.EBADF,
        errno.ENOENT,
    }
)

#: Filesystems that report the holes of their files. Of files elsewhere (FUSE, NFS before 4.2, CIFS) all is read.
_REPORT_HOLES = frozenset(
    {syscalls.XFS, syscalls.BTRFS, syscalls.EXT4, syscalls.TMPFS, syscalls.ZFS, syscalls.OVERLAYFS}
)

#: Called with the number of bytes just copied; raises to stop.
Step = Callable[[int], None]


#: The paths of source and destination, called for only where a message needs them.
Paths = Callable[[], tuple[str, str]]


class Part(NamedTuple):
    """The bytes [start, end) of a file of `size` bytes, `allocated` of which have blocks (st_blocks)."""

    start: int
    end: int
    size: int
    allocated: int


def data_extents(fd: int, start: int, end: int, paths: Paths) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each data extent of `fd` within [start, end), in bytes.

    Raises ForkError sparse_unsupported where the filesystem cannot tell, and OSError.
    """
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            if data >= end:
                return
            at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                message = "its filesystem cannot tell data from holes, and a dense copy is never made"
                raise ForkError(Code.SPARSE_UNSUPPORTED, message, paths()[0], error.errno) from None
            raise
        yield data, at


def reports_holes(fd: int) -> bool:
    """Whether the filesystem of `fd` is known to report holes. Raises OSError."""
    return syscalls.filesystem_type(fd) in _REPORT_HOLES


def reports_no_hole(fd: int, size: int) -> bool:
    """Whether the filesystem reports all `size` bytes of a file as data. Raises OSError."""
    return os.lseek(fd, 0, os.SEEK_DATA) == 0 and os.lseek(fd, 0, os.SEEK_HOLE) >= size


class SparseCopier:
    """Copies byte ranges between files, with one buffer for as long as it lives."""

    def __init__(self, step: Step, *, offload: bool) -> None:
        """`offload`: let copy_file_range do it, which shares extents where it can; else real bytes are written."""
        self._step = step
        self._offload = offload
        self._data = bytearray()
        self._buffer = memoryview(self._data)
        #: st_dev of a source → whether its filesystem is OpenZFS.
        self._is_zfs: dict[int, bool] = {}
        #: Whether blocks are to be allocated first; all of a fork is on one filesystem.
        self._allocates: bool | None = None

    def copy(self, src_fd: int, src_dev: int, dst_fd: int, part: Part, paths: Paths) -> int:
        """Copy the data of one part of a file and leave its holes; the destination must be a hole there.

        Returns the bytes written. `src_dev` is st_dev of the source. Raises ForkError: sparse_unsupported,
        source_changed for a source that ends early, no_space, io_error.
        """
        copied = 0
        try:
            if src_dev not in self._is_zfs:
                self._is_zfs[src_dev] = syscalls.filesystem_type(src_fd) == syscalls.ZFS
            if self._is_zfs[src_dev]:  # its holes are to be trusted after an fsync; compression makes st_blocks small
                os.fsync(src_fd)
            for data, hole in data_extents(src_fd, part.start, part.end, paths):
                if (
                    part.size - part.allocated >= BLOCK
                    and (data, hole) == (part.start, part.end)
                    and not self._is_zfs[src_dev]
                    and reports_no_hole(src_fd, part.size)
                ):
                    return self._copy_nonzero(src_fd, dst_fd, data, hole, paths)
                self._copy_extent(src_fd, dst_fd, data, hole, paths)
                copied += hole - data
        except OSError as error:
            source, destination = paths()
            raise from_oserror(error, f"copying {source}", destination) from None
        return copied

    def _copy_nonzero(self, src_fd: int, dst_fd: int, at: int, end: int, paths: Paths) -> int:
        """Copy [at, end) but for blocks of zeros; returns the bytes written.

        Not with copy_file_range, which would write the zeros.
        """
        copied = 0
        while at < end:
            got = self._read(src_fd, at, end)
            if got == 0:
                raise ended_early(paths)
            written = 0
            for first, last in nonzero_runs(self._data, got, at):
                self._write(dst_fd, first, last, at + first)
                written += last - first
            at, copied = at + got, copied + written
            self._step(written)  # also of nothing: a cancellation must come through
        return copied

    def _copy_extent(self, src_fd: int, dst_fd: int, at: int, end: int, paths: Paths) -> None:
        if end - at >= _ALLOCATED_BYTES:
            self._allocate(dst_fd, at, end)
        while self._offload and at < end:
            try:
                done = os.copy_file_range(src_fd, dst_fd, min(end - at, _CALL_BYTES), at, at)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                break
            if done == 0:  # the end of the file, or a filesystem that only says so
                break
            at += done
            self._step(done)
        while at < end:
            got = self._read(src_fd, at, end)
            if got == 0:
                raise ended_early(paths)
            self._write(dst_fd, 0, got, at)
            at += got
            self._step(got)

    def _allocate(self, dst_fd: int, start: int, end: int) -> None:
        """Give [start, end) its blocks, where that makes the copy faster. Raises OSError."""
        if self._allocates is None:
            self._allocates = syscalls.filesystem_type(dst_fd) == syscalls.EXT4
        if not self._allocates:
            return
        try:
            syscalls.allocate(dst_fd, start, end - start)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._allocates = False  # ext2 or ext3, whose files have no extents

    def _read(self, src_fd: int, at: int, end: int) -> int:
        """Fill the buffer from [at, end); returns the bytes read."""
        if not self._data:
            self._data = bytearray(_BUFFER_BYTES)
            self._buffer = memoryview(self._data)
        return os.preadv(src_fd, [self._buffer[: min(end - at, _BUFFER_BYTES)]], at)

    def _write(self, dst_fd: int, first: int, last: int, at: int) -> None:
        """Write bytes [first, last) of the buffer to the offset `at`."""
        written = first
        while written < last:
            done = os.pwritev(dst_fd, [self._buffer[written:last]], at + written - first)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            written += done


def ended_early(paths: Paths) -> ForkError:
    """The error for a source that has fewer bytes than the walk saw."""
    return ForkError(Code.SOURCE_CHANGED, "it became shorter while it was copied", paths()[0])
