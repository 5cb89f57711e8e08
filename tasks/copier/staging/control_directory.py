"""The control directory of a fork: making or finding it beside the destination, locking it, and its files.

A process that opens it first proves that it is the worker's own (see `proof`). A process that holds it touches the lock
file every few seconds. If the directory is removed or replaced, its lock protects nothing any more.
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
#: How long to wait for the lock of a control directory, in seconds. `gc` and other deliveries hold it for an instant.
LOCK_WAIT = 1.0
#: The heartbeat of a staging whose lock file names no holder that may be alive. It never changes, whatever the mtime of
#: the lock file. A holder that has just begun is named with its first heartbeat.
NO_HOLDER = 1
_FILE = os.O_RDWR | os.O_CREAT
#: How often a control directory is made again that other processes remove before it is opened.
_MAKE_TRIES = 1000
#: Bytes read at a time.
_PIECE = 1 << 20
#: Errnos of unlink(2) and rmdir(2) for files that other processes use: NFS returns EBUSY for an open file.
_IN_USE = frozenset({errno.ENOTEMPTY, errno.EBUSY, errno.EISDIR})
#: Pause between two tries of a lock, in seconds.
_LOCK_PAUSE = 0.01


class Held(Exception):
    """Another process holds the staging; `heartbeat` is the last one of a holder."""

    def __init__(self, heartbeat: int) -> None:
        super().__init__(heartbeat)
        self.heartbeat = heartbeat


class ControlDirectory:
    """An open control directory. `claim` makes or finds it, `attach` only finds it."""

    def __init__(self, parent_fd: int, name: str, fd: int, lock_fd: int) -> None:
        self.parent_fd = parent_fd
        self.name = name
        self.fd = fd
        self._lock_fd = lock_fd
        #: See `retire`.
        self.retired: str | None = None
        #: See `keep_open`.
        self._kept: list[int] = []

    # -- opening and locking

    @classmethod
    @contextmanager
    def claim(cls, parent_fd: int, fork_id: str, wait: float) -> Iterator[Self]:
        """Make or open the fork's staging, and hold it exclusively.

        Raises Held if another process holds it for `wait` seconds, NotOurs (a ForkError) if its path is not the
        worker's own directory, other ForkErrors if none can be made here that can be removed again, and OSError.
        """
        deadline = time.monotonic() + wait
        name = control_name(fork_id)
        proof.refuse_append_only(parent_fd)
        for _ in range(_MAKE_TRIES):
            is_new = False
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent_fd)
                is_new = True
            try:
                staging = cls._open(parent_fd, name)
            except OSError:  # disk full: no later delivery would look for the empty directory
                with suppress(OSError):
                    os.rmdir(name, dir_fd=parent_fd)
                raise
            except NotOurs as error:
                if is_new:  # each delivery would leave one
                    with suppress(OSError):
                        os.rmdir(name, dir_fd=parent_fd)
                    raise proof.unlike_made(parent_fd, error) from None
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
        raise NotOurs(proof.path_of(parent_fd, name), f"other processes removed it {_MAKE_TRIES} times")

    @classmethod
    @contextmanager
    def attach(cls, parent_fd: int, fork_id: str, wait: float, *, alone: bool = False) -> Iterator[Self | None]:
        """Hold the fork's staging, shared or exclusively (`alone`). Yields None if there is none.

        Raises Held if another process holds it for `wait` seconds, NotOurs (a ForkError), and OSError.
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
        """Open the fork's staging without its lock, which a paused process may hold. Yields None if there is none.

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

    def keep_open(self, fd: int) -> None:
        """Keep a descriptor open for as long as the control directory is open in this process, and close it then."""
        self._kept.append(fd)

    def _close(self) -> None:
        for fd in self._kept:
            syscalls.release(fd)
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

    # -- heartbeats

    def with_heartbeat(self) -> AbstractContextManager[None]:
        """Send a heartbeat every `HEARTBEAT_SECONDS` within the context, also during a long system call."""
        return with_heartbeat(self._lock_fd)

    def heartbeat(self) -> int:
        """The last heartbeat of any holder: a number that is only compared with an earlier one. Raises OSError."""
        return syscalls.fstat(self._lock_fd).st_mtime_ns

    def holder_heartbeat(self) -> int:
        """The last heartbeat, or NO_HOLDER if the lock file names no holder that may be alive."""
        return self.heartbeat() if names_living_holder(self.notes()) else NO_HOLDER

    def is_current(self) -> bool:
        """Whether the control directory still has its name; the lock of a removed one protects nothing."""
        try:
            status = os.stat(self.name, dir_fd=self.parent_fd, follow_symlinks=False)
            return os.path.samestat(status, syscalls.fstat(self.fd))
        except FileNotFoundError:
            return False

    def clear(self, names: list[str]) -> bool:
        """Remove the control directory and its files `names`. Returns False if another process still uses a file.

        The lock file is removed last. If another process makes a new one before the directory is removed, it has
        claimed the directory, which then stays. Raises OSError.
        """
        if self._is_claimed_again():
            return True
        try:
            for name in sorted(names, key=LOCK.__eq__):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)
            os.rmdir(self.name, dir_fd=self.parent_fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in _IN_USE:
                return self._is_claimed_again()
            raise
        return True

    def _is_claimed_again(self) -> bool:
        try:
            lock = os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        try:
            return not os.path.samestat(lock, syscalls.fstat(self._lock_fd))
        except FileNotFoundError:  # ours was removed, and this is another one
            return True

    def retire(self) -> str | None:
        """Rename the control directory to the name of a tree, and release its lock. Returns that name, or None.

        No process finds it under its own name after that. FUSE and NFS keep an unlinked file in its directory while it
        is open, so the lock file is closed, and other processes that wait for the lock notice and close it too. If this
        process dies meanwhile, `gc` removes the directory. Returns None if it is gone. Raises OSError.
        """
        if self.retired is not None or not self.is_current():
            return self.retired
        away = f"{self.name}.{secrets.token_hex(4)}"
        try:
            os.rename(self.name, away, src_dir_fd=self.parent_fd, dst_dir_fd=self.parent_fd)
        except FileNotFoundError:
            return None
        self.retired = away
        os.dup2(self.fd, self._lock_fd, inheritable=False)  # `_close` closes this number
        return away

    # -- notes: lines in the lock file, which is open already

    def note(self, lines: bytes) -> None:
        """Append lines to the notes, whole or with an error. Raises OSError."""
        syscalls.append_lines(self._lock_fd, lines)

    def notes(self) -> bytes:
        """All lines of the notes."""
        size = 0 if self.retired is not None else min(syscalls.fstat(self._lock_fd).st_size, proof.most_bytes(LOCK))
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
        """Open the file `name` of the control directory; `create`: for writing, and make it. The caller closes it.

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
        """Replace the file `name` of the control directory atomically; `sync`: and write it to the disk.

        Raises OSError; EFBIG for more bytes than `proof.MOST_BYTES` allows, because no process would read them back.
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
        """Make the file `name` of the control directory. The caller closes it. Raises FileExistsError and OSError."""
        return proof.open_file(self.fd, name, _FILE | os.O_EXCL)

    def _new_file(self, name: str) -> int:
        """Make a file. Replaces one that a process left when it died before its rename."""
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
    """See `sign_of_life`. Returns 0 if the fork has no staging that is the worker's own."""
    try:
        fd = open_directory(parent_fd, control_name(fork_id))
    except (ForkError, OSError):
        return 0
    try:
        return sign_of_life(fd)
    finally:
        os.close(fd)


def sign_of_life(control_fd: int) -> int:
    """When any process last worked in a control directory, in milliseconds since the epoch.

    Every step of a fork makes or renames a file in it, and during a step the holder touches the lock file.
    """
    signs = [syscalls.fstat(control_fd).st_mtime_ns]
    with suppress(FileNotFoundError):
        signs.append(os.stat(LOCK, dir_fd=control_fd, follow_symlinks=False).st_mtime_ns)
    return max(signs) // 1_000_000
