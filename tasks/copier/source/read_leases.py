"""Read leases on the files of a source that are being cloned, for `source_open: refuse`.

An open for writing waits until the lease is given up. The thread that clones may be in a system call for seconds
meanwhile, so another thread receives the signal and gives the lease up at once.
"""

from __future__ import annotations

import signal
from functools import lru_cache
from threading import Event, Lock, Thread, get_native_id

from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel.leases import LEASE_SIGNAL, LeasesUnknown, give_up_lease, holds_lease, take_lease

_IN_USE = "it is open for writing on this host: stop the guest, or allow it with source_open=allow"


class ReadLeases:
    """The leases of one process, and the thread that gives up those that a writer waits for."""

    def __init__(self) -> None:
        #: Guards the descriptors: a closed one may have been opened again for another file.
        self._lock = Lock()
        self._fds: set[int] = set()
        self._thread: _Receiver | None = None

    def take(self, fd: int, path: str) -> None:
        """Take the lease of a file of the source, open for reading. `release` must be called before `fd` is closed.

        Raises ForkError: source_in_use, source_open_unsupported, io_error. `path` is the file's, for the message.
        """
        try:
            with self._lock:
                if self._thread is None:
                    thread = _Receiver(self)
                    thread.start()
                    thread.ready.wait()
                    self._thread = thread
                take_lease(fd, self._thread.number)
                self._fds.add(fd)
        except BlockingIOError as error:
            raise ForkError(Code.SOURCE_IN_USE, _IN_USE, path, error.errno) from None
        except LeasesUnknown as error:
            message = f"source_open=refuse is not possible here: {error.strerror}"
            raise ForkError(Code.SOURCE_OPEN_UNSUPPORTED, message, path, error.errno) from None
        except OSError as error:
            raise from_oserror(error, "taking a read lease", path) from None
        except RuntimeError:  # from Thread.start
            raise ForkError(Code.IO_ERROR, "no thread is left to receive the signals of read leases", path) from None

    def require(self, fd: int, path: str) -> None:
        """Raise ForkError source_in_use if the file was opened for writing since `take`."""
        if not holds_lease(fd):
            raise ForkError(Code.SOURCE_IN_USE, _IN_USE, path)

    def release(self, fd: int) -> None:
        """Forget a descriptor that is about to be closed, which ends its lease."""
        with self._lock:
            self._fds.discard(fd)

    def give_up_broken(self) -> None:
        """Give up the leases that a writer waits for."""
        with self._lock:
            for fd in self._fds:
                if not holds_lease(fd):
                    give_up_lease(fd)


class _Receiver(Thread):
    """Receives the kernel's signals. They are sent to this thread only, and are blocked in it, so no handler runs."""

    def __init__(self, leases: ReadLeases) -> None:
        super().__init__(name="read-leases", daemon=True)
        self.ready = Event()
        self.number = 0
        self._leases = leases

    def run(self) -> None:
        """Give up broken leases until the process ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (LEASE_SIGNAL,))
        self.number = get_native_id()
        self.ready.set()
        while True:
            signal.sigwaitinfo((LEASE_SIGNAL,))
            self._leases.give_up_broken()


@lru_cache(maxsize=1)
def leases_of_process(pid: int) -> ReadLeases:
    """The leases of the process `pid`, which is the caller's: a forked child has none of its parent's threads."""
    return ReadLeases()
