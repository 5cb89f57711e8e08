"""Begins to write a copy to the disk while it is made.

Otherwise the kernel collects dirty pages up to a share of the memory before it writes any, and a process that calls
fsync meanwhile may wait for gigabytes.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from tasks.copier.kernel import page_cache

#: How many bytes of all files of the host may be dirty before a copy begins its write-out.
MOST_DIRTY = 256 << 20
#: Whether to begin write-out is decided after so many bytes, and it is begun for so many at a time.
_WINDOW_BYTES = 8 << 20
#: The share of its time that a copy waits, from which on it is slowed down on purpose, and not by the disk.
_SLOWED_SHARE = 0.25
#: Such a copy is made in windows of so many bytes, and written in requests of so many bytes, at most so many at a time.
#: This keeps the disk's queue short: an fsync of a neighbour waits behind it three times. Without a slowdown it would
#: cost more than it helps; see docs/experiments.md.
_SLOWED_WINDOW_BYTES, _REQUEST_BYTES, _REQUESTS = 1 << 20, 256 << 10, 8
#: With `drops`, how many windows of a copy may be in write-out before it waits for the first.
_WINDOWS_BEHIND = 8


class WriteBehind:
    """The write-out of one file, or of one range of it, that is copied from its start to its end."""

    def __init__(
        self, fd: int, start: int, *, drops: bool, is_slowed: bool = False, most_dirty: int = MOST_DIRTY
    ) -> None:
        """`drops`: drop the pages that are written, and wait for the disk, so that few are left at any time.

        `is_slowed`: whether the last copy was slowed down by the copy rate.
        """
        self._fd = fd
        self._drops = drops
        self._most_dirty = most_dirty
        #: Whether the copy is slowed down by the copy rate.
        self.is_slowed = is_slowed
        #: The offset up to which write-out was begun, and the end of the copied data.
        self._next = self._end = start
        #: Bytes since the last decision, its time, and how long the copy has waited since, in seconds.
        self._new = 0
        self._decided, self._waited = time.monotonic(), 0.0
        #: The ranges whose write-out was begun, with `drops`.
        self._begun: deque[tuple[int, int]] = deque()
        self._thread: _Writer | None = None

    @property
    def window_bytes(self) -> int:
        """How many bytes to copy at a time."""
        return _SLOWED_WINDOW_BYTES if self.is_slowed else _WINDOW_BYTES

    def wrote(self, count: int, end: int) -> None:
        """`count` bytes were written, up to the offset `end`. Call it after the wait for them. Raises OSError."""
        self._new += count
        self._end = end
        if self._new < self.window_bytes:
            return
        self._new = 0
        self._note_pace()
        if self._drops:
            self._begin()
            if len(self._begun) > _WINDOWS_BEHIND:
                self._drop(*self._begun.popleft())
        elif self.is_slowed or page_cache.dirty_bytes() > self._most_dirty:
            self._hand_over(_REQUEST_BYTES if self.is_slowed else _WINDOW_BYTES)

    def waited(self, seconds: float) -> None:
        """The copy was kept from going on for some seconds, by the copy rate if it was long."""
        self._waited += seconds

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

    def _note_pace(self) -> None:
        """Note whether the copy has waited for a large part of the time since the last decision."""
        now = time.monotonic()
        self.is_slowed = self._waited > _SLOWED_SHARE * (now - self._decided)
        self._decided, self._waited = now, 0.0

    def _hand_over(self, at_a_time: int) -> None:
        """Have a thread begin the write-out: the call waits while the disk's queue is full."""
        if self._thread is None:
            thread = _Writer(self._fd)
            with suppress(RuntimeError):  # no thread is left: the kernel writes the pages later
                thread.start()
                self._thread = thread
        if self._thread is not None:
            self._thread.ranges.put((self._next, self._end, at_a_time))
            self._next = self._end


class _Writer(Thread):
    """Begins the write-out of ranges."""

    def __init__(self, fd: int) -> None:
        super().__init__(name="write-behind", daemon=True)
        #: Start, end, and the bytes of one request.
        self.ranges: SimpleQueue[tuple[int, int, int]] = SimpleQueue()
        self._fd = fd
        self._ends = False
        #: The small requests that may not be complete.
        self._begun: deque[tuple[int, int]] = deque()

    def run(self) -> None:
        """Begin write-out until `stop` is called."""
        while True:
            start, end, at_a_time = self.ranges.get()
            for at in range(start, end, at_a_time or 1):
                if self._ends:
                    return
                with suppress(OSError):  # a sync of the file reports it too
                    self._begin(at, min(at + at_a_time, end))
            if self._ends:
                return

    def stop(self) -> None:
        """End after the call that is made now."""
        self._ends = True
        self.ranges.put((0, 0, 0))
        self.join()

    def _begin(self, start: int, end: int) -> None:
        """Begin one request, after the first of so many small ones is complete."""
        if end - start <= _REQUEST_BYTES:
            self._begun.append((start, end))
            if len(self._begun) > _REQUESTS:
                page_cache.wait_for_write_out(self._fd, *self._begun.popleft())
        page_cache.begin_write_out(self._fd, start, end)
