"""Copies extended attributes one by one, with the same result as `cp -a`.

An attribute that the destination refuses is left out, and the caller is informed: one that needs privileges, that only
another filesystem supports, that is too large, or that is invalid for the file (btrfs refuses `btrfs.compression` in a
NOCOW directory). A failing or full disk is an error.

Sources: xattr(7), setxattr(2), and attr_copy_fd(3) as GNU cp calls it.
"""

from __future__ import annotations

import errno
import os

from tasks.copier.clone.acl import ACCESS_ACL, ACLS

#: XFS shows the same ACLs to root again, under the names of its disk format (/etc/xattr.conf of attr skips them).
XFS_ACLS = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")
#: Errnos of a filesystem without attributes, or without attributes of this kind.
NOT_KNOWN_HERE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
#: Errnos that concern this one attribute: not permitted, not valid here, too large. EOVERFLOW: a file capability of
#: another user namespace, which cannot be read (capabilities(7), "Namespaced file capabilities").
REFUSED = NOT_KNOWN_HERE | {
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.E2BIG,
    errno.ERANGE,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENODATA,
    errno.EOVERFLOW,
}
#: Attributes of so few bytes together fit on every filesystem, so ENOSPC does not concern their size.
_SMALL_BYTES = 512
#: A filesystem with less free space, in bytes and inodes, is full.
_ROOM_BYTES, _ROOM_INODES = 1 << 20, 128

#: A descriptor, or a path for a symlink, which cannot be opened.
Target = int | str


class XattrError(OSError):
    """A system call on the extended attribute `attribute` failed."""

    def __init__(self, error: OSError, attribute: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.attribute = attribute


def names_of(source: Target, *, follow: bool) -> tuple[list[str], bool]:
    """The names of the extended attributes of `source`, and whether the list is complete.

    ACLs are last: the access ACL may take away the owner's right to write, which user.* attributes need. The kernel
    cannot list more than 64 KiB of names; then only the names of the ACLs are returned. Raises OSError.
    """
    try:
        return sorted(os.listxattr(source, follow_symlinks=follow), key=ACLS.__contains__), True
    except OSError as error:
        if error.errno in NOT_KNOWN_HERE:
            return [], True
        if error.errno in REFUSED:
            return list(ACLS), False
        raise


def access_acl(source: int) -> bytes | None:
    """The access ACL of an open file, or None. Raises XattrError."""
    try:
        return os.getxattr(source, ACCESS_ACL)
    except OSError as error:
        if error.errno in NOT_KNOWN_HERE or error.errno == errno.ENODATA:
            return None
        raise XattrError(error, ACCESS_ACL) from None


def copy(source: Target, target: Target, name: str, *, follow: bool) -> bool:
    """Copy one attribute. Returns False if the target cannot hold it. Raises XattrError.

    Returns True if the attribute was removed meanwhile: a changed source is found by its ctime.
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


def drop_inherited_acls(fd: int) -> bool:
    """Remove the ACLs that a new directory inherited from its parent, so that its entries do not inherit them.

    Returns whether there were any.
    """
    acls = [name for name in names_of(fd, follow=True)[0] if name in ACLS]
    for name in acls:
        os.removexattr(fd, name)
    return bool(acls)


def _has(target: Target, name: str, value: bytes, follow: bool) -> bool:
    """Whether the target has the attribute although setting it was refused, such as a label from a policy."""
    try:
        return os.getxattr(target, name, follow_symlinks=follow) == value
    except OSError:
        return False


def _is_too_large(target: Target, name: str, value: bytes, follow: bool) -> bool:
    """Whether ENOSPC means that the attributes are too large (ext4, btrfs), and not that the filesystem is full.

    Raises OSError.
    """
    names = os.listxattr(target, follow_symlinks=follow)
    held = sum(len(one) + len(os.getxattr(target, one, follow_symlinks=follow)) for one in names)
    if held + len(name) + len(value) <= _SMALL_BYTES:
        return False
    status = os.statvfs(target if isinstance(target, int) else os.path.dirname(target))
    # f_bavail also for root: f_bfree includes blocks that ext4 reserves for itself (statvfs(3)).
    has_inodes = status.f_files == 0 or status.f_favail >= _ROOM_INODES
    return has_inodes and status.f_bavail * status.f_frsize >= _ROOM_BYTES
