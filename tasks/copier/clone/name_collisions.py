"""Names of one directory that the destination's filesystem does not distinguish, such as Disk.raw and disk.raw.

ext4 directories with casefold, SMB, NTFS, APFS and vfat ignore case. ZFS with normalization and APFS ignore the form of
composed characters. Without a check, the second entry would replace the first.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Sequence

from tasks.copier.errors import Code, ForkError


def name_taken(src_fd: int, dst_fd: int, name: str, path: str) -> ForkError:
    """The error for an entry `name` that exists in the directory `dst_fd` of the fork before it is created.

    The message names the other entry of the source directory `src_fd` that was created under this name. `path` is the
    path of the entry in the fork.
    """
    try:
        other = _other_name(src_fd, dst_fd, name)
    except OSError:
        other = None
    if other is not None:
        return _one_name(other, name, path)
    message = f"{name!r} exists already in the unfinished fork; stop the process that writes there and try again"
    return ForkError(Code.IO_ERROR, message, path, errno.EEXIST)


def entry_lost(src_fd: int, dst_fd: int, lost: Sequence[str], directory: str) -> ForkError:
    """The error for a directory of the fork in which created entries, `lost`, are missing. Raises OSError."""
    for name in lost:
        other = _other_name(src_fd, dst_fd, name)
        if other is not None:
            return _one_name(name, other, directory)
    message = f"{lost[0]!r} was removed from the unfinished fork; stop the process that writes there and try again"
    return ForkError(Code.IO_ERROR, message, directory, errno.ENOENT)


def _one_name(name: str, other: str, path: str) -> ForkError:
    message = (
        f"{name!r} and {other!r} are the same name on the destination's filesystem; "
        "rename one of them, leave one out with skip, or choose a filesystem that distinguishes them"
    )
    return ForkError(Code.IO_ERROR, message, path, errno.EEXIST)


def names_in(dir_fd: int) -> list[str]:
    """The names in an open directory, sorted. Raises OSError.

    It opens the directory again: processes that share a descriptor also share its read position.
    """
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)


def _other_name(src_fd: int, dst_fd: int, name: str) -> str | None:
    """Another name in the source that is the same entry of the fork, or None. Raises OSError.

    Hard links have the same inode too, so names that differ only in case or composition come first. Some FUSE
    filesystems give each spelling its own inode, so such a name is also returned if no name has the inode.
    """
    others = [other for other in names_in(src_fd) if other != name]
    alike = [other for other in others if _folded(other) == _folded(name)]
    for candidates in (alike, others):
        for other in candidates:
            if _is_one_entry(dst_fd, name, other):
                return other
    return alike[0] if alike else None


def _is_one_entry(dir_fd: int, name: str, other: str) -> bool:
    try:
        return os.path.samestat(*(os.stat(n, dir_fd=dir_fd, follow_symlinks=False) for n in (name, other)))
    except FileNotFoundError:
        return False


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
