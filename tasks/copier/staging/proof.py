"""Proving that staging is this worker's own, before it is trusted, changed or removed.

A user who may write in a destination's parent can make a directory with the name of a control directory, or move one
there. So a name proves nothing. A control directory belongs to the process's effective user, has mode 0700, and is on
its parent's filesystem. A file in it is a regular file of that user, with one name and a limited size. Both are opened
once, checked by descriptor, and then used by descriptor. Opening follows no symlink and waits for no FIFO (open(2):
O_NOFOLLOW, O_NONBLOCK).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress

from tasks.copier.clone.attributes import drop_inherited_acls
from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel import syscalls

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PRIVATE = 0o700
#: The mode of the files in it.
_OWNER_USES = 0o600
_OTHERS = 0o077
#: Errnos of open(2) with O_DIRECTORY for a symlink and for what is not a directory.
_NOT_DIRECTORY = frozenset({errno.ENOTDIR, errno.ELOOP})
#: Errnos of open(2) for what is not a regular file: a symlink, a directory, a socket or device.
_NOT_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV})

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
#: The largest size in bytes of each kind of file in a control directory, by the first word of its name.
MOST_BYTES = {
    # One line for each tree (a campaign may have a million) and one for each process with a heartbeat.
    "lock": 256 * _MIB,
    # The request, whose lists may have 10,000 entries each, and the places of at most 10,000 chunks.
    "journal": 64 * _MIB,
    # About 150 bytes an entry. It is read block by block, and each block has its own limit.
    "manifest": 1 << 40,
    "closing": 1 << 40,
    # One number.
    "chunk": 4 * _KIB,
    # FileResults of one chunk, compressed: about 20 bytes an entry.
    "report": _GIB,
    # A number of 8 bytes for each of at most 100,000 chunks.
    "copied": _MIB,
    # Empty.
    "stop": 4 * _KIB,
    # FileResults of the forks of one batch.
    "batch": _GIB,
    # A million paths of at most 4 KiB, and their offsets.
    "destinations": 5 * _GIB,
    # Sums and at most 100 failures, each with three paths of at most 4 KiB that JSON may write six times as long.
    "settled": 16 * _MIB,
    # Notes about the forks that ended in one minute; see `tasks.store.recent_forks.files`.
    "ended": 16 * _MIB,
}


class NotOurs(ForkError):
    """A staging path is not this worker's own, or has changed since the worker made it. It is not touched."""

    def __init__(self, path: str, what: str) -> None:
        self.what = what
        super().__init__(Code.IO_ERROR, f"not usable as staging: {what}; remove it, and send the fork again", path)


def refuse_append_only(parent_fd: int) -> None:
    """Raise ForkError permission_denied if no entry of the directory can be renamed or removed (chattr(1), `a`)."""
    with suppress(OSError):
        if syscalls.attributes(parent_fd, ".") & syscalls.STATX_ATTR_APPEND:
            message = (
                "the destination's directory is append-only, so that a fork could be neither published nor removed"
            )
            raise ForkError(Code.PERMISSION_DENIED, f"{message}; use chattr -a", path_of(parent_fd), errno.EPERM)


def unlike_made(parent_fd: int, refused: NotOurs) -> ForkError:
    """The error for a directory that this process has just made and that is refused as another's."""
    message = f"the filesystem shows a directory that forkvm has just made as another's: {refused.what}"
    return ForkError(Code.IO_ERROR, f"{message}; choose a destination that keeps owners", path_of(parent_fd))


def path_of(dir_fd: int, name: str = "") -> str:
    """The path of an open directory, or of `name` in it, for messages; the name alone without /proc."""
    try:
        path = os.readlink(f"/proc/self/fd/{dir_fd}")
    except OSError:
        return name
    return os.path.join(path, name) if name else path


def open_directory(parent_fd: int, name: str) -> int:
    """Open the directory `name` of `parent_fd` and prove that it is this user's alone. The caller closes it.

    If its maker died before it set the final mode, the mode is set here. Raises NotOurs, FileNotFoundError, OSError.
    """
    fd, _ = open_with_status(parent_fd, name)
    return fd


def open_with_status(parent_fd: int, name: str) -> tuple[int, os.stat_result]:
    """As `open_directory`. Also returns the status of the directory before a repair of its mode."""
    fd = _open_directory(parent_fd, name)
    try:
        return fd, _prove_directory(fd, parent_fd, name)
    except BaseException:
        os.close(fd)
        raise


def open_plain_directory(parent_fd: int, name: str) -> int:
    """Open a directory whose identity the caller checks. Raises NotOurs, FileNotFoundError, and OSError."""
    return _open_directory(parent_fd, name)


def is_private(parent_fd: int, name: str) -> bool:
    """Whether `name` is a directory that `open_directory` would accept unchanged."""
    status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    is_ours = status.st_uid == os.geteuid() and status.st_dev == os.fstat(parent_fd).st_dev
    return is_ours and stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == _PRIVATE


def _open_directory(parent_fd: int, name: str) -> int:
    try:
        try:
            return os.open(name, DIRECTORY, dir_fd=parent_fd)
        except PermissionError:
            if not _make_enterable(parent_fd, name):
                raise
            return os.open(name, DIRECTORY, dir_fd=parent_fd)
    except OSError as error:
        if error.errno in _NOT_DIRECTORY:
            raise NotOurs(path_of(parent_fd, name), _kind_of(parent_fd, name)) from None
        if error.errno == errno.EACCES and os.access(name, os.F_OK, dir_fd=parent_fd, follow_symlinks=False):
            raise NotOurs(path_of(parent_fd, name), "this process has no permission to open it") from None
        raise


def _make_enterable(parent_fd: int, name: str) -> bool:
    """Give a directory of this user the mode that a umask or default ACL took. Returns False if it is another's."""
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS:
            return False
        os.chmod(f"/proc/self/fd/{fd}", _PRIVATE)  # fchmod takes no O_PATH descriptor
        return True
    except FileNotFoundError:  # without /proc
        return False
    finally:
        os.close(fd)


def _prove_directory(fd: int, parent_fd: int, name: str) -> os.stat_result:
    status = syscalls.fstat(fd)
    user, mode = os.geteuid(), stat.S_IMODE(status.st_mode)
    if status.st_uid != user:
        what = f"it belongs to the user {status.st_uid}, and this process runs as the user {user}"
        raise NotOurs(path_of(parent_fd, name), what)
    if status.st_dev != os.fstat(parent_fd).st_dev:
        raise NotOurs(path_of(parent_fd, name), "it is on another filesystem than its parent directory")
    if mode == _PRIVATE:
        return status
    if mode & _OTHERS and _keeps_modes(fd):
        raise NotOurs(path_of(parent_fd, name), f"other users may enter it: its mode is {mode:04o} and not 0700")
    drop_inherited_acls(fd)
    try:
        os.fchmod(fd, _PRIVATE)  # a umask removes bits, and a set-gid parent adds some
    except PermissionError:
        if not mode & _OTHERS:  # others: a filesystem without modes, which may refuse to change them
            raise
    return status


def _keeps_modes(fd: int) -> bool:
    """Whether the filesystem keeps the modes of files. If a mount option sets them, 0700 cannot be required."""
    name = f"mode-{secrets.token_hex(8)}"
    probe = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o600, dir_fd=fd)
    try:
        return not os.fstat(probe).st_mode & _OTHERS
    finally:
        os.close(probe)
        with suppress(OSError):
            os.unlink(name, dir_fd=fd)


def open_file(dir_fd: int, name: str, flags: int) -> int:
    """Open the file `name` of the proved directory `dir_fd` and prove it. The caller closes the descriptor.

    `flags` as for open(2), without O_TRUNC, which would truncate a file before it is proved. Raises NotOurs,
    FileNotFoundError, and OSError.
    """
    try:
        fd = os.open(name, flags | _SAFE, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _NOT_FILE:
            raise NotOurs(path_of(dir_fd, name), _kind_of(dir_fd, name)) from None
        raise
    try:
        _prove_file(fd, dir_fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _prove_file(fd: int, dir_fd: int, name: str) -> None:
    status = syscalls.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotOurs(path_of(dir_fd, name), _kind_of(dir_fd, name))
    if status.st_uid != os.geteuid():
        what = f"it belongs to the user {status.st_uid}, and this process runs as the user {os.geteuid()}"
        raise NotOurs(path_of(dir_fd, name), what)
    if status.st_nlink > 1:  # 0: it was replaced or removed after it was opened
        raise NotOurs(path_of(dir_fd, name), f"it has {status.st_nlink} names (hard links)")
    if status.st_size > most_bytes(name):
        what = f"it has {status.st_size} bytes; the limit is {most_bytes(name)}"
        raise NotOurs(path_of(dir_fd, name), what)
    if status.st_mode & _OWNER_USES != _OWNER_USES:  # a umask took it from a new file, which will be opened again
        os.fchmod(fd, _OWNER_USES)


def most_bytes(name: str) -> int:
    """The largest size of the file `name` of a control directory, in bytes."""
    return MOST_BYTES.get(name.partition("-")[0].removesuffix(".new"), 0)


def _kind_of(dir_fd: int, name: str) -> str:
    """The type of `name`, in words."""
    with suppress(OSError):
        mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        for is_kind, word in _WORDS:
            if is_kind(mode):
                return f"it is a {word}"
    return "its type is not one that forkvm makes"


_WORDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISLNK, "symlink"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISBLK, "block device"),
    (stat.S_ISCHR, "character device"),
)
