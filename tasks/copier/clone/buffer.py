"""The buffer of a copy with pread and pwrite, and what such a copy leaves in the page cache."""

from __future__ import annotations

import errno
import os

from tasks.copier.kernel import page_cache

#: Size of the buffer, in bytes. A larger one is slower; a new one for each extent is far slower.
_BYTES = 256 << 10


class Buffer:
    """One buffer for all copies of a process."""

    def __init__(self, *, drops: bool) -> None:
        """`drops`: leave no page of a source in the page cache that was not there before, and no page of a copy.

        Pages of a copy that the kernel does not drop itself are dropped by `WriteBehind`.
        """
        self.data = bytearray()
        self._drops = drops
        self._read_flags = self._write_flags = page_cache.RWF_DONTCACHE if drops else 0

    def read(self, fd: int, at: int, end: int) -> int:
        """Read from [at, end) into the buffer. Returns the number of bytes read. Raises OSError."""
        if not self.data:
            self.data = bytearray(_BYTES)
        length = min(end - at, _BYTES)
        view = memoryview(self.data)[:length]
        if self._read_flags:
            try:
                return os.preadv(fd, [view], at, self._read_flags)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._read_flags = 0
        if not self._drops:
            return os.preadv(fd, [view], at)
        os.posix_fadvise(fd, at, length, os.POSIX_FADV_RANDOM)  # no pages are read ahead, which would count as present
        absent = list(page_cache.absent_pages(fd, at, at + length))
        got = os.preadv(fd, [view], at)
        for first, last in absent:
            page_cache.drop(fd, first, last)
        return got

    def write(self, fd: int, first: int, last: int, at: int) -> None:
        """Write bytes [first, last) of the buffer at the offset `at` of the file. Raises OSError."""
        view = memoryview(self.data)
        written = first
        while written < last:
            try:
                done = os.pwritev(fd, [view[written:last]], at + written - first, self._write_flags)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or not self._write_flags:
                    raise
                self._write_flags = 0
                continue
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            written += done
