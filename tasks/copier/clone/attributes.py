"""Copying extended attributes one by one, with the outcome that `cp -a` gives to each.

An attribute that the destination refuses is passed over, and the caller learns of it: one that only a privileged
process may set, that only another filesystem knows, that is too large there, or that does not fit the file (btrfs
refuses `btrfs.compression` in a NOCOW directory). A disk that fails or is full is an error.

Sources: xattr(7), setxattr(2), and attr_copy_fd(3) as GNU cp calls it.
"""

from __future__ import annotations

import errno
import os

from tasks.copier.clone.acl import ACCESS_ACL, ACLS

#: XFS shows root the same ACLs a second time, under the names it stores them by (attr's /etc/xattr.conf skips them).
XFS_ACLS = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")
#: A filesystem without any attributes, or without this kind.
NOT_KNOWN_HERE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
#: What is answered about the one attribute: not allowed, not valid here, too large.
REFUSED = NOT_KNOWN_HERE | {
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.E2BIG,
    errno.ERANGE,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENODATA,
}
#: Attributes of so few bytes in all fit on every filesystem: ENOSPC is not about their size.
_SMALL_BYTES = 512
#: A filesystem with less room than this, in bytes and inodes, is full.
_ROOM_BYTES, _ROOM_INODES = 1 << 20, 128

#: An open file, or a path for a symlink, which no descriptor reaches.
Target = int | str


class XattrError(OSError):
    """A system call on the extended attribute `attribute` failed."""

    def __init__(self, error: OSError, attribute: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.attribute = attribute


def names_of(source: Target, *, follow: bool) -> tuple[list[str], bool]:
    """The names of the extended attributes of `source`, and whether these are all.

    There may be more than the kernel lists (64 KiB of names); then the ACLs alone are named. Raises OSError.
    """
    try:
        return os.listxattr(source, follow_symlinks=follow), True
    except OSError as error:
        if error.errno in NOT_KNOWN_HERE:
            return [], True
        if error.errno in REFUSED:
            return list(ACLS), False
        raise


def access_acl(source: int) -> bytes | None:
    """The access ACL of an open file; None where it has none. Raises XattrError."""
    try:
        return os.getxattr(source, ACCESS_ACL)
    except OSError as error:
        if error.errno in NOT_KNOWN_HERE or error.errno == errno.ENODATA:
            return None
        raise XattrError(error, ACCESS_ACL) from None


def copy(source: Target, target: Target, name: str, *, follow: bool) -> bool:
    """Copy one attribute; False where the target does not hold it. Raises XattrError.

    True also for one that was removed since it was listed: whether the source has changed, its ctime tells.
    """
    try:
        value = os.getxattr(source, name, follow_symlinks=follow)
    except OSError as error:
        if error.errno in REFUSED:
            return error.errno == errno.ENODATA
        raise XattrError(error, name) from None
    try:
        os.setxattr(target, name, value, follow_symlinks=follow)
    except OSError as error:
        if error.errno in REFUSED or (error.errno == errno.ENOSPC and _is_too_large(target, name, value, follow)):
            return _has(target, name, value, follow)
        raise XattrError(error, name) from None
    return True


def drop_inherited_acls(fd: int) -> None:
    """Take the ACLs from a fresh directory that its parent's default ACL gave it, so that its entries get none."""
    names, _ = names_of(fd, follow=True)
    for name in names:
        if name in ACLS:
            os.removexattr(fd, name)


def _has(target: Target, name: str, value: bytes, follow: bool) -> bool:
    """Whether the target has the attribute although it may not be set: a label that a policy gives to all files."""
    try:
        return os.getxattr(target, name, follow_symlinks=follow) == value
    except OSError:
        return False


def _is_too_large(target: Target, name: str, value: bytes, follow: bool) -> bool:
    """Whether ENOSPC is about the size of the attributes (ext4, btrfs) and not about the filesystem's room.

    Raises OSError.
    """
    names = os.listxattr(target, follow_symlinks=follow)
    held = sum(len(one) + len(os.getxattr(target, one, follow_symlinks=follow)) for one in names)
    if held + len(name) + len(value) <= _SMALL_BYTES:
        return False
    status = os.statvfs(target if isinstance(target, int) else os.path.dirname(target))
    # Not f_bfree for root: ext4 counts blocks in it that it keeps for itself (statvfs(3)).
    has_inodes = status.f_files == 0 or status.f_favail >= _ROOM_INODES
    return has_inodes and status.f_bavail * status.f_frsize >= _ROOM_BYTES
