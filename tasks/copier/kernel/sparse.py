"""The sparse copy: the data extents of a file, and its holes kept.

copy_file_range per data extent, and pread/pwrite from where it refuses. Sources: copy_file_range(2), lseek(2),
openzfs issues 15526 and 15728 (holes reported over dirty data).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import syscalls

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

#: Called with the number of bytes just copied; raises to stop.
Step = Callable[[int], None]


#: The paths of source and destination, called for only where a message needs them.
Paths = Callable[[], tuple[str, str]]


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


class SparseCopier:
    """Copies byte ranges between files, with one buffer for as long as it lives."""

    def __init__(self, step: Step, *, offload: bool) -> None:
        """`offload`: let copy_file_range do it, which shares extents where it can; else real bytes are written."""
        self._step = step
        self._offload = offload
        self._buffer: memoryview | None = None
        #: st_dev of a source → whether its holes are to be trusted without an fsync before.
        self._tells_holes: dict[int, bool] = {}
        #: Whether blocks are to be allocated first; all of a fork is on one filesystem.
        self._allocates: bool | None = None

    def copy(self, src_fd: int, src_dev: int, dst_fd: int, start: int, end: int, paths: Paths) -> int:
        """Copy the data of [start, end) and leave its holes; the destination must be a hole there. Returns bytes.

        `src_dev` is st_dev of the source. Raises ForkError: sparse_unsupported, source_changed for a source that
        ends early, no_space, io_error.
        """
        copied = 0
        try:
            if src_dev not in self._tells_holes:
                self._tells_holes[src_dev] = syscalls.filesystem_type(src_fd) != syscalls.ZFS
            if not self._tells_holes[src_dev]:
                os.fsync(src_fd)
            for data, hole in data_extents(src_fd, start, end, paths):
                self._copy_extent(src_fd, dst_fd, data, hole, paths)
                copied += hole - data
        except OSError as error:
            source, destination = paths()
            raise from_oserror(error, f"copying {source}", destination) from None
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
            done = self._copy_piece(src_fd, dst_fd, at, end)
            if done == 0:
                raise ForkError(Code.SOURCE_CHANGED, "it became shorter while it was copied", paths()[0])
            at += done
            self._step(done)

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

    def _copy_piece(self, src_fd: int, dst_fd: int, at: int, end: int) -> int:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        got = os.preadv(src_fd, [self._buffer[: min(end - at, _BUFFER_BYTES)]], at)
        written = 0
        while written < got:
            done = os.pwritev(dst_fd, [self._buffer[written:got]], at + written)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            written += done
        return got
