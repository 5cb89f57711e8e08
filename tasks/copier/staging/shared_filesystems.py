"""Checking the fence between hosts: whether a lock that one host holds is visible on another.

The fence of a fork is flock(2) (see `staging`). Not every network or FUSE filesystem passes flock to its server: NFS
mounted with `nolock` or `local_lock`, CIFS with `nobrl`, and FUSE filesystems without the operation grant a lock on
each host separately. Two hosts could then write into one fork.

Each worker keeps a marker file in such a filesystem, holds its lock exclusively, and touches it every
`HEARTBEAT_SECONDS`. A process that starts tries to lock the markers that it finds, in shared mode. If it gets a lock
and the marker is still touched, the lock of the marker's process is not visible here, and there is no fence.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from tasks.copier.kernel.mounts import may_be_shared
from tasks.copier.kernel.syscalls import release
from tasks.copier.source.selection import MARKER_NAME
from tasks.copier.staging.control_directory import ControlDirectory, sign_of_life
from tasks.copier.staging.heartbeat import HEARTBEAT_SECONDS, names_living_holder, with_heartbeat

#: How long a marker whose lock was granted is watched, in seconds: three times the interval at which it is touched.
_WATCH_SECONDS = 3 * HEARTBEAT_SECONDS
#: Seconds between two checks.
_WATCH_PAUSE = 0.25
#: A marker that is not locked and was not touched for this many seconds is removed.
_DEAD_SECONDS = 60.0
#: Bytes of a marker that are read, and markers that are checked at most: other users may have made them.
_MOST_BYTES, _MOST_MARKERS = 1024, 256
#: How often a marker is made again when another process locks it before its maker does.
_TRIES = 8
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Proof:
    """What the markers of other processes show: host names, as the markers give them."""

    #: Hosts of live processes whose exclusive locks were granted here too: there is no fence.
    unfenced: tuple[str, ...]
    #: Hosts of live processes, on other hosts or other mounts of this one, whose locks are visible here.
    fenced: tuple[str, ...]


@dataclass(frozen=True)
class Marker:
    """A marker of this process: an open, locked file in an open directory."""

    directory_fd: int
    name: str
    fd: int
    view: str


@dataclass(frozen=True)
class _Other:
    """The open marker of another process; `mtime` was read after its lock was granted."""

    name: str
    fd: int
    host: str
    view: str
    mtime: int


#: Descriptors of this process's markers. A forked child closes them: its parent holds the locks.
_open_fds: set[int] = set()


def _close_in_child() -> None:
    for fd in _open_fds:
        release(fd)
    _open_fds.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def marked(directory_fd: int) -> Iterator[Marker]:
    """Keep a marker in the open directory within the context. Raises OSError (EACCES, EROFS, ENOLCK …)."""
    view = _view(directory_fd)
    marker = _make(directory_fd, view)
    try:
        os.write(marker.fd, f"{socket.gethostname()[:255]}\n{view}\n".encode("utf-8", "backslashreplace"))
        with with_heartbeat(marker.fd):
            yield marker
    finally:
        _end(marker)


def prove(marker: Marker) -> Proof:
    """Try to lock all other markers beside `marker`, and remove those of processes that ended.

    Takes up to `_WATCH_SECONDS` if a lock was granted. Raises OSError.
    """
    fenced: set[str] = set()
    with ExitStack() as opened:
        watched: list[_Other] = []
        now = os.fstat(marker.fd).st_mtime_ns
        for name in _others(marker):
            other = _open_other(marker, name, opened)
            if other is None:
                continue
            if not _lock(other.fd, fcntl.LOCK_SH):
                if other.view not in ("", marker.view) and abs(now - other.mtime) < _WATCH_SECONDS * 1e9:
                    fenced.add(other.host)
            elif other.view == marker.view:  # same kernel and mount: the process that held the lock has ended
                _unlink(marker.directory_fd, name)
            else:
                watched.append(other)
        unfenced = _touched(marker, watched)
        for other in watched:
            if other not in unfenced and now - other.mtime > _DEAD_SECONDS * 1e9:
                _unlink(marker.directory_fd, other.name)
    return Proof(tuple(sorted({other.host for other in unfenced})), tuple(sorted(fenced)))


def remove_dead_markers(directory_fd: int) -> list[str]:
    """Remove the markers of processes that ended some time ago; returns their names.

    Only filesystems that other hosts may use have markers. Markers that cannot be read are skipped.
    """
    try:
        if not may_be_shared(directory_fd):
            return []
        names = [name for name in os.listdir(directory_fd) if MARKER_NAME.fullmatch(name)]
    except OSError:
        return []
    return [name for name in names if _remove_if_dead(directory_fd, name)]


def is_held_elsewhere(staging: ControlDirectory) -> bool:
    """Whether a process works in a staging whose exclusive lock was granted here: its locks are not visible here.

    Takes up to 3 s; no time if no other host can use the filesystem, if the named holders have ended, or if nothing was
    done in the staging for a minute. Raises OSError.
    """
    if not may_be_shared(staging.parent_fd):
        return False
    notes = staging.notes()
    sign = sign_of_life(staging.fd)
    have_ended = b"holder " in notes and not names_living_holder(notes)
    if have_ended or time.time() - sign / 1000 > _DEAD_SECONDS:
        return False
    deadline = time.monotonic() + HEARTBEAT_SECONDS + 1
    while time.monotonic() < deadline:
        time.sleep(_WATCH_PAUSE)
        if sign_of_life(staging.fd) != sign:
            return True
    return False


def _remove_if_dead(directory_fd: int, name: str) -> bool:
    try:
        fd = os.open(name, _OPEN, dir_fd=directory_fd)
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
        if not is_ours or not _lock(fd, fcntl.LOCK_SH) or time.time() - os.fstat(fd).st_mtime < _DEAD_SECONDS:
            return False
        os.unlink(name, dir_fd=directory_fd)
        return True
    except OSError:
        return False
    finally:
        release(fd)


def _view(directory_fd: int) -> str:
    """Names this kernel and the mount of this filesystem: processes with the same view see each other's locks."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            kernel = file.read(64).strip()
    except (OSError, ValueError):
        kernel = uuid.uuid4().hex  # unknown: a new value each time equals no other
    return f"{kernel}:{os.fstat(directory_fd).st_dev}"


def _make(directory_fd: int, view: str) -> Marker:
    for _ in range(_TRIES):
        name = f".forkvm-worker-{uuid.uuid4().hex[:16]}"
        marker = Marker(
            directory_fd, name, os.open(name, _OPEN | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory_fd), view
        )
        _open_fds.add(marker.fd)
        try:
            if _lock(marker.fd, fcntl.LOCK_EX):
                return marker
        except BaseException:
            _end(marker)
            raise
        _end(marker)  # another process locked it first
    raise BlockingIOError(f"other processes locked {_TRIES} new markers first")


def _end(marker: Marker) -> None:
    if marker.fd in _open_fds:  # not in a child, where it is closed
        _unlink(marker.directory_fd, marker.name)
        _open_fds.discard(marker.fd)
        release(marker.fd)


def _lock(fd: int, kind: int) -> bool:
    """Lock an open file. Returns False if another process holds the lock. Raises OSError.

    A marker's own process holds it exclusively, and others try it in shared mode. So False means that its own process
    holds it, never that two processes try it at the same time.
    """
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlink(directory_fd: int, name: str) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=directory_fd)


def _others(marker: Marker) -> list[str]:
    """The names of the other markers in the directory."""
    names = [name for name in os.listdir(marker.directory_fd) if MARKER_NAME.fullmatch(name) and name != marker.name]
    return sorted(names)[:_MOST_MARKERS]


def _open_other(marker: Marker, name: str, opened: ExitStack) -> _Other | None:
    """Open the marker `name` if it has the owner, mode and link count of a marker. Returns None otherwise.

    It is compared with this process's marker, because the server may change the owner (NFS, root_squash) or the mode
    (CIFS).
    """
    try:
        fd = os.open(name, _OPEN, dir_fd=marker.directory_fd)
    except OSError:  # removed meanwhile, or not ours
        return None
    opened.callback(release, fd)
    ours, theirs = os.fstat(marker.fd), os.fstat(fd)
    if (theirs.st_mode, theirs.st_uid, theirs.st_nlink) != (ours.st_mode, ours.st_uid, 1):
        return None
    lines = os.pread(fd, _MOST_BYTES, 0).decode("utf-8", "replace").split("\n")
    host, view = lines[:2] if len(lines) > 2 else ("", "")
    return _Other(name, fd, host[:255] or "an unknown host", view, theirs.st_mtime_ns)


def _touched(marker: Marker, watched: list[_Other]) -> list[_Other]:
    """The markers in `watched` that are touched within `_WATCH_SECONDS` although this process holds their locks."""
    touched: list[_Other] = []
    waiting = list(watched)
    deadline = time.monotonic() + _WATCH_SECONDS
    while waiting and not touched and time.monotonic() < deadline:
        time.sleep(_WATCH_PAUSE)
        for other in list(waiting):
            now = _mtime(marker.directory_fd, other)
            if now is None:
                waiting.remove(other)  # removed by its process, which may not have locked it yet: proves nothing
            elif now != other.mtime:
                touched.append(other)
    return touched


def _mtime(directory_fd: int, other: _Other) -> int | None:
    """When a marker was last touched, in ns. Opened again: an NFS client asks the server at open (nfs(5), ac/noac)."""
    try:
        fd = os.open(other.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        return status.st_mtime_ns if os.path.samestat(status, os.fstat(other.fd)) else None
    finally:
        release(fd)
