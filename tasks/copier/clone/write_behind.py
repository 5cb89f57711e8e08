"""Writes a copy to the disk while it is made, so that the host has a bounded amount of dirty pages.

Otherwise the kernel collects dirty pages up to a share of the memory, and then writes gigabytes at once. A process that
calls fsync meanwhile waits for them.
"""

from __future__ import annotations

from collections import deque

from tasks.copier.kernel import page_cache

#: How many bytes of all files of the host may be dirty before a copy begins its write-out. Until then, a copy is as
#: fast as the memory.
MOST_DIRTY = 256 << 20
#: Whether to begin write-out is decided after so many bytes.
_WINDOW_BYTES = 8 << 20
#: The most bytes of one copy in write-out. The copy waits for the disk to write the rest.
_BEHIND_BYTES = 256 << 20


class WriteBehind:
    """The write-out of one file, or of one range of it, that is copied from its start to its end."""

    def __init__(self, fd: int, start: int, *, drops: bool, most_dirty: int = MOST_DIRTY) -> None:
        """`drops`: drop the pages that are written, and begin at once."""
        self._fd = fd
        self._most_dirty = most_dirty
        self._drops = drops
        #: The offset up to which write-out was begun, and the end of the copied data.
        self._next = self._end = start
        #: Bytes since the last decision.
        self._new = 0
        #: The ranges whose write-out was begun.
        self._begun: deque[tuple[int, int]] = deque()

    def wrote(self, count: int, end: int) -> None:
        """`count` bytes were written, up to the offset `end`. Raises OSError."""
        self._new += count
        self._end = end
        if self._new >= _WINDOW_BYTES:
            self._new = 0
            if self._drops or page_cache.dirty_bytes() > self._most_dirty:
                self._begin()
            while self._begun and self._next - self._begun[0][0] > _BEHIND_BYTES:
                self._finish(*self._begun.popleft())

    def close(self) -> None:
        """The copy is complete. Raises OSError."""
        if self._drops:
            self._begin()
            while self._begun:
                self._finish(*self._begun.popleft())

    def _begin(self) -> None:
        page_cache.begin_write_out(self._fd, self._next, self._end)
        self._begun.append((self._next, self._end))
        self._next = self._end

    def _finish(self, start: int, end: int) -> None:
        page_cache.finish_write_out(self._fd, start, end)
        if self._drops:
            page_cache.drop(self._fd, start, end)
