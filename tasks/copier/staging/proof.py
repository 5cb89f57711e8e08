"""Proving that staging is this worker's own, before anything in it is believed, changed or removed.

Who may write in a destination's parent can make a directory with the name of a control directory, or move one there.
So a name proves nothing. A control directory is one that belongs to the process's effective user, that nobody else can
enter (mode 0700), and that lies on its parent's filesystem. A file in it is a regular file of that user with one name
and of a bounded size. Both are opened once, checked by descriptor, and used by descriptor from then on: neither a
symlink is followed nor a FIFO waited for (open(2): O_NOFOLLOW, O_NONBLOCK).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress

from tasks.copier.clone.attributes import drop_inherited_acls
from tasks.copier.errors import Code, ForkError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PRIVATE = 0o700
#: The mode of the files in it.
_OWNER_USES = 0o600
_OTHERS = 0o077
#: What open(2) answers for something else than a directory, and for a symlink.
_OTHER_KIND = frozenset({errno.ENOTDIR, errno.ELOOP})
#: What open(2) answers for something else than a regular file: a symlink, a directory, a socket or device.
_OTHER_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV})

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
#: The largest size of each kind of file in a control directory, in bytes, by the word that its name begins with.
MOST_BYTES = {
    # A line for each tree, of which a campaign has a million, and one for each process that holds it for seconds.
    "lock": 256 * _MIB,
    # The request, whose lists may have 10,000 entries each, and the places of at most 10,000 chunks.
    "journal": 64 * _MIB,
    # About 150 bytes an entry. It is read block by block, and each block has a bound of its own.
    "manifest": 1 << 40,
    "closing": 1 << 40,
    # One number.
    "chunk": 4 * _KIB,
    # FileResults of one chunk, compressed: about 20 bytes an entry.
    "report": _GIB,
    # Nothing.
    "stop": 4 * _KIB,
    # FileResults of the forks of one batch.
    "batch": _GIB,
    # A million paths of at most 4 KiB, and their offsets.
    "destinations": 5 * _GIB,
    # Sums and at most 100 failures, each with three paths of at most 4 KiB that JSON may write six times as long.
    "settled": 16 * _MIB,
    # Notes of one minute about forks that ended; see `tasks.store.recent_forks.files`.
    "ended": 16 * _MIB,
}


class NotOurs(ForkError):
    """What stands at a staging path is not this worker's own, or not what the worker left: it is left as it is."""

    def __init__(self, path: str, what: str) -> None:
        self.what = what
        super().__init__(Code.IO_ERROR, f"not usable as staging: {what}; remove it, and send the fork again", path)


def path_of(dir_fd: int, name: str = "") -> str:
    """The path of an open directory, or of `name` in it, for messages; the name alone without /proc."""
    try:
        path = os.readlink(f"/proc/self/fd/{dir_fd}")
    except OSError:
        return name
    return os.path.join(path, name) if name else path


def open_directory(parent_fd: int, name: str) -> int:
    """Open the directory `name` of `parent_fd` and prove that it is ours alone; the caller closes the descriptor.

    A directory that its maker died in before it had its final mode gets it here. Raises NotOurs, FileNotFoundError, and
    OSError.
    """
    fd = _open_directory(parent_fd, name)
    try:
        _prove_directory(fd, parent_fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_plain_directory(parent_fd: int, name: str) -> int:
    """Open a directory whose identity the caller compares then. Raises NotOurs, FileNotFoundError, and OSError."""
    return _open_directory(parent_fd, name)


def is_private(parent_fd: int, name: str) -> bool:
    """Whether `name` is a directory that `open_directory` would take as it is."""
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
        if error.errno in _OTHER_KIND:
            raise NotOurs(path_of(parent_fd, name), _kind_of(parent_fd, name)) from None
        if error.errno == errno.EACCES and os.access(name, os.F_OK, dir_fd=parent_fd, follow_symlinks=False):
            raise NotOurs(path_of(parent_fd, name), "this process may not open it") from None
        raise


def _make_enterable(parent_fd: int, name: str) -> bool:
    """Give a directory of ours the mode that a umask or a default ACL kept from it; whether it is one of ours."""
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


def _prove_directory(fd: int, parent_fd: int, name: str) -> None:
    status = os.fstat(fd)
    user, mode = os.geteuid(), stat.S_IMODE(status.st_mode)
    if status.st_uid != user:
        what = f"it belongs to the user {status.st_uid}, and this process runs as the user {user}"
        raise NotOurs(path_of(parent_fd, name), what)
    if status.st_dev != os.fstat(parent_fd).st_dev:
        raise NotOurs(path_of(parent_fd, name), "it is on another filesystem than the directory that holds it")
    if mode == _PRIVATE:
        return
    if mode & _OTHERS and _keeps_modes(fd):
        raise NotOurs(path_of(parent_fd, name), f"others may enter it: its mode is {mode:04o} and not 0700")
    drop_inherited_acls(fd)
    try:
        os.fchmod(fd, _PRIVATE)  # a umask takes bits, and a set-gid parent adds its own
    except PermissionError:
        if not mode & _OTHERS:  # else it is a filesystem without modes, which may refuse to change them
            raise


def _keeps_modes(fd: int) -> bool:
    """Whether the filesystem keeps the modes of files. Where a mount option decides them, 0700 cannot be asked for."""
    name = f"mode-{secrets.token_hex(8)}"
    probe = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o600, dir_fd=fd)
    try:
        return not os.fstat(probe).st_mode & _OTHERS
    finally:
        os.close(probe)
        with suppress(OSError):
            os.unlink(name, dir_fd=fd)


def open_file(dir_fd: int, name: str, flags: int) -> int:
    """Open the file `name` of the proved directory `dir_fd` and prove it; the caller closes the descriptor.

    `flags` as for open(2); O_TRUNC is not for it, since what is truncated is not proved yet. Raises NotOurs,
    FileNotFoundError, and OSError.
    """
    try:
        fd = os.open(name, flags | _SAFE, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _OTHER_FILE:
            raise NotOurs(path_of(dir_fd, name), _kind_of(dir_fd, name)) from None
        raise
    try:
        _prove_file(fd, dir_fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _prove_file(fd: int, dir_fd: int, name: str) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotOurs(path_of(dir_fd, name), _kind_of(dir_fd, name))
    if status.st_uid != os.geteuid():
        what = f"it belongs to the user {status.st_uid}, and this process runs as the user {os.geteuid()}"
        raise NotOurs(path_of(dir_fd, name), what)
    if status.st_nlink > 1:  # none: it was replaced or removed since it was opened
        raise NotOurs(path_of(dir_fd, name), f"it has {status.st_nlink} names")
    if status.st_size > most_bytes(name):
        what = f"it has {status.st_size} bytes, and no such file has more than {most_bytes(name)}"
        raise NotOurs(path_of(dir_fd, name), what)
    if status.st_mode & _OWNER_USES != _OWNER_USES:  # a umask took it from a new file, which is opened again later
        os.fchmod(fd, _OWNER_USES)


def most_bytes(name: str) -> int:
    """The largest size of the file `name` of a control directory, in bytes."""
    return MOST_BYTES.get(name.partition("-")[0].removesuffix(".new"), 0)


def _kind_of(dir_fd: int, name: str) -> str:
    """What stands there, in words."""
    with suppress(OSError):
        mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        for is_kind, word in _WORDS:
            if is_kind(mode):
                return f"it is a {word}"
    return "it is something else than forkvm makes there"


_WORDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISLNK, "symlink"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISBLK, "block device"),
    (stat.S_ISCHR, "character device"),
)
