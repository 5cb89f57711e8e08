"""Signs of life: a thread of this process touches the lock file of each staging that the process works in.

A thread, so that they come also within a system call that takes long: a process that is stopped stops its threads, and
one that dies lets go of its locks. One that serves one fork after the other, since starting and joining a thread takes
0.1 to 0.3 ms, a tenth of a small fork's time in a worker.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: How often a holder gives a sign of life, in seconds.
PULSE_SECONDS = 2.0


class _Heart:
    """The thread, which ends when it finds nothing to touch, and what it touches."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: list[int] = []
        self._beats = False

    def hold(self, fd: int) -> None:
        with self._guard:
            self._held.append(fd)
            if not self._beats:
                # Without a thread to spare the work goes on; if it takes long, another process may take it over.
                with suppress(RuntimeError):
                    threading.Thread(target=self._beat, name="pulse", daemon=True).start()
                    self._beats = True

    def let_go(self, fd: int) -> None:
        """When this returns, `fd` is not touched any more."""
        with self._guard:
            self._held.remove(fd)

    def _beat(self) -> None:
        while True:
            time.sleep(PULSE_SECONDS)
            with self._guard:
                for fd in self._held:
                    with suppress(OSError):  # the next one may come through; without any, the work is taken over
                        os.utime(fd)
                if not self._held:
                    self._beats = False
                    return


_heart = _Heart()


def _renew() -> None:
    """Begin anew in a forked child: it has no thread of its parent's, and holds nothing of its own yet."""
    global _heart
    _heart = _Heart()


os.register_at_fork(after_in_child=_renew)


@contextmanager
def beating(fd: int) -> Iterator[None]:
    """Touch the open file `fd` every `PULSE_SECONDS`."""
    heart = _heart
    heart.hold(fd)
    try:
        yield
    finally:
        heart.let_go(fd)
