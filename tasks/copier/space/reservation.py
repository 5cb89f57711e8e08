"""The bytes that the forks of this host will still copy, so that two forks that fit alone and not together do not both
begin.

Each fork that copies has a file in /dev/shm, which all users and services of a host share and which is empty after a
boot. The file says how many bytes the fork will copy, and how many each of its chunks has copied. A process that works
on the fork holds its flock shared: if no process does, the fork has ended or died, and its bytes do not count. A queued
fork may have no process for a moment, between its chunks. So its file also counts for `GRACE_SECONDS` after a process
has last worked on it.

Limits: containers see each other's forks only if they share /dev/shm. Files count that this user or root has made:
another user could claim any number of bytes. Reservations are advice: without /dev/shm a fork works as without others.
They are not in the runtime directory of the copy rate, which another user's command may not be able to use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tasks.copier.clone.sparse_copy import Step
from tasks.copier.kernel import syscalls

#: How long a queued fork's bytes count while no process works on it, in seconds.
GRACE_SECONDS = 60.0
#: How long a process waits for others that reserve at the same time, in seconds: each takes less than 1 ms.
_WAIT_SECONDS = 0.5
_PAUSE_SECONDS = 0.002
#: Where the files are.
DIRECTORY = "/dev/shm"
_PREFIX = "forkvm-space-"
#: The filesystem, the bytes that the fork will copy, and until when it counts without a process (CLOCK_BOOTTIME).
_HEAD = struct.Struct("=16sqd")
_NUMBER = struct.Struct("=q")
#: After so many bytes a chunk records what it has copied.
_RECORD_BYTES = 8 << 20
#: The most bytes of a file: it has a number for each of at most 100,000 chunks.
_MOST_BYTES = 1 << 20
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def job_of(control_fd: int, part: str = "") -> str:
    """The name of a job's reservation on this host, from its open control directory; `part`: of a batch."""
    status = syscalls.fstat(control_fd)
    return f"{status.st_dev:x}-{status.st_ino:x}{part and '-'}{part}"


@dataclass(frozen=True)
class Reservation:
    """The open file of one job. The process holds its lock until the file is closed. Errors are ignored."""

    fd: int
    filesystem: bytes
    is_queued: bool

    def set_total(self, total: int) -> None:
        """Set the number of bytes that the job will copy in all, and renew the time of a queued job."""
        until = _now() + GRACE_SECONDS if self.is_queued else 0.0
        with suppress(OSError):
            os.pwrite(self.fd, _HEAD.pack(self.filesystem, total, until), 0)

    def set_copied(self, chunk: int, copied: int) -> None:
        """Set the number of bytes that a chunk has copied."""
        with suppress(OSError):
            os.pwrite(self.fd, _NUMBER.pack(copied), _HEAD.size + chunk * _NUMBER.size)

    def close(self) -> None:
        """Release the lock; the file stays."""
        syscalls.release(self.fd)


class Copied:
    """The bytes that one chunk has copied. They are recorded now and then: a write for each file would take long."""

    def __init__(self, chunk: int = 0) -> None:
        self._chunk = chunk
        self._count = self._recorded = 0

    def add(self, number: int, reservation: Reservation) -> None:
        """Count copied bytes. Until they are recorded, the others count them as still to come."""
        self._count += number
        if self._count - self._recorded >= _RECORD_BYTES:
            self.record(reservation)

    def record(self, reservation: Reservation) -> None:
        """Record all bytes that were copied."""
        if self._recorded != self._count:
            self._recorded = self._count
            reservation.set_copied(self._chunk, self._count)


@contextmanager
def reserving() -> Iterator[None]:
    """Let no other process of this host reserve within the context, unless it has waited too long."""
    try:
        fd = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not _lock(fd, fcntl.LOCK_EX) and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        syscalls.release(fd)


def reserve(job: str, filesystem: bytes, total: int, *, is_queued: bool) -> Reservation | None:
    """Reserve `total` bytes of a filesystem for a job; what it had reserved before is replaced.

    Call it within `reserving`. Returns None where that is not possible.
    """
    try:
        fd = os.open(_path_of(job), _OPEN | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError:
        return None
    _lock(fd, fcntl.LOCK_SH)
    reservation = Reservation(fd, filesystem, is_queued)
    reservation.set_total(total)
    return reservation


def attach(job: str) -> Reservation | None:
    """Hold the lock of a job's reservation too, and renew it. None if it has none on this host."""
    try:
        fd = os.open(_path_of(job), _OPEN)
    except OSError:
        return None
    try:
        with reserving():
            _lock(fd, fcntl.LOCK_SH)
            filesystem, total, until = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
            reservation = Reservation(fd, filesystem, bool(until))
            reservation.set_total(total)
            return reservation
    except (OSError, struct.error):
        syscalls.release(fd)
        return None


@contextmanager
def counted(step: Step, job: str, chunk: int) -> Iterator[Step]:
    """`step`, but it also counts for the job's reservation, if it has one, what a try of the chunk copies."""
    reservation = attach(job)
    if reservation is None:
        yield step
        return
    copied = Copied(chunk)

    def count(number: int) -> None:
        copied.add(number, reservation)
        step(number)

    try:
        yield count
    finally:
        copied.record(reservation)
        reservation.close()


def withdraw(job: str) -> None:
    """Remove a job's reservation, if it has one on this host."""
    with suppress(OSError):
        os.unlink(_path_of(job))


def reserved_by_others(filesystem: bytes, job: str) -> int:
    """The bytes of a filesystem that other jobs of this host will still copy. Removes the files of dead ones.

    Call it within `reserving`.
    """
    own = _path_of(job)
    try:
        paths = [os.path.join(DIRECTORY, name) for name in os.listdir(DIRECTORY) if name.startswith(_PREFIX)]
    except OSError:
        return 0
    return sum(_remaining(path, filesystem) for path in paths if path != own)


def _remaining(path: str, filesystem: bytes) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # removed meanwhile, or another user's
        return 0
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            return 0
        data = os.pread(fd, min(status.st_size, _MOST_BYTES), 0)
        found, total, until = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))  # it is empty if its maker died
        if until <= _now() and _lock(fd, fcntl.LOCK_EX):
            os.unlink(path)
            return 0
        whole = len(data) - (len(data) - _HEAD.size) % _NUMBER.size
        copied = sum(number for (number,) in _NUMBER.iter_unpack(data[_HEAD.size : whole]))
        return max(0, total - copied) if found == filesystem else 0
    except OSError:
        return 0
    finally:
        syscalls.release(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True


def _path_of(job: str) -> str:
    return os.path.join(DIRECTORY, f"{_PREFIX}{job}-{os.geteuid()}")


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
