"""The sparse copy: it copies the data extents of a file and keeps its holes.

Each data extent is copied with copy_file_range, or with pread and pwrite from where copy_file_range refuses. Some
filesystems report all bytes as data although st_blocks shows that there are holes, or report data as holes. There, as
in GNU cp, blocks of zeros are found by reading. Sources: copy_file_range(2), lseek(2), OpenZFS issues 15526 and 15728
(dirty data reported as holes).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from tasks.copier.clone.buffer import Buffer
from tasks.copier.clone.write_behind import WriteBehind
from tasks.copier.clone.zeros import BLOCK, nonzero_runs
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.sparse import HolesUnknown, data_extents, reports_no_hole

#: On ext4, the blocks of extents of at least this many bytes are allocated first: otherwise it reserves them page by
#: page. Elsewhere this does not help: XFS and tmpfs are no faster, and btrfs would not compress the data.
_ALLOCATED_BYTES = 128 << 10

#: How much of an extent is allocated at a time. Other forks see this space as taken, and as still to be taken.
_STRETCH_BYTES = 16 << 20

#: Errnos after which pread and pwrite replace copy_file_range, and after which fallocate is left out. ENOENT is CIFS.
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

#: Called with the number of bytes just copied. Raises to stop the copy.
Step = Callable[[int], None]
#: Called with the number of bytes that are about to be copied. Returns whether they may be.
Take = Callable[[int], bool]
#: Returns the paths of source and destination. Called only when an error message needs them.
Paths = Callable[[], tuple[str, str]]


class Part(NamedTuple):
    """The bytes [start, end) of a file of `size` bytes; `allocated` bytes of it have blocks (st_blocks)."""

    start: int
    end: int
    size: int
    allocated: int


class OpenPair(NamedTuple):
    """A file of the source and its clone, both open."""

    src_fd: int
    #: st_dev of the source.
    src_dev: int
    dst_fd: int
    paths: Paths
    step: Step
    behind: WriteBehind


class SparseCopier:
    """Copies byte ranges between files, with one buffer for its whole life."""

    def __init__(self, *, offload: bool, drops: bool) -> None:
        """`offload`: use copy_file_range, which may share extents. Otherwise every byte is written.

        `drops`: leave no pages in the page cache that were not there before; then every byte is written too.
        """
        #: The budget of the copies. A fork without `max_copied_bytes` may copy all.
        self.take: Take = lambda count: True
        self._offload = offload and not drops
        self._buffer = Buffer(drops=drops)
        #: st_dev of a source → whether its filesystem is OpenZFS.
        self._is_zfs: dict[int, bool] = {}
        #: Whether to allocate blocks first. A fork is on one filesystem, so one answer is enough.
        self._allocates: bool | None = None

    def copy(self, pair: OpenPair, part: Part) -> int:
        """Copy the data of one part of a file and keep its holes. The destination must be a hole there.

        Returns the number of bytes written. Raises ForkError: sparse_unsupported, copy_budget_exceeded, source_changed
        (the source became shorter), no_space, io_error (also for data after the file's size), and what `pair.step`
        raises.
        """
        src_fd, src_dev = pair.src_fd, pair.src_dev
        copied = 0
        try:
            if src_dev not in self._is_zfs:
                self._is_zfs[src_dev] = syscalls.filesystem_type(src_fd) == syscalls.ZFS
            if self._is_zfs[src_dev]:  # it may report dirty data as holes; fsync ends that (OpenZFS issue 15526)
                os.fsync(src_fd)
            for data, hole in data_extents(src_fd, part.start, part.end):
                if (
                    part.size - part.allocated >= BLOCK
                    and (data, hole) == (part.start, part.end)
                    and not self._is_zfs[src_dev]  # compression makes st_blocks small there
                    and reports_no_hole(src_fd, part.size)
                ):
                    copied = self._copy_nonzero(pair, data, hole)
                    break
                self._copy_extent(pair, data, hole)
                copied += hole - data
            if part.end == part.size and os.pread(src_fd, 1, part.size):
                raise _continues(pair, part.size)
            pair.behind.complete()
        except HolesUnknown as error:
            message = "the filesystem cannot report holes (SEEK_DATA); forkvm never makes a dense copy instead"
            raise ForkError(Code.SPARSE_UNSUPPORTED, message, pair.paths()[0], error.errno) from None
        except OSError as error:
            source, destination = pair.paths()
            raise from_oserror(error, f"copying {source}", destination) from None
        return copied

    def _copy_nonzero(self, pair: OpenPair, at: int, end: int) -> int:
        """Copy the blocks of [at, end) that are not all zeros. Returns the number of bytes written.

        copy_file_range would write the zeros too.
        """
        copied = 0
        while at < end:
            got = self._buffer.read(pair.src_fd, at, end)
            if got == 0:
                raise _ended_early(pair)
            written = 0
            for first, last in nonzero_runs(self._buffer.data, got, at):
                self._take(last - first, pair)
                self._buffer.write(pair.dst_fd, first, last, at + first)
                written += last - first
            at, copied = at + got, copied + written
            pair.step(written)  # also with 0 bytes, so that a cancellation takes effect
            pair.behind.wrote(written, at)
        return copied

    def _copy_extent(self, pair: OpenPair, start: int, end: int) -> None:
        self._take(end - start, pair)
        for at in range(start, end, _STRETCH_BYTES):
            self._copy_stretch(pair, at, min(end, at + _STRETCH_BYTES))

    def _copy_stretch(self, pair: OpenPair, at: int, end: int) -> None:
        if end - at >= _ALLOCATED_BYTES:
            self._allocate(pair.dst_fd, at, end)
        while self._offload and at < end:
            # After each call a cancellation takes effect, the copy rate is observed, and write-out is begun.
            try:
                done = os.copy_file_range(pair.src_fd, pair.dst_fd, min(end - at, pair.behind.window_bytes), at, at)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                break
            if done == 0:  # the end of the file, or a filesystem that wrongly reports it
                break
            at += done
            pair.step(done)
            pair.behind.wrote(done, at)
        while at < end:
            got = self._buffer.read(pair.src_fd, at, end)
            if got == 0:
                raise _ended_early(pair)
            self._buffer.write(pair.dst_fd, 0, got, at)
            at += got
            pair.step(got)
            pair.behind.wrote(got, at)

    def _take(self, count: int, pair: OpenPair) -> None:
        if not self.take(count):
            message = "copying it would exceed max_copied_bytes; allow more, or find out why it is not reflinked"
            raise ForkError(Code.COPY_BUDGET_EXCEEDED, message, pair.paths()[0])

    def _allocate(self, dst_fd: int, start: int, end: int) -> None:
        """Allocate the blocks of [start, end) where that makes the copy faster. Raises OSError."""
        if self._allocates is None:
            self._allocates = syscalls.filesystem_type(dst_fd) == syscalls.EXT4
        if not self._allocates:
            return
        try:
            syscalls.allocate(dst_fd, start, end - start)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._allocates = False  # ext2 and ext3 have no extents


def _ended_early(pair: OpenPair) -> ForkError:
    return ForkError(Code.SOURCE_CHANGED, "the file became shorter while it was copied", pair.paths()[0])


def _continues(pair: OpenPair, size: int) -> ForkError:
    message = (
        f"the file has more data than the {size} bytes that its filesystem reports (as in procfs, or in FUSE with "
        "direct_io), so its clone would lack data; leave it out with skip"
    )
    return ForkError(Code.IO_ERROR, message, pair.paths()[0])
