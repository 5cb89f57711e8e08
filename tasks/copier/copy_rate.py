"""The bound on the bytes that all processes of a host copy in a second.

The processes share a file that holds the bound and the time until which the bytes copied so far use it up. A process
that has copied some bytes moves this time on by what they take at the bound, and waits until then. So the processes
need no message, and one that dies leaves at most the wait for its last piece.

The bytes that could have been copied in the past are lost, so that a fork does not begin with a burst. Only the time in
which a piece was copied counts, up to what the piece takes at the bound: otherwise a process that is alone would copy,
and then wait as long as if it had copied nothing meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

log = logging.getLogger(__name__)

#: The least bound, in bytes per second: with less, the wait for one piece would last minutes.
LEAST_RATE = 64 << 10
#: The file in the runtime directory.
FILE = "copy-rate"

#: Mark, bound (`_UNSET`, 0 for none, else bytes per second), nanoseconds of the monotonic clock.
_STATE = struct.Struct("=8sqq")
_MARK = b"forkvm-1"
_UNSET = -1
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: Longest sleep between two polls, in seconds.
_SLICE_SECONDS = 0.1
#: What a process may catch up that was woken too late, in nanoseconds. Without this, the sum stays below the bound.
_CREDIT = 100_000_000
#: A time that is further ahead, in nanoseconds, was not written by a process that waits: the host was started again.
_FURTHEST = 3_600_000_000_000
#: How long the absence of the file is remembered, in nanoseconds.
_ABSENT = 500_000_000
#: How long to try for the lock, in seconds. Its holder needs microseconds unless it is stopped (SIGSTOP); then the
#: others go on without it.
_LOCK_SECONDS = 0.2

#: Called with the number of bytes just copied, a function to call regularly while it waits, which may raise, and the
#: seconds in which they were copied.
Pace = Callable[[int, Callable[[], None], float], None]


def unbounded(count: int, poll: Callable[[], None], took: float) -> None:
    """The pace without a bound."""


class _Shared(NamedTuple):
    #: Bytes per second; 0: no bound; None: not set at run time.
    rate: int | None
    #: Until when the bytes that were copied use the bound up, in nanoseconds of the monotonic clock.
    used_until: int


@dataclass
class CopyRate:
    """The copy rate of this host, as one process sees it. It is a `Pace`.

    If the file cannot be used, each process has the bound for itself, and a warning is logged.
    """

    #: The runtime directory, which all processes of the host share. It is created if its parent exists.
    directory: str
    #: Bytes per second if no other bound was set at run time; None: no bound.
    configured: int | None = None
    _fd: int | None = None
    #: When to look for the file again, if it is absent, in nanoseconds of the monotonic clock.
    _absent_until: int = 0
    #: Until when the bytes of this process use the bound up, if the file cannot be used.
    _own_until: int = 0
    _has_warned: bool = False

    def __call__(self, count: int, poll: Callable[[], None], took: float) -> None:
        """Wait until `count` more bytes, copied in the last `took` seconds, are within the bound.

        Raises what `poll` raises.
        """
        if not count:
            return
        rate, until = self._charge(count, int(took * 1e9))
        while rate and (left := until - time.monotonic_ns()) > 0:
            time.sleep(min(_SLICE_SECONDS, left / 1e9))
            poll()
            if self._rate_of(self._read()) != rate:
                return

    def current(self) -> int | None:
        """The bound, in bytes per second, or None."""
        self._absent_until = 0
        return self._rate_of(self._read()) or None

    def is_set_at_run_time(self) -> bool:
        """Whether the bound is that of `set`, and not `configured`."""
        self._absent_until = 0
        return self._read().rate is not None

    def set(self, rate: int | None) -> None:
        """Replace the bound for all processes of the host, until it is set again or the host restarts.

        None removes it. Raises OSError.
        """
        fd = self._open(create=True)
        with _locked(fd):
            os.pwrite(fd, _STATE.pack(_MARK, rate or 0, time.monotonic_ns()), 0)

    def problem(self) -> str:
        """Why the file cannot be used; empty if it can, or can be created."""
        try:
            self._open(create=False)
        except FileNotFoundError:
            nearest = self.directory if os.path.isdir(self.directory) else os.path.dirname(self.directory) or "."
            if not os.path.isdir(nearest):
                return f"{nearest} does not exist"
            return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not writable"
        except OSError as error:
            return str(error.strerror)
        return ""

    def _charge(self, count: int, took: int) -> tuple[int, int]:
        """Count bytes that were copied in `took` nanoseconds.

        Returns the bound (0: none) and the time until which to wait, in nanoseconds.
        """
        if not self._rate_of(self._read()):
            return 0, 0
        try:
            return self._charge_shared(count, took)
        except OSError as error:
            self._warn(error)
            if not self.configured:
                return 0, 0
            self._own_until = _later(self._own_until, count, self.configured, took)
            return self.configured, self._own_until

    def _charge_shared(self, count: int, took: int) -> tuple[int, int]:
        fd = self._open(create=True)
        with _locked(fd):
            shared = _unpacked(os.pread(fd, _STATE.size, 0))
            rate = self._rate_of(shared)
            if not rate:
                return 0, 0
            until = _later(shared.used_until, count, rate, took)
            os.pwrite(fd, _STATE.pack(_MARK, _UNSET if shared.rate is None else shared.rate, until), 0)
        return rate, until

    def _rate_of(self, shared: _Shared) -> int:
        return (self.configured or 0) if shared.rate is None else shared.rate

    def _read(self) -> _Shared:
        if self._fd is None and time.monotonic_ns() < self._absent_until:
            return _Shared(None, 0)
        try:
            return _unpacked(os.pread(self._open(create=False), _STATE.size, 0))
        except FileNotFoundError:
            self._absent_until = time.monotonic_ns() + _ABSENT
        except OSError as error:
            self._warn(error)
        return _Shared(None, 0)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("the copy rate of the host cannot be read or written in %s: %s", self.directory, error)

    def _open(self, *, create: bool) -> int:
        """Open the shared file. Raises OSError, also FileNotFoundError if it is not to be created."""
        if self._fd is not None:
            if os.fstat(self._fd).st_nlink:
                return self._fd
            os.close(self._fd)  # the directory was made again
            self._fd = None
        if create:
            with suppress(FileExistsError):
                os.mkdir(self.directory, 0o700)
        # In /dev/shm any user could make the directory first, or a link.
        may_be_planted = os.stat(os.path.dirname(self.directory) or ".").st_mode & stat.S_IWOTH
        follow = os.O_NOFOLLOW if may_be_planted else 0
        directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow)
        try:
            status = os.fstat(directory_fd)
            is_foreign = status.st_uid not in (0, os.geteuid())
            if is_foreign and (may_be_planted or os.geteuid() != 0):
                raise PermissionError(errno.EPERM, "the directory belongs to another user")
            # A process that may write to the directory may copy on this host.
            mode = status.st_mode & 0o666
            try:
                self._fd = os.open(FILE, _OPEN, dir_fd=directory_fd)
            except FileNotFoundError:
                if not create:
                    raise
                self._fd = os.open(FILE, _OPEN | os.O_CREAT, mode, dir_fd=directory_fd)
                os.fchmod(self._fd, mode)  # regardless of the umask
        finally:
            os.close(directory_fd)
        return self._fd


def _later(until: int, count: int, rate: int, took: int) -> int:
    """The time until which the bound is used up after `count` more bytes, which were copied in `took` nanoseconds."""
    now, lasts = time.monotonic_ns(), count * 1_000_000_000 // rate
    begin = max(until, now - _CREDIT - min(took, lasts))
    if begin > now + _FURTHEST:
        begin = now
    return begin + lasts


def _unpacked(data: bytes) -> _Shared:
    """The content of the file; as if nothing was set if it is damaged."""
    if len(data) == _STATE.size:
        mark, rate, until = _STATE.unpack(data)
        if mark == _MARK:
            return _Shared(rate if rate >= 0 else None, until)
    return _Shared(None, 0)


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Hold the lock of the file, if its holder gives it up in time.

    A lock of fcntl(2) belongs to the process. That of flock(2) would be shared with forked children.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
    try:
        yield
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)
