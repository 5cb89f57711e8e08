"""Opens, identifies and removes directories below an open one, at any depth.

Nothing here follows a symlink or recurses: a tree may be thousands of levels deep, with paths longer than PATH_MAX.

A removal does not enter mounts (RESOLVE_NO_XDEV of openat2(2); a btrfs subvolume is not a mount), and it ends after a
limited time: on FUSE and NFS, an open file that is unlinked gets another name in the same directory until its last
close (.fuse_hidden…, .nfs…), so rmdir(2) may fail with ENOTEMPTY each time.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Sequence

from tasks.copier.kernel import syscalls

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
#: The longest relative path in one call, in bytes. It is below PATH_MAX.
_STRETCH = 4000

#: How long the removal of a directory that does not become empty is retried, in seconds. A file that was open
#: disappears some milliseconds after its last close.
_PATIENCE_SECONDS = 1.0
#: Pause between two attempts, in seconds.
_PAUSE_SECONDS = 0.01
#: Errnos that pass when another process closes or removes a file. NFS fails with EBUSY for a .nfs… file.
_PASSING = frozenset({errno.ENOTEMPTY, errno.EBUSY})

#: The inode of the root of every btrfs subvolume, and of the empty directory that replaces one in a snapshot.
SUBVOLUME_INODE, NESTED_SUBVOLUME_INODE = 256, 2


def open_below(dir_fd: int, path: str, *, cross_mounts: bool = True) -> int:
    """Open the directory at the relative `path` ("" opens `dir_fd` again). The caller closes the descriptor.

    Raises OSError: ENOENT; ENOTDIR; ELOOP for a symlink; EXDEV for a path that leaves `dir_fd`, or that enters a mount
    although `cross_mounts` is false.
    """
    resolve = _BENEATH if cross_mounts else _BENEATH | syscalls.RESOLVE_NO_XDEV
    if len(path) * 4 < _STRETCH or len(os.fsencode(path)) < _STRETCH:
        return _open(dir_fd, path or ".", resolve)
    here = os.dup(dir_fd)
    for stretch in _stretches(path):
        try:
            below = _open(here, stretch, resolve)
        finally:
            os.close(here)
        here = below
    return here


def _open(dir_fd: int, path: str, resolve: int) -> int:
    """Open a part of a path, with O_NOATIME where the process is permitted to use it."""
    try:
        return syscalls.openat2(dir_fd, path, _DIRECTORY | os.O_NOATIME, resolve)
    except OSError as error:
        if error.errno != errno.EPERM:  # open(2): O_NOATIME needs ownership or privilege
            raise
        return syscalls.openat2(dir_fd, path, _DIRECTORY, resolve)


def _stretches(path: str) -> list[str]:
    stretches, length = [""], 0
    for part in path.split("/"):
        length += len(os.fsencode(part)) + 1
        if length >= _STRETCH:
            stretches.append(part)
            length = len(os.fsencode(part)) + 1
        else:
            stretches[-1] = f"{stretches[-1]}/{part}" if stretches[-1] else part
    return stretches


def is_subvolume(fd: int) -> bool:
    """Whether the open directory `fd` is the root of a btrfs subvolume."""
    return _is_subvolume(fd, os.fstat(fd))


def _is_subvolume(fd: int, status: os.stat_result) -> bool:
    return status.st_ino == SUBVOLUME_INODE and syscalls.filesystem_type(fd) == syscalls.BTRFS


def identity(fd: int, status: os.stat_result | None = None) -> int:
    """A number that is unique on the filesystem of `fd`, and the same on every host and after a reboot.

    It is the inode, or the UUID of a btrfs subvolume, because the roots of all subvolumes have the same inode. `status`
    is that of `fd`, if the caller has it.
    """
    status = status or os.fstat(fd)
    return int.from_bytes(syscalls.subvolume_uuid(fd), "big") if _is_subvolume(fd, status) else status.st_ino


def identity_of(dir_fd: int, name: str) -> int | None:
    """The `identity` of the entry `name` of `dir_fd`, or None if there is none. Raises OSError."""
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if status.st_ino != SUBVOLUME_INODE or not stat.S_ISDIR(status.st_mode):
            return status.st_ino
        fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    try:
        return identity(fd)
    finally:
        os.close(fd)


def remove(dir_fd: int, name: str) -> None:
    """Remove the directory `name` of `dir_fd` with everything in it. A missing directory is not an error.

    Removes as much as possible, then raises the first OSError, whose filename is the path below `dir_fd`: EXDEV for a
    mount point, ENOTEMPTY if a process keeps files open there or creates some.
    """
    try:
        top = open_below(dir_fd, name, cross_mounts=False)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _named(error, name) from None
    try:
        if is_subvolume(top) and _destroyed(dir_fd, top):
            return
        _remove_opened(dir_fd, name, top)
    finally:
        os.close(top)


def _remove_opened(dir_fd: int, name: str, top: int) -> None:
    deadline: float | None = None
    while True:
        error = _empty(top, name)
        try:
            if error is None:
                os.rmdir(name, dir_fd=dir_fd)
                return
        except FileNotFoundError:
            return
        except OSError as failure:
            error = _named(failure, name)
        now = time.monotonic()
        deadline = deadline or now + _PATIENCE_SECONDS
        if error.errno not in _PASSING or now >= deadline:
            raise error
        time.sleep(_PAUSE_SECONDS)


def _destroyed(dir_fd: int, top: int) -> bool:
    """Remove a btrfs subvolume in one step. Returns whether that succeeded."""
    try:
        syscalls.destroy_opened_subvolume(dir_fd, top)
    except OSError:  # not permitted, or it contains another subvolume: empty it; rmdir(2) removes it since Linux 4.18
        return False
    return True


def _empty(top: int, path: str) -> OSError | None:
    """Remove everything below the open directory `top`. Returns the first error, with its path, or None."""
    errors: list[OSError] = []
    directories = [""]
    for directory in directories:  # grows while it is read: breadth first
        try:
            fd = _open_to_empty(top, directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            errors.append(_named(error, _join(path, directory)))
            continue
        try:
            directories += [_join(directory, name) for name in _unlink_files(fd, _join(path, directory), errors)]
        finally:
            os.close(fd)
    for directory in reversed(directories[1:]):
        try:
            _remove_empty(top, directory)
        except OSError as error:
            if error.errno not in (
                errno.ENOENT,
                errno.ENOTEMPTY,
            ):  # what is left in it has its own error, or is new
                errors.append(_named(error, _join(path, directory)))
    return errors[0] if errors else None


def _remove_empty(top: int, directory: str) -> None:
    parent, _, name = directory.rpartition("/")
    fd = open_below(top, parent, cross_mounts=False)
    try:
        os.rmdir(name, dir_fd=fd)
    finally:
        os.close(fd)


def _open_to_empty(top: int, directory: str) -> int:
    """Open a directory below `top`. If it is not readable, but owned by this process, make it readable first."""
    try:
        return open_below(top, directory, cross_mounts=False)
    except PermissionError:
        parent, _, name = directory.rpartition("/")
        parent_fd = open_below(top, parent, cross_mounts=False)
        try:
            _make_enterable(parent_fd, name)
        finally:
            os.close(parent_fd)
        return open_below(top, directory, cross_mounts=False)


def _make_enterable(parent_fd: int, name: str) -> None:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    fd = syscalls.openat2(parent_fd, name, flags, _BENEATH | syscalls.RESOLVE_NO_XDEV)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)  # fchmod(2) does not accept an O_PATH descriptor
    finally:
        os.close(fd)


def sync(fds: Sequence[int]) -> None:
    """Write the trees below these directories to the disk. They are on one filesystem. Raises OSError.

    syncfs(2) does that, except on FUSE: the kernel passes it on to virtiofs only (fs/fuse/inode.c, fuse_sync_fs). An
    fsync of a file is always passed on.
    """
    syscalls.syncfs(fds[0])
    if syscalls.filesystem_type(fds[0]) == syscalls.FUSE:
        for fd in fds:
            for _, _, names, directory_fd in os.fwalk(".", dir_fd=fd):
                for name in names:
                    _sync_file(name, directory_fd)
                os.fsync(directory_fd)


def _sync_file(name: str, directory_fd: int) -> None:
    if stat.S_ISREG(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _unlink_files(fd: int, path: str, errors: list[OSError]) -> list[str]:
    """Unlink everything but directories in `fd`. Adds failures to `errors`. Returns the names of the directories."""
    try:
        with os.scandir(fd) as entries:
            listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        if listed and os.fstat(fd).st_mode & 0o300 != 0o300:
            os.fchmod(fd, 0o700)  # without privileges, a read-only directory cannot be emptied
    except OSError as error:
        errors.append(_named(error, path))
        return []
    for name, is_directory in listed:
        if not is_directory:
            try:
                os.unlink(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                errors.append(_named(error, _join(path, name)))
    return [name for name, is_directory in listed if is_directory]


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory and name else directory or name


def _named(error: OSError, path: str) -> OSError:
    """The same error with its path, and with a clearer text than the kernel's where that is ambiguous."""
    if error.errno == errno.EXDEV:
        return OSError(errno.EXDEV, "a filesystem is mounted there; unmount it", path)
    if error.errno == errno.ENOTEMPTY:
        message = "a process keeps files in it open or creates files in it; stop that process"
        return OSError(errno.ENOTEMPTY, message, path)
    return OSError(error.errno, error.strerror, path)
