"""Proving the fence between hosts: whether a lock that is held on one host is seen on another.

The fence of a fork is flock(2) (see `staging`). Not every network or FUSE filesystem passes flock to its server: NFS
mounted with `nolock` or `local_lock`, CIFS with `nobrl`, and FUSE filesystems without the operation grant it on each
host alone. Two hosts would then write into one fork.

Each worker keeps a marker file in such a filesystem, holds its lock, and touches it every `PULSE_SECONDS`. A process
that starts tries the locks of the markers that it finds, in shared mode. If a marker is touched while this process
holds its lock, the exclusive lock of the marker's process is not seen here, and the fence does not exist.
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
from tasks.copier.staging.heartbeat import PULSE_SECONDS, names_living_holder, with_heartbeat

#: How long a marker whose lock was granted is watched, in seconds: three times the interval at which it is touched.
_WATCH_SECONDS = 3 * PULSE_SECONDS
#: Time between two looks, in seconds.
_WATCH_PAUSE = 0.25
#: A marker that nobody locks and that was not touched for so long is removed, in seconds.
_DEAD_SECONDS = 60.0
#: Bytes of a marker that are read, and markers that are looked at: what is found may be anybody's.
_MOST_BYTES, _MOST_MARKERS = 1024, 256
#: How often a marker is made anew when another process takes its lock before its maker does.
_TRIES = 8
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Proof:
    """What the markers of other processes show. Hosts are as the markers name them."""

    #: Live processes that hold a lock which was granted here too: the fence does not exist.
    unfenced: tuple[str, ...]
    #: Live processes on other hosts, or on other mounts of this one, whose locks are seen here.
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
    """The marker of another process, open; `mtime` is from the moment after its lock was granted."""

    name: str
    fd: int
    host: str
    view: str
    mtime: int


#: Descriptors of this process's markers. A forked child closes them: they are files of the process that made them.
_open_fds: set[int] = set()


def _close_in_child() -> None:
    for fd in _open_fds:
        release(fd)
    _open_fds.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def marked(directory_fd: int) -> Iterator[Marker]:
    """Keep a marker in the open directory, locked and touched. Raises OSError (EACCES, EROFS, ENOLCK …)."""
    view = _view(directory_fd)
    marker = _make(directory_fd, view)
    try:
        os.write(marker.fd, f"{socket.gethostname()[:255]}\n{view}\n".encode("utf-8", "backslashreplace"))
        with with_heartbeat(marker.fd):
            yield marker
    finally:
        _end(marker)


def prove(marker: Marker) -> Proof:
    """Try the locks of all other markers beside `marker`, and remove those of processes that ended.

    Takes no time where there are none, and up to `_WATCH_SECONDS` where a lock was granted. Raises OSError.
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
            elif other.view == marker.view:  # one kernel and one mount: the process that had the lock has ended
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

    Looks only where markers are made: in filesystems that other hosts may use. What cannot be read is passed over.
    """
    try:
        if not may_be_shared(directory_fd):
            return []
        names = [name for name in os.listdir(directory_fd) if MARKER_NAME.fullmatch(name)]
    except OSError:
        return []
    return [name for name in names if _remove_if_dead(directory_fd, name)]


def is_held_elsewhere(staging: ControlDirectory) -> bool:
    """Whether a process works in a staging whose exclusive lock was granted here: then locks are not shared with it.

    Takes up to 3 s, and no time where no other host can use the filesystem, where the holders that the staging names
    have ended, or where nothing was done for a minute. Raises OSError.
    """
    if not may_be_shared(staging.parent_fd):
        return False
    notes = staging.notes()
    sign = sign_of_life(staging.fd)
    have_ended = b"holder " in notes and not names_living_holder(notes)
    if have_ended or time.time() - sign / 1000 > _DEAD_SECONDS:
        return False
    deadline = time.monotonic() + PULSE_SECONDS + 1
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
    """What sees one set of locks for certain: this kernel, and the mount of this filesystem."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            kernel = file.read(64).strip()
    except (OSError, ValueError):
        kernel = uuid.uuid4().hex  # unknown: another one each time, so nothing is concluded from it
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
        _end(marker)  # a process that looked at it was first
    raise BlockingIOError("the locks of new markers are taken by other processes")


def _end(marker: Marker) -> None:
    if marker.fd in _open_fds:  # not in a child, where it is closed
        _unlink(marker.directory_fd, marker.name)
        _open_fds.discard(marker.fd)
        release(marker.fd)


def _lock(fd: int, kind: int) -> bool:
    """Take the lock of an open file; False where it is refused because of another process's. Raises OSError.

    A marker's own process holds it exclusively, and those that try it share it: so a refusal always means that its
    process holds it, and never that another one tries it at the same time.
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
    """Open the marker `name`, if it is a file such as this process makes here itself: owner, mode, one name.

    Compared with our own marker, since the server may give files another owner (NFS, root_squash) or mode (CIFS).
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
    """Those of the markers, whose locks this process holds, that are touched within `_WATCH_SECONDS`."""
    touched: list[_Other] = []
    waiting = list(watched)
    deadline = time.monotonic() + _WATCH_SECONDS
    while waiting and not touched and time.monotonic() < deadline:
        time.sleep(_WATCH_PAUSE)
        for other in list(waiting):
            now = _mtime(marker.directory_fd, other)
            if now is None:
                waiting.remove(other)  # removed by its process, which proves nothing: it may not have had its lock yet
            elif now != other.mtime:
                touched.append(other)
    return touched


def _mtime(directory_fd: int, other: _Other) -> int | None:
    """When a marker was last touched, in ns. Opened anew: an NFS client asks the server at open (nfs(5), ac/noac)."""
    try:
        fd = os.open(other.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        return status.st_mtime_ns if os.path.samestat(status, os.fstat(other.fd)) else None
    finally:
        release(fd)
