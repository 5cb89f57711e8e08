"""Directories below an opened one: opening them by relative path, telling them apart, removing them, at any depth.

Nothing here follows a symlink or recurses: a tree may be thousands of levels deep, and its paths longer than
PATH_MAX.
"""

from __future__ import annotations

import errno
import os
import stat

from tasks.copier.kernel import syscalls

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
#: Longest relative path handed to the kernel in one call, in bytes; below PATH_MAX.
_STRETCH = 4000

#: Inode of the root of every btrfs subvolume, and of the empty directory that a snapshot has in place of one.
SUBVOLUME_INODE, NESTED_SUBVOLUME_INODE = 256, 2


def open_below(dir_fd: int, path: str) -> int:
    """Open the directory at the relative `path` ("" is `dir_fd` itself, opened anew); the caller closes it.

    Raises OSError: ENOENT, ENOTDIR; ELOOP for a symlink and EXDEV for a way out.
    """
    if len(path) * 4 < _STRETCH or len(os.fsencode(path)) < _STRETCH:
        return _open(dir_fd, path or ".")
    here = os.dup(dir_fd)
    for stretch in _stretches(path):
        try:
            below = _open(here, stretch)
        finally:
            os.close(here)
        here = below
    return here


def _open(dir_fd: int, path: str) -> int:
    """Open one stretch of a way, so that a look into the directory is not written down as its atime where possible."""
    try:
        return syscalls.openat2(dir_fd, path, _DIRECTORY | os.O_NOATIME, _BENEATH)
    except OSError as error:
        if error.errno != errno.EPERM:  # open(2): O_NOATIME is for the owner and the privileged
            raise
        return syscalls.openat2(dir_fd, path, _DIRECTORY, _BENEATH)


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
    return os.fstat(fd).st_ino == SUBVOLUME_INODE and syscalls.filesystem_type(fd) == syscalls.BTRFS


def identity(fd: int) -> int:
    """A number that no other directory on the filesystem of `fd` has, the same on every host and after a reboot.

    The inode; of a btrfs subvolume its UUID, since the roots of all have one inode.
    """
    return int.from_bytes(syscalls.subvolume_uuid(fd), "big") if is_subvolume(fd) else os.fstat(fd).st_ino


def identity_of(dir_fd: int, name: str) -> int | None:
    """As `identity`, of what stands at `name` in `dir_fd`; None where nothing does."""
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
    """Remove the directory `name` of `dir_fd` with all below it; gone already is fine.

    A btrfs subvolume goes in one step where that is allowed, else as a directory does (rmdir takes an empty one since
    Linux 4.18). Someone may still be adding to it (a chunk that has not yet seen that its fork was given up): what
    appears meanwhile is removed too.
    """
    while True:
        try:
            top = os.open(name, _DIRECTORY, dir_fd=dir_fd)
        except FileNotFoundError:
            return
        try:
            if is_subvolume(top) and _destroyed(dir_fd, name):
                return
            _empty(top)
        finally:
            os.close(top)
        try:
            os.rmdir(name, dir_fd=dir_fd)
            return
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno != errno.ENOTEMPTY:
                raise


def _destroyed(dir_fd: int, name: str) -> bool:
    try:
        syscalls.destroy_subvolume(dir_fd, name)
    except OSError:  # not allowed, or another subvolume in it: what keeps it from going shows when it is emptied
        return False
    return True


def _empty(top: int) -> None:
    directories = [""]
    for directory in directories:  # grows while it is read: breadth first
        try:
            fd = open_below(top, directory)
        except FileNotFoundError:
            continue
        try:
            directories += [f"{directory}/{name}" if directory else name for name in _unlink_files(fd)]
        finally:
            os.close(fd)
    for directory in reversed(directories[1:]):
        parent, _, name = directory.rpartition("/")
        try:
            fd = open_below(top, parent)
        except FileNotFoundError:
            continue
        try:
            os.rmdir(name, dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
        finally:
            os.close(fd)


def _unlink_files(fd: int) -> list[str]:
    """Unlink all but the directories in `fd`; returns the directories' names, each made enterable."""
    names: list[str] = []
    with os.scandir(fd) as entries:
        listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    if listed and not os.fstat(fd).st_mode & 0o200:
        os.fchmod(fd, 0o700)  # an ordinary user cannot empty the copy of a read-only directory otherwise
    for name, is_directory in listed:
        if is_directory:
            names.append(name)
        else:
            try:
                os.unlink(name, dir_fd=fd)
            except FileNotFoundError:
                continue
    return names
