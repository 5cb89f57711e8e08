"""The control directory of a fork: made or found beside its destination, held by a lock, with files of its own.

Each process that opens it proves first that it is the worker's own (see `proof`). A holder touches the lock file every
few seconds. A process that finds the directory gone, or another one in its place, holds nothing any more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Self

from tasks.copier.errors import ForkError
from tasks.copier.kernel import syscalls
from tasks.copier.staging import proof
from tasks.copier.staging.heartbeat import names_living_holder, with_heartbeat
from tasks.copier.staging.proof import NotOurs, open_directory

LOCK = "lock"
#: Stands for the pulse of what is held by no process that is known to be a worker's: it never changes, whatever the
#: time of the lock file. A holder that began a moment ago is known with its first heartbeat.
NO_HOLDER = 1
_FILE = os.O_RDWR | os.O_CREAT
#: How often a control directory is made that is gone again before it is opened: others who end forks remove theirs.
_MAKE_TRIES = 1000
#: Bytes read at a time.
_PIECE = 1 << 20
#: What unlink(2) and rmdir(2) answer for what other processes keep: NFS says EBUSY for a file that is open.
_KEPT_BY_OTHERS = frozenset({errno.ENOTEMPTY, errno.EBUSY, errno.EISDIR})
#: Pause between two tries of a lock, in seconds.
_LOCK_PAUSE = 0.01


class Held(Exception):
    """Others hold the staging; `heartbeat` is when one of them last gave a sign of life."""

    def __init__(self, heartbeat: int) -> None:
        super().__init__(heartbeat)
        self.heartbeat = heartbeat


class ControlDirectory:
    """A control directory, open. `claim` makes or finds it, `attach` only finds it."""

    def __init__(self, parent_fd: int, name: str, fd: int, lock_fd: int) -> None:
        self.parent_fd = parent_fd
        self.name = name
        self.fd = fd
        self._lock_fd = lock_fd
        #: See `retire`.
        self.retired: str | None = None

    # -- coming and going

    @classmethod
    @contextmanager
    def claim(cls, parent_fd: int, fork_id: str, wait: float) -> Iterator[Self]:
        """Make the fork's staging, or open the one that exists, and hold it exclusively.

        Raises Held when others hold it for `wait` seconds, NotOurs (a ForkError) for what is not the worker's own at
        its path, and OSError.
        """
        deadline = time.monotonic() + wait
        name = control_name(fork_id)
        for _ in range(_MAKE_TRIES):
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent_fd)
            try:
                staging = cls._open(parent_fd, name)
            except OSError:  # full: the new directory is still empty, and no later delivery would look for it
                with suppress(OSError):
                    os.rmdir(name, dir_fd=parent_fd)
                raise
            if staging is None:
                continue
            try:
                staging._lock(fcntl.LOCK_EX, deadline)
                if staging.is_current():
                    yield staging
                    return
            finally:
                staging._close()
        raise NotOurs(proof.path_of(parent_fd, name), "another process removes it as often as it is made")

    @classmethod
    @contextmanager
    def attach(cls, parent_fd: int, fork_id: str, wait: float, *, alone: bool = False) -> Iterator[Self | None]:
        """Hold the fork's staging, shared or `alone`; None where there is none (any more).

        Raises Held when others hold it for `wait` seconds, NotOurs (a ForkError), and OSError.
        """
        with cls.hold(parent_fd, control_name(fork_id), wait, alone=alone) as staging:
            yield staging

    @classmethod
    @contextmanager
    def hold(cls, parent_fd: int, name: str, wait: float, *, alone: bool) -> Iterator[Self | None]:
        """As `attach`, by the name of the control directory."""
        staging = cls._open(parent_fd, name)
        if staging is None:
            yield None
            return
        try:
            staging._lock(fcntl.LOCK_EX if alone else fcntl.LOCK_SH, time.monotonic() + wait)
            yield staging if staging.is_current() else None
        finally:
            staging._close()

    @classmethod
    @contextmanager
    def peek(cls, parent_fd: int, fork_id: str) -> Iterator[Self | None]:
        """Open the fork's staging without holding it, for what paused holders must not hinder; None: there is none.

        Raises NotOurs (a ForkError), and OSError.
        """
        staging = cls._open(parent_fd, control_name(fork_id))
        try:
            yield staging
        finally:
            if staging is not None:
                staging._close()

    @classmethod
    def _open(cls, parent_fd: int, name: str) -> Self | None:
        try:
            fd = open_directory(parent_fd, name)
        except FileNotFoundError:
            return None
        try:
            lock_fd = proof.open_file(fd, LOCK, _FILE)
        except FileNotFoundError:  # removed between the two calls
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(parent_fd, name, fd, lock_fd)

    def _close(self) -> None:
        syscalls.release(self._lock_fd)
        syscalls.release(self.fd)

    def _lock(self, kind: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._lock_fd, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Held(self.holder_heartbeat()) from None
            time.sleep(_LOCK_PAUSE)

    # -- life signs

    def with_heartbeat(self) -> AbstractContextManager[None]:
        """Give a sign of life every `PULSE_SECONDS`, also within a system call that takes long."""
        return with_heartbeat(self._lock_fd)

    def heartbeat(self) -> int:
        """When whoever holds the staging last gave a sign of life; to be compared with an earlier one only."""
        return os.fstat(self._lock_fd).st_mtime_ns

    def holder_heartbeat(self) -> int:
        """The holder's heartbeat, or NO_HOLDER while the lock file names no process that may be a holder."""
        return self.heartbeat() if names_living_holder(self.notes()) else NO_HOLDER

    def is_current(self) -> bool:
        """Whether the control directory still stands under its name; the lock of a removed one guards nothing."""
        try:
            status = os.stat(self.name, dir_fd=self.parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(self.fd))

    def clear(self, names: list[str]) -> bool:
        """Remove the control directory with its files `names`; False where something of other processes keeps it.

        The lock goes last: a process that makes a new one before the directory is gone has claimed it, and then it
        stays. Raises OSError.
        """
        if self._is_claimed_anew():
            return True
        try:
            for name in sorted(names, key=LOCK.__eq__):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)
            os.rmdir(self.name, dir_fd=self.parent_fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in _KEPT_BY_OTHERS:
                return self._is_claimed_anew()
            raise
        return True

    def _is_claimed_anew(self) -> bool:
        with suppress(FileNotFoundError):
            lock = os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)
            return not os.path.samestat(lock, os.fstat(self._lock_fd))
        return False

    def retire(self) -> str | None:
        """Give the control directory the name of a tree, and let go of its lock: that name, or None where it is gone.

        Nobody finds it under its own name from then on. FUSE and NFS keep an unlinked file that is open in its
        directory, so the lock file is closed, and other processes that wait for it find out and close it too. A process
        that dies meanwhile leaves what `gc` removes. Raises OSError.
        """
        if self.retired is not None or not self.is_current():
            return self.retired
        away = f"{self.name}.{secrets.token_hex(4)}"
        try:
            os.rename(self.name, away, src_dir_fd=self.parent_fd, dst_dir_fd=self.parent_fd)
        except FileNotFoundError:
            return None
        self.retired = away
        os.dup2(self.fd, self._lock_fd, inheritable=False)  # its number stays in use until the end
        return away

    # -- notes: lines behind the lock, in its file, which is open already

    def note(self, lines: bytes) -> None:
        """Append lines to the notes in one step, also while other processes append (pwritev2(2))."""
        os.pwritev(self._lock_fd, [lines], 0, os.RWF_APPEND)

    def notes(self) -> bytes:
        """All lines that were noted."""
        size = 0 if self.retired is not None else min(os.fstat(self._lock_fd).st_size, proof.most_bytes(LOCK))
        return os.pread(self._lock_fd, size, 0) if size else b""

    # -- files

    def has_file(self, name: str) -> bool:
        """Whether the control directory has the file `name`. Raises OSError."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def open_file(self, name: str, *, create: bool = False) -> int:
        """Open the file `name` of the control directory, for writing too where it may be made; the caller closes it.

        Raises FileNotFoundError, NotOurs, and OSError.
        """
        return proof.open_file(self.fd, name, _FILE if create else os.O_RDONLY)

    def read_file(self, name: str) -> bytes:
        """The bytes of the file `name` of the control directory. Raises FileNotFoundError, NotOurs, and OSError."""
        fd = self.open_file(name)
        try:
            return b"".join(iter(lambda: os.read(fd, _PIECE), b""))
        finally:
            syscalls.release(fd)

    def write_file(self, name: str, data: bytes, *, sync: bool = False) -> None:
        """Replace the file `name` of the control directory, in one step; `sync`: and have it on the disk.

        Raises OSError: EFBIG for more than such a file may have, since nobody would read it back.
        """
        if len(data) > proof.most_bytes(name):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
        new = f"{name}.new"
        fd = self._new_file(new)
        try:
            syscalls.write_all(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        if sync:
            os.fsync(self.fd)

    def create_file(self, name: str) -> int:
        """Make the file `name` of the control directory; the caller closes it. Raises FileExistsError, and OSError."""
        return proof.open_file(self.fd, name, _FILE | os.O_EXCL)

    def _new_file(self, name: str) -> int:
        """Make a file, in place of what a process left that died before it had renamed it."""
        try:
            return self.create_file(name)
        except FileExistsError:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)
            return self.create_file(name)


def control_name(fork_id: str) -> str:
    """The name of the control directory of the fork `fork_id`."""
    return f".forkvm-{hashlib.sha256(fork_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def last_sign_of_life(parent_fd: int, fork_id: str) -> int:
    """See `sign_of_life`; 0 where the fork has no staging that is the worker's own."""
    try:
        fd = open_directory(parent_fd, control_name(fork_id))
    except (ForkError, OSError):
        return 0
    try:
        return sign_of_life(fd)
    finally:
        os.close(fd)


def sign_of_life(control_fd: int) -> int:
    """When anyone last did anything in a control directory, in milliseconds since the epoch.

    Every step of a fork makes or renames a file in it, and within a step a holder touches the lock.
    """
    signs = [os.fstat(control_fd).st_mtime_ns]
    with suppress(FileNotFoundError):
        signs.append(os.stat(LOCK, dir_fd=control_fd, follow_symlinks=False).st_mtime_ns)
    return max(signs) // 1_000_000
