"""Begins to write a copy to the disk while it is made.

Otherwise the kernel collects dirty pages up to a share of the memory before it writes any, and a process that calls
fsync meanwhile may wait for gigabytes.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from tasks.copier.kernel import page_cache

#: How many bytes of all files of the host may be dirty before a copy begins its write-out.
MOST_DIRTY = 256 << 20
#: Whether to begin write-out is decided after so many bytes, and it is begun for so many at a time.
_WINDOW_BYTES = 8 << 20
#: With `drops`, how many windows of a copy may be in write-out before it waits for the first.
_WINDOWS_BEHIND = 8


class WriteBehind:
    """The write-out of one file, or of one range of it, that is copied from its start to its end."""

    def __init__(self, fd: int, start: int, *, drops: bool, most_dirty: int = MOST_DIRTY) -> None:
        """`drops`: drop the pages that are written, and wait for the disk, so that few are left at any time."""
        self._fd = fd
        self._drops = drops
        self._most_dirty = most_dirty
        #: The offset up to which write-out was begun, and the end of the copied data.
        self._next = self._end = start
        #: Bytes since the last decision.
        self._new = 0
        #: The ranges whose write-out was begun, with `drops`.
        self._begun: deque[tuple[int, int]] = deque()
        self._thread: _Writer | None = None

    def wrote(self, count: int, end: int) -> None:
        """`count` bytes were written, up to the offset `end`. Raises OSError."""
        self._new += count
        self._end = end
        if self._new < _WINDOW_BYTES:
            return
        self._new = 0
        if self._drops:
            self._begin()
            if len(self._begun) > _WINDOWS_BEHIND:
                self._drop(*self._begun.popleft())
        elif page_cache.dirty_bytes() > self._most_dirty:
            self._hand_over()

    def complete(self) -> None:
        """The copy is complete: with `drops`, drop the rest. Raises OSError."""
        if self._drops:
            self._begin()
            while self._begun:
                self._drop(*self._begun.popleft())

    def stop(self) -> None:
        """Leave the rest to the kernel. When this returns, the descriptor is not used any more."""
        if self._thread is not None:
            self._thread.stop()

    def _begin(self) -> None:
        page_cache.begin_write_out(self._fd, self._next, self._end)
        self._begun.append((self._next, self._end))
        self._next = self._end

    def _drop(self, start: int, end: int) -> None:
        page_cache.finish_write_out(self._fd, start, end)
        page_cache.drop(self._fd, start, end)

    def _hand_over(self) -> None:
        """Have a thread begin the write-out: the call waits while the disk's queue is full."""
        if self._thread is None:
            thread = _Writer(self._fd)
            with suppress(RuntimeError):  # no thread is left: the kernel writes the pages later
                thread.start()
                self._thread = thread
        if self._thread is not None:
            self._thread.ranges.put((self._next, self._end))
            self._next = self._end


class _Writer(Thread):
    """Begins the write-out of ranges."""

    def __init__(self, fd: int) -> None:
        super().__init__(name="write-behind", daemon=True)
        self.ranges: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._fd = fd
        self._ends = False

    def run(self) -> None:
        """Begin write-out until `stop` is called."""
        while True:
            start, end = self.ranges.get()
            for at in range(start, end, _WINDOW_BYTES):
                if self._ends:
                    return
                with suppress(OSError):  # a sync of the file reports it too
                    page_cache.begin_write_out(self._fd, at, min(at + _WINDOW_BYTES, end))
            if self._ends:
                return

    def stop(self) -> None:
        """End after the call that is made now."""
        self._ends = True
        self.ranges.put((0, 0))
        self.join()
